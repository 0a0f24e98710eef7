"""What the tests of sharded tables run on every rank, and what one process makes of the same batches."""

import datetime
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastopt.torch as ft
from fastopt.distributed import (
    ByColumns,
    ByRows,
    ShardedEmbeddingBagCollection,
    TrainingState,
    Whole,
    clip_grad_norm_,
)

FEATURES = {"a": ["x", "y"]}
ROWS = {"a": 50, "b": 30, "c": 20, "d": 7}
BAGS = [4, 0, 5, 2], [1, 6, 0, 3], [3, 3, 3, 3]  # of each rank, step by step
PLANS = {
    "whole": {"a": Whole(1), "b": Whole(0), "c": Whole(1), "d": Whole(0)},
    "rows": {"a": ByRows(), "b": ByRows(), "c": Whole(0), "d": ByRows()},
    "columns": {"a": ByColumns(), "b": ByColumns(), "c": ByColumns(), "d": Whole(1)},
}
OPTIMIZERS = {
    "SGD": lambda params: ft.SGD(params, lr=0.3, weight_decay=0.1),
    "Adagrad": lambda params: ft.Adagrad(params, lr=0.1, lr_decay=0.1),
    "Adam": lambda params: ft.Adam(params, lr=0.1, weight_decay=0.1, amsgrad=True),
    "RowwiseAdagrad": lambda params: ft.RowwiseAdagrad(params, lr=0.1),
    "LAMB": lambda params: ft.LAMB(params, lr=0.1),
}


def plan_of(name, ranks):
    """One of the plans, or that with uneven bounds, for so many ranks."""
    if name != "uneven":
        return PLANS[name]
    rest = [50] * (ranks - 2)
    return {
        "a": ByRows([0, 41, *rest, 50]),
        "b": ByColumns([0] * (ranks - 1) + [3, 8]),
        "c": Whole(ranks - 1),
        "d": ByRows([0] * ranks + [7]),
    }


def tables(dtype=torch.float32, fused=False, module=ft.EmbeddingBag, device="cpu", **options):
    torch.manual_seed(0)
    own = {"fused": True} if fused else {}
    given = {
        "a": {"mode": "sum", "embedding_dim": 8},
        "b": {"mode": "mean", "embedding_dim": 8, "padding_idx": 3},
        "c": {"mode": "max", "embedding_dim": 4, "scale_grad_by_freq": False},
        "d": {"mode": "mean", "embedding_dim": 8, "include_last_offset": True},
    }
    return {
        name: module(ROWS[name], dtype=dtype, **{**own, **options, **values}).to(device)
        for name, values in given.items()
    }


def batches(step, ranks, dtype=torch.float32, device="cpu"):
    """What each rank looks up in a step: 2-D, with empty bags and weights, with padding, with int32."""
    random = np.random.default_rng(step)
    found = []
    for bags in BAGS[step % len(BAGS)][:ranks]:
        lengths = {name: random.integers(0, 4, bags) for name in "ybd"}
        inputs = {"x": torch.from_numpy(random.integers(0, 50, (bags, 2)))}
        inputs["c"] = torch.from_numpy(random.integers(0, 20, (bags, 3)).astype(np.int32))
        for name, own in lengths.items():
            rows = ROWS.get(name, 50)
            indices = torch.from_numpy(random.integers(0, rows, own.sum()) % (5 if name == "b" else rows))
            offsets = torch.from_numpy(np.cumsum([0, *own]))
            inputs[name] = indices, offsets if name == "d" else offsets[:-1]
        weights = torch.from_numpy(random.standard_normal(len(inputs["y"][0]))).to(dtype)
        inputs["y"] = *inputs["y"], weights.requires_grad_()
        found.append({name: moved(own, device) for name, own in inputs.items()})
    return found


def moved(own, device):
    """Tensors on a device, also those within what holds them."""
    if isinstance(own, torch.Tensor):
        there = own.device.type == device
        return own if there else own.detach().to(device).requires_grad_(own.requires_grad)
    if isinstance(own, dict):
        return {key: moved(one, device) for key, one in own.items()}
    return type(own)(moved(one, device) for one in own) if isinstance(own, (tuple, list)) else own


