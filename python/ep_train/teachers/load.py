"""A teacher from a spec: ``NAME:PATH``, a run folder, or a pretrained name of torchvision or timm."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ep_kernels
from ep_kernels import RelaxConfig

from ..feedforward import feedforward_states
from ..models import Model
from .nets import BASE, HEAD, STEM, TEACHERS, Normalise, build_teacher
from .teacher import IMAGENET, Normalisation, Teacher

WHERE = "load_teacher: argument 'spec'"
LIBRARIES = ("torchvision", "timm")

_log = logging.getLogger(__name__)


class EquilibriumTeacher(nn.Module):
    """A trained EP network: its free phase, and its states as outputs of the modules ``nodes.1``, ``nodes.2``, ...

    Without a ``config`` it is one that was trained by backprop: the feed-forward network.
    """

    def __init__(self, model: Model, config: RelaxConfig | None) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.nodes = nn.ModuleDict({str(i): nn.Identity() for i in range(1, len(model.network.shapes))})

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to logits [B, classes]."""
        network, tensors = self.model.network, self.model.tensors()
        if self.config is None:
            states = feedforward_states(network, tensors, images)
        else:
            states = ep_kernels.free_phase(network, tensors, images, self.config).states
        for i, node in self.nodes.items():
            node(states[int(i)])
        head = network.readout
        state = states[head.node].to(images.dtype)
        return ep_kernels.reference.head_output(head, state, tensors.head_weights[0], tensors.head_biases[0])


def load_teacher(
    spec: str,
    *,
    image_shape: tuple[int, int, int],
    classes: int,
    names: Sequence[str] = (),
    images: Normalisation | None = None,
    dataset: str | None = None,
) -> Teacher:
    """A teacher, on the CPU.

    Args:
        spec: one of

            * ``NAME:PATH``: a name of ``TEACHERS`` and a state dict (.pt, .safetensors) or a run folder of
              ``ep-train teacher``;
            * ``PATH``: a run folder of ``ep-train teacher``, or of ``ep-train``: an EP network, whose features are the
              states of its nodes (``nodes.3``). Images are brought to the normalisation that the run had; they must
              have the shape that it had;
            * ``torchvision:NAME`` or ``timm:NAME`` (or ``NAME`` alone, looked up in that order): pretrained on
              ImageNet, downloaded by the library; ``torchvision:NAME:PATH`` with the weights in PATH. Of another number
              of classes it has features, and no logits for this dataset.
        image_shape: (C, H, W) of the batches.
        classes: of the dataset: a state dict of another number of classes still loads, and serves features.
        names: modules to watch.
        images: how the batches are normalised; teachers that normalise pixels themselves need it, and without it a run
            folder's reads batches as they come.
        dataset: what the images are of (``Dataset.name``): a run folder of another one is worth a warning in the log.

    Returns:
        The teacher, frozen; ``classes`` says how many logits it has, ``names`` which modules it watches.

    Raises:
        ValueError: nothing of that name, a file that cannot be read (files are read with ``weights_only``) or does not
            fit, a run on images of another shape, a library that is not installed, weights that cannot be downloaded,
            a module that does not read images of this shape.
    """
    name, _, rest = spec.partition(":")
    if rest and name in TEACHERS:
        return _own(name, Path(rest), image_shape, names, images, dataset)
    if rest and name in LIBRARIES:
        return _library((name,), rest, image_shape, classes, names, images)
    if spec and Path(spec).exists():
        return _run_folder(Path(spec), None, image_shape, names, images, dataset)
    if not spec or any(c in spec for c in "/\\"):
        expected = f"NAME:PATH, a run folder that is there, or a name of {' or '.join(LIBRARIES)}"
        raise ValueError(f"{WHERE}: expected {expected}, got {spec!r}")
    return _library(LIBRARIES, spec, image_shape, classes, names, images)


def _own(
    name: str,
    path: Path,
    image_shape: tuple[int, int, int],
    names: Sequence[str],
    images: Normalisation | None,
    dataset: str | None,
) -> Teacher:
    if path.is_dir():
        return _run_folder(path, name, image_shape, names, images, dataset)
    return _built(name, _state_dict(path), str(path), image_shape, names, images)


