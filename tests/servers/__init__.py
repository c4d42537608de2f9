"""Real servers for tests and benchmarks: each on 127.0.0.1 and free ports, its data in a temporary folder."""