def joined(parts):
    """The batch of one process, of those of ranks."""
    found = {}
    for name in parts[0]:
        if not isinstance(parts[0][name], tuple):
            found[name] = torch.cat([own[name] for own in parts])
            continue
        indices, offsets, *weights = zip(*(own[name] for own in parts), strict=True)
        sizes = np.cumsum([0, *map(len, indices)])
        shifted = [own + int(size) for own, size in zip(offsets, sizes, strict=False)]
        if name == "d":
            shifted = [*(own[:-1] for own in shifted), shifted[-1][-1:]]
        rest = [torch.cat(own).detach().requires_grad_() for own in weights]
        found[name] = torch.cat(indices), torch.cat(shifted), *rest
    return found


def coefficients(first, bags, columns, like):
    """The gradient of the result of bags, which are numbered over all ranks."""
    numbers = np.arange(first * columns, (first + bags) * columns).reshape(bags, columns)
    return torch.from_numpy(np.sin(numbers)).to(like)


def trained(collection, make, steps, batch_of, first_of, factor=1):
    """Train, and return the gradients of weights."""
    optimizer = make(collection.parameters())
    gradients = []
    for step in range(steps):
        optimizer.zero_grad()
        inputs = batch_of(step)
        pooled = collection(inputs)
        (pooled * coefficients(first_of(step), *pooled.shape, pooled) * factor).sum().backward()
        gradients.append(inputs["y"][2].grad)
        optimizer.step()
    return optimizer, gradients


def on_one(ranks, make, steps=4, dtype=torch.float32, fused=False, device="cpu", **options):
    """The weights and gradients of weights of one process."""
    collection = ft.EmbeddingBagCollection(tables(dtype, fused, device=device, **options), FEATURES)

    def batch_of(step):
        return joined(batches(step, ranks, dtype, device))

    optimizer, gradients = trained(collection, OPTIMIZERS[make], steps, batch_of, lambda step: 0)
    state = {
        name: {key: own for key, own in optimizer.state[table.weight].items() if own.ndim}
        for name, table in collection.tables.items()
    }
    weights = {name: own.weight.detach() for name, own in collection.tables.items()}
    return moved((weights, state, gradients), "cpu")


def group_of(ranks):
    """The group of the first ranks; None on the others. Every rank calls it."""
    if ranks == dist.get_world_size():
        return dist.group.WORLD
    if ranks not in _groups:
        _groups[ranks] = dist.new_group([*range(ranks)])
    return _groups[ranks] if dist.get_rank() < ranks else None


_groups = {}


def on_each(ranks, arguments):
    """What lies on a rank, with where it belongs, after the same steps."""
    return moved(_on_each(ranks, **arguments), "cpu") if group_of(ranks) is not None else None


def _on_each(
    ranks,
    plan,
    make,
    steps=4,
    dtype=torch.float32,
    fused=False,
    wire_dtype=None,
    ahead=False,
    device="cpu",
    **options,
):
    group, rank = group_of(ranks), dist.get_rank()
    given = tables(dtype, fused, device=device, **options)
    own = plan_of(plan, ranks)
    collection = ShardedEmbeddingBagCollection(given, FEATURES, plan=own, group=group, wire_dtype=wire_dtype)
    kept = {}

    def batch_of(step):
        for k in (step, step + 1) if ahead else (step,):
            if k not in kept:
                kept[k] = batches(k, ranks, dtype, device)[rank]
                if ahead:
                    collection.prefetch(kept[k])
        return kept[step]

    def first_of(step):
        return sum(BAGS[step % len(BAGS)][:rank])

    optimizer, gradients = trained(collection, OPTIMIZERS[make], steps, batch_of, first_of, factor=ranks)
    parts = {name: tuple(collection.plan.parts[name][rank]) for name in collection.tables}
    weights = {name: own.weight.detach() for name, own in collection.tables.items()}
    state = {
        name: {key: own for key, own in optimizer.state[table.weight].items() if own.ndim}
        for name, table in collection.tables.items()
    }
    return parts, weights, state, [None if own is None else own / ranks for own in gradients]


