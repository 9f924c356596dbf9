"""Run directories: what they hold, their lock, how a run starts in one, and the results that are read from it."""

from falcon_fast.models.exported import TrainedBackbone, load_weights
from falcon_fast.runs.results import Trained, evaluate, load_run, load_trained

__all__ = ["Trained", "TrainedBackbone", "evaluate", "load_run", "load_trained", "load_weights"]
