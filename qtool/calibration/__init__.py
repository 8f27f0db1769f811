"""Text in, token rows and statistics of the inputs of linear layers out."""
