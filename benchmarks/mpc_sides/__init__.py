"""The sides that `benchmarks/mpc.py` measures: each module is what one process of a side runs."""
