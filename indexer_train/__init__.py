"""Attention traces in, a memory indexer out; the backbone is never loaded here."""
