"""Passages from the live web."""
