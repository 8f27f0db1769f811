"""Reading and writing checkpoints as streams of tensors, never as whole models."""
