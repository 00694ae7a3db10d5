"""Code that all other folders share: errors for users, atomic file writes, credentials, provenance."""
