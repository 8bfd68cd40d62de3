"""``python -m benchmarks.cpu [--json]``: the CPU kernels against what they replace, in one run on one machine.

(1) One full sweep of a free phase against its convolutions alone, and against a step of the autograd-of-energy loop.
(2) One whole training batch, at a measured gradient cosine, against a backprop batch of the feed-forward net of the
same shape and against the autograd loop at its published T and K.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path

import torch

import ep_kernels
from benchmarks.baselines import AutogradLoop, Convolutions, FeedForward, backprop
from benchmarks.machine import cpu_name, revision
from benchmarks.timing import Times, interleave, ratio
from ep_kernels import Network, Parameters, RelaxConfig, ops
from ep_train.check import compare, smallest_cosine, true_gradients
from ep_train.models import initial_parameters

SWEEPS = 4  # a sweep's time is the difference between a phase of 2 + SWEEPS sweeps and one of 2, over SWEEPS
TARGETS = (
    ("sweep / convolutions", "<=", 1.10),
    ("autograd step / sweep", ">=", 1.8),
    ("EP batch / backprop batch", "<=", 3.0),
    ("autograd batch / EP batch", ">=", 10.0),
    ("smallest gradient cosine", ">=", 0.98),
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds; medians are over these (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--batch", type=int, default=32, help="images (default 32)")
    parser.add_argument("--width", type=float, default=1.0, help="factor of the widths 128-256-512-512 (default 1)")
    parser.add_argument("--feedback-gain", type=float, default=0.02, help="k (default 0.02)")
    parser.add_argument("--free-steps", type=int, default=2, help="T of our batch (default 2)")
    parser.add_argument("--nudged-steps", type=int, default=1, help="K of our batch (default 1)")
    parser.add_argument("--loop-steps", type=int, nargs=2, default=(250, 30), metavar=("T", "K"),
                        help="of the autograd loop (default 250 30, as published)")  # fmt: skip
    parser.add_argument("--loop-rounds", type=int, default=1, help="whole batches of the autograd loop (default 1)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    widths = [max(1, round(args.width * c)) for c in (128, 256, 512, 512)]
    network = Network.chain((3, 32, 32), widths, ["max"] * 4, classes=10, feedback_gain=args.feedback_gain)
    parameters = Parameters.from_named(network, initial_parameters(network))
    x = torch.rand(args.batch, 3, 32, 32)
    labels = torch.randint(0, 10, (args.batch,))
    sweep, sweep_ratios = sweeps(network, parameters, x, args)
    batch, batch_ratios = batches(network, parameters, x, labels, args)
    ratios = {**sweep_ratios, **batch_ratios}
    result = {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.cpu " + " ".join(sys.argv[1:] if argv is None else argv),
        "machine": machine(args.threads),
        "network": {"widths": widths, "input": [3, 32, 32], "batch": args.batch, "feedback_gain": args.feedback_gain},
        "sweep": sweep,
        "batch": batch,
        "targets": [
            {
                "measure": name,
                "value": ratios[name],
                "target": f"{sign} {bound}",
                "met": ratios[name] <= bound if sign == "<=" else ratios[name] >= bound,
            }
            for name, sign, bound in TARGETS
        ],
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2) if args.json else table(result))
    return 0


Rows = dict[str, object]
Ratios = dict[str, float]


def sweeps(network: Network, parameters: Parameters, x: torch.Tensor, args: argparse.Namespace) -> tuple[Rows, Ratios]:
    """Question 1."""
    loop = AutogradLoop(network, parameters)
    states = loop.relax(x, 3)
    convolutions = Convolutions(network, parameters, args.batch)

    def phase(steps: int) -> object:
        return ep_kernels.free_phase(network, parameters, x, RelaxConfig(free_steps=steps), backend="cpu")

    times = interleave(
        {
            "short": lambda: phase(2),
            "long": lambda: phase(2 + SWEEPS),
            "convolutions": lambda: [convolutions.run() for _ in range(SWEEPS)],
            "autograd": lambda: [loop.step(x, states) for _ in range(SWEEPS)],
        },
        rounds=args.rounds,
        warmup=2,
    )
    pairs = zip(times["long"].seconds, times["short"].seconds, strict=True)
    sweep = Times("one sweep", [(a - b) / SWEEPS for a, b in pairs])
    alone = Times("its convolutions alone", [t / SWEEPS for t in times["convolutions"].seconds])
    step = Times("one autograd step", [t / SWEEPS for t in times["autograd"].seconds])
    ratios = {
        "sweep / convolutions": ratio(sweep, alone).median,
        "autograd step / sweep": ratio(step, sweep).median,
    }
    return {"rows": [t.row() for t in (sweep, alone, step)]}, ratios


def batches(
    network: Network, parameters: Parameters, x: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace
) -> tuple[Rows, Ratios]:
    """Question 2. The backprop net gets channels_last memory, which is faster for it."""
    config = RelaxConfig(free_steps=args.free_steps, nudged_steps=args.nudged_steps, estimator="tangent")
    targets = ep_kernels.targets_for(network, labels, 10, x.dtype)

    def ours() -> tuple[Parameters, ep_kernels.Equilibrium]:
        return ep_kernels.ep_gradients(network, parameters, x, targets, config, backend="cpu")

    gradients, equilibrium = ours()
    true, settled = true_gradients(network, parameters, equilibrium.states, targets, steps=20)
    rows = compare(gradients, true)
    model = FeedForward(network, parameters).to(memory_format=torch.channels_last)
    image = x.contiguous(memory_format=torch.channels_last)
    check_feed_forward(network, parameters, model, image)
    times = interleave(
        {"EP batch": ours, "backprop batch": lambda: backprop(model, image, labels)}, rounds=args.rounds, warmup=2
    )
    loop = AutogradLoop(network, parameters)
    free_steps, nudged_steps = args.loop_steps
    slow = interleave(
        {"autograd batch": lambda: loop.batch(x, labels, free_steps, nudged_steps, 0.2)},
        rounds=args.loop_rounds,
        warmup=0,
    )["autograd batch"]
    against_backprop = ratio(times["EP batch"], times["backprop batch"]).median
    ratios = {
        "EP batch / backprop batch": against_backprop,
        "autograd batch / EP batch": slow.median / times["EP batch"].median,
        "smallest gradient cosine": smallest_cosine(rows),
    }
    section: Rows = {
        "rows": [t.row() for t in (times["EP batch"], times["backprop batch"], slow)],
        "ours": f"T {args.free_steps} + K {args.nudged_steps}, tangent, sweep",
        "loop": f"T {free_steps}, K {nudged_steps}",
        "cosines": {row.name: row.cosine for row in rows},
        "true_residual": settled,
    }
    return section, ratios


def check_feed_forward(network: Network, parameters: Parameters, model: FeedForward, x: torch.Tensor) -> None:
    """The first free sweep has no feedback, so it is the feed-forward net: a wrong baseline stops here."""
    first = ep_kernels.free_phase(network, parameters, x, RelaxConfig(free_steps=1), backend="cpu")
    torch.testing.assert_close(ep_kernels.readout(network, parameters, first), model(x), rtol=1e-3, atol=1e-4)


def machine(threads: int) -> Rows:
    """Where this was measured."""
    return {
        "cpu": cpu_name(),
        "threads": threads,
        "isa": ops.cpu_isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ep_kernels": ep_kernels.__version__,
        "revision": revision(),
    }


def table(result: dict[str, object]) -> str:
    """For people."""
    lines = [f"{k}: {v}" for k, v in {**result["machine"], **result["network"]}.items()]  # type: ignore[dict-item]
    for section in ("sweep", "batch"):
        lines.append("")
        lines += [
            f"{row['name']:24s}{row['ms']['0.5']:12.2f} ms  ({row['ms']['0.2']:.2f} to {row['ms']['0.8']:.2f})"
            for row in result[section]["rows"]  # type: ignore[index]
        ]
    lines.append("")
    for row in result["targets"]:  # type: ignore[attr-defined]
        verdict = "met" if row["met"] else "MISSED"
        lines.append(f"{row['measure']:28s}{row['value']:10.3f}   target {row['target']:8s} {verdict}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
