"""The cost model by hand, the mean gradient in two real processes, and the command itself, tiny."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.problem import network_of, problem_of
from benchmarks.scaling import __main__ as command
from benchmarks.scaling.buckets import GradientMean, split
from benchmarks.scaling.measure import fit_batches
from benchmarks.scaling.model import (
    INFINIBAND,
    NVLINK,
    Cluster,
    Cost,
    Line,
    Link,
    clusters,
    fit,
    link_of,
    predictions,
    ring,
)
from benchmarks.scaling.report import Links, lines, predicted_rows
from ep_kernels import Parameters, RelaxConfig, ep_gradients
from tests.core.threads import one_thread  # noqa: F401  (autouse)

GB, US = 1e9, 1e-6
FAST, SLOW = Link(100 * GB, 2 * US, "fast"), Link(10 * GB, 20 * US, "slow")
COST = Cost(Line(5e-3, 1e-3), (10**8, 10**7), 1e-3, 2e-3, FAST, SLOW)


# --- the cost model -----------------------------------------------------------------------------------------------


def test_ring_by_hand() -> None:
    # four processes: 6 messages of a quarter of 1 GB at 100 GB/s, 2 us each
    assert ring(4, 1e9, FAST) == pytest.approx(6 * (0.25e9 / 100e9 + 2e-6))
    assert ring(1, 1e9, SLOW) == 0


def test_nodes_exchange_parts_by_hand() -> None:
    # 2 nodes of 4: inside as above for each bucket; between nodes a quarter of it in 2 messages of a half
    inside = sum(6 * (s / 4 / 100e9 + 2e-6) for s in (1e8, 1e7))
    between = sum(2 * (s / 4 / 2 / 10e9 + 20e-6) for s in (1e8, 1e7))
    assert COST.exchange(Cluster(2, 4)) == pytest.approx(1e-3 + inside + between)
    assert COST.exchange(Cluster(1, 1)) == 0
    # 8 images: 13 ms of computation, and the optimizer
    assert COST.step(Cluster(2, 4), 8) == pytest.approx(13e-3 + 1e-3 + inside + between + 2e-3)
    assert COST.step(Cluster(2, 4), 8, overlap=True) == pytest.approx(13e-3 + 2e-3)


def test_fit_recovers_a_line_and_is_never_negative() -> None:
    line = fit([1, 4, 9], [3e-3 + 2e-4 * x for x in (1, 4, 9)])
    assert (line.constant, line.slope) == pytest.approx((3e-3, 2e-4))
    assert line.spread < 1e-9
    bent = fit([1, 2, 4], [1.0, 3.0, 9.0])  # its line would be below zero at 0
    assert bent.constant == 0
    assert bent.slope > 0
    assert bent.spread == pytest.approx(max(abs(bent.slope * x / y - 1) for x, y in ((1, 1), (2, 3), (4, 9))))
    with pytest.raises(ValueError, match="two different x"):
        fit([2, 2], [1.0, 1.1])


def test_a_link_is_found_from_its_ring() -> None:
    sizes = [1e4, 1e6, 3e7]
    found = link_of(fit(sizes, [ring(3, s, SLOW) for s in sizes]), 3, "here")
    assert (found.bandwidth, found.latency) == pytest.approx((SLOW.bandwidth, SLOW.latency))
    with pytest.raises(ValueError, match="takes no longer"):
        link_of(Line(1e-3, 0.0), 2, "noise")


def test_predictions_by_hand() -> None:
    rows = predictions(COST, clusters(8, whole=False), 8, 64)
    named = {(row["scaling"], row["processes"]): row for row in rows}
    assert [row["processes"] for row in rows if row["scaling"] == "weak"] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert max(n for kind, n in named if kind == "strong") == 64  # then less than one image each
    for kind in ("weak", "strong"):
        assert named[kind, 1]["efficiency"] == named[kind, 1]["overlap_efficiency"] == 1
    weak, strong = named["weak", 16], named["strong", 16]
    seconds = COST.step(Cluster(2, 8), 8)
    assert weak["predicted_ms"] == pytest.approx(1e3 * seconds)
    assert weak["images_per_second"] == pytest.approx(128 / seconds)
    assert weak["efficiency"] == pytest.approx(15e-3 / seconds)  # 5 + 8 + 2 ms alone
    assert strong["local_batch"] == 4
    assert strong["efficiency"] == pytest.approx(71e-3 / 16 / COST.step(Cluster(2, 8), 4))
    assert all(row["overlap_predicted_ms"] <= row["predicted_ms"] for row in rows)


def test_faster_links_never_predict_slower_steps() -> None:
    speeds = [1, 10, 50, 400]
    for slot in ("inside", "between"):
        times = []
        for speed in speeds:
            links = {"inside": FAST, "between": SLOW, slot: Link(speed * GB, 1 * US, "")}
            cost = Cost(COST.compute, COST.buckets, COST.copies, COST.optimizer, **links)
            times.append(cost.step(Cluster(4, 8), 8))
        assert times == sorted(times, reverse=True)
        assert times[0] > times[-1]


@pytest.mark.parametrize(("batch", "processes"), [(4, 1), (4, 4), (32, 2), (32, 4), (256, 8)])
def test_the_line_is_not_fitted_to_what_it_predicts(batch: int, processes: int) -> None:
    found = fit_batches(batch, processes)
    assert len(found) >= 2
    assert not {batch, batch // processes} & set(found)


def times_of(compute: Line, names: tuple[str, ...] = ("alone",), **more: float) -> dict[str, object]:
    """Entries as a worker returns them, in ms."""
    times = {f"{name}/{b}": 1e3 * compute.at(b) for name in names for b in (2, 4, 12)}
    times |= {name: 1e3 * seconds for name, seconds in more.items()}
    return {name: {"parts": [], "sum": {"0.2": t, "0.5": t, "0.8": t}} for name, t in times.items()}


def test_one_gpu_predicts_nodes_of_eight_by_the_constants_or_what_is_given() -> None:
    job = command.job_of(command.parser().parse_args(["--device", "cuda"]), 1)
    run = {
        "processes": 1,
        "nodes": 1,
        "threads": 1,
        "bucket_bytes": [10**7],
        "times": times_of(Line(1e-3, 1e-4), copies=1e-4, optimizer=2e-4),
    }
    rows, notes = predicted_rows(job, [run], Links(between_latency=5e-6), 4096)
    last = next(row for row in rows if row["scaling"] == "weak" and row["processes"] == 512)
    inside = ring(8, 1e7, NVLINK)
    between = ring(64, 1e7 / 8, Link(INFINIBAND.bandwidth, 5e-6, ""))
    assert last["exchange_ms"] == pytest.approx(1e3 * (1e-4 + inside + between))
    assert last["predicted_ms"] == pytest.approx(1e3 * (1e-3 + 256e-4 + 2e-4 + 1e-4 + inside + between))
    assert last["inside"] == str(NVLINK)
    assert "5 us (latency as given, else 70 % of NDR InfiniBand" in last["between"]
    # the data sheets' peaks are the optimistic bound
    peaks = ring(8, 1e7, Link(450 * GB, NVLINK.latency, "")), ring(64, 1e7 / 8, Link(50 * GB, 5e-6, ""))
    assert last["peak_predicted_ms"] == pytest.approx(1e3 * (1e-3 + 256e-4 + 2e-4 + 1e-4 + sum(peaks)))
    assert last["efficiency"] < last["peak_efficiency"] < 1
    assert any("count with 70 %, which is an assumption" in note for note in notes)
    # batches of 2 to 12 were timed: 256 images are beyond them, and 4096 / 512 are not
    assert last["outside"]
    strong = {row["processes"]: row for row in rows if row["scaling"] == "strong"}
    assert [n for n, row in strong.items() if not row["outside"]] == [512]
    assert any("extrapolated below b = 2 and above b = 12" in note for note in notes)
    assert any("strong efficiencies are over 1 with 4096 images each, which is extrapolated" in note for note in notes)
    text = lines([*rows, {"case": "", "name": "assumptions", "status": "ok", "assumptions": notes}])
    (line,) = (line for line in text if line.startswith("| 64 x 8 | 256 (outside) |"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[5] == f"{last['efficiency']:.2g}"
    assert cells[6:8] == [f"{last['peak_predicted_ms']:.4g}", f"{last['peak_efficiency']:.2g}"]
    assert any(line.startswith("| 64 x 8 | 8 |") for line in text)
    given = Links(100 * GB, None, 10 * GB, None)
    assert all("peak_predicted_ms" not in row for row in predicted_rows(job, [run], given, 4096)[0])
    assert any("measured on GPUs: 1; everything beyond is a prediction" in note for note in notes)
    # two GPUs that were measured: their link takes the place of the constant
    names = ("alone", "together")
    messages = {f"link/{s}": ring(2, s, SLOW) for s in (10**4, 10**6, 10**7)}
    two = {**run, "processes": 2, "times": times_of(Line(1e-3, 1e-4), names, copies=1e-4, optimizer=2e-4, **messages)}
    rows, _ = predicted_rows(job, [run, two], Links(), 4096)
    eight = next(row for row in rows if row["scaling"] == "weak" and row["processes"] == 8)
    assert eight["exchange_ms"] == pytest.approx(1e3 * (1e-4 + ring(8, 1e7, SLOW)))


# --- buckets ------------------------------------------------------------------------------------------------------


def test_buckets_hold_at_most_their_size() -> None:
    tensors = [torch.zeros(n) for n in (10, 10, 100, 5, 5)] + [torch.zeros(1, dtype=torch.float64)]
    groups = split(tensors, 4 * 20)
    assert [[t.numel() for t in group] for group in groups] == [[10, 10], [100], [5, 5], [1]]
    assert [id(t) for group in groups for t in group] == [id(t) for t in tensors]


def gradients_of(x: torch.Tensor, targets: list[torch.Tensor]) -> Parameters:
    """Of a tiny network with a bucket's worth of odd shapes."""
    network = network_of("5p-6", 8)
    config = RelaxConfig(free_steps=2, nudged_steps=1, estimator="tangent")
    parameters = problem_of(network, 6, "cpu").parameters
    return ep_gradients(network, parameters, x, targets, config, backend="reference")[0]


