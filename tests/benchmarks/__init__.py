"""What users wait for, timed: `python -m tests.benchmarks.run`, or `make bench`."""
