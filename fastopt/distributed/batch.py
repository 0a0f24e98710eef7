"""The batches of all ranks, as far as this one serves them: what came of their requests."""

import zlib
from collections.abc import Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from fastopt._core.arrays import array_view
from fastopt.distributed.agreement import Described, check_same, gathered
from fastopt.distributed.exchange import Field, Incoming, packed_size, send, unpacked
from fastopt.distributed.layout import Layout, ShardedTable
from fastopt.distributed.requests import Request
from fastopt.gradients.pooling import Offsets
from fastopt.torch.lookups import Call
from fastopt.torch.memory import computed_with

# What a rank says of the weights of a feature in its batch
_WITHOUT, _WITH, _LEARNING, _NO_INDICES = range(4)


class Header(NamedTuple):
    """What a rank tells another first. failed: whether its batch does not fit. bags: how many it has. alike:
    a digest of what ranks have to have alike. weights: of each feature. rows: of each table; indices, used:
    of each feature, as of ``Request.counts``."""

    failed: bool
    bags: int
    alike: int
    weights: list[int]
    rows: list[int]
    indices: list[int]
    used: list[int]

    def numbers(self) -> list[int]:
        return [*map(int, self[:3]), *chain(*self[3:])]

    @classmethod
    def of(cls, numbers: Sequence[int], layout: Layout) -> "Header":
        features, tables = len(layout.features), len(layout.tables)
        lists, at = [], 3
        for size in (features, tables, features, features):
            lists.append([*numbers[at : at + size]])
            at += size
        return cls(bool(numbers[0]), numbers[1], numbers[2], *lists)


class Failure(NamedTuple):
    """Why this rank has no request."""

    error: Exception


class Arguments(NamedTuple):
    """How this rank means its batch. alike: what ranks have to have alike. weights: of each feature, None
    without. messages: what goes to each rank, made before any is sent, since that may fail."""

    alike: Described
    weights: Sequence[torch.Tensor | None]
    messages: Sequence[torch.Tensor]


def open_batch(
    layout: Layout, request: Request | Failure, arguments: Arguments, device: torch.device, group: Any
) -> "Batch":
    """Tell all ranks what is asked, and begin to send it.

    Raises:
        ValueError, TypeError, RuntimeError: the batch of a rank does not fit; raised on every rank.
    """
    alike = zlib.crc32(repr(arguments.alike).encode())
    headers = [
        _header(layout, request, alike, arguments.weights, rank).numbers() for rank in range(layout.ranks)
    ]
    sent = torch.tensor([*chain(*headers)], device=device)
    size = len(headers[0])
    came = send(sent.split(size), [size] * layout.ranks, group).wait()
    found = [Header.of(own.tolist(), layout) for own in came]
    _check(layout, found, request, arguments, group)
    assert isinstance(request, Request)
    weighted = {f for own in found for f, code in enumerate(own.weights) if code in (_WITH, _LEARNING)}
    learning = {f for own in found for f, code in enumerate(own.weights) if code == _LEARNING}
    fields = [_fields(layout, own, weighted) for own in found]
    incoming = send(arguments.messages, [*map(packed_size, fields)], group, wait=False)
    return Batch(layout, request, found, fields, incoming, weighted, learning)


def _header(
    layout: Layout,
    request: Request | Failure,
    alike: int,
    weights_given: Sequence[torch.Tensor | None],
    rank: int,
) -> Header:
    features, tables = len(layout.features), len(layout.tables)
    if isinstance(request, Failure):
        none = [0] * features
        return Header(True, 0, alike, none, [0] * tables, none, none)
    codes = []
    for own, weights in zip(request.given, weights_given, strict=True):
        if weights is None:
            codes.append(_WITHOUT if len(own.indices) else _NO_INDICES)
        else:
            codes.append(_LEARNING if weights.requires_grad else _WITH)
    return Header(False, request.bags, alike, codes, *request.counts(rank))


def _check(
    layout: Layout,
    headers: Sequence[Header],
    request: Request | Failure,
    arguments: Arguments,
    group: Any,
) -> None:
    """Refuse batches that do not fit, on all ranks for the same reason."""
    if any(own.failed for own in headers):
        own = None if isinstance(request, Request) else f"{type(request.error).__name__}: {request.error}"
        reasons = gathered(own, group)
        if isinstance(request, Failure):
            raise request.error
        rank = next(rank for rank, reason in enumerate(reasons) if reason is not None)
        raise RuntimeError(f"the batch of rank {rank} does not fit: {reasons[rank]}")
    if len({own.alike for own in headers}) > 1:
        check_same(gathered(arguments.alike, group))
    for f, feature in enumerate(layout.features):
        codes = [own.weights[f] for own in headers]
        if _WITHOUT in codes and max(code for code in codes if code != _NO_INDICES) != _WITHOUT:
            with_weights = next(rank for rank, code in enumerate(codes) if code in (_WITH, _LEARNING))
            raise ValueError(
                f"inputs[{feature.name!r}] has per_sample_weights on rank {with_weights} and none on rank "
                f"{codes.index(_WITHOUT)}: expected the same of all"
            )


