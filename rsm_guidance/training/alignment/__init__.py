"""Fine-tuning a generator by rewards."""
