"""``ep-train export``: the network of a run for use elsewhere, its free phase unrolled, checked after writing."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from pprint import pformat
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from ep_kernels import Network, Parameters, RelaxConfig
from ep_kernels.plan import update_order
from ep_kernels.stages import stages_of

from .. import extras
from ..teachers import Normalisation
from ..trained import Trained, load_trained
from . import free_phase
from .free_phase import FreePhase
from .output import replacing

SUFFIXES = {"module": ".py", "torch-export": ".pt2", "onnx": ".onnx"}
BATCHES = (1, 5)  # the sizes that a written file is checked with; it is traced with another
FOOTER = '''

SPEC = {spec}

ABOUT = {about}


def load(weights: str | Path | None = None) -> FreePhase:
    """The trained network: pixels in [0, 1] to outputs. ``weights``: the file that was written beside this one."""
    path = Path(__file__).with_suffix(".pt") if weights is None else weights
    return FreePhase(SPEC, torch.load(path, weights_only=True)).eval()
'''


class ExportError(ValueError):
    """A network cannot be exported, or what was written computes something else; the file has been removed."""


@dataclass(frozen=True)
class ExportConfig:
    """Write the network of a run for use without this package: images in, outputs of the readout after the free phase
    out. The file is loaded back and compared with the network before it gets its name."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    out: Path
    """The file: .py (module; its weights go beside it, as .pt), .pt2 (torch-export) or .onnx."""
    to: Literal["module", "torch-export", "onnx"]
    """module: Python source that needs torch alone; torch-export: a program for torch.export.load; onnx."""
    free_steps: int | None = None
    """Sweeps of the free phase that are unrolled (default: those of the run's own evaluation)."""
    tolerance: float = 1e-4
    """Largest difference of an output that is allowed, relative to the largest output (or to 1)."""
    overwrite: bool = False
    """Replace a file that is there."""

    def __post_init__(self) -> None:
        if self.out.suffix != SUFFIXES[self.to]:
            raise ValueError(
                f"ExportConfig: argument 'out': expected a name that ends in {SUFFIXES[self.to]} with --to {self.to}, "
                f"got {self.out}"
            )
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ValueError(f"ExportConfig: argument 'tolerance': expected a number > 0, got {self.tolerance}")


def run_export(config: ExportConfig) -> int:
    """The command; returns its exit code."""
    trained = load_trained(config.run, device="cpu", free_steps=config.free_steps)
    written = [config.out]
    if config.to == "module":
        written.append(config.out.with_suffix(".pt"))
        settle(*written)
    for path in written:
        if path.exists() and not config.overwrite:
            raise ValueError(f"ExportConfig: argument 'out': {path} is there already: name another, or --overwrite")
    difference = export(trained, config.to, config.out, tolerance=config.tolerance)
    c, h, w = trained.image_shape
    print(
        f"{' and '.join(map(str, written))}: pixels in [0, 1] of shape [batch, {c}, {h}, {w}] to "
        f"{'logits' if trained.probabilities else 'output units'} [batch, {len(trained.class_names)}]"
    )
    if trained.relax is not None:
        print(f"{trained.relax.free_steps} sweeps of the free phase, in float32{_left_out(trained.relax)}")
    if difference is None:
        print("not run: onnxruntime is not installed (pip install 'ep-kernels[export]')")
    else:
        print(f"loaded and run: outputs within {difference:.1e} of the network's own (allowed {config.tolerance:g})")
    return 0


def export(trained: Trained, to: str, out: Path, *, tolerance: float = 1e-4) -> float | None:
    """Write a network, load it back, and compare it with the network's own outputs on random images.

    The network's own run in float32, without an early stop: what is exported has neither low precision nor ``tol``.

    Args:
        trained: on the CPU.
        to: a key of ``SUFFIXES``.
        out: the file; it is replaced, and only when everything agrees.
        tolerance: see :class:`ExportConfig`.

    Returns:
        The largest difference, relative to the largest output (or to 1); None when onnxruntime is not there to run it.

    Raises:
        ExportError: the outputs differ by more.
        MissingExtra: onnx or onnxscript is not installed.
        ValueError: a teacher as ``module``, which it is already.
    """
    module = as_module(trained)
    if to == "module":
        if not isinstance(module, FreePhase):
            raise ValueError(
                f"ExportConfig: argument 'to': expected torch-export or onnx with {trained.config.model_name}, "
                "which is an ordinary PyTorch module: ep_train.teachers.build_teacher makes it"
            )
        with replacing_together(out, out.with_suffix(".pt")) as (file, weights):
            torch.save(module.state_dict(), weights)
            file.write_text(source_of(module, about(trained)), encoding="utf-8")
            return _compared(trained, load_source(file)(weights), tolerance)
    with replacing(out) as file:
        example = torch.rand(BATCHES[0] + BATCHES[-1], *trained.image_shape)
        if to == "onnx":
            write_onnx(module, example, file, about(trained))
            run = load_onnx(file)
            return None if run is None else _compared(trained, run, tolerance)
        with _torchs_own_business():
            program = torch.export.export(module, (example,), dynamic_shapes=_any_batch())
            torch.export.save(program, file, extra_files={"about.json": json.dumps(about(trained))})
            read = torch.export.load(file).module()
        return _compared(trained, read, tolerance)


