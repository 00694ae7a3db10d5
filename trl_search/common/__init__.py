"""Shared by all other folders: errors for users, files that are written whole, credentials, provenance."""
