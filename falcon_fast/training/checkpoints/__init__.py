"""Checkpoints: what a run needs to continue, saved while training goes on."""
