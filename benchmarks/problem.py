"""What the questions are asked about: networks, precisions, batches, and how many operations each part needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Unavailable
from benchmarks.setting import Setting
from ep_kernels import Network, Parameters, RelaxConfig, _library, backends, targets_for
from ep_kernels.plan import Drive, Launch, Nudge, compile_plan
from ep_kernels.precision import Operands
from ep_train.models import build_network, initial_parameters

BACKENDS = ("reference", "cpu", "triton", "cuda")
GAIN = 0.02  # k of everything that is timed
CLASSES = 10
FLOAT16_LIMIT = 2e-2  # largest relative error of a baseline's states: all of its arithmetic is float16


@dataclass(frozen=True)
class Precision:
    """``rate`` names the matmul rate that it is compared with; ``error`` is the largest relative error of states and
    ``gradient_error`` of gradients, against float64, above which a result is wrong."""

    name: str
    operands: Operands
    storage: torch.dtype | None
    rate: str
    error: float
    gradient_error: float

    def config(self, **settings: object) -> RelaxConfig:
        return RelaxConfig(operands=self.operands, storage=self.storage, **settings)  # type: ignore[arg-type]


PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp16", torch.float16, torch.float16, "fp16", 1e-2, 0.15),
        Precision("fp16, fp32 states", torch.float16, None, "fp16", 1e-2, 0.15),
        Precision("bf16", torch.bfloat16, None, "bf16", 5e-2, 0.4),
        Precision("tf32", "tf32", None, "tf32", 1e-2, 0.15),
        Precision("fp32", None, None, "fp32", 1e-4, 0.05),
    )
}
COMPILED = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}  # of torch.compile; graphs are ours
# settings of a training batch: those of the CPU benchmark, and the defaults
BATCHES = {
    "T 2 + K 1, tangent": {"free_steps": 2, "nudged_steps": 1, "estimator": "tangent"},
    "T 4 + K 3, symmetric": {"free_steps": 4, "nudged_steps": 3, "estimator": "symmetric"},
}


def backends_of(setting: Setting, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Ours that can run on the device, or those that were asked for (Triton's interpreter only then)."""
    if setting.backends:
        return setting.backends
    device = torch.device(setting.device)
    names = ("triton", "cuda") if setting.cuda else ("cpu",)
    return tuple(name for name in names if backends.why_not(name, device, dtype) is None) or names[-1:]


def precisions(
    setting: Setting, *, cpu: Sequence[str] = ("fp32",), cuda: Sequence[str] = tuple(PRECISIONS)
) -> list[Precision]:
    """Of our operands: those that were asked for, else the question's; in a hurry fp32."""
    return [PRECISIONS[name] for name in setting.choose(setting.precisions, tuple(cpu), tuple(cuda), ("fp32",))]


