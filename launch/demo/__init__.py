"""The demo: digit-grid VQA from handwritten digits, with small models of true architectures."""
