"""Everything that is known about a run, and the views of it. Never imports torch."""
