"""What a run costs, computed from shapes before it starts; and complete configurations for a GPU.

:func:`estimate` counts convolutions, multiply-adds and bytes from the compiled plan and the geometry. Only the time is
an assumption: operations over a rate that is an argument. No device has confirmed any time that this module prints.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ep_kernels import Network, Parameters, RelaxConfig
from ep_kernels.network import Head, Shape
from ep_kernels.plan import Drive, Launch, Nudge, Plan, Step, compile_plan

from .config import TrainConfig
from .learners import network_of

# Stated peaks of dense float16 tensor-core products with float32 sums, in operations (two a multiply-add) a second:
# the vendor's data sheets.
PEAKS = {"A100": 312e12, "H100": 989e12, "RTX 4090": 165e12}
# ASSUMED, not measured: the part of a stated peak that a training batch reaches.
ASSUMED_EFFICIENCY = 0.4
WORKSPACE = "a convolution's map before pooling"
_OPTIMIZER_COPIES = {"adam": 2, "adamw": 2, "sgd": 1}


@dataclass(frozen=True)
class Estimate:
    """Cost of EP on one network, computed, not measured.

    Attributes:
        parameters: trained numbers, those of heads and feedback weights too.
        convolutions: of a training batch, as :meth:`ep_kernels.plan.Plan.convolutions` counts them, of ``batch``
            samples each; a nudged phase of both signs counts twice. Without the contrast's products and the heads'.
        products: weight-gradient products of the contrast.
        multiply_adds: of one training image.
        evaluation_multiply_adds: of one test image (the free phase and the readout).
        memory: bytes by what they hold, at the largest moment of a batch of ``batch``. What kernels take for
            themselves (packed weights, a library's workspace) is not in it.
    """

    parameters: int
    convolutions: int
    products: int
    multiply_adds: int
    evaluation_multiply_adds: int
    batch: int
    memory: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """The sum of ``memory``."""
        return sum(self.memory.values())

    def seconds(self, images: int, rate: float, *, test_images: int = 0) -> float:
        """Time to train on ``images`` and to evaluate ``test_images`` at an ASSUMED rate of operations a second."""
        work = images * self.multiply_adds + test_images * self.evaluation_multiply_adds
        return 2 * work / rate


def multiply_adds(network: Network, c: int) -> int:
    """Of the convolution (or matrix product) of connection c for one sample; its feedback has as many."""
    conn = network.connections[c]
    src, dst = network.shapes[conn.src], network.shapes[conn.dst]
    weight = math.prod(conn.weight_shape(src, dst))
    return weight if conn.kernel_size is None else weight * math.prod(conn.map_size(*src[1:]))


def estimate(
    network: Network,
    config: RelaxConfig,
    batch: int,
    *,
    optimizer: str = "adam",
    teacher_multiply_adds: int = 0,
    teacher_bytes: int = 0,
) -> Estimate:
    """Count what a training batch of EP computes and holds.

    Args:
        config: how it is relaxed; ``tol`` is not foreseen, all sweeps are counted.
        optimizer: ``adam``, ``adamw`` or ``sgd`` (with momentum).
        teacher_multiply_adds, teacher_bytes: of one image's forward pass, and of its weights.

    Raises:
        ValueError: an unknown optimizer.
    """
    if optimizer not in _OPTIMIZER_COPIES:
        names = ", ".join(_OPTIMIZER_COPIES)
        raise ValueError(f"estimate: argument 'optimizer': expected one of {names}, got {optimizer!r}")
    free = compile_plan(network, config.schedule, "free", steps=config.free_steps)
    nudged = _nudged_plan(network, config, free)
    phases = config.phases
    times = phases * (2 if config.estimator == "five_phase" else 1)
    first = _convolutions(free, config.free_steps, refresh=True)
    second = _convolutions(nudged, config.nudged_steps, refresh=config.winners == "live")
    products = {c: _products(network, c) * times // phases for c in range(len(network.connections))}
    heads = _head_work(network, nudged, config, phases) * (times // phases)
    readout = _head_products(network, network.readout)
    count = sum(first.values()) + times * sum(second.values())
    work = (
        _weighted(network, first)
        + times * _weighted(network, second)
        + _weighted(network, products)
        + heads
        + readout
        + teacher_multiply_adds
    )
    inference = _convolutions(free, config.free_steps, refresh=False)
    return Estimate(
        parameters=_numel(Parameters.shapes(network).values()),
        convolutions=count,
        products=sum(products.values()),
        multiply_adds=work,
        evaluation_multiply_adds=_weighted(network, inference) + readout,
        batch=batch,
        memory=_memory(network, config, batch, phases, free, nudged, optimizer, teacher_bytes),
    )


def _nudged_plan(network: Network, config: RelaxConfig, free: Plan) -> Plan:
    """The plan that :func:`ep_kernels.nudged_phase` compiles."""
    states = config.nudge_form == "states"
    kept: set[int] = set()
    if states:
        launched = set(_launched(free, config.free_steps)) | {launch.connection for launch in free.refresh}
        kept = {c for c in launched if config.keeps_drive(network.connections[c])}
    return compile_plan(
        network,
        config.schedule,
        "nudged",
        form=config.nudge_form,
        winners=config.winners,
        linear_nudge=config.linear_nudge,
        warm=states,
        kept=frozenset(kept),
        clamped=config.clamped_nodes(network),
        steps=config.nudged_steps,
    )


def _convolutions(plan: Plan, steps: int, *, refresh: bool) -> Counter[int]:
    """By connection, how often it is convolved, up or down."""
    found: Counter[int] = Counter()
    for launch in [*_launches(plan, steps), *(plan.refresh if refresh else ())]:
        if isinstance(launch, Drive):
            found[launch.connection] += 1
        elif isinstance(launch, Step):
            found.update((*launch.below, *launch.above))
    return found


def _launched(plan: Plan, steps: int) -> set[int]:
    """Connections whose drive is computed and kept."""
    return {launch.connection for launch in _launches(plan, steps) if isinstance(launch, Drive)}


def _launches(plan: Plan, steps: int) -> list[Launch]:
    return [*plan.prologue, *(launch for t in range(steps) for launch in plan.sweep(t))]


def _products(network: Network, c: int) -> int:
    """Of the contrast: a difference and a mean at each end; the clamped input has no difference."""
    return 1 if network.connections[c].src == 0 else 2


def _weighted(network: Network, counts: Mapping[int, int]) -> int:
    return sum(times * multiply_adds(network, c) for c, times in counts.items())


def _head_products(network: Network, head: Head) -> int:
    """Multiply-adds of one head's output for one sample."""
    shape = network.shapes[head.node]
    weight = head.weight_shape(shape)
    if weight is None:
        return 0
    return math.prod(weight) * (math.prod(head.output_shape(shape)[1:]) if head.pointwise else 1)


def _head_work(network: Network, nudged: Plan, config: RelaxConfig, phases: int) -> int:
    """Nudges (an output and its way back), and the gradients of the heads' weights at the contrasted states."""
    launches = _launches(nudged, config.nudged_steps)
    nudges = Counter(launch.node for launch in launches if isinstance(launch, Nudge))
    contrasted = 1 if config.nudge_form == "tangent" else 2
    return sum(
        _head_products(network, head) * (2 * phases * nudges[head.node] + 2 * contrasted) for head in network.heads
    )


def _memory(
    network: Network,
    config: RelaxConfig,
    batch: int,
    phases: int,
    free: Plan,
    nudged: Plan,
    optimizer: str,
    teacher_bytes: int,
) -> dict[str, int]:
    numbers = 4  # bytes: parameters and what is computed with them are float32
    stored = torch.finfo(config.storage).bits // 8 if config.storage is not None else numbers
    parameters = _numel(Parameters.shapes(network).values()) * numbers
    units = _numel(network.shapes[1:]) * batch
    conns = network.connections

    def maps(which: set[int]) -> int:
        return sum(math.prod(network.shapes[conns[c].dst]) for c in which) * batch

    pooled = [c for c, conn in enumerate(conns) if conn.pool != "none"]
    before = [
        math.prod((network.shapes[conns[c].dst][0], *conns[c].map_size(*network.shapes[conns[c].src][1:])))
        for c in pooled
    ]
    live = 1 + phases if config.winners == "live" else 1
    return {
        "weights": parameters,
        "gradients": parameters,
        "optimizer": _OPTIMIZER_COPIES[optimizer] * parameters,
        "input": math.prod(network.shapes[0]) * batch * numbers,
        "free states": units * stored,
        "preactivations": units * numbers,
        "drives": maps(_launched(free, config.free_steps)) * numbers
        + phases * maps(_launched(nudged, config.nudged_steps)) * numbers,
        "winners": live * maps({c for c in pooled if conns[c].pool == "max"}),
        "nudged states": phases * units * (stored if config.nudge_form != "states" else stored + numbers),
        WORKSPACE: max(before, default=0) * phases * batch * numbers,
        "teacher": teacher_bytes,
    }


def _numel(shapes: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


# --- recipes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A complete run for a GPU that nobody has made yet: what is measured and what is chosen stands in ``backing``."""

    name: str
    what: str
    values: Mapping[str, object]
    input_shape: tuple[int, int, int]
    classes: int
    images: int
    test_images: int
    backing: Sequence[str]

    def config(self) -> TrainConfig:
        """Every field of the run. Raises TypeError for a value that is no field."""
        return TrainConfig(**self.values)  # type: ignore[arg-type]

    def network(self) -> Network:
        """The network that the run trains."""
        return network_of(self.config(), self.input_shape, self.classes)

    def estimate(self) -> Estimate:
        """Cost of its batches."""
        config = self.config()
        return estimate(self.network(), config.relax_config(), config.batch_size, optimizer=config.optimizer)

    def summary(self, *, gpu: str = "H100", efficiency: float = ASSUMED_EFFICIENCY) -> str:
        """What the run computes and holds, and a time under an assumption that it names.

        Args:
            gpu: a name of ``PEAKS``.
            efficiency: the ASSUMED part of that peak, at best; a quarter of it is shown too.

        Raises:
            ValueError: an unknown GPU, or an efficiency outside (0, 1].
        """
        if gpu not in PEAKS:
            raise ValueError(f"Recipe.summary: argument 'gpu': expected one of {', '.join(PEAKS)}, got {gpu!r}")
        if not 0 < efficiency <= 1:
            raise ValueError(f"Recipe.summary: argument 'efficiency': expected a number in (0, 1], got {efficiency!r}")
        config, cost = self.config(), self.estimate()
        fast, slow = efficiency * PEAKS[gpu], efficiency / 4 * PEAKS[gpu]
        evaluations = -(-config.epochs // config.evaluate_every)

        def minutes(rate: float) -> float:
            return cost.seconds(config.epochs * self.images, rate, test_images=evaluations * self.test_images) / 60

        epoch = f"{cost.seconds(self.images, fast):.1f} to {cost.seconds(self.images, slow):.1f} s an epoch"
        total = f"{minutes(fast):.1f} to {minutes(slow):.1f} min for {config.epochs} epochs"
        work = f"{cost.multiply_adds / 1e9:.2f} G an image, {self.images * cost.multiply_adds / 1e12:.0f} T an epoch"
        held = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in cost.memory.items() if size)
        assumed = f"{efficiency:.0%} to {efficiency / 4:.0%} of the {PEAKS[gpu] / 1e12:.0f} TFLOP/s that {gpu} states"
        batch = f"{cost.convolutions} convolutions of {cost.batch} images, {cost.products} weight gradients"
        return "\n".join(
            [
                f"{self.name}: {self.what}",
                f"  parameters     {cost.parameters:,}",
                f"  a batch        {batch}",
                f"  multiply-adds  {work}",
                f"  peak memory    {cost.peak_bytes / 1e6:.0f} MB, computed from shapes ({held})",
                f"  time           {epoch}, {total}, ASSUMING",
                f"                 {assumed}. No device has confirmed it.",
                *(f"  note           {note}" for note in self.backing),
            ]
        )


# docs/decisions.md: gain, sweeps and estimator by their gradient cosines, float16 by its table.
_GPU: dict[str, object] = {
    "model": "vgg11",
    "feedback_gain": 0.02,
    "schedule": "sweep",
    "free_steps": 2,
    "nudged_steps": 1,
    "estimator": "tangent",
    "form": "delta",
    "winners": "frozen",
    "operands": "float16",
    "storage": "float16",
    "batch_size": 128,
    "optimizer": "adamw",
    "lr": 2e-4,
    "lr_schedule": "cosine",
    "weight_decay": 0.05,
    "crop_padding": 4,
    "flip": True,
    "evaluate_every": 5,
    "device": "cuda",
    "backend": "auto",
}
_BACKING = (
    "measured (docs/decisions.md): gradient cosine 0.99 on 8 layers at k 0.02, 2 + 1 tangent sweeps, float16",
    "measured (docs/results.md): Adam at 2e-4 trains vgg5 at this width",
    "chosen, not measured: epochs, batch size, weight decay, cutout. The run has not been made; expect to tune lr",
)
RECIPES: dict[str, Recipe] = {
    "vgg11-cifar10": Recipe(
        "vgg11-cifar10",
        "VGG-11 on CIFAR-10, 100 epochs",
        {**_GPU, "dataset": "cifar10", "epochs": 100},
        (3, 32, 32),
        10,
        50_000,
        10_000,
        _BACKING,
    ),
    "vgg11-cifar100": Recipe(
        "vgg11-cifar100",
        "VGG-11 on CIFAR-100, 200 epochs",
        {**_GPU, "dataset": "cifar100", "epochs": 200, "cutout": 8},
        (3, 32, 32),
        100,
        50_000,
        10_000,
        _BACKING,
    ),
}


def write_recipe(name: str, path: Path) -> Recipe:
    """Write the recipe's complete configuration as JSON, for ``ep-train --config``.

    Raises:
        ValueError: no such recipe; with the names.
        FileExistsError: ``path`` is there already.
    """
    if name not in RECIPES:
        raise ValueError(f"argument 'recipe': expected one of {', '.join(RECIPES)}, got {name!r}")
    recipe = RECIPES[name]
    text = json.dumps(asdict(recipe.config()), indent=2, default=str)
    with path.open("x", encoding="utf-8") as file:
        file.write(text + "\n")
    return recipe
