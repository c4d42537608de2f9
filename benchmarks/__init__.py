"""Benchmarks: ratios against a limit measured in the same run, beside what users do today."""