def assembled(answers, name, pick, like):
    """A whole array, of what each rank has of it; ``like``: of its shape, a table's or one number a row."""
    whole = torch.full_like(like, float("nan"))
    for parts, *rest in answers:
        rows, columns = slice(*parts[name][:2]), slice(*parts[name][2:])
        own = pick(rest)
        if own is not None and own.numel():
            whole[(rows, columns)[: like.ndim]] = own
    return whole


# What does not fit


def message_of(function, *args):
    """What a call raised."""
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def refused_when_made(change):
    """What each rank is told where rank 1 is given something else."""
    given, arguments = tables(), {"features": FEATURES, "plan": PLANS["whole"]}
    if dist.get_rank() == 1:
        if change == "rows":
            given["a"] = ft.EmbeddingBag(51, 8, mode="sum")
        elif change == "names":
            given["e"] = given.pop("d")
            arguments["plan"] = {**PLANS["whole"], "e": Whole(0)}
            del arguments["plan"]["d"]
        elif change == "plan":
            arguments["plan"] = PLANS["rows"]
        elif change == "wire":
            arguments["wire_dtype"] = torch.bfloat16
        elif change == "bad":
            arguments["plan"] = {**PLANS["whole"], "c": ByRows()}
    return message_of(lambda: ShardedEmbeddingBagCollection(given, **arguments))


def refused_in_forward(change):
    """What each rank is told where the batch of rank 1 does not fit, and whether the next one goes on."""
    collection = ShardedEmbeddingBagCollection(tables(), FEATURES, plan=PLANS["columns"])
    optimizer = OPTIMIZERS["SGD"](collection.parameters())
    inputs = batches(2, dist.get_world_size())[dist.get_rank()]
    given, grad = dict(inputs), True
    if dist.get_rank() == 1:
        if change == "index":
            given["x"] = torch.tensor([[50]] * 3)
        elif change == "feature":
            del given["x"]
        elif change == "kind":
            given = [given]
        elif change == "bags":
            given["c"] = given["c"][:2]
        elif change == "weights":
            given["y"] = given["y"][:2]
        elif change == "grad":
            grad = False
    if change == "rule":
        del optimizer
        optimizer = ft.RowwiseAdagrad(collection.parameters())
    before = [p.detach().clone() for p in collection.parameters()]
    with torch.set_grad_enabled(grad):
        told = message_of(lambda: collection(given))
    assert all(map(torch.equal, before, collection.parameters()))
    if change != "rule":
        collection(inputs).sum().backward()
        optimizer.step()
    return told


def rounded_on_the_wire(ranks):
    """The largest difference of results and updates from those that travel as they are, over the largest."""
    found = []
    for wire_dtype in (None, torch.bfloat16):
        own = ShardedEmbeddingBagCollection(tables(), FEATURES, plan=PLANS["rows"], wire_dtype=wire_dtype)
        optimizer = OPTIMIZERS["SGD"](own.parameters())
        pooled = own(batches(2, ranks)[dist.get_rank()])
        (pooled * coefficients(0, *pooled.shape, pooled)).sum().backward()
        before = torch.cat([p.detach().flatten() for p in own.parameters()])
        optimizer.step()
        found.append([pooled.detach(), torch.cat([p.detach().flatten() for p in own.parameters()]) - before])
    return [float((got - want).abs().max() / want.abs().max()) for want, got in zip(*found, strict=True)]


def drawn():
    """Parts of a table on the meta device."""
    torch.manual_seed(0)
    own = ft.EmbeddingBag(4000, 8, device="meta", padding_idx=3)
    return ShardedEmbeddingBagCollection({"a": own}, plan={"a": ByRows()}).tables["a"].weight.detach()


def example(source):
    """The losses of an example, which has a ``loader``."""
    torch.manual_seed(dist.get_rank())
    ids, target = torch.randint(1000, (32, 3)), torch.randn(32, 1)
    batch = {"shown": ids, "bought": ids.flip(1), "country": ids[:, :1] % 200}
    names = {"__name__": "example", "loader": [(batch, target)] * 6}
    losses = []
    watched = source.replace("    loss.backward()", "    losses.append(loss.item()); loss.backward()")
    exec(compile(watched, "example", "exec"), names | {"losses": losses, "print": str})
    return losses


