"""A run directory: what is in it, its lock, and the results that are read from it."""

from falcon_fast.runs.results import Trained, evaluate, load_trained

__all__ = ["Trained", "evaluate", "load_trained"]
