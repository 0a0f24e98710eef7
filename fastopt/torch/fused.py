"""Tables that the backward pass itself updates: which optimizer each has."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch.utils.weak import WeakIdKeyDictionary

from fastopt.torch.row_gradients import RowGradients


class Updates(Protocol):
    """An optimizer, as tables see it."""

    def update(self, gradients: Mapping[int, RowGradients]) -> None:
        """Update these parameters, given by ``id``, alone."""


_optimizers: Any = WeakIdKeyDictionary()  # by parameter: a weak reference to its latest optimizer


def register(optimizer: Updates, params: Iterable[torch.Tensor]) -> None:
    """Have an optimizer be that of these parameters."""
    own = weakref.ref(optimizer)
    for p in params:
        _optimizers[p] = own


def update(gradients: Iterable[tuple[torch.Tensor, RowGradients]]) -> None:
    """Have each table's optimizer update it: the gradients of a table are added up.

    Raises:
        RuntimeError: a table has no optimizer of :mod:`fastopt.torch`.
    """
    alike: dict[int, tuple[Updates, dict[int, RowGradients]]] = {}
    for table, gradient in gradients:
        found = _optimizers.get(table)
        optimizer = None if found is None else found()
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
