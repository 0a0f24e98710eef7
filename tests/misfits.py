"""What sharded tables refuse on every rank, where one rank or all of them are given what does not fit; and
copies, batches ahead and state that are seldom met."""

import copy
import pickle

import torch
import torch.distributed as dist
from sharded import message_of
from torch.distributed.distributed_c10d import GroupMember
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

import fastopt.torch as ft
from fastopt.distributed import ByColumns, ByRows, ShardedEmbeddingBagCollection, TrainingState, Whole

IDS = {"a": torch.tensor([[1], [7]]), "b": torch.tensor([[2], [3]])}


def two_tables(**options):
    torch.manual_seed(0)
    return {name: ft.EmbeddingBag(20, 8, **{"mode": "sum", **options}) for name in "ab"}


def whole_and_rows(**options):
    own = {"a": Whole(1), "b": ByRows()}
    return ShardedEmbeddingBagCollection(two_tables(**options), plan=own)


def group_of_three():
    """That of the first three processes, and what stands for it on others."""
    members = dist.new_group([0, 1, 2], use_local_synchronization=True)
    return GroupMember.NON_GROUP_MEMBER if members is None else members


# Collections that are not made


def refused_when_made(case):
    """What this rank is told."""
    first, given, arguments = dist.get_rank() == 0, two_tables(), {"plan": {"a": Whole(3), "b": ByRows()}}
    if case == "features":
        arguments["features"] = {"a": ["x", "y"], "b": ["z"]} if first else {"a": ["x"], "b": ["y", "z"]}
    elif case == "kind":
        arguments["plan"] = {**arguments["plan"], "a": Whole(3) if first else ByRows([0, 0, 0, 0, 20])}
    elif case == "one weight":
        given["b"] = given["a"]
    elif case == "hook":
        given["a"].register_forward_hook(lambda module, given, result: result * 2)
    elif case == "parametrized":
        spectral_norm(given["a"])
    elif case == "no group":
        arguments["group"] = group_of_three()
    return message_of(lambda: ShardedEmbeddingBagCollection(given, **arguments))


def numbers_on_meta():
    """Parts of two tables of one size, in two places."""
    torch.manual_seed(0)
    given = two_tables(device="meta")
    found = []
    for placement in (ByRows(), ByColumns()):
        own = ShardedEmbeddingBagCollection(given, plan=dict.fromkeys("ab", placement))
        found.append([table.weight.detach() for table in own.tables.values()])
    return found


# Batches


def refused_in_forward(case):
    """What this rank is told, of what rank 1 has changed since the collection was made, or all have."""
    own, second = whole_and_rows(), dist.get_rank() == 1
    called, before = own, [p.detach().clone() for p in own.parameters()]
    if case == "frozen" and second:
        own.tables["b"].weight.requires_grad_(False)
    elif case == "double" and second:
        own.double()
    elif case == "one table":
        own.tables["b"].double()
    elif case == "Adafactor":
        kept = ft.Adafactor(own.parameters())
    elif case == "rows":
        kept = ft.AdamW(own.parameters(), rows="dense")
    elif case == "rule":
        kept = ft.SGD(own.parameters(), lr=0.1) if second else ft.Adam(own.parameters(), lr=0.1)
    elif case == "rate":  # as of a schedule that goes by what each rank sees
        kept = ft.Adam(own.parameters(), lr=torch.tensor(0.1))
        kept.param_groups[0]["lr"].mul_(0.5 if second else 1.0)
    elif case == "replicas":
        rows = ShardedEmbeddingBagCollection(two_tables(), plan=dict.fromkeys("ab", ByRows()))
        own, called = rows, DistributedDataParallel(rows)
        before = [p.detach().clone() for p in own.parameters()]
    told = message_of(lambda: called(IDS))
    assert all(torch.equal(p, q.to(p)) for p, q in zip(before, own.parameters(), strict=True))
    return told


