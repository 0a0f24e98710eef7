"""Embedding tables as modules of torch, whose gradients are never made: what their lookups leave goes to the
optimizer (see row_gradients.py)."""

import torch
from torch.autograd import forward_ad

from fastopt.torch.kept import takes
from fastopt.torch.lookups import Call, look_up

_INTEGERS = {torch.int32, torch.int64}


class EmbeddingBag(torch.nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag`` with the lookups and gradients of :func:`fastopt.embedding_bag`.

    The arguments are torch's. ``weight.grad`` is a :class:`RowGradients`, which the optimizers of
    :mod:`fastopt.torch` take as it is, and others as a dense gradient; ``sparse`` makes no difference. What
    fastopt does not take goes torch's own way: other dtypes, strided tables, nested tensors, what is traced
    or under transforms of :mod:`torch.func`.
    """

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``torch.nn.EmbeddingBag``."""
        return _embedding_bag(self, input, offsets, per_sample_weights)


class Embedding(torch.nn.Embedding):
    """``torch.nn.Embedding`` with the lookups and gradients of :func:`fastopt.embedding`; as for
    :class:`EmbeddingBag`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See ``torch.nn.Embedding``."""
        return _embedding(self, input)


@torch.compiler.disable
def _embedding_bag(
    module: EmbeddingBag,
    given: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """The pooled lookup of a module, by torch where it is not fastopt's."""
    table = module.weight  # read once: it may be computed
    if _is_plain(given, table) and _are_bags(module, table, given, offsets, weights):
        try:
            return _pooled(module, table, given, offsets, weights)
        except ValueError:
            if given.is_cuda or not _ascend(offsets, given):  # which torch's kernels would not look at
                raise
    return torch.nn.EmbeddingBag.forward(module, given, offsets, weights)


def _pooled(
    module: EmbeddingBag,
    table: torch.Tensor,
    given: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    call = Call(module, table, given, offsets, weights, pooled=True)
    _limit_norms(module, table, given)
    return look_up([call])


@torch.compiler.disable
def _embedding(module: Embedding, given: torch.Tensor) -> torch.Tensor:
    """The lookup of a module, by torch where it is not fastopt's."""
    table = module.weight  # read once: it may be computed
    if _is_plain(given, table) and given.dtype in _INTEGERS:
        try:
            call = Call(module, table, given, pooled=False)
            _limit_norms(module, table, given)
            return look_up([call]).reshape(*given.shape, module.embedding_dim)
        except ValueError:
            if given.is_cuda:  # where torch's kernels would not look at indices
                raise
    return torch.nn.Embedding.forward(module, given)


def _is_plain(given: torch.Tensor, table: torch.Tensor) -> bool:
    """Whether kernels can read the memory of both tensors, and nothing but gradients is asked of the lookup:
    no transform of torch.func, derivative in forward mode, or graph that is recorded."""
    return (
        type(given) is torch.Tensor
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None
        and takes(table)
        and given.device == table.device
    )


def _are_bags(
    module: EmbeddingBag,
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


def _limit_norms(module: EmbeddingBag | Embedding, table: torch.Tensor, indices: torch.Tensor) -> None:
    """Scale rows that are too long down, as torch does."""
    if module.max_norm is not None:
        with torch.no_grad():
            torch.embedding_renorm_(table, indices.contiguous(), module.max_norm, module.norm_type)
