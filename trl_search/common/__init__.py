"""What every other folder may use: errors for users, files that are written whole, credentials, provenance."""
