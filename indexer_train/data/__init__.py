"""What a training step reads: windows, candidates, negatives, mixtures of stores."""
