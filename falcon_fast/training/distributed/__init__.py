"""Several processes: their start and end, the strategies that share the work, and signals that all agree on."""
