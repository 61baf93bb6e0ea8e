"""Lookahead sparse attention around a Hugging Face model.

Its door is `runtime.LSARuntime`; whoever drives a host by another rule takes `cycle.DecodeCycle`, the same step.
"""
