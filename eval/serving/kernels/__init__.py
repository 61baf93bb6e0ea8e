"""Triton kernels of the engine kit: level1 and limits behind `level1_triton`, gather behind `pools`, Level 2's."""