def within_replicas():
    """Whether tables keep their own rows where DistributedDataParallel ignores them."""
    tables = ShardedEmbeddingBagCollection(two_tables(), plan=dict.fromkeys("ab", ByRows()))
    before = [p.detach().clone() for p in tables.parameters()]
    model = torch.nn.Sequential(tables, torch.nn.Linear(16, 1))
    names = [f"0.{name}" for name, _ in tables.named_parameters()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    DistributedDataParallel(model)(IDS).sum().backward()
    return all(map(torch.equal, before, tables.parameters()))


def without_indices(dtype):
    """The gradients of weights, of which one rank has none."""
    own = ShardedEmbeddingBagCollection(two_tables(dtype=dtype), plan={"a": Whole(1), "b": ByColumns()})
    ids = torch.arange(0 if dist.get_rank() == 1 else 2)
    weights = torch.ones(len(ids), dtype=dtype, requires_grad=True)
    given = ids, torch.zeros(1, dtype=torch.int64), weights
    own({"a": given, "b": given}).sum().backward()
    return weights.grad


# Copies and batches ahead


def copies():
    """What an optimizer with a norm says to the parts of a collection and of its copies."""
    own = whole_and_rows()
    own.prefetch(IDS)
    found = [own, copy.deepcopy(own), pickle.loads(pickle.dumps(own)), whole_and_rows()]
    found[3].load_state_dict(own.state_dict(), assign=True)
    told = []
    for each in found:
        optimizer = ft.SGD(each.parameters(), lr=0.1)
        each(IDS).sum().backward()
        told.append(message_of(lambda optimizer=optimizer: optimizer.step(clip_norm=1.0)))
    return told


def weights_of_a_batch_ahead():
    """The gradients of weights of a batch that was sent without gradients, and changed afterwards."""
    own = whole_and_rows()
    ids, offsets = torch.tensor([1, 7]), torch.tensor([0, 1])
    ahead, later = (torch.ones(2, requires_grad=True) for _ in range(2))
    inputs = dict.fromkeys("ab", (ids, offsets, ahead))
    with torch.no_grad():
        own.prefetch(inputs)
    inputs.update({name: (ids.flip(0), offsets, later) for name in "ab"})
    own(inputs).sum().backward()
    return ahead.grad, later.grad


# Checkpoints


def refused_by_one(folder):
    """What each rank is told where rank 1 alone can't save, and where it can't load."""
    model = torch.nn.ModuleDict({"tables": whole_and_rows()})
    state = TrainingState(model)
    state.save(f"{folder}/first")
    second = dist.get_rank() == 1
    progress = (lambda: None) if second else None  # which pickle does not take
    saved = message_of(lambda: state.save(f"{folder}/second", progress=progress))
    loaded = message_of(lambda: state.load(f"{folder}/{'none' if second else 'first'}"))
    return saved, loaded


def adafactor(folder):
    """The parameters of a run, and of one that went on from its checkpoint with another plan."""
    found = []
    for owner in (1, 2):
        own = ShardedEmbeddingBagCollection(two_tables(), plan={"a": Whole(owner), "b": Whole(0)})
        model, optimizer = torch.nn.ModuleDict({"tables": own}), ft.Adafactor(own.parameters(), lr=0.1)
        state = TrainingState(model, optimizer)
        if owner == 2:
            state.load(folder)
        for step in range(2 if owner == 1 else 1):
            if step == 1:
                state.save(folder)
            own(IDS).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append({name: table.weight.detach() for name, table in own.tables.items()})
    return found


def loaded_by_another(folder, case):
    """What this rank is told of a checkpoint that is not that of its model, and whether its parameters are as
    they were."""
    saved = torch.nn.ModuleDict({"tables": whole_and_rows()})
    optimizer = ft.Adam(saved.parameters())
    saved["tables"](IDS).sum().backward()
    optimizer.step()
    TrainingState(saved, optimizer).save(folder)
    given = two_tables()
    if case == "rows":
        given["b"] = ft.EmbeddingBag(21, 8, mode="sum")
    elif case == "tables":
        given["c"] = ft.EmbeddingBag(5, 8, mode="sum")
    own = ShardedEmbeddingBagCollection(given, plan={name: Whole(0) for name in given})
    params = [*own.parameters()]
    groups = [{"params": params[:1]}, {"params": params[1:]}] if case == "groups" else params
    state = TrainingState(torch.nn.ModuleDict({"tables": own}), ft.Adam(groups))
    before = [p.detach().clone() for p in params]
    told = message_of(lambda: state.load(folder))
    return told, all(map(torch.equal, before, params))


def two_saves_at_once(folder):
    """Whether both are whole, of a state that is asked for the second before the first is written."""
    state = TrainingState(torch.nn.ModuleDict({"tables": whole_and_rows()}))
    for saving in [state.async_save(f"{folder}/{name}", progress=name) for name in "ab"]:
        saving.result()
    return [state.load(f"{folder}/{name}") for name in "ab"]


def outside():
    """What the process is told that is in no group."""
    group = group_of_three()
    return message_of(lambda: TrainingState(torch.nn.Linear(1, 1), group=group))
