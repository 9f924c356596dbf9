"""Training: the step, the loop over steps, and the parts of a run."""
