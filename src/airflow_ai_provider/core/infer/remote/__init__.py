"""Models behind a server: the wire formats, and an Engine over them."""
