"""The benchmark suite: `python -m benchmarks`, from a checkout."""
