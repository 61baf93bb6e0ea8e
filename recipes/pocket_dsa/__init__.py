"""A pocket DeepSeek-V3.2: a few million parameters of the stock transformers class (MLA, lightning indexers: DSA)."""
