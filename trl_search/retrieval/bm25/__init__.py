"""BM25: lexical search over an index of terms."""
