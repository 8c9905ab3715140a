"""What tests and benchmarks share: op cases and tolerances.  Never imported by the core."""
