"""Gradients by rows of one parameter, brought together: the values of each follow those of the one before."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from fastopt._core.backend import Backend, backend_of
from fastopt._core.indices import Indices, one_after_the_other
from fastopt.gradients.rows import RowGradient
from fastopt.kernels.work import Array


class JoinedRows(RowGradient):
    """The sum of gradients by rows of one parameter, with one backend, dtype to compute with and dim.

    What a row has in several is added in the order of these and, within each, of its positions: the same as
    of one gradient that has all of it in this order. Where bags have maxima, the gradient of each position is
    written out once these are found.
    """

    def __init__(self, parts: Sequence[RowGradient]) -> None:
        first = parts[0].values
        backend = backend_of(first)
        sizes = [part.indices.flat.size if part.takes_maxima else len(part.values) for part in parts]
        bounds = list(accumulate(sizes, initial=0))
        values = backend.empty((bounds[-1], first.shape[1]), first.dtype)
        self._parts = [(part, values[a:b]) for part, (a, b) in zip(parts, pairwise(bounds), strict=True)]
        for part, own in self._parts:
            if not part.takes_maxima:
                own[...] = part.values
        positions = [_positions(backend, part) for part in parts]
        rows = max(part.indices.rows for part in parts)
        super().__init__(values, Indices(one_after_the_other([own for own, _, _ in positions]), rows))
        self.given = tuple(array for part in parts for array in part.given)
        self._sources = _sources(backend, positions, bounds), _weights(backend, positions, first.dtype)

    @property
    def takes_maxima(self) -> bool:
        """Whether some go to the rows that maxima come from."""
        return any(part.takes_maxima for part, _ in self._parts)

    @property
    def values_used(self) -> np.ndarray:
        """Those of all that belong to a row, on the host."""
        return np.concatenate([part.values_used for part, _ in self._parts])

    def find_winners(self, table: Array) -> None:
        """Find the rows of ``table`` that the maxima come from, and write out what goes to them."""
        for part, own in self._parts:
            if part.takes_maxima:
                part.find_winners(table)
                part.write_won(own)

    def sources(self) -> tuple[Array | None, Array | None]:
        """The row of ``values`` that each position has, and the factor on it."""
        return self._sources


_Positions = tuple[Array, Array | None, Array | None]  # their indices, rows of values, and factors


def _positions(backend: Backend, part: RowGradient) -> _Positions:
    """The positions of a gradient, but for those of its padding: other gradients may give that row one."""
    indices = part.indices.flat
    source, weights = (None, None) if part.takes_maxima else part.sources()
    if part.padding < 0:
        return indices, source, weights
    if source is None:
        source = backend.all_rows(indices.size)[0]
    return backend.without(indices, part.padding, source, weights)


def _sources(backend: Backend, positions: Sequence[_Positions], bounds: Sequence[int]) -> Array | None:
    """The row of joined values of each position, int32; ``bounds``: where those of each gradient begin."""
    if all(source is None for _, source, _ in positions):
        return None
    out, last = backend.empty(sum(indices.size for indices, _, _ in positions), np.int32), 0
    for (indices, source, _), first in zip(positions, bounds[:-1], strict=True):
        own, last = out[last : last + indices.size], last + indices.size
        own[...] = backend.all_rows(indices.size)[0] if source is None else source
        backend.shift(own, first)
    return out


def _weights(backend: Backend, positions: Sequence[_Positions], dtype: np.dtype) -> Array | None:
    """The factor of each position."""
    if all(weights is None for _, _, weights in positions):
        return None
    out, last = backend.empty(sum(indices.size for indices, _, _ in positions), dtype), 0
    for indices, _, weights in positions:
        own, last = out[last : last + indices.size], last + indices.size
        own[...] = 1 if weights is None else weights
    return out
