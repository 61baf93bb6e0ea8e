"""Indexers as other programs read them."""
