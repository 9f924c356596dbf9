"""The loss in Triton: one file for each phase, `loss.py` for their order."""
