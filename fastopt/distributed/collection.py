"""Many embedding tables, shared out over the processes of a group, as one module."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastopt.distributed.agreement import Described, agree, rank_in
from fastopt.distributed.batch import Arguments, Batch, Failure, open_batch
from fastopt.distributed.layout import Feature, Layout, ShardedTable
from fastopt.distributed.lookup import ShardedLookup, look_up
from fastopt.distributed.parts import module_of_part
from fastopt.distributed.placement import ByRows, Placement
from fastopt.distributed.planner import plan, sizes_of
from fastopt.distributed.plans import Plan
from fastopt.distributed.requests import Request, checked
from fastopt.distributed.training import check_rules, state_of
from fastopt.torch.collection import Bags, EmbeddingBagCollection, check_alike, looks_up_alone
from fastopt.torch.fused import owners
from fastopt.torch.memory import DTYPES, mark_as_part


class _Ahead(NamedTuple):
    """A batch whose indices are on their way: what the caller gave, kept so that no other object has its
    ``id``; and the weights of each feature in it, or None."""

    inputs: Mapping[str, Bags]
    batch: Batch
    weights: list[torch.Tensor | None]


class ShardedEmbeddingBagCollection(EmbeddingBagCollection):
    """``fastopt.torch.EmbeddingBagCollection`` with its tables shared out over the processes of a group.

    Every rank gives the bags of its own batch, as many as it has, and gets their pooled rows. Tables are
    updated where they are, by an optimizer of :mod:`fastopt.torch` on each rank, from the gradients of all
    ranks. Parameters, gradients and state have the bits of one process that looks up the batches of all
    ranks, one after the other.

    Args:
        tables: as for the other class. Each rank keeps copies of its own parts; parts of tables on the meta
            device, which need never fit one machine, are filled as ``torch.nn.EmbeddingBag`` fills its
            weight, with other numbers in each part of each.
        features: as for the other class.
        plan: where each table is, by its name: one of :func:`fastopt.distributed.plan`, whose answer for one
            lookup a feature is the default, or a dict of :class:`Whole`, :class:`ByRows`, :class:`ByColumns`.
        group: the process group, None for the default one.
        wire_dtype: ``torch.bfloat16`` rounds results and gradients while they travel, at half of the bytes of
            float32; None sends them as they are.

    Attributes:
        tables: modules over the parts that lie here, a ``ModuleDict``, in which every table has one; those
            without rows or columns have no elements. plan: where each table is. layout: the same, by features
            and ranks. group: as given.

    Raises:
        ValueError, TypeError: as for the other class; or the tables, options or plans of two ranks differ, on
            every rank; or a table has mode "max" and goes by rows, or has ``max_norm``, hooks or the weight
            of another one; or tables have different dtypes or devices; or this process is not in ``group``.
        RuntimeError: there is no process group.

    As with ``DistributedDataParallel``, what is minimised is the mean of the ranks' losses: gradients of
    tables are the sum over all ranks divided by the number of ranks. The mean over all bags of all ranks,
    where they have different numbers of them, is a loss of ``ranks * own_sum / number_of_all`` on each.

    Every rank calls the module and the backward pass equally often, with bags or without. Keep it out of
    ``DistributedDataParallel``, which is for parameters that all ranks have: wrap the dense part alone.
    """

    def __init__(
        self,
        tables: Mapping[str, torch.nn.EmbeddingBag],
        features: Mapping[str, Sequence[str]] | None = None,
        *,
        plan: Mapping[str, Placement] | None = None,
        group: dist.ProcessGroup | None = None,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "there is no process group: expected torch.distributed.init_process_group before"
            )
        rank, ranks = rank_in(group), dist.get_world_size(group)
        self.group = group
        with agree(group) as described:  # until its end an error of one rank is one of all
            super().__init__(tables, features)
            _check_tables(tables, wire_dtype)
            self.plan = _plan_of(tables, features, plan, ranks)
            of_tables = {name: [own.name for own in self._features if own.table == name] for name in tables}
            _describe(described, tables, of_tables, self.plan, wire_dtype)
            parts = {name: self.plan.parts[name][rank] for name in tables}
            own = {name: module_of_part(name, table, parts[name]) for name, table in tables.items()}
        self._wire_dtype = wire_dtype
        self.tables = torch.nn.ModuleDict(own)
        self.layout = _layout(self, tables, own, rank, ranks)
        self._ahead: dict[int, _Ahead] = {}

    @torch.compiler.disable
    def prefetch(self, inputs: Mapping[str, Bags]) -> None:
        """Begin to send what a later ``forward`` of the same object looks up, while others compute.

        Every rank calls it for its own part of the same batch, and in the same order among its other calls.
        Indices and weights are read here; tables are read by ``forward``.

        Args:
            inputs: as for ``forward``.

        Raises:
            ValueError, TypeError, RuntimeError: as for ``forward``.
        """
        self._ahead[id(inputs)] = self._opened(inputs)

    @torch.compiler.disable
    def forward(self, inputs: Mapping[str, Bags]) -> torch.Tensor:
        """The pooled rows of all features of this rank's bags.

        Args:
            inputs: as for ``EmbeddingBagCollection``, of as many bags as this rank has, none among them.

        Returns:
            As of ``EmbeddingBagCollection``.

        Raises:
            ValueError, TypeError: the batch of this rank does not fit.
            RuntimeError: the batch of another rank does not fit, and why.
            ValueError: ranks do not agree on whether there will be a backward pass, or have changed the dtype
                or ``requires_grad`` of a table since it was made, or train it by other rules or options.
                Nothing has changed then, on no rank.
        """
        ahead = self._ahead.pop(id(inputs), None)
        # Opening a batch raises on all ranks, if at all.
        _, batch, weights = self._opened(inputs) if ahead is None else ahead
        tables = [table.weight for table in self.tables.values()]
        lookup = ShardedLookup(self.layout, batch, weights, self._wire_dtype, self.group)
        return look_up(lookup, weights, tables)

    def __getstate__(self) -> dict[str, Any]:
        """A copy goes without the batches that are on their way to this one."""
        return {**self.__dict__, "_ahead": {}}

    def _opened(self, inputs: Mapping[str, Bags]) -> _Ahead:
        weights: list[torch.Tensor | None] = [None] * len(self.features)
        messages: list[torch.Tensor] = []
        own_weights = [table.own.weight for table in self.layout.tables]
        device, known = own_weights[0].device, owners()
        try:
            for p in own_weights:
                mark_as_part(p)  # a copy, or one that load_state_dict assigned, is not marked
            check_alike(own_weights)
            self._check_replicas()
            check_rules(self.layout, known)
            given = self.arguments(inputs)
            asked = Request(self.layout, checked(self.layout, given, device))
            messages = asked.messages()
            weights = self._weights_of(inputs)
            request: Request | Failure = asked
        except Exception as error:
            request = Failure(error)
        learning = any(own.requires_grad for own in (*self.parameters(), *weights) if own is not None)
        alike = state_of(self.layout, known, learns=torch.is_grad_enabled() and learning)
        arguments = Arguments(alike, weights, messages)
        return _Ahead(inputs, open_batch(self.layout, request, arguments, device, self.group), weights)

    def _check_replicas(self) -> None:
        """Refuse to be called within DistributedDataParallel, unless that ignores the tables."""
        replicas = DistributedDataParallel._get_active_ddp_module()
        if replicas is None:
            return
        own, ignored = {id(p) for p in self.parameters()}, replicas.parameters_to_ignore
        for name, p in replicas.module.named_parameters():
            if id(p) in own and name not in ignored:
                raise ValueError(
                    f"{name} is part of a table, and DistributedDataParallel has given all ranks that of "
                    "rank 0: expected the dense part alone to be wrapped"
                )

    def _weights_of(self, inputs: Mapping[str, Bags]) -> list[torch.Tensor | None]:
        found = (inputs.get(name) for name in self.features)
        return [own[2] if isinstance(own, tuple) and len(own) > 2 else None for own in found]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {placement}" for name, placement in self.plan.items())


def _check_tables(tables: Mapping[str, torch.nn.EmbeddingBag], wire_dtype: torch.dtype | None) -> None:
    names: dict[int, str] = {}
    for name, table in tables.items():
        if table.weight.dtype not in DTYPES:
            raise TypeError(f"tables[{name!r}] has dtype {table.weight.dtype}: expected one of {[*DTYPES]}")
        if table.max_norm is not None:
            raise ValueError(f"tables[{name!r}] has max_norm {table.max_norm}: expected None")
        if not looks_up_alone(table) or "weight" not in table._parameters:
            raise ValueError(
                f"tables[{name!r}] does more than look up, by hooks, parametrizations or a forward of its "
                "own, of which its parts would know nothing: expected a plain EmbeddingBag"
            )
        first = names.setdefault(id(table.weight), name)
        if first != name:
            raise ValueError(
                f"tables[{first!r}] and tables[{name!r}] have the same weight, of which each would get a "
                f"copy: expected one table, with several names in features[{first!r}]"
            )
    check_alike(table.weight for table in tables.values())
    if wire_dtype not in (None, torch.bfloat16):
        raise ValueError(f"wire_dtype is {wire_dtype!r}: expected torch.bfloat16 or None")


def _plan_of(
    tables: Mapping[str, torch.nn.EmbeddingBag],
    features: Mapping[str, Sequence[str]] | None,
    given: Mapping[str, Placement] | None,
    ranks: int,
) -> Plan:
    if given is None:
        return plan(tables, features, ranks=ranks)
    if isinstance(given, Plan) and given.ranks != ranks:
        raise ValueError(f"plan is for {given.ranks} ranks: expected one for {ranks}")
    found = Plan(given, sizes_of(tables, features), ranks)
    for name, table in tables.items():
        if table.mode == "max" and isinstance(found[name], ByRows):
            raise ValueError(
                f"plan[{name!r}] is by rows and the table's mode 'max': expected Whole or ByColumns, since "
                "the maxima of parts do not say which row they come from"
            )
    return found


def _describe(
    described: Described,
    tables: Mapping[str, torch.nn.EmbeddingBag],
    features: Mapping[str, Sequence[str]],
    own: Plan,
    wire_dtype: torch.dtype | None,
) -> None:
    """Put what ranks have to agree on; ``features``: of each table."""
    described["names of tables"] = [*tables]
    described["features"] = dict(features)
    described["wire_dtype"] = str(wire_dtype)
    for name, table in tables.items():
        described[f"tables[{name!r}]"] = {
            "rows": table.num_embeddings,
            "dim": table.embedding_dim,
            "dtype": str(table.weight.dtype),
            "device": table.weight.device.type,
            "mode": table.mode,
            "padding_idx": table.padding_idx,
            "scale_grad_by_freq": table.scale_grad_by_freq,
            "fused": bool(getattr(table, "fused", False)),
            "requires_grad": table.weight.requires_grad,
        }
        described[f"plan[{name!r}]"] = [tuple(part) for part in own.parts[name]]
        described[f"the kind of plan[{name!r}]"] = type(own[name]).__name__


def _layout(
    collection: EmbeddingBagCollection,
    tables: Mapping[str, torch.nn.EmbeddingBag],
    own: Mapping[str, Any],
    rank: int,
    ranks: int,
) -> Layout:
    assert isinstance(collection, ShardedEmbeddingBagCollection)
    names, features, at = [*tables], [], 0
    of_feature = {id(module): name for name, module in own.items()}
    for name, module in zip(collection.features, collection.modules_of_features(), strict=True):
        table = names.index(of_feature[id(module)])
        dim = tables[names[table]].embedding_dim
        features.append(Feature(name, table, at, at + dim))
        at += dim
    found = [
        ShardedTable(
            name=name,
            rows=table.num_embeddings,
            columns=table.embedding_dim,
            placement=collection.plan[name],
            parts=collection.plan.parts[name],
            here=collection.plan.parts[name][rank],
            own=own[name],
            mode=table.mode,
            padding=table.padding_idx,
            features=[f for f, feature in enumerate(features) if feature.table == t],
        )
        for t, (name, table) in enumerate(tables.items())
    ]
    return Layout(found, features, rank, ranks)