def on_cpu() -> tuple[str, ...]:
    """Operands that this CPU has units for: without them a product in bfloat16 takes a hundred times as long."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = set()
    return ("fp32", "bf16") if flags & {"avx512_bf16", "amx_bf16"} else ("fp32",)


def wgmma_runs(setting: Setting) -> bool:
    """Whether the wgmma main loop of the backend cuda can be timed here: it is opt-in: a process of its own."""
    if not setting.cuda or not torch.cuda.is_available() or backends.why_not("cuda", "cuda") is not None:
        return False
    archs = _library.build_info().get("cuda_archs", ())
    return torch.cuda.get_device_capability() == (9, 0) and any(arch.startswith("9.0a") for arch in archs)


def label(backend: str, setting: Setting) -> str:
    """Name of a backend in rows."""
    return f"{backend}-wgmma" if setting.wgmma and backend == "cuda" else backend


def require_backend(name: str, setting: Setting, dtype: torch.dtype = torch.float32) -> None:
    """Raise Unavailable unless the backend can run here."""
    reason = backends.why_not(name, torch.device(setting.device), dtype)
    if reason is not None:
        raise Unavailable(f"backend {name}: {reason}")


@dataclass(frozen=True, eq=False)
class Problem:
    """A network with random parameters, a random batch and its targets, float32. Hashed by identity, for caches."""

    network: Network
    parameters: Parameters
    x: Tensor
    labels: Tensor
    targets: list[Tensor]

    def double(self) -> Problem:
        """The same numbers in float64."""
        named = {name: t.double() for name, t in self.parameters.named().items()}
        parameters = Parameters.from_named(self.network, named)
        return Problem(self.network, parameters, self.x.double(), self.labels, [t.double() for t in self.targets])


def network_of(model: str, size: int = 32, gain: float = GAIN, **settings: Any) -> Network:
    """A named network (``ep_train.models``) or widths, on images of 3 x size x size; ``NAME/2`` has half its widths."""
    name, _, divisor = model.partition("/")
    width = 1 / float(divisor) if divisor else 1.0
    return build_network(name, (3, size, size), CLASSES, width=width, feedback_gain=gain, **settings)


@lru_cache(maxsize=2)
def problem_of(network: Network, batch: int, device: str, seed: int = 0) -> Problem:
    """Parameters as a training starts with; images are uniform noise, never zeros."""
    named = initial_parameters(network, seed=seed)
    named = {
        name: (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t).to(device)
        for name, t in named.items()
    }
    generator = torch.Generator().manual_seed(1_000 + seed)
    x = torch.rand(batch, *network.shapes[0], generator=generator).to(device, memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (batch,), generator=generator).to(device)
    targets = targets_for(network, labels, CLASSES, torch.float32)
    return Problem(network, Parameters.from_named(network, named), x, labels, targets)


def size_of(setting: Setting) -> int:
    """Side of the images."""
    return 8 if setting.quick else 32


def problem_at(setting: Setting, model: str, batch: int) -> Problem:
    """Of a network's name, on the setting's images and device."""
    return problem_of(network_of(model, size_of(setting)), batch, setting.device)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether cuDNN and cuBLAS round float32 operands to tf32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def relative_error(out: Tensor, expected: Tensor) -> float:
    """``|out - expected| / |expected|``, in float64; 0 where both are zero."""
    reference = expected.detach().double()
    difference = float((out.detach().double() - reference).norm())
    return difference / max(float(reference.norm()), 1e-300) if difference else 0.0


def largest_error(out: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """Over tensors, of :func:`relative_error`; NaN wins."""
    pairs = [(a, b) for a, b in zip(out, expected, strict=True) if a is not None and b is not None]
    errors = [relative_error(a, b) for a, b in pairs]
    return next((e for e in errors if e != e), max(errors))


# --- operations: a multiply-add is two; pooled feedback counts as the dense product that it is ------------------------


def connection_flops(network: Network, c: int, batch: int) -> int:
    """Of one drive or one feedback."""
    conn = network.connections[c]
    shape = conn.weight_shape(network.shapes[conn.src], network.shapes[conn.dst])
    positions = 1
    if conn.kernel_size is not None:
        height, width = conn.map_size(*network.shapes[conn.src][1:])
        positions = height * width
    total = 2 * batch * positions
    for n in shape:
        total *= n
    return total


def layer_flops(network: Network, node: int, batch: int) -> int:
    """Of one update in a steady free sweep: drives but the clamped input's, and feedbacks."""
    drives = [c for c in network.into[node] if network.connections[c].src != 0]
    return sum(connection_flops(network, c, batch) for c in (*drives, *network.out_of[node]))


def sweep_flops(network: Network, batch: int) -> int:
    """Of a steady free sweep."""
    return sum(layer_flops(network, i, batch) for i in range(1, len(network.shapes)))


def _launch_flops(network: Network, launch: Launch, batch: int) -> int:
    if isinstance(launch, Nudge):
        return 0
    connections = (launch.connection,) if isinstance(launch, Drive) else (*launch.below, *launch.above)
    return sum(connection_flops(network, c, batch) for c in connections)


def free_flops(network: Network, config: RelaxConfig, batch: int) -> int:
    """Of a free phase from zero."""
    plan = compile_plan(network, config.schedule, "free", steps=config.free_steps)
    launches = [*plan.prologue, *(launch for t in range(config.free_steps) for launch in plan.sweep(t))]
    return sum(_launch_flops(network, launch, batch) for launch in launches)


def batch_flops(network: Network, config: RelaxConfig, batch: int) -> int:
    """Of ``ep_gradients``: both phases, and two products a connection for the contrast (one from the clamped input)."""
    plan = compile_plan(
        network,
        config.schedule,
        "nudged",
        form=config.nudge_form,
        winners=config.winners,
        linear_nudge=config.linear_nudge,
        warm=False,
        steps=config.nudged_steps,
    )
    phases = 2 if config.estimator == "symmetric" else 1
    launches = [*plan.prologue, *(launch for t in range(config.nudged_steps) for launch in plan.sweep(t))]
    nudged = sum(_launch_flops(network, launch, phases * batch) for launch in launches)
    contrast = sum(
        (2 if conn.src else 1) * connection_flops(network, c, batch) for c, conn in enumerate(network.connections)
    )
    return free_flops(network, config, batch) + nudged + contrast
