"""Tables that the backward pass itself updates: which optimizer each has."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any, Protocol

import torch

from fastopt.torch.row_gradients import RowGradients


class Updates(Protocol):
    """An optimizer, as tables see it."""

    param_groups: list[dict[str, Any]]

    def update(self, gradients: Mapping[int, RowGradients]) -> None:
        """Update these parameters, given by ``id``, alone."""


# In the order in which they were made. Of parameters there is no weak reference: with one, torch refuses to
# put other memory in their place.
_optimizers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = count()
_PLAIN = torch.Tensor, torch.nn.Parameter


def register(optimizer: Updates) -> None:
    """Have an optimizer be found by the tables among its parameters."""
    _optimizers[next(_numbers)] = optimizer


def parameter_at(place: int, shape: Sequence[int]) -> torch.Tensor:
    """The parameter of this shape, of an optimizer, whose memory begins at ``place``.

    Raises:
        RuntimeError: no optimizer has one.
    """
    for optimizer in _optimizers.values():
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if type(p) in _PLAIN and p.shape == tuple(shape) and p.data_ptr() == place:
                return p
    raise _without_optimizer(shape)


def owners() -> dict[int, tuple[Any, dict[str, Any]]]:
    """The latest optimizer of :mod:`fastopt.torch` that has each parameter, and its group there, by the
    parameter's ``id``."""
    return {
        id(p): (optimizer, group)
        for _, optimizer in sorted(_optimizers.items())
        for group in optimizer.param_groups
        for p in group["params"]
    }


def _without_optimizer(shape: Sequence[int]) -> RuntimeError:
    return RuntimeError(
        f"a table of shape {tuple(shape)} is fused, and no optimizer has it: expected its weight, itself and "
        "not what it is computed of, in an optimizer of fastopt.torch, made before the backward pass"
    )


def update(gradients: Iterable[tuple[torch.Tensor, RowGradients]]) -> None:
    """Have each table's optimizer, the latest that has it, update it: the gradients of a table are added up.

    Raises:
        RuntimeError: a table has no optimizer of :mod:`fastopt.torch`, or hooks that would see its gradient.
    """
    gradients = list(gradients)
    if not gradients:
        return
    known = owners()
    alike: dict[int, tuple[Updates, dict[int, RowGradients]]] = {}
    for table, gradient in gradients:
        if table._backward_hooks:
            raise RuntimeError(
                f"a table of shape {tuple(table.shape)} is fused and has hooks (register_hook): expected "
                "none, as there is no gradient after its update"
            )
        if id(table) not in known:
            raise _without_optimizer(table.shape)
        optimizer, _ = known[id(table)]
        _, own = alike.setdefault(id(optimizer), (optimizer, {}))
        before: Any = own.get(id(table))
        own[id(table)] = gradient if before is None else before + gradient
    for optimizer, own in alike.values():
        optimizer.update(own)
