"""The engine kit: Level 1, resident sets, paged keys, Level 2. Imports no Hugging Face.

A serving engine calls `level1.open_level1`, `residency.Residency` and, where its model is a DeepSeek-V4, `level2` or
the kernels of the same names; the runtime around a Hugging Face model shares Level 1 and the pools.
"""
