"""Hardware-bound licensing for machine-learning models."""