def _built(
    name: str,
    state: Mapping[str, Tensor],
    where: str,
    image_shape: tuple[int, int, int],
    names: Sequence[str],
    images: Normalisation | None,
    reads: Normalisation | None = None,
) -> Teacher:
    """One of ours with these weights; their shapes say its width and its number of classes."""
    if STEM[name] not in state or HEAD[name] not in state:
        raise ValueError(
            f"{WHERE}: expected a state dict of our {name} (with '{STEM[name]}' and '{HEAD[name]}') in {where}, got "
            f"{', '.join(list(state)[:4])}, ... (weights of torchvision's: torchvision:{name}:PATH)"
        )
    stem, head = state[STEM[name]], state[HEAD[name]]
    if stem.shape[1] != image_shape[0]:
        raise ValueError(
            f"{WHERE}: expected a teacher of {image_shape[0]}-channel images, got {stem.shape[1]} in {where}"
        )
    module = build_teacher(name, image_shape, head.shape[0], stem.shape[0] / BASE)
    try:
        missing, unexpected = module.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        raise ValueError(f"{WHERE}: {where} does not fit {name}: {error}") from error
    missing = [key for key in missing if not key.startswith("normalise.")]
    if missing or unexpected:
        raise ValueError(f"{WHERE}: {where} does not fit {name}: missing {missing}, unexpected {list(unexpected)}")
    normalise = module.normalise
    assert isinstance(normalise, Normalise)
    pixels = Normalisation((0.0,) * image_shape[0], (1.0,) * image_shape[0])
    reads = pixels if normalise.reads_pixels else reads
    return Teacher(module, image_shape=image_shape, names=names, images=images, reads=reads, identity=name)


def _run_folder(
    path: Path,
    name: str | None,
    image_shape: tuple[int, int, int],
    names: Sequence[str],
    images: Normalisation | None,
    dataset: str | None,
) -> Teacher:
    from .. import checkpoint
    from ..config_file import config_from_json
    from ..trained import restored  # which knows teachers

    if not path.is_dir():
        raise ValueError(f"{WHERE}: expected a run folder, or NAME:PATH for a state dict, got the file {path}")
    config_path = path / "config.json"
    try:
        values = json.loads(config_path.read_text())
        stored = checkpoint.model_of(path)
        state = stored["model"]
    except (OSError, ValueError) as error:  # CheckpointError, and of JSON
        raise ValueError(f"{WHERE}: {path} is not a run folder with a config.json and a checkpoint: {error}") from error
    reads = _trained_on(path, stored, image_shape, images, dataset)
    if not any(key.startswith("connections.") for key in state):
        found = values.get("model")
        if name is None and found not in TEACHERS:
            raise ValueError(f"{WHERE}: expected NAME:{path}, as its config.json names none of {', '.join(TEACHERS)}")
        return _built(name or str(found), state, str(path), image_shape, names, images, reads)
    if name is not None:
        raise ValueError(f"{WHERE}: expected a run of `ep-train teacher` with {name}, got an EP run: {path}")
    outputs = state["heads.0.weight"].shape[0] if "heads.0.weight" in state else _last_bias(state)
    config = config_from_json(config_path)
    try:
        model, relax = restored(config, state, image_shape, outputs)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{WHERE}: the EP network in {path} does not read these images: {error}") from error
    module = EquilibriumTeacher(model, relax)
    # what happens above tol is no part of what it computes, so none of its identity: any one word will do
    same = None if relax is None else replace(relax, on_fail=RelaxConfig.on_fail)
    return Teacher(
        module, image_shape=image_shape, names=names, images=images, reads=reads, identity=f"{model.network}{same}"
    )


