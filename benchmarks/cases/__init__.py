"""One module per case; its file name is the case's name."""
