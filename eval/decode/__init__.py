"""Decoding with lookahead sparse attention: a real model, only the resident chunks in its attention."""
