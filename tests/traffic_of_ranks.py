"""What tests of loads run on every rank: steps, with the bytes counted that the process group is given."""

import numpy as np
import sharded
import torch
import torch.distributed as dist

import fastopt.torch as ft
from fastopt.distributed import ByColumns, ByRows, Plan, ShardedEmbeddingBagCollection, Size, Whole
from fastopt.distributed.loads import Step, power_law
from fastopt.distributed.planner import plan_of_sizes

ROWS = {"a": 4_000, "b": 900, "c": 2_500, "d": 30}
FEATURES = {"a": ["x", "y"]}
LOOKUPS = {"x": 3, "y": 3, "b": 1, "c": 4, "d": 2}
MODES = {"a": "sum", "b": "mean", "c": "sum", "d": "mean"}
PLAN = {"a": ByRows(), "b": Whole(1), "c": ByColumns(), "d": ByRows()}
DIM, BAGS, STEPS = 16, 512, 3


def popularity(table):
    return power_law(ROWS[table], 1.05)


def sizes():
    found = {}
    for name, rows in ROWS.items():
        features = FEATURES.get(name, [name])
        lookups = sum(LOOKUPS[feature] for feature in features)
        found[name] = Size(rows, DIM, 4, lookups, len(features), MODES[name], popularity=popularity(name))
    return found


def plans(ranks):
    """Placements of each kind, and what the planner makes of the tables."""
    return {"given": Plan(PLAN, sizes(), ranks), "planner": plan_of_sizes(sizes(), ranks)}


def sent_by_each(ranks, plan, wire_dtype):
    """Bytes that each of the first ranks sends others in a step, on average, and what was to be expected."""
    rank, group = dist.get_rank(), sharded.group_of(ranks)
    if group is None:
        return None
    tables = {name: ft.EmbeddingBag(rows, DIM, mode=MODES[name]) for name, rows in ROWS.items()}
    own = plans(ranks)[plan]
    collection = ShardedEmbeddingBagCollection(tables, FEATURES, plan=own, group=group, wire_dtype=wire_dtype)
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
    expected = own.loads(Step(BAGS, itemsize=itemsize))
    return count / STEPS, float(expected.sent()[rank])
