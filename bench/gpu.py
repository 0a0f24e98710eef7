"""How fast are updates on this machine's GPU? ``python bench/gpu.py [part of a name]``.

Each line has the time that the bytes of an update take at the bandwidth of a copy, measured here, beside
the time measured, and in turns with it torch's, and FBGEMM's where it is installed. Times are of CUDA events,
medians of ROUNDS turns. Before each call the second-level cache is filled with other data, and the device is
kept busy until the host has launched all of the call, so that the host's time is not in it; the host's is a
line of its own.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from draws import draw
from fbgemm import embedding_bags
from rich.console import Console
from rich.table import Table

import fastopt

ROUNDS = 15
FLUSHED = 256 << 20  # bytes, more than any second-level cache has
BUSY = 20_000_000  # cycles that the device is kept busy, some 10 milliseconds
GPT2 = [(50257, 768), (1024, 768)] + 12 * [
    (768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,), (768, 3072), (3072,),
    (3072, 768), (768,),
] + [(768,), (768,)]  # fmt: skip


class Case(NamedTuple):
    """Calls to be measured in turns, the first of them fastopt's, and the bytes that an update moves."""

    name: str
    calls: dict[str, Callable[[], Any]]
    bytes_moved: int


def seconds(case: Case, rounds: int = ROUNDS) -> dict[str, float]:
    """The median time of each call."""
    other = torch.empty(FLUSHED // 4, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in case.calls}
    for call in case.calls.values():
        call()
        call()
    for _ in range(rounds):
        for name, call in case.calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.zero_()
            torch.cuda._sleep(BUSY)
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e-3)
    return {name: statistics.median(own) for name, own in times.items()}


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    a, b = (torch.ones(1 << 28, device="cuda") for _ in range(2))
    return 2 * a.nbytes / seconds(Case("copy", {"copy": lambda: b.copy_(a)}, 0))["copy"]


