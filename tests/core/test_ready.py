"""Gradients that are handed out as soon as they are computed, for those who send them elsewhere meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_kernels import RelaxConfig, ep_gradients, free_phase, nudged_gradients, reference, relax_op
from tests.core.nets import BACKENDS, NETWORKS, VARIANTS, problem
from tests.core.threads import one_thread  # noqa: F401  (autouse)

ALL = {**NETWORKS, **VARIANTS}
CONFIG = RelaxConfig(free_steps=3, nudged_steps=2)


@pytest.mark.parametrize("estimator", ["symmetric", "five_phase"])
@pytest.mark.parametrize("name", ALL)
def test_every_gradient_is_handed_out_once_and_may_be_written_to(name: str, estimator: Any) -> None:
    p, config = problem(ALL[name]), replace(CONFIG, estimator=estimator)
    want = ep_gradients(p.network, p.parameters, p.x, p.targets, config)[0].named()
    handed: list[str] = []

    def double(key: str, gradient: Tensor) -> None:
        torch.testing.assert_close(gradient, want[key], rtol=0, atol=0)
        handed.append(key)
        gradient.mul_(2)

    found = free_phase(p.network, p.parameters, p.x, config, keep=True)
    got, _ = nudged_gradients(p.network, p.parameters, found, p.targets, config, ready=double)
    assert sorted(handed) == sorted(want)
    assert {key: torch.equal(g, 2 * want[key]) for key, g in got.named().items()} == dict.fromkeys(want, True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_is_handed_out_before_the_next_one_is_computed(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(NETWORKS["slope 1/2, local heads"])
    module = reference if backend == "reference" else relax_op
    original, seen = module.contrast, []

    def contrast(*arguments: Any, **options: Any) -> Any:
        seen.append("contrast")
        return original(*arguments, **options)

    monkeypatch.setattr(module, "contrast", contrast)
    found = free_phase(p.network, p.parameters, p.x, CONFIG, keep=True, backend=backend)
    nudged_gradients(
        p.network, p.parameters, found, p.targets, CONFIG, backend=backend, ready=lambda name, _: seen.append(name)
    )
    heads = [f"heads.{h}.{what}" for what in ("weight", "bias") for h in range(3)]
    connections = [
        text for c in (3, 2, 1, 0) for text in ("contrast", f"connections.{c}.weight", f"nodes.{c + 1}.bias")
    ]
    assert seen == [*heads, *connections]  # from the top
