"""Lookahead sparse attention around a Hugging Face model."""
