"""State of torch optimizers as the plain optimizer takes it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastopt._core.state import SCALES, Slot
from fastopt.torch.memory import array_of, local

_CODES = np.dtype(np.uint8)


def state_of(own: Mapping[str, Any], slots: Mapping[str, Slot], *, begun: bool) -> dict[str, np.ndarray]:
    """Copies of a parameter's state in torch, ``own``, in the dtypes that kernels work on; of what torch
    lacks, the first values. None at all if torch has none.

    Args:
        slots: the state arrays that the plain optimizer has of it.
        begun: whether it has made steps. Before the first, numbers that torch's constructor has made, as
            Adagrad's does, are none if there are to be codes, whose blocks the first gradient decides on.

    Raises:
        ValueError: 8-bit codes are expected where torch has other numbers.
    """
    if not any(isinstance(own.get(name), Tensor) for name in slots):
        return {}
    coded = [name for name, slot in slots.items() if slot.dtype == _CODES]
    if not begun and coded and all(_is_as_made(own.get(name), name, slots) for name in coded):
        return {}
    found = {}
    for name, (shape, dtype, first) in slots.items():
        value = own.get(name)
        if value is None:
            found[name] = np.full(shape, first, dtype)
            continue
        value = local(value)
        if dtype == _CODES and value.dtype != torch.uint8:
            raise ValueError(
                f"the state {name!r} has dtype {value.dtype}: expected 8-bit codes, as state_dtype='8bit' of "
                "this optimizer makes them; load this state into one with state_dtype None or 'bfloat16'"
            )
        found[name] = array_of(value, dtype)
    return found


def _is_as_made(value: Any, name: str, slots: Mapping[str, Slot]) -> bool:
    """Whether an array, of what are to be codes, holds nothing but the first value, as torch rounds it."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    own = local(value)
    first = torch.tensor(slots[name + SCALES].first, dtype=torch.float64).to(own)
    return own.shape == slots[name].shape and bool((own == first).all())
