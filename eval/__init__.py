"""Does an indexer keep what the backbone needs? Recall against oracles, baselines, decoding."""
