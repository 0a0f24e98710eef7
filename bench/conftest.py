"""What the benchmarks share: bytes moved, and a closing table of bandwidth and ratios to the peers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


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
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    runs = [b for b in session.benchmarks if b.stats.rounds] if session else []
    if not runs:
        return
    rate = {b.fullname: b.extra_info.get("bytes", 0) / b.stats.median / 1e9 for b in runs}
    best = max(rate.values())
    write = terminalreporter.write_line
    terminalreporter.section("medians: time, bandwidth, share of the best bandwidth seen, ratio to fastopt")
    for group in dict.fromkeys(b.group for b in runs):
        members = [b for b in runs if b.group == group]
        own = next((b.stats.median for b in members if b.name.split("[")[0].endswith("fastopt")), None)
        write(group)
        for b in members:
            ratio = f"{b.stats.median / own:8.2f} x" if own else ""
            speed = (
                f"{rate[b.fullname]:8.1f} GB/s {rate[b.fullname] / best:6.0%}"
                if rate[b.fullname]
                else " " * 20
            )
            write(f"  {b.name:44} {b.stats.median * 1e3:11.3f} ms {speed} {ratio}")
