"""Retrievers made of other retrievers: fusion and reranking."""
