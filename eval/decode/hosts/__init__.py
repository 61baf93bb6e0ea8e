"""The models that decode under lookahead sparse attention: one host a family."""
