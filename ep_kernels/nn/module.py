"""``EquilibriumNet``: a network that settles, as an ordinary ``torch.nn.Module``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .. import backends, reference
from ..config import RelaxConfig
from ..equilibrium import Equilibrium
from ..network import Network
from ..solver import ep_gradients, readout, targets_for
from .equilibrium_op import equilibrium
from .holder import ParameterHolder, initial_parameters, laid_out_as
from .phases import key_of


class TrainStep(NamedTuple):
    """Of one batch, at the free equilibrium: the mean of the network's own loss, and the readout's outputs."""

    loss: Tensor
    outputs: Tensor


class EquilibriumNet(ParameterHolder):
    """A network trained by Equilibrium Propagation inside any PyTorch program.

    ``net(x)`` runs the free phase and returns the readout's outputs. ``backward()`` of any loss on them runs the nudged
    phases and leaves EP gradients in ``.grad``, or hands them on to the modules that made x. Guide: docs/dropin.md.

    The readout of a softmax network is an ordinary linear map, which autograd differentiates at the free equilibrium;
    dL/ds^N, held constant, nudges the states (:mod:`ep_kernels.nn.phases` has the equations). The loss of the
    network's heads enters :meth:`train_step` only.

    Args:
        network: nodes, connections and heads; with a readout of ``Head(node, None, "mse")`` the outputs are the states
            of that node.
        config: of the phases; default ``RelaxConfig()``. With ``estimator="tangent"`` backward is linear in the loss,
            as backpropagation is, and one nudged phase instead of two.
        weight_gain: of :func:`initial_parameters`.
        seed: of the initial weights; None draws one from torch's global generator (``torch.manual_seed``).
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument that does not fit, with what was expected.
    """

    def __init__(
        self,
        network: Network,
        config: RelaxConfig | None = None,
        *,
        weight_gain: float | Sequence[float] = 1.0,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(network, Network):
            raise ValueError(f"EquilibriumNet: argument 'network': expected a Network, got {type(network).__name__}")
        if seed is None:
            seed = int(torch.randint(2**31, (), device="cpu"))
        dtype = torch.get_default_dtype() if dtype is None else dtype
        drawn = initial_parameters(network, weight_gain=weight_gain, seed=seed, dtype=dtype)
        super().__init__(network, {name: t.to(device) for name, t in drawn.items()})
        self.config = config if config is not None else RelaxConfig()

    @property
    def config(self) -> RelaxConfig:
        """How the phases are solved; may be set between batches."""
        return self._config

    @config.setter
    def config(self, config: RelaxConfig) -> None:
        if not isinstance(config, RelaxConfig):
            raise ValueError(f"EquilibriumNet: argument 'config': expected a RelaxConfig, got {type(config).__name__}")
        self._config = config
        self._residuals: Tensor | None = None
        self._key = key_of(self.network, config)

    def forward(self, x: Tensor, *, heads: bool = False) -> Any:
        """Outputs of the readout at the free equilibrium, [B, outputs] (logits, or the states of ``mse``).

        Args:
            x: [B, C, H, W] or [B, F], in the parameters' dtype (under autocast in any floating-point one).
            heads: return a tuple with the outputs of every head, readout first: losses on those of local heads nudge
                their nodes directly.

        Raises:
            ValueError: x does not fit.
            RuntimeError: vmap or forward-mode differentiation; from backward(), a second derivative.
        """
        spec = self.network.heads if heads else self.network.heads[:1]
        states = self._settle(x, sorted({head.node for head in spec}))
        outputs = []
        for h, head in enumerate(spec):
            own = h if head.tied is None else head.tied
            holder = None if head.outputs is None else getattr(self.heads, str(own))
            map_ = (None, None) if holder is None else (holder.weight, holder.bias)
            outputs.append(reference.head_output(head, states[head.node], *map_))
        return tuple(outputs) if heads else outputs[0]

    def states(self, x: Tensor) -> tuple[Tensor, ...]:
        """States of every node at the free equilibrium, differentiable; the first one is ``x``."""
        nodes = list(range(1, len(self.network.shapes)))
        found = self._settle(x, nodes)
        return (x, *(found[i] for i in nodes))

    def train_step(self, x: Tensor, y: Tensor | Sequence[Tensor]) -> TrainStep:
        """EP gradients of the network's own loss, with the nudge evaluated at every update: free phase, nudged phases
        and contrast in one call, without autograd. Gradients are added to ``.grad``, as ``backward()`` does.

        It sees the parameters themselves: no DistributedDataParallel around the net hears of these gradients.

        Args:
            y: labels [B] (integers; of every head), targets [B, outputs] of the readout (for a network without local
                heads), or one target for each head, readout first.

        Raises:
            ValueError: x or y does not fit.
        """
        weight = self._check(x)
        x, tensors = x.detach(), self.tensors()
        if x.dtype != weight.dtype:
            x = x.to(weight.dtype)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            targets = self._targets(y, x)
            found, free = ep_gradients(self.network, tensors, x, targets, self.config)
            outputs = readout(self.network, tensors, free)
            loss = outputs.new_zeros(())
            for h, head in enumerate(self.network.heads):
                loss = loss + reference.head_loss(head, readout(self.network, tensors, free, h), targets[h]).mean()
            named = found.named()
            for name, parameter in self.named_parameters():
                if not parameter.requires_grad:
                    continue
                if parameter.grad is None:
                    parameter.grad = laid_out_as(parameter, named[name])
                else:
                    parameter.grad += named[name]
        self._residuals = free.residuals
        return TrainStep(loss, outputs)

    @property
    def last(self) -> Equilibrium | None:
        """What is known of the last free phase: ``residual``, ``steps``, ``converged``, ``message`` of an
        :class:`ep_kernels.Equilibrium`, without its states. None before the first, and in copies."""
        if self._residuals is None:
            return None
        return Equilibrium([], [], {}, {}, self._residuals, self.network, self._config)

    @property
    def residual(self) -> Tensor | None:
        """Of the last free phase: the residual of every sample, [B] (docs/concepts.md). None before the first."""
        return None if self.last is None else self.last.residual

    def extra_repr(self) -> str:
        """Shapes of the nodes, the feedback gain and the settings."""
        shapes = " -> ".join("x".join(map(str, shape)) for shape in self.network.shapes)
        return f"{shapes}, feedback_gain={self.network.feedback_gain:g}, config={self._config}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_residuals": None}  # what a batch left is no part of a copy or a file

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._key = key_of(self.network, self._config)  # the file may be of another version

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "EquilibriumNet: nn.DataParallel is not supported: it copies the net to threads of one process at every "
            "batch, where what the copies keep is lost and relaxations wait for each other. Use "
            "torch.nn.parallel.DistributedDataParallel, one process for each GPU"
        )

    def _settle(self, x: Tensor, nodes: list[int]) -> dict[int, Tensor]:
        """States of some nodes at the free equilibrium."""
        weight = self._check(x)
        if x.dtype != weight.dtype:
            x = x.to(weight.dtype)
        keep = torch.is_grad_enabled()
        if keep and self._config.clamps:
            raise ValueError(
                f"EquilibriumNet: argument 'config': expected an estimator that nudges, got "
                f"'{self._config.estimator}', which clamps the output units at a target, and a loss on the outputs "
                "gives none: use train_step, or no_grad for predictions"
            )
        net, holders = self.network, self._modules
        connections: Any = holders["connections"]
        biases: Any = holders["nodes"]
        count = range(len(net.connections))
        of = [getattr(connections, str(c)) for c in count]
        states, residuals = equilibrium(
            x,
            [holder.weight for holder in of],
            [holder.feedback for c, holder in zip(count, of, strict=True) if net.has_feedback_weight(c)],
            [getattr(biases, str(i)).bias for i in range(1, len(net.shapes))],
            self._key,
            _backend(),
            nodes,
            keep,
        )
        self._residuals = residuals.detach()
        return dict(zip(nodes, states, strict=True))

    def _check(self, x: Tensor) -> Tensor:
        """Refuses what cannot run; returns a parameter, whose dtype and device x must have."""
        weight = self.get_submodule("connections.0").weight
        assert isinstance(weight, Tensor)
        shape = self.network.shapes[0]
        if not isinstance(x, Tensor):
            raise ValueError(f"EquilibriumNet: argument 'x': expected a tensor, got {type(x).__name__}")
        if tuple(x.shape[1:]) != shape or x.dim() < 2:
            expected = ", ".join(map(str, shape))
            raise ValueError(f"EquilibriumNet: argument 'x': expected shape [B, {expected}], got {list(x.shape)}")
        fits = x.device == weight.device
        if fits and x.dtype != weight.dtype:
            fits = x.dtype.is_floating_point and torch.is_autocast_enabled(x.device.type)
        if not fits:
            raise ValueError(
                f"EquilibriumNet: argument 'x': expected {weight.dtype} on {weight.device} (as the parameters), "
                f"got {x.dtype} on {x.device}"
            )
        return weight

    def _targets(self, y: Tensor | Sequence[Tensor], x: Tensor) -> list[Tensor]:
        net = self.network
        outputs = net.readout.output_shape(net.shapes[net.readout.node])
        if not isinstance(y, Tensor):
            return list(y)
        if y.dtype.is_floating_point:
            if len(net.heads) > 1:
                raise ValueError(
                    f"EquilibriumNet.train_step: argument 'y': expected labels [B] or a list of {len(net.heads)} "
                    f"targets, one for each head, got one tensor of {y.dtype}"
                )
            return [y.to(x.dtype)]
        if tuple(y.shape) != (x.shape[0],) or y.dtype == torch.bool or y.is_complex() or len(outputs) != 1:
            raise ValueError(
                f"EquilibriumNet.train_step: argument 'y': expected labels [{x.shape[0]}] (integers) or targets "
                f"{[x.shape[0], *outputs]}, got {y.dtype} {list(y.shape)}"
            )
        return targets_for(net, y.long(), outputs[0], x.dtype)


def _backend() -> str:
    """Name of the backend in force, for all phases: backward may run in a thread that sees no ``with backend``."""
    return backends.requested()


# torch.compile takes its result as a constant (see _where in functional.py).
_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]
