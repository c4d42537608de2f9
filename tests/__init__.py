"""The tests; a package so that benchmarks can start the same real servers."""