def one_of_two(rank: int, folder: str) -> None:
    """A process with its half of a batch; the first leaves the mean."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    problem = problem_of(network_of("5p-6", 8), 6, "cpu")
    half = slice(3 * rank, 3 * rank + 3)
    mean = GradientMean(size=400)  # several buckets
    for _ in range(2):  # the second time in the same buffers
        gradients = gradients_of(problem.x[half], [t[half] for t in problem.targets])
        if rank:  # processes need not agree on how their tensors lie in memory
            named = {name: t.contiguous() for name, t in gradients.named().items()}
            gradients = Parameters.from_named(problem.network, named)
        mean(gradients)
    torch.save(gradients.named(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_the_mean_of_two_processes_is_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    problem = problem_of(network_of("5p-6", 8), 6, "cpu")
    whole = gradients_of(problem.x, problem.targets).named()
    assert len(split(list(whole.values()), 400)) > 2
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == whole.keys()
        for name, expected in whole.items():
            assert expected.norm() > 0, name
            assert (found[name] - expected).norm() <= 1e-5 * expected.norm(), name


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_measures_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sub" / "scaling.json"
    processes = [1, 2] if command.cores() > 1 else [1]
    options = ["--quick", "--network-bandwidth", "3", "--network-latency", "7", "--json", str(out), "--processes"]
    assert command.main([*options, *map(str, processes)]) == 0
    rows = json.loads(out.read_text())
    assert all({"question", "case", "name", "status", "environment"} <= set(row) for row in rows)
    steps = [row for row in rows if "measured_ms" in row]
    assert {(row["processes"], row["name"]) for row in steps} >= {
        (n, name)
        for n in processes
        for name in (["step, one process alone"] if n == 1 else ["step, weak", "step, strong"])
    }
    for row in steps:
        assert row["relative_error"] == pytest.approx(row["predicted_ms"] / row["measured_ms"] - 1)
        assert row["measured_ms"] == row["ms"]["0.5"] > 0
        assert row["error"] <= 1e-5
        assert row["environment"]["threads"] == row["threads"] == max(1, command.cores() // row["processes"])
    two = {row["name"]: row for row in steps if row["processes"] == 2 and "scaling" in row}
    for row in two.values():
        assert row["error"] > 0  # two different sums: the check did compare
        assert {"compute_ms", "exchange_ms", "optimizer_ms", "together_relative_error"} <= set(row)
        assert math.isfinite(row["predicted_exchange_ms"])
    predicted = [row for row in rows if row["name"].startswith("weak, predicted")]
    assert [row["nodes"] for row in predicted] == [1, 2, 4, 8, 16, 32, 64]
    assert predicted[0]["between"] == "3 GB/s, 7 us (bandwidth and latency as given)"
    printed = capsys.readouterr().out
    assert "predictions for GPUs need a measurement on one GPU" in printed
    for row in steps:
        assert f"{100 * row['relative_error']:+.1f} %" in printed


def test_a_wrong_mean_is_not_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if command.cores() < 2:
        pytest.skip("needs two cores")
    out = tmp_path / "scaling.json"
    assert command.main(["--quick", "--processes", "2", "--tolerance", "0", "--json", str(out)]) == 1
    assert "Wrong: relative error" in capsys.readouterr().err
    assert not out.exists()


def test_a_process_that_dies_ends_the_run(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text("import os, time\nif os.environ['RANK'] == '1':\n    os.kill(os.getpid(), 9)\ntime.sleep(600)\n")
    with pytest.raises(command.Died, match=r"2 processes ended with exit code 1(.|\n)*dies\.py"):
        command.launch(2, [str(script)], seconds=120)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "0"], "--processes: expected 1 to"),
        (["--processes", "4096"], "--processes: expected 1 to"),
        (["--processes", "1", "--batch", "3"], "--batch: expected at least 4, and a multiple of 1"),
        (["--model", "nothing"], "expected one of"),
        (["--network-bandwidth", "0"], "--network-bandwidth: expected more than 0, got 0"),
        (["--node-latency", "-1"], "--node-latency: expected at least 0, got -1"),
        (["--backend", "cuda"], "--backend cuda: "),
        (["--json", __file__], "is not a result file"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(options) == 2
    assert message in capsys.readouterr().err


def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert command.main(["--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
