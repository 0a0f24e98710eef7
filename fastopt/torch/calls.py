"""What modules are called with: whether kernels take it, or torch does, which then says what is wrong."""

import torch
from torch.autograd import forward_ad

from fastopt._core.arrays import before_writing
from fastopt.torch.kept import takes
from fastopt.torch.lookups import Call
from fastopt.torch.tables import TableWeight, plain_parameter, writable

_INTEGERS = {torch.int32, torch.int64}


def call_of(
    module: torch.nn.EmbeddingBag | torch.nn.Embedding,
    given: torch.Tensor,
    offsets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> Call | None:
    """A lookup with the rows that it names ready, or None if it is torch's.

    Raises:
        TypeError: it would be torch's, in a table in files, of which torch makes dense gradients.
    """
    table = module.weight  # read once: it may be computed
    call = _call_in(table, module, given, offsets, weights)
    if call is None and isinstance(table, TableWeight):
        raise TypeError(
            f"{table.table!r} can't be looked up by these arguments: expected what {type(module).__name__} "
            "takes, integers as plain tensors on the CPU, and neither tracing nor transforms of torch.func"
        )
    return call


def _call_in(
    table: torch.Tensor,
    module: torch.nn.EmbeddingBag | torch.nn.Embedding,
    given: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> Call | None:
    if not (_is_plain(given) and takes(table) and fits(module, table, given, offsets, weights)):
        return None
    try:
        call = Call(module, table, given, offsets, weights)
    except ValueError:
        # What torch's kernels would not look at, and what torch must not
        if given.is_cuda or not _ascend(offsets, given) or isinstance(table, TableWeight):
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


def _ascend(offsets: torch.Tensor | None, indices: torch.Tensor) -> bool:
    """Whether bags begin in order, and hold all indices."""
    if offsets is None:
        return True
    return len(indices) == 0 if len(offsets) == 0 else bool((offsets.diff() >= 0).all())


def limit_norms(
    module: torch.nn.EmbeddingBag | torch.nn.Embedding, table: torch.Tensor, indices: torch.Tensor
) -> None:
    """Scale rows that are too long down, as torch does."""
    if module.max_norm is not None:
        with torch.no_grad():
            torch.embedding_renorm_(writable(table), indices.contiguous(), module.max_norm, module.norm_type)
