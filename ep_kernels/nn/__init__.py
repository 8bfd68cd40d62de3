"""Equilibrium Propagation as ordinary PyTorch modules: ``EquilibriumNet``, and ``convert`` for networks that exist."""

from .convert import convert
from .holder import ParameterHolder, initial_parameters
from .module import EquilibriumNet, TrainStep

__all__ = ["EquilibriumNet", "ParameterHolder", "TrainStep", "convert", "initial_parameters"]
