"""The grid behind `benchmarks/claims.py`: cells, how one is run and measured, what follows from their figures."""
