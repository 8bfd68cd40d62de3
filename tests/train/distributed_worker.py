"""What one of two processes does in tests/train/test_distributed.py: all checks in one launch, which takes seconds."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ep_kernels import Network, RelaxConfig
from ep_train import Model, TrainConfig, build_network, learners, runs
from ep_train.data import load_dataset
from ep_train.distill import Distillation, cache
from ep_train.distributed import (
    Agreement,
    GradientMean,
    LostContact,
    ProcessError,
    Processes,
    check_alike,
    from_environment,
    joined,
    spread,
)
from ep_train.distributed.step import pooled
from ep_train.dropout import Dropout
from ep_train.losses import AugmentedLoss, LocalErrors
from ep_train.step import StepResult, backprop_step, bptt_step, ep_step, module_step
from ep_train.teachers import Teacher, build_teacher

CONFIG = RelaxConfig(free_steps=3, nudged_steps=2)
IMAGES = 7  # 3 and 4
RUN: dict[str, Any] = {
    "model": "6p-8",
    "train_limit": 105,
    "test_limit": 41,
    "batch_size": 21,
    "epochs": 3,
    "estimator": "random_sign",
    "lr_schedule": "cosine",
    "crop_padding": 1,
    "dropout": (0.1,),
    "device": "cpu",
    "threads": 1,
    "quiet": True,
}
BOARD = importlib.util.find_spec("tensorboard") is not None
Step = Callable[..., StepResult]


def teacher(shape: tuple[int, int, int], classes: int = 4) -> Teacher:
    torch.manual_seed(0)
    return Teacher(build_teacher("vgg11_bn", shape, classes, 3 / 64), image_shape=shape)


def model(spec: str = "5p-6", shape: tuple[int, int, int] = (1, 8, 8), **options: Any) -> Model:
    return Model(build_network(spec, shape, 4, **options), seed=1)


def augmented(side: str) -> Model:
    """Local heads, softened logits tied to the readout and to them, and features with a map on either side."""
    shape = (3, 32, 32)
    network = build_network("4p-5p-6p", shape, 4, feedback_gain=0.2)
    distillation = Distillation(1.0, 2.0, 0.5, ("2=features.7",), (1.0,), map=side)  # type: ignore[arg-type]
    local = LocalErrors("1,2", (0.3, 0.2))
    loss = AugmentedLoss(network, 4, local=local, distillation=distillation, teacher=teacher(shape))
    return Model(loss.network, seed=1, loss=loss)


def skips() -> Model:
    from tests.core.nets import NETWORKS

    network: Network = replace(NETWORKS["skips, max"], local_heads=())  # mse, strides, several connections into a node
    return Model(network, seed=1)


def step_of(step: Step, made: Model, *arguments: Any, **options: Any) -> tuple[Model, Step]:
    def go(images: Tensor, labels: Tensor, **more: Any) -> StepResult:
        return step(made, images, labels, *arguments, **options, **more)

    return made, go


def cases() -> dict[str, tuple[Model, Step]]:
    """Models, and steps on images, labels and a mean."""
    thinned = model()
    masks = Dropout(thinned.network, (0.3,)).draw(torch.Generator().manual_seed(0), dtype=torch.float64)
    five = replace(CONFIG, estimator="five_phase")
    return {
        "softmax": step_of(ep_step, model(), CONFIG),
        "mse": step_of(ep_step, model(readout="mse"), CONFIG),
        "tangent": step_of(ep_step, model(local_heads=(1,)), replace(CONFIG, estimator="tangent")),
        "five phases, local heads": step_of(ep_step, model(local_heads=(1,)), five),
        "skips, mse": step_of(ep_step, skips(), CONFIG),
        "kolen_pollack": step_of(ep_step, model(feedback="separate"), CONFIG, same_update=True),
        "dropout": step_of(ep_step, thinned, CONFIG, masks=masks),
        "maps of the student": step_of(ep_step, augmented("student"), CONFIG),
        "maps of the teacher": step_of(ep_step, augmented("teacher"), CONFIG),
        "bptt, maps of the teacher": step_of(bptt_step, augmented("teacher"), CONFIG),
        "backprop": step_of(backprop_step, model()),
    }


def batch_of(made: Model, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(IMAGES, *made.network.shapes[0], generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(0, 4, (IMAGES,), generator=generator)


def gradients(processes: Processes) -> dict[str, Any]:
    """Per case and dtype: largest relative error of a gradient against the whole batch's, and bytes of buckets."""
    found: dict[str, Any] = {}
    for name, (made, step) in cases().items():
        for dtype in (torch.float64, torch.float32):
            made.to(dtype)
            if name == "dropout" and dtype == torch.float32:
                continue
            images, labels = batch_of(made, dtype)
            whole = step(images, labels)
            want = {key: p.grad.clone() for key, p in made.named_parameters() if p.grad is not None}
            mean, part = GradientMean(processes, size=600), processes.part(IMAGES)
            for _ in range(2):  # the first batch sends nothing before it is complete
                made.zero_grad()
                mean.begin(processes.share(IMAGES))
                mine = pooled(processes, step(images[part], labels[part], mean=mean), processes.share(IMAGES))
            got = {key: p.grad for key, p in made.named_parameters() if p.grad is not None}
            assert got.keys() == want.keys() == {key for key, _ in made.named_parameters()}
            errors = {key: float((got[key] - w).norm() / w.norm()) for key, w in want.items() if w.norm() > 0}
            found[f"{name}, {dtype}"] = {
                "error": max(errors.values()),
                "compared": len(errors),
                "buckets": mean.buckets,
                "bytes": sum(w.numel() * w.element_size() for w in want.values()),
                "loss apart": abs(float(mine.loss) - float(whole.loss)),
                "correct": (int(mine.correct), int(whole.correct)),
            }
    return found


