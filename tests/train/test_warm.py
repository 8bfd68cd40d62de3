"""Warm states: what comes back is what was kept, sweeps are saved, and memory is refused before it is taken."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from ep_kernels import RelaxConfig, free_phase
from ep_train.warm import WarmStates, _group_limits
from tests.core.nets import NETWORKS, problem
from tests.core.threads import one_thread  # noqa: F401  (autouse)

NET = NETWORKS["max"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.float16, 5e-4)])
def test_states_come_back_by_image(dtype: torch.dtype, tolerance: float) -> None:
    p = problem(NET, batch=3)
    states = [None, *(s.float() for s in p.states()[1:])]
    kept = WarmStates(NET, 10, dtype=dtype)
    kept.put(torch.tensor([7, 0, 4]), states)
    like = torch.zeros(0)
    got = kept.get(torch.tensor([4, 5, 7]), like)
    assert got[0] is None
    for s, state in zip(states[1:], got[1:], strict=True):
        assert state is not None
        assert state.dtype == torch.float32
        torch.testing.assert_close(state[0], s[2], rtol=0, atol=tolerance)
        torch.testing.assert_close(state[2], s[0], rtol=0, atol=tolerance)
        assert not bool(state[1].any())  # never seen
    assert kept.get(torch.tensor([0]), like.double())[1].dtype == torch.float64


def test_an_unseen_image_relaxes_as_without_a_warm_start() -> None:
    p = problem(NET)
    kept = WarmStates(NET, 3)
    config = RelaxConfig(free_steps=4)
    cold = free_phase(NET, p.parameters, p.x, config)
    warm = free_phase(NET, p.parameters, p.x, config, states=kept.get(torch.arange(3), p.x))
    for a, b in zip(cold.states, warm.states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_seen_image_goes_on_where_it_ended() -> None:
    p = problem(NET, gain=0.7)
    kept = WarmStates(NET, 3)
    config = RelaxConfig(free_steps=3, over_relaxation=1.0)
    rows, residuals = torch.tensor([2, 0, 1]), []
    for _ in range(6):
        found = free_phase(NET, p.parameters, p.x, config, states=kept.get(rows, p.x))
        kept.put(rows, found.states)
        residuals.append(float(found.residual.max()))
    long = free_phase(NET, p.parameters, p.x, RelaxConfig(free_steps=18, over_relaxation=1.0))
    for a, b in zip(long.states, found.states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # kept in float32
    assert residuals[-1] < 1e-2 * residuals[0]


def test_a_checkpoint_restores_the_same_bits() -> None:
    p = problem(NET)
    first = WarmStates(NET, 5)
    first.put(torch.tensor([1, 3, 4]), p.states())
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = WarmStates(NET, 5)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(first.states, second.states, strict=True))
    given = second.state_dict()
    third = WarmStates(NET, 5)
    third.load_state_dict(given)
    assert all(a is b for a, b in zip(given["states"], third.states, strict=True))  # taken over, not copied
    with pytest.raises(ValueError, match="argument 'state': expected states of shapes"):
        WarmStates(NET, 6).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="argument 'state': expected states of dtypes"):
        WarmStates(NET, 5, dtype=torch.float16).load_state_dict(first.state_dict())


def test_states_that_are_not_finite_start_again_from_zero() -> None:
    p = problem(NET)
    kept = WarmStates(NET, 3)
    kept.put(torch.arange(3), p.states())
    broken = p.states(1)
    broken[2][1, 0, 0, 0] = float("nan")
    kept.put(torch.arange(3), broken)
    for s, state in zip(broken[1:], kept.states, strict=True):
        assert not bool(state[1].any())
        assert torch.equal(state[[0, 2]], s[[0, 2]].float())


def test_the_limit_of_a_control_group(tmp_path: Path) -> None:
    """Of both versions; the smallest of the groups that hold this process."""
    own, groups = tmp_path / "own", tmp_path / "cgroup"
    for folder, name, limit in (
        ("", "memory.max", "max"),
        ("job", "memory.max", "5000\n"),
        ("job/step", "memory.max", "7000\n"),
        ("memory/job", "memory.limit_in_bytes", "4000\n"),
    ):
        (groups / folder).mkdir(parents=True, exist_ok=True)
        (groups / folder / name).write_text(limit)
    own.write_text("0::/job/step\n")
    assert sorted(_group_limits(groups, own)) == [5000, 7000]
    own.write_text("5:cpu,cpuacct:/job\n4:memory:/job/step\n0::/\n")
    assert _group_limits(groups, own) == [4000]
    own.write_text("0::/../elsewhere\n")
    assert _group_limits(groups, own) == []
    assert _group_limits(groups, tmp_path / "none") == []


def test_memory() -> None:
    per_image = 3 * 64 + 4 * 16 + 5 * 16 + 4 * 4
    assert WarmStates.bytes_needed(NET, 1000) == 4000 * per_image
    assert WarmStates.bytes_needed(NET, 1000, torch.float16) == 2000 * per_image
    limit = 3000 * per_image
    WarmStates(NET, 1000, dtype=torch.float16, limit=limit)
    with pytest.raises(ValueError, match=r"of 1000 images take 0\.00 GB \(1\.4 kB each\).*store them as float16"):
        WarmStates(NET, 1000, limit=limit)
    with pytest.raises(ValueError, match=r"more than the limit of"):  # before any is taken
        WarmStates(NET, 1 << 50)
    with pytest.raises(ValueError, match=r"expected torch\.float32 or torch\.float16, got torch\.bfloat16"):
        WarmStates(NET, 1, dtype=torch.bfloat16)
