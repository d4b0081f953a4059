"""Training on transformers' Trainer: base models, adaptive models, and what both share."""