@contextmanager
def replacing_together(program: Path, weights: Path) -> Iterator[tuple[Path, Path]]:
    """As :func:`replacing`, of a program and its weights: both are new once the program has its name; after an error
    before that both are as they were, after a kill at the next export. At no time is an old program beside new weights.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: something else than a regular file is in the place of one.
    """
    settle(program, weights)
    for path in (program, weights):
        if os.path.lexists(path) and not path.is_file():
            raise ValueError(f"ExportConfig: argument 'out': expected a regular file or none, got {path}")
    there: list[Path] | None = None
    try:
        with replacing(program) as file, replacing(weights) as beside:  # which get their names in the other order
            yield file, beside
            for temporary in (file, beside):
                with temporary.open("rb+") as written:
                    os.fsync(written.fileno())
            there = [path for path in (weights, program) if path.is_file()]  # both new ones are on the disk in full
            for path in there:
                os.replace(path, _aside(path))
    except BaseException:
        if there == [] and not program.exists():
            with suppress(OSError):
                weights.unlink(missing_ok=True)
        settle(program, weights)
        raise
    settle(program, weights)


def settle(program: Path, weights: Path) -> None:
    """Put in order what an export that broke off has left: the new files if both have their names, else the old ones.

    It may break off itself: an export moves the old weights aside first, and gives the new program its name last.
    """
    old = {path: aside for path in (program, weights) if (aside := _aside(path)).is_file()}
    if program.exists() and weights.exists():
        for aside in old.values():
            aside.unlink()
        return
    if program in old:
        with suppress(OSError):  # a file there is a new one
            weights.unlink(missing_ok=True)
    for path, aside in old.items():
        os.replace(aside, path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}-old")


def as_module(trained: Trained) -> nn.Module:
    """The network as an ordinary module, on the CPU in float32: pixels in [0, 1] to outputs."""
    if trained.network is None:
        return _Pixels(trained.normalisation, trained.module).eval()
    spec = spec_of(trained.network, trained.relax, trained.normalisation)
    return FreePhase(spec, trained.module.state_dict()).eval()


def spec_of(network: Network, relax: RelaxConfig | None, images: Normalisation) -> dict[str, Any]:
    """What :class:`FreePhase` computes, as plain numbers. Without ``relax``: one pass without feedback, which is what
    the first sweep from below is.

    Raises:
        ValueError: a readout that averages its map, or is a 1x1 convolution, which no run has.
    """
    head = network.readout
    if head.pool is not None or head.pointwise:
        raise ValueError(f"spec_of: argument 'network': expected a readout of the whole state, got {head}")
    stages = stages_of(network, plain(relax or RelaxConfig(schedule="sweep", free_steps=1)), warm=False)
    return {
        "mean": list(images.mean),
        "std": list(images.std),
        "shapes": [list(shape) for shape in network.shapes],
        "connections": [
            {
                "src": conn.src,
                "dst": conn.dst,
                "stride": list(conn.stride),
                "padding": list(conn.padding),
                "pool": conn.pool,
                "feedback_gain": network.feedback_coefficient(c),
            }
            for c, conn in enumerate(network.connections)
        ],
        "boxes": [
            [None, None] if math.isinf(lo) else [lo, hi] for lo, hi in map(network.box, range(len(network.shapes)))
        ],
        "slope": network.slope,
        "stages": [
            {
                "schedule": stage.schedule,
                "order": list(update_order(network, stage.schedule, "free")),
                "sweeps": stage.steps,
                "damping": [min(stage.damping, 1.0), stage.damping],
            }
            for stage in stages
        ],
        "readout": head.node,
        "parameters": {
            name: list(shape) for name, shape in Parameters.shapes(replace(network, local_heads=())).items()
        },
    }


def plain(relax: RelaxConfig) -> RelaxConfig:
    """The same free phase in the parameters' own precision, for all of its sweeps."""
    low = {"operands": None, "storage": None, "early_operands": None, "early_steps": 0}
    return replace(relax, tol=0.0, on_fail="ignore", **low)  # type: ignore[arg-type]


