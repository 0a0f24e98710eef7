"""Tables that the backward pass itself updates: which optimizer each has."""

import weakref
from collections.abc import Iterable, Mapping
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


def register(optimizer: Updates) -> None:
    """Have an optimizer be found by the tables among its parameters."""
    _optimizers[next(_numbers)] = optimizer


def update(gradients: Iterable[tuple[torch.Tensor, RowGradients]]) -> None:
    """Have each table's optimizer, the latest that has it, update it: the gradients of a table are added up.

    Raises:
        RuntimeError: a table has no optimizer of :mod:`fastopt.torch`.
    """
    gradients = list(gradients)
    if not gradients:
        return
    owners = {
        id(p): optimizer
        for _, optimizer in sorted(_optimizers.items())
        for group in optimizer.param_groups
        for p in group["params"]
    }
    alike: dict[int, tuple[Updates, dict[int, RowGradients]]] = {}
    for table, gradient in gradients:
        optimizer = owners.get(id(table))
        if optimizer is None:
            raise RuntimeError(
                f"a table of shape {tuple(table.shape)} is fused, and no optimizer has it: expected its "
                "weight among the parameters of an optimizer of fastopt.torch, made before the backward pass"
            )
        _, own = alike.setdefault(id(optimizer), (optimizer, {}))
        before: Any = own.get(id(table))
        own[id(table)] = gradient if before is None else before + gradient
    for optimizer, own in alike.values():
        optimizer.update(own)
