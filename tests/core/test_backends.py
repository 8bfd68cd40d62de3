"""Which backend runs: by name, by environment, by context, automatically; and what is said when one cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ep_kernels
from ep_kernels import BackendError, RelaxConfig, _library, backend, backends, free_phase, functional, ops, races
from ep_kernels.relaxation import Relaxation, Relaxed
from tests.core.nets import NETWORKS, problem


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    monkeypatch.setattr(backends, "_logged", set())
    forget()
    yield
    forget()


def forget() -> None:
    """What is remembered of this machine."""
    for remembered in (backends._triton_missing, backends._cuda_missing, backends._archs, backends._machine):
        remembered.cache_clear()  # type: ignore[attr-defined]
    races.forget()


def triton_is(
    monkeypatch: pytest.MonkeyPatch,
    version: str | None = "3.9.0",
    capability: tuple[int, int] | None = None,
    *,
    interpreter: bool = False,
    hip: str | None = None,
) -> None:
    """Pretend that this version of triton is installed (None: none is), beside devices of this capability."""
    find, version_of = importlib.util.find_spec, importlib.metadata.version
    spec = None if version is None else object()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: spec if name == "triton" else find(name, *a))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "triton" else version_of(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreter)))
    forget()


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "load_error", lambda: "no library today")


def test_auto_picks_the_fastest_that_can_run() -> None:
    assert backends.requested() == "auto"
    assert backends.choose() == backends.choose("cpu", torch.float64) == "cpu"
    assert backends.choose("cpu", torch.float16) == "reference"
    assert backends.choose(torch.device("meta"), torch.float32) == "cpu"


def test_auto_falls_back_to_the_reference_and_logs_each_reason_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_library(monkeypatch)
    caplog.set_level(logging.INFO, logger="ep_kernels")
    assert [backends.choose() for _ in range(3)] == ["reference"] * 3
    messages = [record.getMessage() for record in caplog.records]
    assert messages.count("backend cpu is not used: no library today") == 1
    assert len(messages) == 3 == len(set(messages))  # cuda, triton, cpu
    assert all(record.name == "ep_kernels" for record in caplog.records)
    loud = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert loud == ["backend cpu is not used: no library today"]


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_named_backend_that_cannot_run_raises_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_is(monkeypatch, None)
    reason = backends.status()[name]
    assert reason
    p = problem(NETWORKS["max"])
    with pytest.raises(BackendError, match=f"backend '{name}' cannot run: ") as caught:
        free_phase(p.network, p.parameters, p.x, backend=name)
    assert reason in str(caught.value)
    with pytest.raises(BackendError, match=f"backend '{name}' cannot run: "), backend(name):
        pass
    assert backends.requested() == "auto"


def test_the_compiled_backend_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    without_library(monkeypatch)
    assert backends.status()["cpu"] == "no library today"
    with pytest.raises(BackendError, match="backend 'cpu' cannot run: no library today"):
        backends.choose(name="cpu")
    monkeypatch.setenv(backends.ENVIRONMENT, "cpu")
    p = problem(NETWORKS["max"])
    with pytest.raises(BackendError, match="no library today"):
        free_phase(p.network, p.parameters, p.x)


def test_a_named_backend_refuses_a_dtype_or_a_device_that_it_has_no_kernels_for() -> None:
    with pytest.raises(BackendError, match=r"it computes in float32 and float64, these are torch\.float16"):
        backends.choose("cpu", torch.float16, "cpu")
    with pytest.raises(BackendError, match="it runs on cpu tensors, these are on cuda:1"):
        backends.choose("cuda:1", torch.float32, "cpu")
    assert backends.choose("cuda:1", torch.float16, "reference") == "reference"


def test_states_in_float16_are_not_for_the_compiled_backend(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ep_kernels")
    p = problem(NETWORKS["max"])
    config = RelaxConfig(storage=torch.float16)
    found = [free_phase(p.network, p.parameters, p.x, config).states[1].dtype for _ in range(2)]
    assert found == [torch.float16] * 2
    reason = "it stores states in the parameters' dtype, not in torch.float16"
    messages = [record.getMessage() for record in caplog.records]
    assert messages.count(f"backend cpu is not used: {reason}") == 1
    with pytest.raises(BackendError, match=f"^backend 'cpu' cannot run: {reason}$"):
        free_phase(p.network, p.parameters, p.x, config, backend="cpu")
    with pytest.raises(BackendError, match=reason), backend("cpu"):
        ep_kernels.ep_gradients(p.network, p.parameters, p.x, p.targets, config)
    assert backends.choose(name="reference", storage=torch.float16) == "reference"
    assert backends.choose(storage=torch.float16) == "reference"


@pytest.mark.parametrize("name", ["gpu", "", "CPU"])
def test_unknown_names_are_refused_with_the_valid_ones(name: str) -> None:
    valid = "expected one of auto, reference, cpu, triton, cuda, got"
    with pytest.raises(ValueError, match=f"^backend: {valid} '{name}'$"):
        backends.choose(name=name)
    with pytest.raises(ValueError, match=f"^ep_kernels.backend: {valid} '{name}'$"), backend(name):
        pass


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_is(monkeypatch, None)
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    assert backends.requested() == backends.choose() == "reference"
    monkeypatch.setenv(backends.ENVIRONMENT, "triton")
    with pytest.raises(BackendError, match="backend 'triton' cannot run"):
        backends.choose()
    monkeypatch.setenv(backends.ENVIRONMENT, "warp")
    with pytest.raises(ValueError, match=r"EP_KERNELS_BACKEND: expected one of auto, .*, got 'warp'"):
        backends.choose()
    monkeypatch.setenv(backends.ENVIRONMENT, "")
    assert backends.requested() == "auto"


def test_the_innermost_context_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    with backend("cpu"):
        assert backends.choose() == "cpu"
        with backend("reference"):
            assert backends.choose() == "reference"
            with backend("auto"):
                assert backends.choose() == "cpu"
            assert backends.choose(name="cpu") == "cpu"  # an argument wins over any context
        assert backends.choose() == "cpu"
        with pytest.raises(RuntimeError, match="inside"), backend("reference"):
            raise RuntimeError("inside")
        assert backends.choose() == "cpu"
    assert backends.choose() == "reference"


def test_the_reference_backend_calls_no_compiled_op(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a compiled op was called")

    monkeypatch.setattr(backends.relax_op, "relax", refuse)
    monkeypatch.setattr(backends.relax_op, "contrast", refuse)
    p = problem(NETWORKS["max"])
    with backend("reference"):
        ep_kernels.ep_gradients(p.network, p.parameters, p.x, p.targets)
    with pytest.raises(AssertionError, match="compiled op"), backend("cpu"):
        ep_kernels.ep_gradients(p.network, p.parameters, p.x, p.targets)


# --- triton ---------------------------------------------------------------------------------------------------------


def test_why_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {
        "triton is not installed: pip install 'ep-kernels[triton]'": {"version": None, "capability": (9, 0)},
        "it needs triton >= 3.6, this is 3.5.1": {"version": "3.5.1", "capability": (9, 0)},
        "it needs triton >= 3.6, this is 2.10.0": {"version": "2.10.0", "capability": (9, 0)},
        "no CUDA device is available": {"version": "3.6.0"},
        "PyTorch is built for ROCm; the kernels are for NVIDIA GPUs": {"capability": (9, 0), "hip": "6.4"},
        None: {"capability": (7, 5)},  # its device is refused when tensors come from it
    }
    for reason, world in reasons.items():
        with monkeypatch.context() as patch:
            triton_is(patch, **world)  # type: ignore[arg-type]
            assert backends.status()["triton"] == reason
            if reason is not None:
                with pytest.raises(BackendError) as caught:
                    backends.choose("cuda:0", torch.float32, "triton")
                assert str(caught.value) == f"backend 'triton' cannot run: {reason}"


@pytest.mark.parametrize("version", ["3.6.0", "3.10.1+gitabc", "4.0.0a1"])
def test_versions_of_triton_that_will_do(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_is(monkeypatch, version, (8, 0))
    assert backends.status()["triton"] is None


def test_triton_as_part_of_another_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nightly builds of PyTorch bring the module triton as pytorch-triton."""
    triton_is(monkeypatch, "3.9.0", (9, 0))

    def no_such_name(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", no_such_name)
    for version, ok in (("3.9.0+git1234", True), ("3.2.0", False)):
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
        backends._triton_missing.cache_clear()
        assert (backends.status()["triton"] is None) == ok


def test_triton_is_the_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ep_kernels")
    triton_is(monkeypatch, capability=(9, 0))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert backends.choose("cuda:0", dtype) == backends.choose("cuda:0", dtype, "triton") == "triton"
    assert backends.choose("cuda:0", storage=torch.float16) == "triton"
    assert backends.choose("cpu") == "cpu"
    messages = [record.getMessage() for record in caplog.records]
    assert messages.count("backend triton is not used: it runs on cuda tensors, these are on cpu") == 1
    with pytest.raises(BackendError, match=r"^backend 'triton' cannot run: it runs on cuda tensors, these are on cpu$"):
        backends.choose("cpu", torch.float32, "triton")
    with backend("triton"):
        assert backends.choose("cuda:1") == "triton"
    with pytest.raises(BackendError, match=r"it computes in float32, float16 and bfloat16, these are torch\.int32"):
        backends.choose("cuda:0", torch.int32, "triton")


def test_float64_falls_back_to_the_reference(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """By name with a log line, once; automatically as for every backend that has no kernels for a dtype."""
    caplog.set_level(logging.INFO, logger="ep_kernels")
    triton_is(monkeypatch, capability=(9, 0))
    assert [backends.choose("cuda:0", torch.float64, "triton") for _ in range(2)] == ["reference"] * 2
    reason = "it computes in float32 and narrower; float64 falls back to the reference"
    assert [r.getMessage() for r in caplog.records] == [f"backend triton is not used: {reason}"]
    assert backends.choose("cuda:0", torch.float64) == "reference"
    with pytest.raises(BackendError, match="it runs on cuda tensors, these are on cpu"):
        backends.choose("cpu", torch.float64, "triton")
    triton_is(monkeypatch, None)
    with pytest.raises(BackendError, match="triton is not installed"):
        backends.choose("cuda:0", torch.float64, "triton")


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ep_kernels")
    triton_is(monkeypatch, capability=(7, 5))
    reason = "it needs compute capability 8.0 or newer, cuda:0 has 7.5"
    assert [backends.choose("cuda:0") for _ in range(2)] == ["reference"] * 2
    assert [r.getMessage() for r in caplog.records].count(f"backend triton is not used: {reason}") == 1
    with pytest.raises(BackendError, match=reason.replace(".", r"\.")):
        backends.choose("cuda:0", name="triton")


def test_the_interpreter_is_never_the_automatic_choice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ep_kernels")
    triton_is(monkeypatch, interpreter=True)
    assert backends.interpreting()
    assert backends.status()["triton"] is None
    assert backends.choose("cpu") == "cpu"
    reason = "TRITON_INTERPRET runs it on the CPU, slowly and for tests: ask for it by name"
    assert [r.getMessage() for r in caplog.records].count(f"backend triton is not used: {reason}") == 1
    with backend("triton"):
        assert backends.choose("cpu") == "triton"
        assert backends.choose("cpu", torch.float64) == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "")
    assert not backends.interpreting()


def test_triton_is_imported_when_it_runs_and_not_before() -> None:
    code = "import sys; from ep_kernels import backends as b; b.choose(); b.status(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- cuda -----------------------------------------------------------------------------------------------------------


def cuda_is(
    monkeypatch: pytest.MonkeyPatch,
    archs: Sequence[str] | None = ("8.0", "9.0a", "12.0+PTX"),
    capability: tuple[int, int] | None = (9, 0),
    *,
    triton: str | None = None,
    note: str | None = None,
    hip: str | None = None,
) -> None:
    """Pretend that the library has kernels for these architectures (None: it is built for the CPU only)."""
    triton_is(monkeypatch, triton, capability, hip=hip)
    monkeypatch.setattr(ops, "has_cuda", lambda: archs is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test 9000")
    monkeypatch.setattr(_library, "build_info", lambda: {"cuda_archs": list(archs or ()), "note": note})
    forget()


def test_why_cuda_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    built = "this build has no CUDA kernels, it is built for the CPU only"
    worlds: list[tuple[str | None, dict[str, Any]]] = [
        (f"{built}. Where nvcc is installed, run: EP_KERNELS_BUILD=cuda pip install", {"archs": None}),
        (f"{built} (nvcc was not found). Where", {"archs": None, "note": "nvcc was not found"}),
        ("no CUDA device is available", {"capability": None}),
        ("PyTorch is built for ROCm; the kernels are for NVIDIA GPUs", {"hip": "6.4"}),
        (None, {}),
        (None, {"capability": (7, 5)}),  # its device is refused when tensors come from it
    ]
    for reason, world in worlds:
        with monkeypatch.context() as patch:
            cuda_is(patch, **world)
            found = backends.status()["cuda"]
            if reason is None:
                assert found is None
                continue
            assert found is not None
            assert found.startswith(reason)
            with pytest.raises(BackendError) as caught:
                backends.choose("cuda:0", torch.float32, "cuda")
            assert str(caught.value) == f"backend 'cuda' cannot run: {found}"
    cuda_is(monkeypatch)
    without_library(monkeypatch)
    assert backends.status()["cuda"] == "no library today"


def test_this_torch_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_is(monkeypatch, capability=None)
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = f"no CUDA device is available: torch {torch.__version__} has no CUDA"
    assert backends.status()["cuda"] == reason


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        (["8.0"], [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        (["8.6"], [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        (["9.0a"], [(9, 0)], [(8, 0), (9, 1), (10, 0)]),
        (["10.0a+PTX"], [(10, 0)], [(10, 3), (12, 0)]),
        (["10.0f"], [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        (["8.0+PTX"], [(8, 0), (9, 0), (10, 3), (12, 1)], [(7, 5)]),
        (["8.0", "12.0+PTX"], [(8, 9), (12, 0), (12, 1), (13, 0)], [(9, 0), (10, 0)]),
        (["sm_90"], [], [(9, 0)]),
    ],
)
def test_devices_that_a_build_covers(
    archs: list[str], runs: list[tuple[int, int]], does_not: list[tuple[int, int]]
) -> None:
    assert all(backends.covered(archs, capability) for capability in runs)
    assert not any(backends.covered(archs, capability) for capability in does_not)


def test_a_device_that_the_build_does_not_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_is(monkeypatch, ("8.0", "9.0a"), (10, 0))
    reason = (
        r"this build has kernels for compute capability 8\.0, 9\.0a; cuda:0 has 10\.0: build again with TORCH_.*=10\.0"
    )
    with pytest.raises(BackendError, match=f"^backend 'cuda' cannot run: {reason}$"):
        backends.choose("cuda:0", name="cuda")
    assert backends.choose("cuda:0") == "reference"
    cuda_is(monkeypatch, ("8.0",), (7, 5))
    with pytest.raises(BackendError, match=r"it needs compute capability 8\.0 or newer, cuda:0 has 7\.5"):
        backends.choose("cuda:0", name="cuda")
    cuda_is(monkeypatch, (), (10, 0))  # built by hand: nothing is known of it
    assert backends.choose("cuda:0", name="cuda") == "cuda"


def test_what_cuda_takes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ep_kernels")
    cuda_is(monkeypatch)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert backends.choose("cuda:0", dtype) == backends.choose("cuda:0", dtype, "cuda") == "cuda"
    assert backends.choose("cuda:0", storage=torch.float16) == "cuda"
    assert [backends.choose("cuda:0", torch.float64, "cuda") for _ in range(2)] == ["reference"] * 2
    reason = "it computes in float32 and narrower; float64 falls back to the reference"
    assert [r.getMessage() for r in caplog.records] == [f"backend cuda is not used: {reason}"]
    assert backends.choose("cuda:0", torch.float64) == "reference"
    with pytest.raises(BackendError, match=r"it computes in float32, float16 and bfloat16, these are torch\.int32"):
        backends.choose("cuda:0", torch.int32, "cuda")
    for on_cpu in (torch.float32, torch.float64):
        with pytest.raises(BackendError, match="it runs on cuda tensors, these are on cpu"):
            backends.choose("cpu", on_cpu, "cuda")


@pytest.fixture
def chosen_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every call takes the backend cuda, on CPU tensors; the list gets the ops that are called."""
    called: list[str] = []
    for name in ("relax", "contrast"):
        run = getattr(ops, name)

        def record(*args: Any, name: str = name, run: Any = run) -> Any:
            called.append(name)
            return run(*args)

        monkeypatch.setattr(ops, name, record)
    monkeypatch.setattr(backends, "choose", lambda *_, **__: "cuda")
    return called


def test_cuda_runs_the_compiled_ops(chosen_cuda: list[str]) -> None:
    p = problem(NETWORKS["max"])
    named = {name: t.float() for name, t in p.parameters.named().items()}
    parameters = ep_kernels.Parameters.from_named(p.network, named)
    ep_kernels.ep_gradients(p.network, parameters, p.x.float(), [t.float() for t in p.targets])
    assert chosen_cuda == ["relax", "relax", *["contrast"] * len(p.network.connections)]


def test_relaxations_of_other_dtypes_go_through_the_reference(
    chosen_cuda: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ep_kernels")
    p = problem(NETWORKS["max"])
    for _ in range(2):
        free_phase(p.network, p.parameters, p.x)
    assert chosen_cuda == []
    said = "backend cuda is not used: parameters of torch.float64 go through the reference"
    assert [r.getMessage() for r in caplog.records] == [said]


# --- auto on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "first", "other"),
    [((8, 0), "cuda", "triton"), ((8, 9), "cuda", "triton"), ((9, 0), "triton", "cuda"), ((12, 0), "triton", "cuda")],
)
def test_auto_where_nothing_was_measured(
    capability: tuple[int, int],
    first: str,
    other: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="ep_kernels")
    cuda_is(monkeypatch, capability=capability, triton="3.9.0")
    assert [backends.choose("cuda:0") for _ in range(2)] == [first] * 2
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.startswith(f"backend {other} is not used: nothing was measured (ep-kernels tune), and on compute")
    assert f"capability {capability[0]}.{capability[1]} auto takes {first}: " in said
    assert backends.choose("cuda:0", name=other) == other
    assert backends.choose("cpu") == "cpu"


def test_auto_takes_the_only_one_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_is(monkeypatch, capability=(9, 0))
    assert backends.choose("cuda:0") == "cuda"
    cuda_is(monkeypatch, None, (8, 0), triton="3.9.0")
    assert backends.choose("cuda:0") == "triton"
    cuda_is(monkeypatch, ("9.0a",), (8, 0), triton="3.9.0")
    assert backends.choose("cuda:0") == "triton"


def test_auto_takes_the_winner_of_a_race(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EP_KERNELS_CACHE", str(tmp_path))
    cuda_is(monkeypatch, capability=(9, 0), triton="3.9.0")
    machine = backends.machine(torch.device("cuda:0"))
    assert (machine.device, machine.ep_kernels, machine.triton) == ("NVIDIA Test 9000", ep_kernels.__version__, "3.9.0")
    races.store({"a": races.Race({"cuda": 1e-4, "triton": 2e-4}, {})}, machine)
    races.store({"b": races.Race({"cuda": 2e-4, "triton": 1e-4}, {})}, machine)
    keys = iter("abc")
    assert [backends.choose("cuda:0", race=lambda: next(keys)) for _ in range(3)] == ["cuda", "triton", "triton"]
    assert backends.choose("cuda:0", race=lambda: "a", dtype=torch.float64) == "reference"
    assert backends.choose("cuda:0", name="triton", race=lambda: pytest.fail("a name was given")) == "triton"
    cuda_is(monkeypatch, None, (9, 0), triton="3.9.0")  # a winner that cannot run any more
    assert backends.choose("cuda:0", race=lambda: "a") == "triton"


def test_what_runs_is_recorded() -> None:
    p = problem(NETWORKS["max"])
    with backends.recorded() as jobs:
        ep_kernels.ep_gradients(p.network, p.parameters, p.x, p.targets, backend="cpu")
    free, nudged, contrasts = jobs
    assert isinstance(free, Relaxation)
    assert isinstance(nudged, Relaxation)
    assert isinstance(contrasts, tuple)
    assert len(contrasts) == len(p.network.connections)
    keys = [races.key_of(job) for job in jobs]
    assert len(set(keys)) == 3
    found = backends.run_job(free, "cpu")
    assert isinstance(found, Relaxed)
    ep_kernels.ep_gradients(p.network, p.parameters, p.x, p.targets, backend="cpu")
    assert len(jobs) == 3


# --- the ops by name ------------------------------------------------------------------------------------------------


def test_ops_of_triton_have_the_same_schemas() -> None:
    ops.ensure()
    for name in ops.NAMES:
        own, triton = (getattr(torch.ops.ep_kernels, n).default for n in (name, f"triton_{name}"))
        assert str(triton._schema) == str(own._schema).replace(f"::{name}", f"::triton_{name}")
    shapes = torch.ops.ep_kernels.triton_drive(
        torch.empty(2, 3, 8, 8, device="meta"), torch.empty(4, 3, 3, 3, device="meta"), [1, 1], [1, 1], 1
    )
    assert [tuple(t.shape) for t in shapes] == [(2, 4, 4, 4)] * 2


def test_ops_of_triton_on_cpu_tensors_need_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_is(monkeypatch, capability=(9, 0))
    with pytest.raises(RuntimeError, match=r"ep_kernels::triton_drive cannot run: it runs on cuda tensors"):
        ops.triton_drive(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3), [1, 1], [1, 1], 0, None)
    triton_is(monkeypatch, None)
    with pytest.raises(RuntimeError, match=r"ep_kernels::triton_drive cannot run: triton is not installed"):
        ops.triton_drive(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3), [1, 1], [1, 1], 0, None)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_functional_ops_of_a_named_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of triton run the ops that are always Triton's."""
    monkeypatch.setattr(functional, "choose", lambda *_: name)
    called: list[str] = []
    for prefix in ("", "triton_"):

        def drive(*args: Any, prefix: str = prefix) -> tuple[torch.Tensor, torch.Tensor]:
            called.append(prefix)
            return torch.zeros(1), torch.zeros(1)

        monkeypatch.setattr(ops, f"{prefix}drive", drive)
    functional.drive(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3))
    assert called == ["triton_" if name == "triton" else ""]


def test_ops_on_cuda_tensors_without_any_kernels_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_is(monkeypatch, None)
    with pytest.raises(RuntimeError, match=r"ep_kernels::drive on CUDA tensors needs .* triton: triton is not"):
        ops._on_cuda("drive")()
    with pytest.raises(RuntimeError, match=r"cuda: this build has no CUDA kernels.*EP_KERNELS_BUILD=cuda pip install"):
        ops._on_cuda("relax")()


def test_release_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing on a CPU build; what every loaded GPU backend keeps elsewhere."""
    ep_kernels.release()
    forgotten = []
    monkeypatch.setattr(backends._cuda_contrasts, "clear", lambda: forgotten.append("contrasts"))
    monkeypatch.setitem(sys.modules, "ep_kernels.triton", SimpleNamespace(clear=lambda: forgotten.append("triton")))
    ep_kernels.release()
    without_library(monkeypatch)
    ep_kernels.release()
    assert forgotten == ["contrasts", "triton"] * 2
