"""What a run writes down and shows: metrics.csv, TensorBoard's events, the progress line."""
