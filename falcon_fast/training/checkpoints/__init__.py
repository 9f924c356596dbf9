"""Checkpoints: what a run needs to continue, written while training continues, and restored."""