def _fields(layout: Layout, header: Header, weighted: set[int]) -> list[Field]:
    """What the message of a rank to this one holds, in the order of Request.message."""
    own: list[Field] = []
    for by_rows in (False, True):
        for t in layout.at(layout.rank, by_rows=by_rows):
            table = layout.tables[t]
            if by_rows:
                own.append(Field(table.index_dtype, header.rows[t]))
            for f in table.features:
                positions = torch.int32 if by_rows else table.index_dtype
                own += [Field(torch.int32, header.used[f]), Field(positions, header.indices[f])]
                if has_factors(table, f, weighted):
                    own.append(Field(computed_with(table.own.weight), header.indices[f]))
    return own


def has_factors(table: ShardedTable, feature: int, weighted: set[int]) -> bool:
    """Whether there is a factor for each use of a row."""
    return feature in weighted or (table.by_rows and table.mode == "mean")


class Served(NamedTuple):
    """The lookups that this rank makes for all, in the order of ranks.

    pooled: by feature. rows: by table, of those by rows, whose rows others pool. used: by feature, of bags
    that hold what is used of the rows here: their gradients are those of the rows.
    """

    pooled: dict[int, Call]
    rows: dict[int, Call]
    used: dict[int, Call]


class Batch:
    """A batch of all ranks, on its way.

    Attributes:
        request: of this rank. headers: of each rank, to this one. learning: the features whose weights learn
            on some rank.
    """

    def __init__(
        self,
        layout: Layout,
        request: Request,
        headers: Sequence[Header],
        fields: Sequence[Sequence[Field]],
        incoming: Incoming,
        weighted: set[int],
        learning: set[int],
    ) -> None:
        self._layout = layout
        self.request = request
        self.headers = headers
        self.learning = sorted(learning)
        self._fields = fields
        self._incoming = incoming
        self._weighted = weighted

    @property
    def bags(self) -> list[int]:
        """Of each rank."""
        return [own.bags for own in self.headers]

    def served(self) -> Served:
        """The lookups to make here; waits for what was sent."""
        messages = self._incoming.wait()
        arrays = [iter(unpacked(own, fields)) for own, fields in zip(messages, self._fields, strict=True)]
        found = Served({}, {}, {})
        layout = self._layout
        for t in layout.at(layout.rank, by_rows=False):
            table = layout.tables[t]
            for f in table.features:
                lengths, indices = _joined(arrays), _joined(arrays)
                weights = _joined(arrays) if f in self._weighted else None
                found.pooled[f] = _call(table, table.own, indices, lengths, weights)
        for t in layout.at(layout.rank, by_rows=True):
            table = layout.tables[t]
            rows = [next(own) for own in arrays]
            single = SimpleNamespace(mode=None, padding_idx=None, scale_grad_by_freq=False)
            found.rows[t] = Call(single, table.own.weight, torch.cat(rows))
            for f in table.features:
                lengths = _joined(arrays)
                indices = torch.cat([own[next(of).long()] for own, of in zip(rows, arrays, strict=True)])
                factors = _joined(arrays) if has_factors(table, f, self._weighted) else None
                found.used[f] = _call(table, _summing(table), indices, lengths, factors)
        return found


def _joined(arrays: Sequence[Any]) -> torch.Tensor:
    """The next array of each rank's message, one after the other."""
    return torch.cat([next(own) for own in arrays])


def _summing(table: ShardedTable) -> SimpleNamespace:
    """The options of lookups whose factors are at hand."""
    own = table.own
    return SimpleNamespace(
        mode="sum",
        padding_idx=None,
        scale_grad_by_freq=own.scale_grad_by_freq,
        include_last_offset=False,
        fused=own.fused,
    )


def _call(
    table: ShardedTable,
    options: Any,
    indices: torch.Tensor,
    lengths: torch.Tensor,
    weights: torch.Tensor | None,
) -> Call:
    """A lookup in the part of a table that lies here, in bags of these lengths."""
    offsets = torch.cat([lengths.new_zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return Call(options, table.own.weight, indices, Offsets(array_view(offsets, "offsets")), weights)
