"""Will this distillation work? Questions to a run's models and data before it starts."""
