"""What torch's state shows of the memory that kernels work on, and whether it still does."""

from collections.abc import Container, Iterable, Sequence
from operator import is_, itemgetter
from typing import Any

import torch

from fastopt.torch.memory import local

_address: Any = torch.Tensor.data_ptr


def same(one: Iterable, other: Sequence) -> bool:
    """Whether both hold the same objects in the same order."""
    one = list(one)
    return len(one) == len(other) and all(map(is_, one, other))


class Shown:
    """Tensors over state arrays, and over numbers, in the dicts of a torch optimizer's ``state``.

    Of arrays it is looked at where they lie, since ``set_``, ``.data =`` and ``share_memory_`` put a tensor
    over other memory. Numbers are known by their tensors: to ask each for its address costs as much again.

    Args:
        state: of the torch optimizer. has_shards: whether some are DTensors.
    """

    def __init__(self, state: Any, has_shards: bool) -> None:
        self._state = state
        self._has_shards = has_shards
        self._dicts: list[dict] = []
        self._numbers: dict[str, tuple[list[dict], list[Any]]] = {}
        self._arrays: dict[str, tuple[list[dict], list[int]]] = {}

    def remember(self, shown: Iterable[tuple[Any, Container[str]]], numbers: Container[str]) -> None:
        """Take what is in the state now for what was put there: of parameters, arrays and numbers by their
        names."""
        self._dicts = list(self._state.values())
        self._numbers = {}
        dicts_of: dict[str, list[dict]] = {}
        for p, names in shown:
            own = self._state.get(p, {})
            for name, tensor in own.items():
                if not isinstance(tensor, torch.Tensor):
                    continue
                if name in numbers:
                    dicts, tensors = self._numbers.setdefault(name, ([], []))
                    dicts.append(own)
                    tensors.append(tensor)
                elif name in names:
                    dicts_of.setdefault(name, []).append(own)
        self._arrays = {name: (dicts, self._addresses(name, dicts)) for name, dicts in dicts_of.items()}

    def holds(self) -> bool:
        """Whether the state is what was put there, in the memory where it lay."""
        if not same(self._state.values(), self._dicts):
            return False
        try:
            for name, (dicts, tensors) in self._numbers.items():
                if not all(map(is_, map(itemgetter(name), dicts), tensors)):
                    return False
            return all(self._addresses(name, dicts) == at for name, (dicts, at) in self._arrays.items())
        except (KeyError, TypeError, RuntimeError):  # some was taken out, or something else put in its place
            return False

    def _addresses(self, name: str, dicts: list[dict]) -> list[int]:
        tensors: Iterable[Any] = map(itemgetter(name), dicts)
        if self._has_shards:
            with torch.no_grad():  # without which the part of a DTensor is a new tensor
                tensors = [*map(local, tensors)]
        return [*map(_address, tensors)]
