"""A thin trainer on ep_kernels: models, data, EP and BPTT steps, a command line."""

try:
    import numpy as _numpy  # noqa: F401  (every module below needs what the extra brings)
except ImportError as error:
    raise ImportError(f"ep_train needs its extra: pip install 'ep-kernels[train]' ({error})") from error

from ep_kernels.architectures import ARCHITECTURES

from .config import TrainConfig
from .models import Model, build_network
from .runs import resume, train
from .step import bptt_step, ep_step, predict
from .trainer import Trainer

__all__ = [
    "ARCHITECTURES",
    "Model",
    "TrainConfig",
    "Trainer",
    "bptt_step",
    "build_network",
    "ep_step",
    "predict",
    "resume",
    "train",
]
