"""Dense retrieval: encoders, vectors of a corpus, and the indexes that search them."""
