"""Token losses -> perplexity with its error, paired deltas, KL divergence, gates."""
