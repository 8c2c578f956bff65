"""Experiments on fine-tuning by rewards: `python -m benchmarks.alignment.NAME --help`."""
