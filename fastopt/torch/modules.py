"""Embedding tables as modules of torch, whose gradients are never made: what their lookups leave goes to the
optimizer (see row_gradients.py)."""

from typing import Any, overload

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

import fastopt
from fastopt._core.indices import IndexPlan
from fastopt.gradients import BagGradient
from fastopt.torch.kept import takes
from fastopt.torch.row_gradients import Lookup, RowGradients

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


class _Call:
    """What a lookup was asked for beside its table: copies, where gradients may be made of them later, when
    the caller may have put other numbers in their place."""

    def __init__(
        self,
        module: torch.nn.Module,
        table: torch.Tensor,
        indices: torch.Tensor,
        offsets: torch.Tensor | None,
        weights: torch.Tensor | None,
        mode: str,
    ) -> None:
        if torch.is_grad_enabled():
            indices, offsets, weights = _copy(indices), _copy(offsets), _copy(weights)
        self.indices = indices
        self.offsets = offsets
        self.weights = None if weights is None else weights.detach()
        self.mode = mode
        self.padding: Any = module.padding_idx
        self.by_frequency = bool(module.scale_grad_by_freq) and mode != "max"
        # Sorted at once where the backward pass needs it; a lookup alone does not.
        learns = torch.is_grad_enabled() and table.requires_grad
        self.plan: Any = IndexPlan(indices, len(table)) if learns else indices

    def result(self, table: torch.Tensor) -> torch.Tensor:
        """What is looked up."""
        if self.offsets is None:
            return fastopt.embedding(table, self.plan)
        return fastopt.embedding_bag(
            table,
            self.plan,
            self.offsets,
            mode=self.mode,
            per_sample_weights=self.weights,
            padding_idx=self.padding,
            include_last_offset=True,
        )

    def lookup(self, values: torch.Tensor) -> Lookup:
        """What is left of it for the table's gradient."""
        found = Lookup(self.indices, self.offsets, values, self.mode, self.weights, self.padding, self.plan)
        if self.offsets is None and (self.padding is not None or self.by_frequency):
            each = torch.arange(len(self.indices) + 1, device=self.indices.device)
            found = found._replace(offsets=each)
        if self.by_frequency:
            found = found.by_frequency()
        return found

    def gradient_of_weights(self, table: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        gradient = BagGradient(
            self.plan, self.offsets, values, self.mode, self.weights, self.padding, include_last_offset=True
        )
        return gradient.per_sample_weights_grad(table)


@overload
def _copy(tensor: torch.Tensor) -> torch.Tensor: ...
@overload
def _copy(tensor: None) -> None: ...
def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A contiguous copy, of which autograd knows nothing."""
    return None if tensor is None else tensor.detach().clone(memory_format=torch.contiguous_format)


class _Looked(torch.autograd.Function):
    """A lookup, and what it leaves in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, weights: torch.Tensor | None, call: _Call) -> torch.Tensor:
        ctx.table, ctx.call = weight.detach(), call
        if call.mode == "max" or (weights is not None and ctx.needs_input_grad[1]):
            ctx.save_for_backward(weight)  # the backward pass reads it: it may not have changed
        return call.result(ctx.table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        ctx.saved_tensors  # noqa: B018  raises if the table has changed, where that matters
        values = _copy(grad_output)  # which may be the caller's, or the gradient of others, too
        of_table = of_weights = None
        if ctx.needs_input_grad[0]:
            of_table = RowGradients(ctx.table, [ctx.call.lookup(values)])
        if ctx.needs_input_grad[1]:
            of_weights = ctx.call.gradient_of_weights(ctx.table, values)
        return of_table, of_weights, None


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
    _limit_norms(module, table, given)
    indices = given.reshape(-1)
    bounds = offsets
    if bounds is None:
        bounds = torch.arange(given.shape[0] + 1, device=given.device) * given.shape[1]
    elif not module.include_last_offset:
        bounds = torch.cat([bounds, bounds.new_full((1,), indices.numel())])
    weights = None if weights is None else weights.reshape(-1)
    return _Looked.apply(table, weights, _Call(module, table, indices, bounds, weights, module.mode))


@torch.compiler.disable
def _embedding(module: Embedding, given: torch.Tensor) -> torch.Tensor:
    """The lookup of a module, by torch where it is not fastopt's."""
    table = module.weight  # read once: it may be computed
    if _is_plain(given, table) and given.dtype in _INTEGERS:
        try:
            _limit_norms(module, table, given)
            call = _Call(module, table, given.reshape(-1), None, None, "sum")
            found = _Looked.apply(table, None, call)
            return found.reshape(*given.shape, module.embedding_dim)
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
