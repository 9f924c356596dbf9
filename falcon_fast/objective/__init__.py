"""The method: dictionaries of codes, the projector, the temperature, the loss. Of the package it imports only the kernels."""

from falcon_fast.objective.codes import HadamardCodes, RademacherCodes
from falcon_fast.objective.loss import FalconLoss, FalconLossOutput, falcon_loss
from falcon_fast.objective.projector import FalconProjector
from falcon_fast.objective.temperature import temperature

__all__ = [
    "FalconLoss",
    "FalconLossOutput",
    "FalconProjector",
    "HadamardCodes",
    "RademacherCodes",
    "falcon_loss",
    "temperature",
]
