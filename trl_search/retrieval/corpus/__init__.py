"""Corpora: passages read from files and datasets, and on disk with access by row."""
