"""Several processes: their start and end, the strategies that share the work, and stopping together."""
