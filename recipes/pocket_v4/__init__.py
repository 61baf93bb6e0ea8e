"""A pocket DeepSeek-V4: a few million parameters of the stock transformers class with a trained lightning indexer."""
