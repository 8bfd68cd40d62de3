"""A run of several processes, on one machine or many: data-parallel training started by torchrun."""

from .agreement import Agreement
from .gradients import GradientMean
from .processes import FirstFailed, LostContact, ProcessError, Processes, from_environment, joined, own_device, voice
from .step import shared_step
from .weights import check_alike, spread

__all__ = [
    "Agreement",
    "FirstFailed",
    "GradientMean",
    "LostContact",
    "ProcessError",
    "Processes",
    "check_alike",
    "from_environment",
    "joined",
    "own_device",
    "shared_step",
    "spread",
    "voice",
]
