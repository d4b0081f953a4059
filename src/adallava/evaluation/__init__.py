"""How well a model answers: benchmarks and sweeps over budgets."""
