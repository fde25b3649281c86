"""Benchmarks: interleaved, median of several rounds, versions and settings printed. Nothing here asserts a timing."""
