"""Training: the compiled step, the trainer around it, metrics and reports."""
