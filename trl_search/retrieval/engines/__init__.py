"""Adapters for search engines that run elsewhere: Qdrant and OpenSearch."""
