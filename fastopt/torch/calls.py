"""What modules are called with: whether kernels take it, or torch does, which then says what is wrong."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from fastopt._core.arrays import array_view, before_writing
from fastopt._core.indices import Indices, copied_together
from fastopt.gradients.pooling import Offsets
from fastopt.torch.kept import takes
from fastopt.torch.lookups import Call
from fastopt.torch.tables import TableWeight, plain_parameter, writable

_INTEGERS = {torch.int32, torch.int64}


class Together:
    """Lookups that are made together: all their indices are copied and looked at at once, and offsets that
    several of them are given are checked once.

    Args:
        tables: of the lookups. given: the indices of each.
    """

    def __init__(self, tables: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> None:
        parts = {
            (id(indices), table.shape[0]): (array_view(indices, "indices"), table.shape[0])
            for table, indices in zip(tables, given, strict=True)
            if table.ndim == 2
            and _is_plain(indices)
            and indices.layout is torch.strided
            and indices.dtype in _INTEGERS
            and indices.device == table.device
        }
        self._indices = dict(zip(parts, copied_together([*parts.values()]), strict=True))
        self._offsets: dict[tuple, Offsets] = {}

    def call_of(
        self,
        module: torch.nn.EmbeddingBag,
        table: torch.Tensor,
        given: torch.Tensor,
        offsets: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> Call | None:
        """One of the lookups, as the function of this name."""
        if offsets is None:
            key: tuple = given.device, given.shape
        else:
            key = id(offsets), given.numel(), module.include_last_offset
        indices = self._indices.get((id(given), table.shape[0])) if table.ndim else None
        call = call_of(module, table, given, offsets, weights, indices, self._offsets.get(key))
        if call is not None and call.bags is not None:
            self._offsets[key] = call.bags.bounds
        return call


def call_of(
    module: torch.nn.EmbeddingBag | torch.nn.Embedding,
    table: torch.Tensor,
    given: torch.Tensor,
    offsets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    indices: Indices | None = None,
    bounds: Offsets | None = None,
) -> Call | None:
    """A lookup with the rows that it names ready, or None if it is torch's.

    Args:
        module; table: its weight, which may be computed each time that it is asked for. given, offsets,
            weights: as for its ``forward``. indices, bounds: copies of the first two, if they are made and
            checked.

    Raises:
        TypeError: it would be torch's, in a table in files, of which torch makes dense gradients.
    """
    call = _call_in(module, table, given, offsets, weights, indices, bounds)
    if call is None and isinstance(table, TableWeight):
        raise TypeError(
            f"{table.table!r} can't be looked up by these arguments: expected what {type(module).__name__} "
            "takes, integers as plain tensors on the CPU, and neither tracing nor transforms of torch.func"
        )
    return call


def _call_in(
    module: torch.nn.EmbeddingBag | torch.nn.Embedding,
    table: torch.Tensor,
    given: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    indices: Indices | None,
    bounds: Offsets | None,
) -> Call | None:
    is_plain = indices is not None or _is_plain(given)
    if not (is_plain and takes(table) and fits(module, table, given, offsets, weights)):
        return None
    try:
        call = Call(module, table, indices or given, bounds or offsets, weights)
    except ValueError:
        # What torch's kernels would not look at, and what torch must not
        if given.is_cuda or not _can_hold(module, offsets, given) or isinstance(table, TableWeight):
            raise
        return None
    if module.max_norm is not None:
        before_writing(plain_parameter(table), call.indices.segments)
        limit_norms(module, table, given)
    return call


def fits(
    module: torch.nn.EmbeddingBag | torch.nn.Embedding,
    table: torch.Tensor,
    given: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> bool:
    """Whether kernels take arguments of these kinds, for a table that they take."""
    if table.ndim != 2 or given.device != table.device:
        return False
    if isinstance(module, torch.nn.EmbeddingBag):
        return _are_bags(module, table, given, offsets, weights)
    return given.dtype in _INTEGERS


def _is_plain(given: torch.Tensor) -> bool:
    """Whether indices have numbers, and nothing but gradients is asked of the lookup: no transform of
    torch.func, derivative in forward mode, or graph that is recorded."""
    return (
        type(given) is torch.Tensor
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None
    )


def _are_bags(
    module: torch.nn.EmbeddingBag,
    table: torch.Tensor,
    given: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> bool:
    """Whether arguments are of the kinds that fastopt takes; of others torch says what is wrong with them."""
    if offsets is None:
        fits = given.ndim == 2 and given.dtype in _INTEGERS
    else:
        fits = given.ndim == offsets.ndim == 1 and {given.dtype, offsets.dtype} <= _INTEGERS
    if module.mode == "max":
        fits = fits and not (module.sparse or module.scale_grad_by_freq)
    if weights is None:
        return fits
    dtypes = {table.dtype, torch.float32} if table.dtype.itemsize == 2 else {table.dtype}
    return fits and module.mode == "sum" and weights.shape == given.shape and weights.dtype in dtypes


def _can_hold(module: Any, offsets: torch.Tensor | None, indices: torch.Tensor) -> bool:
    """Whether bags begin in order, and there is one to hold indices: without, torch's kernels crash."""
    if offsets is None:
        return True
    if len(offsets) == int(module.include_last_offset):
        return len(indices) == 0
    return bool((offsets.diff() >= 0).all())


def limit_norms(
    module: torch.nn.EmbeddingBag | torch.nn.Embedding, table: torch.Tensor, indices: torch.Tensor
) -> None:
    """Scale rows that are too long down, as torch does."""
    if module.max_norm is not None:
        with torch.no_grad():
            torch.embedding_renorm_(writable(table), indices.contiguous(), module.max_norm, module.norm_type)