# Checkpoints


def model_with(collection):
    torch.manual_seed(1)
    return torch.nn.ModuleDict({"tables": collection, "dense": torch.nn.Linear(36, 1)})


def model_of_one(make):
    model = model_with(ft.EmbeddingBagCollection(tables(), FEATURES))
    return model, OPTIMIZERS[make](model.parameters())


def step_of(model, optimizer, inputs, first, factor=1):
    """A step by the tables' gradients alone but for a dense one that all ranks have alike."""
    optimizer.zero_grad()
    pooled = model["tables"](inputs)
    (pooled * coefficients(first, *pooled.shape, pooled) * factor).sum().backward()
    sum(p.square().sum() for p in model["dense"].parameters()).backward()
    optimizer.step()


def train_on_one(model, optimizer, first, last):
    for step in range(first, last):
        step_of(model, optimizer, joined(batches(step, BAGS_RANKS)), 0)


BAGS_RANKS = 4  # whose bags there are, on however many ranks


def shared_out(step, ranks):
    """The batch of all ranks for this one of fewer, and how many bags there are before."""
    each = BAGS_RANKS // ranks
    own = batches(step, BAGS_RANKS)[each * dist.get_rank() : each * (dist.get_rank() + 1)]
    return joined(own), sum(BAGS[step % len(BAGS)][: each * dist.get_rank()])


def sharded_model(ranks, plan, make):
    group = group_of(ranks)
    own = ShardedEmbeddingBagCollection(tables(), FEATURES, plan=plan_of(plan, ranks), group=group)
    model = model_with(own)
    optimizer = OPTIMIZERS[make](model.parameters())
    return model, optimizer, TrainingState(model, optimizer, group=group)


def go_on(ranks, plan, make, first, before, after):
    """Two steps from a checkpoint to the next one."""
    if group_of(ranks) is None:
        return
    model, optimizer, state = sharded_model(ranks, plan, make)
    if before is not None:
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(float("nan"))
        assert state.load(before) == {"next": first}
    for step in (first, first + 1):
        step_of(model, optimizer, *shared_out(step, ranks), factor=ranks)
    state.save(after, {"next": first + 2})


def saved_in_the_background(folder):
    """Save at once and in the background, going on meanwhile."""
    model, optimizer, state = sharded_model(4, "rows", "Adam")
    step_of(model, optimizer, *shared_out(0, 4), factor=4)
    state.save(f"{folder}/now")
    coming = state.async_save(f"{folder}/later")
    for step in (1, 2):
        step_of(model, optimizer, *shared_out(step, 4), factor=4)
    coming.result()


# Dense parameters


def on_one_clipped(steps=3):
    """The norms, and what is trained, of one process."""
    model, optimizer = model_of_one("Adam")
    norms = []
    for step in range(steps):
        inputs = joined(batches(step, BAGS_RANKS))
        model["dense"](model["tables"](inputs)).square().mean().backward()
        optimizer.step(clip_norm=0.1)
        optimizer.zero_grad()
        norms.append(optimizer.info.norm)
    tables = {name: own.weight.detach() for name, own in model["tables"].tables.items()}
    return norms, tables, [p.detach() for p in model["dense"].parameters()]


def on_each_clipped(steps=3):
    """The same, of a model whose dense part is replicated."""
    ranks = dist.get_world_size()
    model, optimizer, _ = sharded_model(ranks, "rows", "Adam")
    model["dense"] = DistributedDataParallel(model["dense"])
    norms = []
    for step in range(steps):
        inputs, _ = shared_out(step, ranks)
        loss = model["dense"](model["tables"](inputs)).square().sum()
        (loss * ranks / sum(BAGS[step % len(BAGS)])).backward()
        norms.append(clip_grad_norm_(model, 0.1))
        optimizer.step()
        optimizer.zero_grad()
    refused = message_of(lambda: optimizer.step(clip_norm=1.0))
    own = model["tables"]
    parts = {name: tuple(own.plan.parts[name][dist.get_rank()]) for name in own.tables}
    weights = {name: table.weight.detach() for name, table in own.tables.items()}
    return parts, weights, [p.detach() for p in model["dense"].parameters()], norms, refused


