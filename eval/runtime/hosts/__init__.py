"""What keeps the resident set of one family of models."""
