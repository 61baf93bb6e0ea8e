"""Triton kernels of the decode runtime. Import their modules only where triton is installed: torch is the reference."""
