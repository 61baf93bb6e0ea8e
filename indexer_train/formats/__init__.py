"""What an indexer is exported to and imported from: bundles, the release's checkpoints, native weights."""
