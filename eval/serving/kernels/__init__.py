"""Triton kernels of the engine kit."""
