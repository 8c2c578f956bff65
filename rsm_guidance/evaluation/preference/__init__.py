"""How well rewards agree with what people prefer: figures, plots, and scoring of preference data."""
