"""Pictures of predictions and curves of runs."""
