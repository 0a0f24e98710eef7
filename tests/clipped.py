"""What tests of clipping run on every rank, and in one process: sharded tables and a layer beside them."""

import sharded
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastopt.torch as ft
from fastopt.distributed import ShardedEmbeddingBagCollection, clip_grad_norm_

STEP = 2  # in which all ranks have bags
COLUMNS = 36


def layer():
    torch.manual_seed(1)
    return torch.nn.Linear(COLUMNS, 3)


def backward(collection, dense, inputs, first, factor):
    pooled = collection(inputs)
    result = dense(pooled)
    (result * sharded.coefficients(first, *result.shape, result) * factor).sum().backward()


def on_one(ranks, limit):
    """The norm, and the gradients once they are clipped, by torch."""
    collection, dense = ft.EmbeddingBagCollection(sharded.tables(), sharded.FEATURES), layer()
    backward(collection, dense, sharded.joined(sharded.batches(STEP, ranks)), 0, 1)
    model = torch.nn.ModuleList([collection, dense])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    of_tables = {name: own.weight.grad.dense() for name, own in collection.tables.items()}
    return float(norm), of_tables, [p.grad for p in dense.parameters()]


def on_each(ranks, plan, limit):
    """The same of each rank, and which parts of the tables it has."""
    group, rank = sharded.group_of(ranks), dist.get_rank()
    if group is None:
        return None
    own = sharded.plan_of(plan, ranks)
    collection = ShardedEmbeddingBagCollection(sharded.tables(), sharded.FEATURES, plan=own, group=group)
    dense = DistributedDataParallel(layer(), process_group=group)
    first = sum(sharded.BAGS[STEP][:rank])
    backward(collection, dense, sharded.batches(STEP, ranks)[rank], first, ranks)
    norm = clip_grad_norm_(torch.nn.ModuleList([collection, dense]), limit)
    parts = {name: tuple(collection.plan.parts[name][rank]) for name in collection.tables}
    grads = {name: own.weight.grad for name, own in collection.tables.items()}
    of_tables = {name: None if grad is None else grad.dense() for name, grad in grads.items()}
    return parts, of_tables, norm, [p.grad for p in dense.parameters()]
