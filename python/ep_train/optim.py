"""The optimizer of a run and how its learning rate falls."""

from __future__ import annotations

import math

import torch

from .config import TrainConfig
from .learners import Learner


def make_optimizer(learner: Learner, config: TrainConfig) -> torch.optim.Optimizer:
    """torch's optimizer, one parameter group per tensor, with the layer's factor of the learning rate."""
    layers = learner.layers  # nodes, then the readout
    factors = config.layer_lr or (1.0,) * layers
    if len(factors) != layers:
        raise ValueError(
            f"TrainConfig: argument 'layer_lr': expected {layers} factors (bottom to top, then a readout that has "
            f"weights), got {len(factors)}"
        )
    groups = [
        {"params": [p], "lr": config.lr * factors[learner.layer_of(name) - 1]}
        for name, p in learner.model.named_parameters()
        if p.requires_grad
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Factor of the learning rate at each of ``steps`` steps, from 1 to ``lr_min / lr``."""
    end = config.lr_min / config.lr
    falls = {
        "constant": lambda t: 1.0,
        "linear": lambda t: 1.0 - (1.0 - end) * t / steps,
        "cosine": lambda t: end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * t / steps)),
    }
    return torch.optim.lr_scheduler.LambdaLR(optimizer, falls[config.lr_schedule])
