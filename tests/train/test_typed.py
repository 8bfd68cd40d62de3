"""Types of options: what a JSON file or a caller may get wrong is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ep_train import TrainConfig
from ep_train.typed import fits

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"method": "foo"}, "argument 'method': expected one of ep, bptt, backprop, got 'foo'"),
    ({"optimizer": "lion"}, "argument 'optimizer': expected one of adam, adamw, sgd, got 'lion'"),
    ({"feedback": "seperate"}, "argument 'feedback'"),
    ({"flip": "false"}, "argument 'flip': expected bool, got 'false'"),
    ({"lr_schedule": "cos"}, "argument 'lr_schedule'"),
    ({"local_weight": 0.1}, "argument 'local_weight': expected tuple"),
    ({"local_weight": (0.1, "a")}, "argument 'local_weight'"),
    ({"box": (0.0, 1.0, 2.0)}, "argument 'box'"),
    ({"epochs": 1.5}, "argument 'epochs': expected int, got 1.5"),
    ({"epochs": True}, "argument 'epochs': expected int, got True"),
    ({"teacher": 3}, "argument 'teacher': expected str or None, got 3"),
    ({"out": "runs"}, "argument 'out': expected Path or None, got 'runs'"),
    ({"on_divergence": "x"}, "argument 'on_divergence'"),
    ({"distill_feature_loss": "x"}, "argument 'distill_feature_loss'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(WRONG)])
def test_wrong_types_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_what_fits() -> None:
    TrainConfig(lr=1, out=Path("x"), train_limit=None, local_weight=(1,), distill_features=())
    assert fits((1, 2.0), tuple[float, float])
    assert fits((), tuple[float, ...])
    assert not fits((1,), tuple[float, float])
    assert not fits([1.0], tuple[float, ...])
