"""Passages from servers that speak `POST /retrieve`."""