def early(processes: Processes) -> list[str]:
    """What happens in which order: contrasts, and buckets that go out."""
    from ep_kernels import relax_op

    made, step = step_of(ep_step, model("5-6-7"), CONFIG)
    images, labels = batch_of(made, torch.float32)
    mean, events = GradientMean(processes, size=600), []
    contrast, send = relax_op.contrast, mean._send

    def seen(name: str, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        events.append(name)
        return work(*arguments, **options)

    relax_op.contrast = partial(seen, "contrast", contrast)  # type: ignore[assignment]
    mean._send = partial(seen, "bucket", send)  # type: ignore[method-assign]
    for _ in range(2):
        events.clear()
        mean.begin(0.5)
        step(images, labels, mean=mean)
    relax_op.contrast = contrast
    return events


def normalised(processes: Processes) -> dict[str, Tensor]:
    """Gradients and running statistics of a module with batch normalisation."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4))
    generator = torch.Generator().manual_seed(processes.rank)
    mean = GradientMean(processes)
    mean.begin(0.5)
    module_step(module, torch.rand(4, 1, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3]), mean=mean)
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {**grads, **dict(module.named_buffers())}


def empty_part(processes: Processes) -> Tensor:
    """The mean where this process has no images, and numbers that are none."""
    gradient = torch.full((3,), 2.0 if processes.first else float("nan"))
    mean = GradientMean(processes)
    mean.begin(1.0 if processes.first else 0.0)
    mean.add("g", gradient)
    mean.finish()
    return gradient


def refusals(processes: Processes) -> dict[str, str]:
    """Errors of what only all processes together can do."""
    found = {}

    def note(name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except (ProcessError, OSError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    note("same", lambda: processes.same("options", {"lr": 0.1 * (1 + processes.rank)}))
    note("fine", lambda: processes.same("options", {"lr": 0.1}))

    def full() -> None:
        raise OSError("disk full")

    note("first", lambda: processes.first_does(full))
    mean = GradientMean(processes)
    mean.begin(0.5)
    mean.add("a" if processes.first else "b", torch.ones(2 + processes.rank))
    note("gradients", mean.finish)
    drifted = model()
    with torch.no_grad():
        drifted.get_parameter("nodes.1.bias").add_(1.0)
        drifted.get_parameter("connections.1.weight").mul_(1 + 0.01 * processes.rank)
    note("alike", lambda: check_alike(processes, drifted))
    spread(processes, drifted)
    note("alike again", lambda: check_alike(processes, drifted))
    return found


def wishes(processes: Processes) -> list[dict[str, bool]]:
    """What is agreed on, batch by batch, when the second process wishes to stop at the third."""
    agreement, answers = Agreement(processes, ("stop", "read")), []
    for batch in range(4):
        agreement.ask(stop=processes.rank == 1 and batch >= 2, read=processes.first and batch == 1)
        answers.append(agreement.answer())
    return answers


def run(folder: Path, name: str, at: int | None = None, do: Callable[[], object] = int, **options: Any) -> Any:
    """A whole run; at step ``at`` of the second process ``do`` happens there. Returns its summary or its error."""
    original, calls = learners.ep_step, []

    def step(*arguments: Any, **more: Any) -> StepResult:
        calls.append(1)
        result = original(*arguments, **more)
        if len(calls) == at and os.environ["RANK"] == "1":
            return do() or result  # type: ignore[return-value]
        return result

    learners.ep_step = step  # type: ignore[assignment]
    try:
        summary, _ = runs.train(TrainConfig(**{**RUN, **options}, out=folder / name))
        return {**summary, "calls": len(calls)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "calls": len(calls)}
    finally:
        learners.ep_step = original


def cached(processes: Processes, folder: Path) -> dict[str, Any]:
    """Images that the teacher sees in this process while the cache of its logits is filled, and what is in it then."""
    data = load_dataset("digits", train_limit=300, test_limit=10)
    taught, seen = teacher(data.image_shape, 10), 0
    outputs = taught.outputs

    def counted(images: Tensor) -> Any:
        nonlocal seen
        seen += len(images)
        return outputs(images)

    taught.outputs = counted  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    blocked = folder / "file"
    blocked.write_text("no folder")
    for name, path in {
        "shared": folder / "cache" / "logits.npz",
        "again": folder / "cache" / "logits.npz",
        "elsewhere": folder / f"machine-{processes.rank}" / "logits.npz",
        "elsewhere, again": folder / f"machine-{processes.rank}" / "logits.npz",
        "blocked": blocked / "logits.npz",
    }.items():
        seen = 0
        distillation = Distillation(1.0, cache=path)
        network = build_network("4p-5", data.image_shape, 10)
        loss = AugmentedLoss(network, 10, distillation=distillation, teacher=taught, dataset=data)
        seen = 0
        try:
            loss.fill_cache(processes)
        except (OSError, ProcessError) as error:
            found[name] = f"{type(error).__name__}: {error}"
            continue
        assert loss._cache is not None
        found[name] = {"seen": seen, "logits": loss._cache.get(torch.arange(300)), "file": path.exists()}
    return found


def distilled(folder: Path) -> Any:
    """A run with a cache: its summary, with the number of images that the teacher saw here, but for a blank one."""
    if os.environ["RANK"] == "0":  # the other one waits for it, as soon as the run begins
        torch.save(build_teacher("vgg11_bn", (1, 8, 8), 10, 4 / 64).state_dict(), folder / "t.pt")
    original, seen = Teacher.outputs, []

    def counted(self: Teacher, images: Tensor) -> Any:
        seen.append(len(images))
        return original(self, images)

    Teacher.outputs = counted  # type: ignore[method-assign]
    try:
        options: dict[str, Any] = {"distill_logits": 1.0, "crop_padding": 0, "epochs": 1}
        spec = f"vgg11_bn:{folder / 't.pt'}"
        summary = run(folder, "distilled", teacher=spec, teacher_cache=folder / "run.npz", **options)
        return {**summary, "seen": sum(count for count in seen if count > 1)}
    finally:
        Teacher.outputs = original  # type: ignore[method-assign]


def stopped_filling(folder: Path) -> Any:
    """A run with a cache, whose first process gets SIGUSR1 while it fills it."""
    original, seen = Teacher.outputs, []

    def counted(self: Teacher, images: Tensor) -> Any:
        if len(images) > 1:
            seen.append(len(images))
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, images)

    Teacher.outputs, size, cache.BATCH = counted, cache.BATCH, 20  # type: ignore[method-assign]
    try:
        options: dict[str, Any] = {"distill_logits": 1.0, "crop_padding": 0, "epochs": 1}
        spec, path = f"vgg11_bn:{folder / 't.pt'}", folder / "filling.npz"
        summary = run(folder, "filling", teacher=spec, teacher_cache=path, **options)
        return {**summary, "seen": seen, "file": path.exists()}
    finally:
        Teacher.outputs, cache.BATCH = original, size  # type: ignore[method-assign]


def nothing() -> StepResult:
    """Of a batch whose loss is no number."""
    return StepResult(torch.tensor(float("nan")), torch.tensor(0), torch.tensor(0.0))


def hung(processes: Processes) -> tuple[str, float]:
    """What the first process says, and after how many seconds, when the other one does not come."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
    began = time.monotonic()
    if processes.rank == 1:
        time.sleep(6)
        return "", 0.0
    try:
        processes.meet()
    except LostContact as error:
        return str(error), time.monotonic() - began
    return "", time.monotonic() - began


def main(rank: int, port: int, folder: Path) -> None:
    """Everything, into ``folder``."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), EP_TRAIN_TIMEOUT="120")
    processes = from_environment()
    stop, interrupt = (partial(os.kill, os.getpid(), number) for number in (signal.SIGUSR1, signal.SIGINT))
    try:
        with joined(processes):
            found: dict[str, Any] = {
                "gradients": gradients(processes),
                "early": early(processes),
                "normalised": normalised(processes),
                "empty": empty_part(processes),
                "refusals": refusals(processes),
                "wishes": wishes(processes),
                "cached": cached(processes, folder),
                "distilled": distilled(folder),
                "filling": stopped_filling(folder),
                "whole": run(folder, "whole"),
                "stopped": run(folder, "stopped", 7, stop),
                "interrupted": run(folder, "interrupted", 2, interrupt, epochs=1),
                "nan": run(folder, "nan", 3, nothing),
                "left out": run(folder, "left out", 3, nothing, on_divergence="continue", epochs=1),
                "rolled back": run(folder, "rolled back", 3, nothing, on_divergence="rollback", epochs=1),
                "shown": run(folder, "shown", tensorboard=BOARD, probe_gradient=1, epochs=2),
            }
            found["hung"] = hung(processes)
            torch.save(found, folder / f"{rank}.pt")
            if found["hung"][0]:
                raise LostContact(found["hung"][0])
    except LostContact as error:
        if "hung" not in found or not found["hung"][0]:
            raise error
