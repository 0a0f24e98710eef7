"""Lookups in sharded tables as one step of autograd: results and gradients travel, each by one all-to-all."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastopt._core.arrays import array_view
from fastopt.distributed.batch import Batch, Served
from fastopt.distributed.exchange import exchange
from fastopt.distributed.layout import Layout
from fastopt.gradients.pooling import Offsets
from fastopt.torch.lookups import Call, gradients_of_tables, results
from fastopt.torch.memory import computed_with


class ShardedLookup:
    """The lookups of one batch.

    Args:
        weights: of each feature, as the caller gave them, or None. wire_dtype: what results and gradients are
            rounded to on their way, None for the tables' own.
    """

    def __init__(
        self,
        layout: Layout,
        batch: Batch,
        weights: Sequence[torch.Tensor | None],
        wire_dtype: torch.dtype | None,
        group: Any,
    ) -> None:
        self._layout = layout
        self._batch = batch
        self._weights = weights
        self._group = group
        self.dtype = layout.tables[0].own.weight.dtype
        self._wire_dtype = wire_dtype or self.dtype
        with torch.no_grad():  # what calls are given is nobody else's, and needs no copies
            self.served: Served = batch.served()
        self._local: dict[int, Call] = {}  # the features that are pooled here, of rows that came

    @property
    def calls(self) -> list[Call]:
        """Those that leave gradients of tables."""
        return [*self.served.pooled.values(), *self.served.used.values()]

    def reread(self) -> list[torch.Tensor]:
        """The tables that the backward pass reads, which may not have changed then."""
        pooled, learning = self.served.pooled, self._batch.learning
        return [call.table for f, call in pooled.items() if call.takes_maxima or f in learning]

    def result(self) -> torch.Tensor:
        """[bags, columns]: what the features of this rank look up."""
        layout, batch = self._layout, self._batch
        pooled = self._empty(sum(batch.bags), 0)
        if self.served.pooled:
            pooled = results([*self.served.pooled.values()])
        rows = {t: results([call]) for t, call in self.served.rows.items()}
        blocks = [*pooled.split(batch.bags)]
        asked = {t: [header.rows[t] for header in batch.headers] for t in rows}
        pieces = {t: own.split(asked[t]) for t, own in rows.items()}
        parts = [
            self._flat([blocks[rank], *(own[rank] for own in pieces.values())])
            for rank in range(layout.ranks)
        ]
        came = self._exchange(parts, [self._size_of_results(rank) for rank in range(layout.ranks)])
        out = self._empty(batch.request.bags, layout.columns)
        small: dict[int, list[torch.Tensor]] = {t: [] for t in layout.by_rows}
        for rank, own in enumerate(came):
            block, rest = own.split([len(out) * layout.width_at(rank), self._size_of_rows(rank)])
            self._place(out, block.reshape(len(out), layout.width_at(rank)), rank)
            for t in layout.at(rank, by_rows=True):
                size, columns = batch.request.rows[t].at[rank], layout.tables[t].columns
                piece, rest = rest.split([size * columns, len(rest) - size * columns])
                small[t].append(piece.reshape(size, columns))
        self._pool({t: torch.cat(own) for t, own in small.items() if own}, out)
        return out

    def _place(self, out: torch.Tensor, block: torch.Tensor, rank: int) -> None:
        """Put what a rank has pooled into its columns."""
        at = 0
        for f in self._layout.pooled_at(rank):
            first, last = self._layout.columns_at(f, rank)
            out[:, first:last] = block[:, at : at + last - first]
            at += last - first

    def _pool(self, small: dict[int, torch.Tensor], out: torch.Tensor) -> None:
        """Pool rows that came, in the order of each bag."""
        for t, rows in small.items():
            mode = self._layout.tables[t].mode
            options = SimpleNamespace(
                mode=mode, padding_idx=None, scale_grad_by_freq=False, include_last_offset=False
            )
            for f, uses in self._batch.request.rows[t].uses.items():
                offsets = Offsets(array_view(uses.given.offsets, "offsets"))
                self._local[f] = Call(options, rows, uses.given.indices, offsets, uses.given.weights)
        if self._local:
            pooled, at = results([*self._local.values()]), 0
            for f in self._local:
                own = self._layout.features[f]
                out[:, own.first : own.last] = pooled[:, at : at + own.last - own.first]
                at += own.last - own.first

    # The backward pass

    def gradients(self, given: torch.Tensor) -> tuple[dict[Call, Any], list[torch.Tensor | None]]:
        """Those of tables, by the calls, and of weights, by features, from that of the result."""
        layout, parts = self._layout, []
        for rank in range(layout.ranks):
            columns = [layout.columns_at(f, rank) for f in layout.pooled_at(rank)]
            pooled = torch.cat([given[:, :0], *(given[:, first:last] for first, last in columns)], 1)
            parts.append(self._flat([pooled, *self._of_bags(given, rank)]))
        came = self._exchange(parts, [self._size_of_gradients(rank) for rank in range(layout.ranks)])
        values = self._values(came)
        of_weights = self._gradients_of_weights(given, values)
        if layout.ranks > 1:
            values = {call: own / layout.ranks for call, own in values.items()}
        learning = [call for call in self.calls if call.table.requires_grad]
        return gradients_of_tables(learning, values), of_weights

    def _of_bags(self, given: torch.Tensor, rank: int) -> list[torch.Tensor]:
        """The gradients of bags that use rows of a rank."""
        found = []
        for f in self._layout.by_rows_at(rank):
            own, uses = self._layout.features[f], self._batch.request.uses_of(f)
            assert uses is not None
            found.append(given[uses.bags.split(uses.bags_at)[rank], own.first : own.last])
        return found

    def _values(self, came: Sequence[torch.Tensor]) -> dict[Call, torch.Tensor]:
        """The gradient of the result of each call, of what came of all ranks."""
        layout, pooled = self._layout, self.served.pooled
        width = layout.width_at(layout.rank)
        blocks, used = [], {f: [] for f in self.served.used}  # type: ignore[var-annotated]
        for own, header in zip(came, self._batch.headers, strict=True):
            block, rest = own.split([header.bags * width, len(own) - header.bags * width])
            blocks.append(block.reshape(header.bags, width))
            for f, parts in used.items():
                columns = layout.table_of(f).columns
                size = header.used[f] * columns
                piece, rest = rest.split([size, len(rest) - size])
                parts.append(piece.reshape(header.used[f], columns))
        whole = torch.cat(blocks)
        widths = [call.table.shape[1] for call in pooled.values()]
        values = dict(zip(pooled.values(), whole.split(widths, 1) if widths else (), strict=True))
        return values | {call: torch.cat(used[f]) for f, call in self.served.used.items()}

    def _gradients_of_weights(
        self, given: torch.Tensor, values: dict[Call, torch.Tensor]
    ) -> list[torch.Tensor | None]:
        layout, request = self._layout, self._batch.request
        found: list[torch.Tensor | None] = [None] * len(layout.features)
        elsewhere = [f for f in self._batch.learning if not layout.table_of(f).by_rows]
        if elsewhere:
            self._fetch(elsewhere, values, found)
        for f in self._batch.learning:
            own, uses, weights = layout.features[f], request.uses_of(f), self._weights[f]
            if weights is None or not weights.requires_grad:
                found[f] = None
            elif uses is not None:
                of_kept = self._local[f].gradient_of_weights(given[:, own.first : own.last])
                found[f] = of_kept.new_zeros(len(uses.kept)).masked_scatter_(uses.kept, of_kept)
            if found[f] is not None:
                found[f] = found[f].reshape(weights.shape).to(weights.dtype)  # type: ignore[union-attr]
        return found

    def _fetch(self, features: list[int], values: dict[Call, torch.Tensor], found: list[Any]) -> None:
        """Have the ranks that pool these features send the gradients of weights; those of columns are
        added up."""
        layout, batch = self._layout, self._batch
        served = {f: call for f, call in self.served.pooled.items() if f in features}
        own = {f: call.gradient_of_weights(values[call]) for f, call in served.items()}
        pieces = [own[f].split([header.indices[f] for header in batch.headers]) for f in own]
        empty = torch.empty(0, dtype=computed_with(layout.tables[0].own.weight), device=self._device)
        parts = [torch.cat([empty, *(piece[rank] for piece in pieces)]) for rank in range(layout.ranks)]
        asked = [[f for f in layout.pooled_at(rank) if f in features] for rank in range(layout.ranks)]
        sizes = [sum(len(batch.request.given[f].indices) for f in of_rank) for of_rank in asked]
        for of_rank, came in zip(asked, exchange(parts, sizes, self._group), strict=True):
            lengths = [len(batch.request.given[f].indices) for f in of_rank]
            for f, piece in zip(of_rank, came.split(lengths) if lengths else (), strict=True):
                found[f] = piece if found[f] is None else found[f] + piece

    # What travels

    def _empty(self, rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=self.dtype, device=self._device)

    @property
    def _device(self) -> torch.device:
        return self._layout.tables[0].own.weight.device

    def _flat(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([piece.reshape(-1) for piece in pieces])

    def _exchange(self, parts: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Send each rank its part, and take what they send, rounded on the way if that is asked for."""
        came = exchange([part.to(self._wire_dtype) for part in parts], sizes, self._group)
        return [own.to(self.dtype) for own in came]

    def _size_of_rows(self, rank: int) -> int:
        """How many numbers of rows come of a rank."""
        layout, rows = self._layout, self._batch.request.rows
        return sum(rows[t].at[rank] * layout.tables[t].columns for t in layout.at(rank, by_rows=True))

    def _size_of_results(self, rank: int) -> int:
        return self._batch.request.bags * self._layout.width_at(rank) + self._size_of_rows(rank)

    def _size_of_gradients(self, rank: int) -> int:
        """How many numbers come of a rank in the backward pass."""
        layout, header = self._layout, self._batch.headers[rank]
        used = sum(header.used[f] * layout.table_of(f).columns for f in layout.by_rows_at(layout.rank))
        return header.bags * layout.width_at(layout.rank) + used