# Dense


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> tuple[list, list]:
    """Ones, and gradients for them."""
    params = [torch.ones(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    return params, [p.grad for p in params]


def dense(
    name: str,
    shapes: list[tuple[int, ...]],
    optimizer: str,
    bytes_an_element: float,
    own: dict[str, Any] | None = None,
    peer: str | None = None,
    dtype: torch.dtype = torch.float32,
    **step: Any,
) -> Case:
    """An optimizer over arrays, and torch's fused one of the same name."""
    params, grads = parameters(shapes, dtype)
    opt = getattr(fastopt, optimizer)(params, lr=1e-3, **(own or {}))
    calls: dict[str, Callable[[], Any]] = {"fastopt": lambda: opt.step(grads, **step)}
    if peer is not None:
        theirs, _ = parameters(shapes, dtype)
        fused = getattr(torch.optim, peer)(theirs, lr=1e-3, fused=True, **(own or {}))

        def torch_step() -> None:
            if "clip_norm" in step:
                torch.nn.utils.clip_grad_norm_(theirs, step["clip_norm"], foreach=True)
            fused.step()

        calls["torch fused"] = torch_step
    size = sum(p.numel() for p in params)
    return Case(f"{name}, {size:,} elements", calls, int(size * bytes_an_element))


def dense_cases() -> Iterator[Callable[[], Case]]:
    for size in (1 << 20, 10_000_000, 1 << 25, 30_000_000, 100_000_000, 300_000_000):
        yield lambda size=size: dense("AdamW", [(size,)], "AdamW", 28, peer="AdamW")
    yield lambda: dense("AdamW, 148 arrays of GPT-2", GPT2, "AdamW", 28, peer="AdamW")
    yield lambda: dense("AdamW, GPT-2, clip_norm", GPT2, "AdamW", 32, peer="AdamW", clip_norm=1.0)
    size = [(100_000_000,)]
    yield lambda: dense("AdamW, bfloat16 state", size, "AdamW", 20, {"state_dtype": "bfloat16"})
    yield lambda: dense("AdamW, 8-bit state", size, "AdamW", 16, {"state_dtype": "8bit"})
    masters = {"master_weights": True}
    yield lambda: dense("AdamW, bfloat16, masters", size, "AdamW", 28, masters, dtype=torch.bfloat16)
    yield lambda: dense("SGD, momentum", size, "SGD", 20, {"momentum": 0.9}, peer="SGD")
    yield lambda: dense("AdaGrad", size, "AdaGrad", 20)
    yield lambda: dense("Lion", size, "Lion", 20)
    yield lambda: dense("LAMB", size, "LAMB", 44)
    yield lambda: dense("Adafactor", [(8192, 8192)], "Adafactor", 24)


# Tables


def table_case(rows: int, dim: int, count: int, kind: str, optimizer: str, states: int) -> Case:
    """Rows named by indices, against SparseAdam where it is that."""
    rng = np.random.default_rng(0)
    indices = torch.as_tensor(draw(rng, kind, rows, count), device="cuda")
    values = torch.full((count, dim), 1e-3, device="cuda")
    table = torch.ones(rows, dim, device="cuda")
    opt = getattr(fastopt, optimizer)(table, lr=1e-3)
    grad = fastopt.IndexedSlices(indices, values)
    calls: dict[str, Callable[[], Any]] = {"fastopt": lambda: opt.step(grad)}
    unchecked = fastopt.IndexedSlices(indices, values, check_indices=False)
    calls["fastopt, unchecked"] = lambda: opt.step(unchecked)
    if optimizer == "Adam":
        theirs = torch.ones(rows, dim, device="cuda", requires_grad=True)
        sparse = torch.optim.SparseAdam([theirs], lr=1e-3)

        def torch_step() -> None:
            theirs.grad = torch.sparse_coo_tensor(indices[None], values, (rows, dim), check_invariants=False)
            sparse.step()

        calls["SparseAdam"] = torch_step
    distinct = len(torch.unique(indices))
    moved = count * (8 + 4 * dim) + distinct * 8 * dim * (1 + states)
    return Case(f"{optimizer}, {rows:,} x {dim}, {count:,} {kind} indices", calls, moved)


def fbgemm_calls(
    indices: list[torch.Tensor], offsets: torch.Tensor, outputs: list[torch.Tensor], rows: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """FBGEMM's forward, and its backward with Adam, over a table for each of ``indices``, which all have bags
    of the same offsets; nothing where it is not installed."""
    try:
        operator = embedding_bags(len(indices), rows, outputs[0].shape[1], "ADAM", "cuda")
    except ImportError:
        return {}, {}
    # One list of the indices of all tables, one after the other, and outputs side by side.
    firsts = [offsets + k * len(own) for k, own in enumerate(indices)]
    together = torch.cat(indices), torch.cat([*firsts, firsts[-1][:1] + len(indices[-1])])
    grad_output, looked_up = torch.cat(outputs, dim=1), operator(*together)
    return (
        {"FBGEMM": lambda: operator(*together)},
        {"FBGEMM": lambda: looked_up.backward(grad_output, retain_graph=True)},
    )


def bags_case() -> tuple[Case, Case]:
    """10 tables of 1.68 M rows of 128, 1.05 M power-law lookups in all: forward, and backward with Adam.

    The configuration is that of FBGEMM's published figures (see the README)."""
    tables, rows, dim, bags, pooled = 10, 1_680_000, 128, 2048, 51
    rng = np.random.default_rng(0)
    weights = [torch.ones(rows, dim, device="cuda") for _ in range(tables)]
    indices = [torch.as_tensor(draw(rng, "zipf", rows, bags * pooled), device="cuda") for _ in weights]
    offsets = torch.arange(0, bags * pooled, pooled, device="cuda")
    outputs = [torch.full((bags, dim), 1e-3, device="cuda") for _ in weights]
    opt = fastopt.Adam(weights, lr=1e-3)
    grads = [
        fastopt.BagGradient(own, offsets, output, "sum", check_indices=False)
        for own, output in zip(indices, outputs, strict=True)
    ]

    def forward() -> None:
        for weight, own in zip(weights, indices, strict=True):
            fastopt.embedding_bag(weight, own, offsets, mode="sum", check_indices=False)

    forwards, backwards = fbgemm_calls(indices, offsets, outputs, rows)
    lookups = tables * bags * pooled
    distinct = sum(len(torch.unique(own)) for own in indices)
    read = lookups * (8 + 4 * dim) + tables * bags * 4 * dim
    updated = lookups * (8 + 4 * dim) + distinct * 4 * dim * 6
    name = f"10 tables of {rows:,} x {dim}, {lookups:,} lookups in bags"
    return (
        Case(f"{name}: forward", {"fastopt": forward, **forwards}, read),
        Case(f"{name}: backward and Adam", {"fastopt": lambda: opt.step(grads), **backwards}, updated),
    )


def table_cases() -> Iterator[Callable[[], Any]]:
    yield lambda: table_case(2_000_000, 64, 262_144, "zipf", "Adam", 2)
    yield lambda: table_case(2_000_000, 64, 262_144, "uniform", "Adam", 2)
    yield lambda: table_case(2_000_000, 64, 1_000_000, "zipf", "RowwiseAdaGrad", 0)
    yield lambda: table_case(10_000_000, 16, 1_000_000, "zipf", "Adam", 2)
    yield bags_case


def sort_case(count: int, rows: int) -> Case:
    """Indices sorted into segments, against torch's stable sort of the same numbers."""
    rng = np.random.default_rng(0)
    indices = torch.as_tensor(draw(rng, "zipf", rows, count), device="cuda")
    calls: dict[str, Callable[[], Any]] = {
        "fastopt": lambda: fastopt.IndexPlan(indices, rows, check_indices=False),
        "torch.sort": lambda: torch.sort(indices, stable=True),
    }
    return Case(f"plan of {count:,} indices", calls, count * 16 * 4)


def sort_cases() -> Iterator[Callable[[], Any]]:
    yield lambda: sort_case(262_144, 2_000_000)
    yield lambda: sort_case(1_048_576, 16_800_000)
    yield lambda: sort_case(10_000_000, 100_000_000)


def host_microseconds(call: Callable[[], Any], calls: int = 200) -> float:
    """How long the host is busy with a call that it does not wait for."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    taken = (time.perf_counter() - start) / calls * 1e6
    torch.cuda.synchronize()
    return taken


def host_lines() -> Iterator[tuple[str, float, float]]:
    """A step of one array, and of many: fastopt's time and torch fused's."""
    for name, shapes in (("1 array", [(1000,)]), ("148 arrays", [(1000,)] * 148)):
        case = dense(name, shapes, "AdamW", 28, peer="AdamW")
        own, other = (host_microseconds(call) for call in case.calls.values())
        yield name, own, other


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    name = torch.cuda.get_device_name()
    bandwidth = copy_bandwidth()
    print(f"{name}: a copy moves {bandwidth / 1e9:.0f} GB/s", flush=True)
    table = Table("", "at that, ms", "fastopt, ms", "of copy", "others, ms", title=name)
    for make in (*dense_cases(), *table_cases(), *sort_cases()):
        made = make()
        for case in made if isinstance(made, tuple) and not isinstance(made, Case) else (made,):
            if wanted not in case.name:
                continue
            found = seconds(case)
            expected = case.bytes_moved / bandwidth
            own = found["fastopt"]
            told = ", ".join(f"{k} {v * 1e3:.3f}" for k, v in list(found.items())[1:])
            row = case.name, f"{expected * 1e3:.3f}", f"{own * 1e3:.3f}", f"{expected / own:.0%}", told
            table.add_row(*row)
            print(json.dumps({"case": case.name, "predicted": expected, **found}), flush=True)
        del made
        torch.cuda.empty_cache()
    for label, own_us, other_us in host_lines():
        table.add_row(f"host, {label}", "", f"{own_us:.0f} us", "", f"torch fused {other_us:.0f} us")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
