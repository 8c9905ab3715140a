"""Benchmarks, results and the tables made from them."""