class LookedUp(torch.autograd.Function):
    """A ShardedLookup, the weights of the tables here, those of features, and the tables of its calls, as one
    step of autograd."""

    @staticmethod
    def forward(ctx: Any, lookup: ShardedLookup, weights: int, *given: torch.Tensor | None) -> torch.Tensor:
        ctx.lookup, ctx.weights, ctx.given = lookup, weights, len(given)
        ctx.save_for_backward(*lookup.reread())
        return lookup.result()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        ctx.saved_tensors  # noqa: B018  raises if a table has changed, where that matters
        of_tables, of_weights = ctx.lookup.gradients(grad_output)
        of_calls = [of_tables.get(call) for call in ctx.lookup.calls]
        rest = ctx.given - len(of_calls) - len(of_weights)
        return None, None, *of_calls, *of_weights, *[None] * rest


def look_up(
    lookup: ShardedLookup, weights: Sequence[torch.Tensor | None], tables: Sequence[Any]
) -> torch.Tensor:
    """What the features of this rank look up.

    Args:
        weights: of each feature. tables: the weights of all parts that lie here: each rank has a backward
            pass, whether it has made lookups or not.
    """
    calls = [call.table for call in lookup.calls]
    return LookedUp.apply(lookup, len(weights), *calls, *weights, *tables)
