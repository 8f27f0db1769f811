"""qtool: a command-line toolkit that makes language models smaller and says what it cost."""

__version__ = "0.1.0"
