"""Measurements: `python -m bench.NAME`. What was measured lies in results/."""