# Faults


def environment():
    """That of this process, for torchrun, whose processes import what it can."""
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1"}


def hanging():
    """What rank 0 is told where rank 1 does not come."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    own = ShardedEmbeddingBagCollection(tables(), FEATURES, plan=PLANS["whole"], group=group)
    if dist.get_rank() == 1:
        return None
    return message_of(lambda: own(batches(0, 2)[0]))


# Bytes


def bytes_sent(ranks, plan):
    """The bytes of each message of a step, as the process group is given it, and by the docs' formulas."""
    if (group := group_of(ranks)) is None:
        return None
    own = ShardedEmbeddingBagCollection(tables(), FEATURES, plan=plan_of(plan, ranks), group=group)
    given = batches(2, ranks)
    given = [{name: moved_detached(one) for name, one in inputs.items()} for inputs in given]
    sent, all_to_all = [], dist.all_to_all_single

    def counting(received, tensor, *args, **options):
        sent.append(tensor.numel() * tensor.itemsize)
        return all_to_all(received, tensor, *args, **options)

    dist.all_to_all_single = counting
    try:
        own(given[dist.get_rank()]).sum().backward()
    finally:
        dist.all_to_all_single = all_to_all
    return sent, by_formulas(own, given)


def moved_detached(own):
    return tuple(one.detach() for one in own) if isinstance(own, tuple) else own


def by_formulas(own, given):
    """The bytes of counts, requests, results and gradients of this rank; how many arrays requests have."""
    rank, ranks = dist.get_rank(), len(given)
    bags = [len(inputs["x"]) for inputs in given]
    counts = 8 * ranks * (3 + 3 * 5 + 4)
    requests = results = gradients = arrays = 0
    for name, placement in own.plan.items():
        features, parts = FEATURES.get(name, [name]), own.plan.parts[name]
        dim = own.plan.sizes[name].columns
        if isinstance(placement, ByRows):
            starts = [part.first_row for part in parts]
            rows = [distinct_rows(name, features, inputs) for inputs in given]
            requests += 4 * len(rows[rank])
            results += 4 * dim * sum(int((owners(one, starts) == rank).sum()) for one in rows)
            arrays += ranks
        for feature in features:
            indices, bag_of, weights = uses(name, given[rank][feature])
            factors = 4 * len(indices) * (weights or own.tables[name].mode == "mean")
            if isinstance(placement, ByRows):
                pairs = len(np.unique(owners(indices, starts) * 1000 + bag_of))
                requests += 4 * pairs + 4 * len(indices) + factors
                gradients += 4 * dim * pairs
                arrays += 3 * ranks
                continue
            count = len(given[rank][feature][0]) if isinstance(given[rank][feature], tuple) else len(indices)
            there = sum(not part.is_empty for part in parts)
            requests += there * (4 * bags[rank] + 4 * count + 4 * count * weights)
            results += 4 * sum(bags) * parts[rank].shape[1] * (not parts[rank].is_empty)
            gradients += 4 * bags[rank] * dim
            arrays += 3 * there
    return [counts, requests, results, gradients], arrays


def uses(name, given):
    """The rows that a feature uses of a table, without padding, the bag of each, and whether there are
    weights."""
    if not isinstance(given, tuple):
        return given.flatten().numpy(), np.repeat(np.arange(len(given)), given.shape[1]), False
    offsets = given[1].numpy() if name == "d" else np.append(given[1].numpy(), len(given[0]))
    indices, bag_of = given[0].numpy(), np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    kept = indices != (3 if name == "b" else -1)
    return indices[kept], bag_of[kept], len(given) == 3


def distinct_rows(name, features, inputs):
    return np.unique(np.concatenate([uses(name, inputs[feature])[0] for feature in features]))


def owners(rows, starts):
    return np.searchsorted(starts, rows, side="right") - 1
