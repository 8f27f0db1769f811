"""Training: the loop, its checkpoints and processes; whole models, objectives and teachers."""
