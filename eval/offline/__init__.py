"""Recall and related measures on held-out traces; no backbone."""