def _trained_on(
    path: Path,
    stored: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    images: Normalisation | None,
    dataset: str | None,
) -> Normalisation | None:
    """How a run's network wants its images, by its checkpoint; None: as they come (the same, or not known)."""
    theirs = stored.get("dataset", "other images")
    ours = "these images" if dataset is None else dataset
    shape = tuple(stored.get("image_shape", image_shape))
    if shape != tuple(image_shape):
        raise ValueError(
            f"{WHERE}: expected a teacher of {_sizes(image_shape)} images ({ours}), got one of {_sizes(shape)} "
            f"({theirs}) in {path}"
        )
    if dataset is not None and "dataset" in stored and theirs != dataset:
        _log.warning("the teacher in %s was trained on %s, the student's images are of %s", path, theirs, ours)
    kept = stored.get("normalisation")
    if kept is None or images is None:
        return None
    reads = Normalisation(tuple(kept["mean"]), tuple(kept["std"]))
    return None if reads == images else reads


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _last_bias(state: Mapping[str, Tensor]) -> int:
    last = max(int(key.split(".")[1]) for key in state if key.startswith("nodes."))
    return state[f"nodes.{last}.bias"].shape[0]


def _library(
    libraries: Sequence[str],
    spec: str,
    image_shape: tuple[int, int, int],
    classes: int,
    names: Sequence[str],
    images: Normalisation | None,
) -> Teacher:
    name, _, rest = spec.partition(":")
    absent = []
    for library in libraries:
        try:
            package: Any = importlib.import_module("torchvision.models" if library == "torchvision" else library)
        except ImportError:
            absent.append(library)
            continue
        if name not in package.list_models():
            continue
        state = _state_dict(Path(rest)) if rest else None
        make: Any = package.get_model if library == "torchvision" else package.create_model
        key = "weights" if library == "torchvision" else "pretrained"
        options: dict[str, Any] = {key: ("DEFAULT" if library == "torchvision" else True) if state is None else None}
        if state is not None:
            last = [t for k, t in state.items() if k.endswith("weight") and t.dim() == 2]
            options["num_classes"] = last[-1].shape[0] if last else classes
            if library == "timm":
                options["pretrained"] = False
        try:
            module = make(name, **options)
        except Exception as error:  # of downloads and of both libraries: many kinds
            kind = type(error).__name__
            if state is None:
                what = "could not be had with its pretrained weights, which are downloaded"
                what += f" ({kind}: {error}): try again with a network connection, or get the file and give "
                raise ValueError(f"{WHERE}: {library}'s {name} {what}{library}:{name}:PATH") from error
            raise ValueError(f"{WHERE}: {library}'s {name} cannot be made ({kind}: {error}): choose another") from error
        if state is not None:
            try:
                module.load_state_dict(state)
            except RuntimeError as error:
                raise ValueError(f"{WHERE}: {rest} does not fit {library}'s {name}: {error}") from error
        reads = _timm_reads(module) if library == "timm" else IMAGENET
        try:
            return Teacher(
                module, image_shape=image_shape, names=names, images=images, reads=reads, identity=f"{library}:{name}"
            )
        except ValueError:
            raise
        except Exception as error:  # of a pass: modules for larger images say so in many ways
            raise ValueError(
                f"{WHERE}: {library}'s {name} does not read {_sizes(image_shape)} images ({type(error).__name__}: "
                f"{error}): choose a teacher for smaller ones, or train one (ep-train teacher)"
            ) from error
    message = f"{WHERE}: expected NAME:PATH with one of {', '.join(TEACHERS)}, a run folder, or a pretrained name"
    if absent:
        message += f" (not installed here: {', '.join(absent)}; pip install {' '.join(absent)})"
    raise ValueError(f"{message}, got {spec!r}")


def _timm_reads(module: Any) -> Normalisation:
    config = getattr(module, "pretrained_cfg", {})
    return Normalisation(tuple(config.get("mean", IMAGENET.mean)), tuple(config.get("std", IMAGENET.std)))


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from a .safetensors file or one of torch's; of a checkpoint the model's."""
    if not path.is_file():
        raise ValueError(f"{WHERE}: expected a state dict or a run folder, got no such file: {path}")
    if path.suffix == ".safetensors":
        try:
            files: Any = importlib.import_module("safetensors.torch")
        except ImportError as error:
            raise ValueError(f"{WHERE}: {path} needs safetensors: pip install safetensors") from error
        read = files.load_file
    else:

        def read(file: Path) -> Any:
            return torch.load(file, weights_only=True, map_location="cpu")

    try:
        state = read(path)
    except Exception as error:  # many kinds; each means the same here
        raise ValueError(f"{WHERE}: {path} is not a readable state dict: {error}") from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{WHERE}: expected tensors by name in {path}, got {type(state).__name__}")
    return state
