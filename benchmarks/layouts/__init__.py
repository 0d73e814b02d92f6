"""The layouts that `benchmarks/store.py` compares, one module per kind."""
