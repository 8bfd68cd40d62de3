"""The cost model: how long a data-parallel step takes on processes that nobody has, from what one machine measured.

A step is ``compute(b) + exchange + optimizer``: nothing overlaps, as gradients exist only after the contrast.

    compute(b)        = a + c b                                                  b: images a process
    exchange          = copies + sum over buckets of all_reduce(bytes)
    ring(n, bytes)    = 2 (n - 1) / n bytes / bandwidth + 2 (n - 1) latency      Patarasuk & Yuan 2009
    all_reduce(bytes) = ring(g, bytes) by the node's link + ring(m, bytes / g) by the network's

for m nodes of g processes: reduce-scatter in the node, all-reduce of each process's part between nodes, all-gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.case import Row

GIGA, MICRO = 1e9, 1e-6


@dataclass(frozen=True)
class Line:
    """``constant + slope x``, in seconds; ``spread``: the largest relative deviation of what it was fitted to."""

    constant: float
    slope: float
    spread: float = 0.0

    def at(self, x: float) -> float:
        return self.constant + self.slope * x


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Least squares of the relative deviations (small times count as much as large ones), both parts at least 0.

    Raises:
        ValueError: fewer than two different x, or a y that is not above 0.
    """
    if len(set(xs)) < 2 or min(ys) <= 0:
        raise ValueError(f"fit: expected two different x or more, with times above 0; got x {list(xs)}, y {list(ys)}")
    # rows (1, x) / y against 1
    s1 = sum(1 / y**2 for y in ys)
    sx = sum(x / y**2 for x, y in zip(xs, ys, strict=True))
    sxx = sum(x * x / y**2 for x, y in zip(xs, ys, strict=True))
    r1 = sum(1 / y for y in ys)
    rx = sum(x / y for x, y in zip(xs, ys, strict=True))
    det = s1 * sxx - sx * sx
    both = (r1 * sxx - rx * sx) / det, (s1 * rx - sx * r1) / det
    candidates = [both] if min(both) >= 0 else [(r1 / s1, 0.0), (0.0, rx / sxx)]

    def deviations(line: tuple[float, float]) -> list[float]:
        return [(line[0] + line[1] * x) / y - 1 for x, y in zip(xs, ys, strict=True)]

    best = min(candidates, key=lambda line: sum(d * d for d in deviations(line)))
    return Line(*best, max(map(abs, deviations(best))))


@dataclass(frozen=True)
class Link:
    """Between two neighbours of a ring: bytes/s a process and direction, seconds a message; ``source`` of both.

    ``peak``: the bandwidth of a data sheet, where ``bandwidth`` is a share of it; None: measured or given.
    """

    bandwidth: float
    latency: float
    source: str
    peak: float | None = None

    @property
    def best(self) -> Link:
        """The optimistic bound: at its peak."""
        return self if self.peak is None else replace(self, bandwidth=self.peak)

    def __str__(self) -> str:
        return f"{self.bandwidth / GIGA:.3g} GB/s, {self.latency / MICRO:.3g} us ({self.source})"


# Peak bandwidths a direction. NVIDIA H100 and H200 SXM data sheets: NVLink 900 GB/s, which is of both directions; DGX
# H100 data sheet: a ConnectX-7 of 400 Gb/s (NDR) for each GPU. Latencies: what NCCL's own tuner reckons with for rings
# of its Simple protocol (NVIDIA/nccl, src/graph/tuning.cc, hwLat: 3.4 us by NVLink, 14 us by network). No exchange
# reaches the peak: the share that one of buckets like these reaches is an assumption, the peak an optimistic bound.
SHARE = 0.7


def _shared(peak: float, latency: float, source: str) -> Link:
    """At its share of the peak."""
    return Link(SHARE * peak, latency, f"{100 * SHARE:.0f} % of {source}; latency of NCCL's tuner", peak)


NVLINK = _shared(450 * GIGA, 3.4 * MICRO, "NVLink 4's 450 GB/s, data sheet")
INFINIBAND = _shared(50 * GIGA, 14 * MICRO, "NDR InfiniBand's 50 GB/s a GPU, data sheet")
# IEEE 802.3ae: 10 Gb/s. The latency is an assumption about TCP through one switch.
ETHERNET = Link(1.25 * GIGA, 50 * MICRO, "10 Gb/s Ethernet a machine, peak; latency assumed")


def ring(processes: int, size: float, link: Link) -> float:
    """Seconds of an all-reduce of ``size`` bytes around a ring."""
    steps = 2 * (processes - 1)
    return steps / processes * size / link.bandwidth + steps * link.latency


