"""What tests of loads run on every rank: steps, with the bytes counted that the process group is given."""

import numpy as np
import sharded
import torch
import torch.distributed as dist

import fastopt.torch as ft
from fastopt.distributed import ByColumns, ByRows, ShardedEmbeddingBagCollection, Whole, loads

ROWS = {"a": 4_000, "b": 900, "c": 2_500, "d": 30}
FEATURES = {"a": ["x", "y"]}
LOOKUPS = {"x": 3, "y": 3, "b": 1, "c": 4, "d": 2}
MODES = {"a": "sum", "b": "mean", "c": "sum", "d": "mean"}
PLAN = {"a": ByRows(), "b": Whole(1), "c": ByColumns(), "d": ByRows()}
DIM, BAGS, STEPS = 16, 512, 3


def popularity(table):
    return loads.power_law(ROWS[table], 1.05)


def uses():
    return {
        name: loads.Use(
            popularity(name),
            features=len(FEATURES.get(name, [name])),
            lookups=LOOKUPS[FEATURES.get(name, [name])[0]],
            factors=MODES[name] == "mean" and isinstance(PLAN[name], ByRows),
        )
        for name in ROWS
    }


def sent_by_each(ranks, wire_dtype):
    """Bytes that each of the first ranks sends others in a step, on average, and what was to be expected."""
    rank, group = dist.get_rank(), sharded.group_of(ranks)
    if group is None:
        return None
    tables = {name: ft.EmbeddingBag(rows, DIM, mode=MODES[name]) for name, rows in ROWS.items()}
    collection = ShardedEmbeddingBagCollection(
        tables, FEATURES, plan=PLAN, group=group, wire_dtype=wire_dtype
    )
    opt = ft.Adam(collection.parameters(), lr=0.1)
    random = np.random.default_rng(rank)
    count, plain = 0, dist.all_to_all_single

    def counted(received, sent, to_here, from_here, **options):
        nonlocal count
        count += sent.element_size() * (sum(from_here) - from_here[rank])
        return plain(received, sent, to_here, from_here, **options)

    dist.all_to_all_single = counted
    try:
        for _ in range(STEPS):
            inputs = {
                feature: torch.from_numpy(
                    random.choice(ROWS[name], (BAGS, LOOKUPS[feature]), p=popularity(name))
                )
                for name in ROWS
                for feature in FEATURES.get(name, [name])
            }
            opt.zero_grad()
            collection(inputs).square().mean().backward()
            opt.step()
    finally:
        dist.all_to_all_single = plain
    itemsize = 4 if wire_dtype is None else wire_dtype.itemsize
    expected = loads.loads(collection.plan, uses(), BAGS, state=2, itemsize=itemsize)
    return count / STEPS, float(expected.sent()[rank])
