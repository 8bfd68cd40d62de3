"""Equilibrium Propagation as fast kernels: relaxation steps and contrastive weight updates as torch ops."""

from . import functional, reference
from .backends import BackendError, backend, release
from .config import RelaxConfig
from .contrasts import Nudged, contrast_gradients, contrasted_states, kolen_pollack
from .equilibrium import ConvergenceError, Equilibrium
from .holomorphic import holomorphic_gradients
from .network import Connection, Head, Network
from .nn import EquilibriumNet
from .parameters import Parameters
from .plan import Plan, compile_plan
from .solver import ep_gradients, free_phase, nudged_gradients, nudged_phase, readout, targets_for

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Connection",
    "ConvergenceError",
    "Equilibrium",
    "EquilibriumNet",
    "Head",
    "Network",
    "Nudged",
    "Parameters",
    "Plan",
    "RelaxConfig",
    "__version__",
    "backend",
    "compile_plan",
    "contrast_gradients",
    "contrasted_states",
    "ep_gradients",
    "free_phase",
    "functional",
    "holomorphic_gradients",
    "kolen_pollack",
    "nudged_gradients",
    "nudged_phase",
    "readout",
    "reference",
    "release",
    "targets_for",
]
