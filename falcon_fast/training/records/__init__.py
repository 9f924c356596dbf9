"""The records of a run: metrics.csv, TensorBoard's events, and the progress display."""
