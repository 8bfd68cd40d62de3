"""Which backend runs: by name, by environment, by context, automatically; and what is said when one cannot."""

from __future__ import annotations

import logging

import pytest
import torch

import ep_kernels
from ep_kernels import BackendError, RelaxConfig, _library, backend, backends, free_phase
from tests.core.nets import NETWORKS, problem


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    monkeypatch.setattr(backends, "_logged", set())


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
    assert all(record.name == "ep_kernels" and record.levelno == logging.INFO for record in caplog.records)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_named_backend_that_cannot_run_raises_with_the_reason(name: str) -> None:
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
