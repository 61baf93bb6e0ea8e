"""Lookahead sparse attention around a Hugging Face model.

Its door is `runtime.LSARuntime`. Whoever drives a host by another rule takes `cycle.DecodeCycle`, the same step, and
the family's host of `hosts`.
"""