def about(trained: Trained) -> dict[str, Any]:
    """What goes with an exported network."""
    return {
        "dataset": trained.dataset,
        "image_shape": list(trained.image_shape),
        "classes": list(trained.class_names),
        "outputs": "logits" if trained.probabilities else "values of the output units",
    }


def source_of(module: FreePhase, information: dict[str, Any]) -> str:
    """Python source that needs torch alone, with a function ``load``."""
    source = Path(free_phase.__file__).read_text(encoding="utf-8")
    _, rest = source.split('"""\n', 1)
    top = '"""The free phase of a trained network as a plain PyTorch module; written by ep-train export."""\n'
    rest = rest.replace("from typing import Any\n", "from pathlib import Path\nfrom typing import Any\n", 1)
    spec, info = (pformat(values, width=110, sort_dicts=False) for values in (module.spec, information))
    return top + rest + FOOTER.format(spec=spec, about=info)


def load_source(path: Path) -> Callable[[Path], nn.Module]:
    """The function ``load`` of a Python file; nothing is left beside the file, as an import would."""
    namespace: dict[str, Any] = {"__name__": "exported", "__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True), namespace)
    load: Callable[[Path], nn.Module] = namespace["load"]
    return load


def write_onnx(module: nn.Module, example: Tensor, path: Path, information: dict[str, Any]) -> None:
    """As one ONNX file, with a batch of any size.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
    """
    for name in ("onnx", "onnxscript"):
        extras.require(name, extra="export", what="--to onnx")
    with _torchs_own_business():
        program = torch.onnx.export(
            module,
            (example,),
            input_names=["pixels"],
            output_names=["outputs"],
            dynamic_shapes=_any_batch(),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update({name: json.dumps(value) for name, value in information.items()})
        program.save(path, external_data=False)


def load_onnx(path: Path) -> Callable[[Tensor], Tensor] | None:
    """A function that runs an ONNX file; None when onnxruntime is not installed."""
    try:
        runtime = extras.require("onnxruntime", extra="export", what="running ONNX")
    except extras.MissingExtra:
        return None
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])

    return run


def _any_batch() -> tuple[dict[int, Any]]:
    """Of the one input; torch.export, which takes a while to import, is asked for only here."""
    return ({0: torch.export.Dim("batch")},)


@contextmanager
def _torchs_own_business() -> Iterator[None]:
    """While torch exports: its deprecated calls of itself and the libraries that it would also know are no news to
    the user, and what it cannot export is an ExportError."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (OSError, ExportError):
        raise
    except Exception as error:  # of its compilers and of onnxscript: many kinds
        raise ExportError(f"export: torch cannot export this network ({type(error).__name__}: {error})") from error
    finally:
        log.setLevel(level)


class _Pixels(nn.Module):
    """A teacher that reads pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, images: Normalisation, module: nn.Module) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(images, name)).view(-1, 1, 1))
        self.module = module

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.module((pixels - self.mean) / self.std)
        return out


@torch.no_grad()
def _compared(trained: Trained, exported: Callable[[Tensor], Tensor], tolerance: float) -> float:
    """Largest difference between the outputs of a network and of what was read back."""
    own = trained if trained.relax is None else replace(trained, relax=plain(trained.relax))
    generator = torch.Generator().manual_seed(0)
    worst, residual = 0.0, None
    for count in BATCHES:
        pixels = torch.randint(256, (count, *trained.image_shape), generator=generator, dtype=torch.uint8)
        expected, residual = own.predict(own.normalised(pixels))
        got = exported(pixels.float() / 255)
        if got.shape != expected.shape:
            raise ExportError(f"export: expected outputs {list(expected.shape)}, got {list(got.shape)}")
        difference = float((got - expected).abs().max() / expected.abs().max().clamp_min(1))
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    if worst <= tolerance:
        return worst
    said = f"export: the outputs read back differ by {worst:.1e} of the largest (allowed {tolerance:g})"
    if residual is not None and float(residual.max()) > 0.1:
        said += (
            f". The free phase has not converged (residual {float(residual.max()):.1e}), and so may amplify rounding: "
            "export with more --free-steps, or a higher --tolerance"
        )
    raise ExportError(said)


def _left_out(relax: RelaxConfig) -> str:
    rounded = [name for name in ("operands", "storage", "early_operands") if getattr(relax, name) is not None]
    parts = [f"the run's {' and '.join(rounded)} in low precision"] if rounded else []
    parts += [f"its early stop at a residual of {relax.tol:g}"] if relax.tol else []
    return f", without {' and '.join(parts)}" if parts else ""
