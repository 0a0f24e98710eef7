"""What the benchmarks share: bytes moved, turns, and a closing table of bandwidth and ratios to the peers."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest

# Threads that have slept are woken on one core by some kernels, of virtual machines above all, and moved
# apart tens of milliseconds later. OpenMP reads this when it is loaded; it is torch's and FBGEMM's, too.
os.environ.setdefault("OMP_PROC_BIND", "true")
# Before torch, which has OpenMP bind this thread to a core: Numba counts the cores that it may use.
import fastopt  # noqa: F401

WARM = 1e-3  # seconds of calls that are not measured, before each that is
PAUSE = 30e-3  # seconds, in which threads of the one before stop waiting busily


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """``measure(group, function, bytes_moved=0, rounds=15)`` times ``function()`` after two unmeasured
    calls, which compile it and touch its memory. The test called ``*_fastopt`` is the group's subject."""

    def run(group: str, function: Callable[[], Any], bytes_moved: int = 0, rounds: int = 15) -> None:
        benchmark.group = group
        benchmark.extra_info["bytes"] = bytes_moved
        benchmark.pedantic(function, rounds=rounds, warmup_rounds=2)

    return run


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., None]:
    """``compare(group, functions, rounds=15)`` times functions in turns, since the speed of a machine drifts.

    ``functions``: name -> (function, bytes moved), the first one fastopt's. Each turn of each is preceded by
    unmeasured calls of its own. pytest-benchmark reports the first; medians of all, and of each one's time
    divided by that of the first in the same turn, with their quartiles, are in ``extra_info["members"]``.
    """

    def run(group: str, functions: Mapping[str, tuple[Callable[[], Any], int]], rounds: int = 15) -> None:
        times: dict[str, list[float]] = {name: [] for name in functions}
        (own, (subject, bytes_moved)), *peers = functions.items()
        for function, _ in functions.values():  # compile and touch memory
            function()
            function()

        def turns_of_others() -> None:
            for name, (function, _) in peers:
                warm_up(function)
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
            warm_up(subject)

        benchmark.group = group
        benchmark.extra_info["bytes"] = bytes_moved
        benchmark.pedantic(subject, setup=turns_of_others, rounds=rounds)
        if not benchmark.enabled:
            return
        times[own] = list(benchmark.stats.stats.data)
        benchmark.extra_info["members"] = {
            name: {"bytes": moved, **figures(times[name], times[own])}
            for name, (_, moved) in functions.items()
        }

    return run


def warm_up(function: Callable[[], Any]) -> None:
    time.sleep(PAUSE)
    end = time.perf_counter() + WARM
    function()
    while time.perf_counter() < end:
        function()


def figures(times: list[float], own: list[float]) -> dict[str, float]:
    """The median time, and of its ratio to that of the same turn the median and quartiles."""
    ratios = [a / b for a, b in zip(times, own, strict=True)]
    low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return {"median": statistics.median(times), "ratio": ratio, "low": low, "high": high}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


class Line(NamedTuple):
    """What is printed of a function."""

    group: str
    name: str
    median: float
    bytes_moved: int
    ratio: str = ""

    @property
    def rate(self) -> float:
        return self.bytes_moved / self.median / 1e9


def lines_of(benchmarks: list[Any]) -> list[Line]:
    lines = []
    for b in benchmarks:
        members = b.extra_info.get("members")
        if members is None:
            same = [other for other in benchmarks if other.group == b.group]
            own = next((o.stats.median for o in same if o.name.split("[")[0].endswith("fastopt")), None)
            ratio = f"{b.stats.median / own:8.2f} x" if own else ""
            lines.append(Line(b.group, b.name, b.stats.median, b.extra_info.get("bytes", 0), ratio))
            continue
        for name, m in members.items():
            ratio = f"{m['ratio']:8.2f} x ({m['low']:.2f} to {m['high']:.2f})"
            lines.append(Line(b.group, name, m["median"], m["bytes"], ratio))
    return lines


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    runs = [b for b in session.benchmarks if b.stats.rounds] if session else []
    if not runs:
        return
    lines = lines_of(runs)
    best = max(line.rate for line in lines)
    write = terminalreporter.write_line
    terminalreporter.section("medians: time, bandwidth, share of the best bandwidth seen, ratio to fastopt")
    for group in dict.fromkeys(line.group for line in lines):
        write(group)
        for line in (line for line in lines if line.group == group):
            speed = f"{line.rate:8.1f} GB/s {line.rate / best:6.0%}" if line.rate else " " * 20
            write(f"  {line.name:44} {line.median * 1e3:11.4f} ms {speed} {line.ratio}")
