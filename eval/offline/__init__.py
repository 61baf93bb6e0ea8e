"""Recall and its kin on held-out traces; no backbone."""
