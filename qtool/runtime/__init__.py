"""Running what was packed: rounding of inputs, keys and values."""
