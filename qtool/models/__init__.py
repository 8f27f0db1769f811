"""What is particular to an architecture, and running a model block by block."""
