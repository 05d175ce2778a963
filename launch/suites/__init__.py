"""Published benchmarks: hands a student to lmms-eval in an environment of its own and keeps what it finds."""
