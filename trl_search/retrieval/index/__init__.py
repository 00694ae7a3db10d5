"""Index folders: built under a temporary name, finished by a manifest, checked when opened."""
