"""Kill ingest again and again while a topic fills, then prove that each committed message landed exactly once."""
