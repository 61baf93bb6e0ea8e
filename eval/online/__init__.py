"""One harness that decodes with the backbone under every policy: sessions, examples, scorers, summaries."""
