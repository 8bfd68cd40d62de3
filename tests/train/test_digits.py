"""The main job, as `make train` runs it: the digits to 98.5 %, within half a minute of training."""

from __future__ import annotations

import statistics

from ep_train import TrainConfig, train


def test_digits_reach_their_accuracy(tmp_path, record_property):
    accuracies, seconds = [], []
    for seed in range(5):
        summary, _ = train(TrainConfig(seed=seed, out=tmp_path / str(seed), quiet=True))
        accuracies.append(summary["test_accuracy"])
        seconds.append(summary["seconds"])
    record_property("accuracies", accuracies)
    record_property("seconds", seconds)
    assert statistics.median(accuracies) >= 0.985, accuracies
    assert statistics.median(seconds) <= 30, seconds
