"""`python -m qtool` is `qtool`."""

from qtool.cli import main

main()
