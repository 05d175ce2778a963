"""What benchmarks/build.py measures."""