def link_of(line: Line, processes: int, source: str) -> Link:
    """The link with which a ring takes ``line`` seconds, x being bytes. The inverse of :func:`ring`.

    Raises:
        ValueError: times that do not grow with the size.
    """
    if line.slope <= 0:
        raise ValueError("link_of: the all-reduce takes no longer with more bytes: raise --steps, on a quieter machine")
    steps = 2 * (processes - 1)
    return Link(steps / processes / line.slope, line.constant / steps, source)


@dataclass(frozen=True)
class Cluster:
    """``nodes`` of ``per_node`` processes each."""

    nodes: int
    per_node: int

    @property
    def processes(self) -> int:
        return self.nodes * self.per_node


def clusters(per_node: int, *, whole: bool) -> list[Cluster]:
    """One node of 1, 2, 4 ... processes (``whole``: only full ones), then 2, 4 ... 64 nodes."""
    inside = [n for n in (1, 2, 4, 8, 16) if n < per_node and not whole]
    return [*(Cluster(1, n) for n in (*inside, per_node)), *(Cluster(m, per_node) for m in (2, 4, 8, 16, 32, 64))]


@dataclass(frozen=True)
class Cost:
    """Of one network, configuration and device.

    Args:
        compute: seconds of the gradients of a local batch, x being images.
        buckets: bytes of each.
        copies, optimizer: seconds of filling and emptying the buckets, and of an optimizer step.
        inside, between: links of a node and of the network.
    """

    compute: Line
    buckets: tuple[int, ...]
    copies: float
    optimizer: float
    inside: Link
    between: Link

    def exchange(self, cluster: Cluster) -> float:
        """Seconds until every process has the mean; 0 for one process."""
        if cluster.processes == 1:
            return 0.0
        g, m = cluster.per_node, cluster.nodes
        return self.copies + sum(ring(g, s, self.inside) + ring(m, s / g, self.between) for s in self.buckets)

    @property
    def best(self) -> Cost:
        """The optimistic bound: links at their peak."""
        return replace(self, inside=self.inside.best, between=self.between.best)

    def step(self, cluster: Cluster, batch: float, *, overlap: bool = False) -> float:
        """Seconds of a step with ``batch`` images a process.

        Args:
            overlap: the bound: the exchange hides behind the computation as far as it is no longer.
        """
        compute, exchange = self.compute.at(batch), self.exchange(cluster)
        return (max(compute, exchange) if overlap else compute + exchange) + self.optimizer


def predictions(cost: Cost, over: Sequence[Cluster], batch: int, total: int) -> list[Row]:
    """Rows for weak scaling (``batch`` images a process) and strong scaling (``total`` images), by cluster.

    Returns:
        ``predicted_ms``, ``images_per_second``, ``efficiency`` (images/s a process over those of the first cluster),
        and the same as ``overlap_...``: the bound with full overlap, and, where a link is a share of its peak, as
        ``peak_...``: the bound with links at their peaks. Strong scaling has rows where ``total`` can be divided
        evenly.
    """
    rows: list[Row] = []
    bounds = {"": (cost, False), "overlap_": (cost, True)}
    if cost.best != cost:
        bounds["peak_"] = (cost.best, False)
    for kind in ("weak", "strong"):
        for cluster in over:
            n = cluster.processes
            if kind == "strong" and total % n:
                continue
            local = batch if kind == "weak" else total // n
            row: Row = {
                "name": f"{kind}, predicted, {cluster.nodes} x {cluster.per_node}",
                "scaling": kind,
                "nodes": cluster.nodes,
                "per_node": cluster.per_node,
                "processes": n,
                "local_batch": local,
                "compute_ms": 1e3 * cost.compute.at(local),
                "exchange_ms": 1e3 * cost.exchange(cluster),
                "optimizer_ms": 1e3 * cost.optimizer,
            }
            first = over[0]
            base_local = batch if kind == "weak" else total / first.processes
            for prefix, (of, overlap) in bounds.items():
                seconds = of.step(cluster, local, overlap=overlap)
                base = of.step(first, base_local, overlap=overlap) / base_local  # seconds an image, of one process
                row |= {
                    f"{prefix}predicted_ms": 1e3 * seconds,
                    f"{prefix}images_per_second": n * local / seconds,
                    f"{prefix}efficiency": base / (seconds / local),
                }
            rows.append(row)
    return rows
