"""The structures that parameters and gradients come in: an array, list, dict or tree, or groups of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from fastopt._core import arrays
from fastopt._core.backend import host
from fastopt._core.trees import (
    Node,
    check_key,
    children,
    described,
    has_fields,
    is_container,
    is_nested,
    listed,
    values_of,
)
from fastopt._core.trees import leaves as leaves_of_tree

# Types of which thousands of groups have gradients, and which need no look at each.
_NEVER_ITERATORS = {list, tuple, np.ndarray, type(None)}


def is_groups(params: Any) -> bool:
    """Whether ``params`` is a list of groups, dicts with the key ``params``.

    Raises:
        TypeError: it has others beside them.
    """
    if not isinstance(params, list | tuple) or has_fields(params):
        return False
    groups = [isinstance(entry, dict) and "params" in entry for entry in params]
    if any(groups) and not all(groups):
        raise TypeError(
            f"params[{groups.index(True)}] is a dict with the key 'params', a group, and "
            f"params[{groups.index(False)}] is none: expected groups alone, or a dict of all parameters"
        )
    return any(groups)


def as_container(params: Any, label: str) -> Any:
    """``params``, with any other iterable than a dict or a named tuple made a list."""
    params = listed(params, label)
    if isinstance(params, dict) or (hasattr(params, "shape") and hasattr(params, "dtype")):
        return params
    if hasattr(params, "__cuda_array_interface__") or has_fields(params):
        return params
    if isinstance(params, Mapping):
        return dict(params)
    if not isinstance(params, list | tuple):
        arrays.array_view(params, label)  # raises
    return list(params)


def named_values(params: Any, label: str) -> Iterable[tuple[str | int, Any, str]]:
    """Key, array, and what follows ``label`` in the label of each parameter of a container."""
    if is_nested(params):
        return leaves_of_tree(params, label)
    if not isinstance(params, dict | list):
        return [(0, params, "")]
    for key in params if isinstance(params, dict) else ():
        check_key(key, label)
    return children(params)


class Structure:
    """The structure of an optimizer's parameters, in which its gradients come.

    Args:
        containers: of each group the array, list, dict or tree of its parameters.
        keys: of each group the keys of its parameters, names or positions.
        values: of each group the parameters themselves, as they are now.
        grouped: whether the parameters came as a list of groups.
    """

    def __init__(
        self,
        containers: Sequence[Any],
        keys: Sequence[Sequence[str | int]],
        values: Sequence[list],
        grouped: bool,
    ) -> None:
        self._keys = keys
        self._grouped = grouped
        self._count = sum(map(len, keys))
        self._params = containers
        # A tree is stood for by its root.
        self._containers = [Node.of(own) if is_nested(own) else own for own in containers]
        self._by_key = [isinstance(container, Mapping) for container in containers]
        self._named, self._some_named = grouped and all(self._by_key), any(self._by_key)
        self._nested = any(isinstance(container, Node) for container in self._containers)
        self._whole = self._joined() if self._nested and self._named else None
        self._identities = [host().Identities(own) for own in values]

    def _joined(self) -> Node | None:
        """The trees of all groups as one, if they have no place in common."""
        firsts = accumulate(map(len, self._keys), initial=0)
        return Node.of_all([Node.of(own, first) for own, first in zip(self._params, firsts, strict=False)])

    def is_as_before(self, number: int) -> bool:
        """Whether the container of a group still holds the parameters that it held at first."""
        params = self._containers[number]
        if isinstance(params, list):
            return self._identities[number].are_those_of(params)
        if isinstance(params, dict):
            return self._identities[number].are_those_of(list(params.values()))
        if isinstance(params, Node):
            return self._identities[number].are_those_of(values_of(self._params[number]))
        return True

    def taken(self, grads: Any) -> Any:
        """``grads`` with a list in the place of every iterator, which can be walked but once."""
        grads = listed(grads, "grads")
        if not self._grouped or not isinstance(grads, list | tuple) or len(grads) != len(self._containers):
            return grads
        if _NEVER_ITERATORS.issuperset(map(type, grads)):
            return grads
        own = [listed(entry, f"grads[{number}]") for number, entry in enumerate(grads)]
        for number, entry in enumerate(own):
            if isinstance(entry, dict) and "params" in entry and not self._by_key[number]:
                own[number] = {"params": listed(entry["params"], f"grads[{number}]['params']")}
        return own

    def _is_flat(self, grads: Any) -> bool:
        """Whether gradients of groups come without the groups: a list of one for each parameter, one group
        after the other, or a dict of all names. A list with an entry for each group is by groups if any entry
        is a list or a dict."""
        if isinstance(grads, Mapping):
            if self._nested:
                return self._whole is not None
            return self._named and set(grads) == {key for keys in self._keys for key in keys}
        if not isinstance(grads, list | tuple) or len(grads) != self._count:
            return False
        if self._some_named or self._nested:
            return False
        by_group = (issubclass(kind, list | tuple | dict) for kind in set(map(type, grads)))
        return len(grads) != len(self._containers) or not any(by_group)

    def entries(self, grads: Any) -> list | tuple:
        """The gradient of each parameter, or None; a list or tuple where several sparse ones are added up.

        Raises:
            ValueError: ``grads`` has another structure.
        """
        if not self._grouped:
            params = self._containers[0]
            if isinstance(params, list) and isinstance(grads, list | tuple) and len(grads) == len(params):
                return grads
            if type(params) is Node:
                return _collected(params, grads, "grads", self._count)
            if not isinstance(params, list | dict) and not isinstance(grads, list | tuple | dict):
                return [grads]
        elif self._is_flat(grads):
            if isinstance(grads, Mapping):
                if self._whole is not None:
                    return _collected(self._whole, grads, "grads", self._count)
                return [grads[key] for keys in self._keys for key in keys]
            return grads
        entries: list[Any] = []
        for number, own, label in self._of_groups(grads):
            entries += self._paired(number, own, label)
        return entries

    def labels(self, grads: Any) -> Callable[[int], str]:
        """What says what the gradient of a parameter, by its index, is called in messages."""
        if self._grouped and self._is_flat(grads):
            if self._whole is not None:
                suffixes = dict(self._whole.suffixes())
                return lambda index: f"grads{suffixes[index]}"
            names = [key for keys in self._keys for key in keys]
            by_name = isinstance(grads, Mapping)
            return lambda index: f"grads[{names[index]!r}]" if by_name else f"grads[{index}]"
        groups = list(self._of_groups(grads))
        return lambda index: self._label_in(groups, index)

    def _label_in(self, groups: Sequence[tuple[int, Any, str]], index: int) -> str:
        for number, _, label in groups:
            params, keys = self._containers[number], self._keys[number]
            if index < len(keys):
                if isinstance(params, Node):
                    return f"{label}{dict(params.suffixes())[index]}"
                if isinstance(params, dict):
                    return f"{label}[{keys[index]!r}]"
                return f"{label}[{index}]" if isinstance(params, list) else label
            index -= len(keys)
        raise IndexError(index)

    def _of_groups(self, grads: Any) -> Iterator[tuple[int, Any, str]]:
        """Number, gradients and label of each group."""
        if not self._grouped:
            yield 0, grads, "grads"
            return
        if not isinstance(grads, list | tuple) or len(grads) != len(self._containers):
            expected = f"a list of {len(self._containers)}, one entry a group"
            if self._whole is not None:
                expected += ", or a tree of all parameters"
            elif self._named and not self._nested:
                names = ", ".join(repr(key) for keys in self._keys for key in keys)
                expected += f", or a dict with the keys of all parameters, {names}"
            elif not self._some_named and not self._nested:
                expected += f", or of {self._count}, one entry a parameter"
            raise ValueError(f"grads is {described(grads)}: expected {expected}")
        for number, own in enumerate(grads):
            label = f"grads[{number}]"
            if isinstance(own, dict) and "params" in own and not self._by_key[number]:
                own, label = own["params"], f"{label}['params']"
            yield number, own, label

    def _paired(self, number: int, grads: Any, label: str) -> list[Any]:
        """The gradients of a group, in the order of its parameters."""
        params, keys = self._containers[number], self._keys[number]
        if isinstance(params, Node):
            return _collected(params, grads, label, len(keys))
        if isinstance(params, dict):
            if isinstance(grads, Mapping) and set(grads) == set(keys):
                return [grads[key] for key in keys]
            missing = [key for key in keys if not isinstance(grads, Mapping) or key not in grads]
            expected = ", ".join(map(repr, keys))
            if missing:
                expected = f"{missing[0]!r} is missing, pass None to skip it"
            raise ValueError(
                f"{label} is {described(grads)}: expected a dict with the keys of the parameters, {expected}"
            )
        if isinstance(params, list):
            if not isinstance(grads, list | tuple) or len(grads) != len(keys):
                raise ValueError(
                    f"{label} is {described(grads)}: expected a list of {len(keys)}, one entry a parameter"
                )
            return list(grads)
        if isinstance(grads, list | tuple | dict) and not _adds_up(grads):
            raise ValueError(f"{label} is {described(grads)}: expected one array, as params is one")
        return [grads]


class Gradients:
    """The gradients of one step: ``entries`` has one for each parameter, or None."""

    def __init__(self, entries: list | tuple, given: Any, structure: Structure) -> None:
        self.entries = entries
        self._given = given
        self._structure = structure

    @cached_property
    def label(self) -> Callable[[int], str]:
        """What says what the gradient of a parameter, by its index, is called in messages."""
        return self._structure.labels(self._given)

    def replace(self, positions: Iterable[int], made: Callable[[Any, str], Any]) -> None:
        """Have those gradients of these positions that came as a list or a sparse tensor be what is ``made``
        of them and their label. What the caller passed stays as it is."""
        entries = self.entries
        changed: dict[int, Any] = {}
        for i in positions:
            value = entries[i]
            if value is not None and (isinstance(value, list | tuple) or arrays.is_sparse_tensor(value)):
                changed[i] = made(value, self.label(i))
        if changed:
            self.entries = [changed.get(i, value) for i, value in enumerate(entries)]


def leaves(grads: Any, label: str) -> Iterator[tuple[Any, str]]:
    """Each gradient of an array, a sparse gradient, or nested lists and dicts of them, with its label."""
    if grads is None:
        return
    grads = listed(grads, label)
    if is_container(grads):
        for _, value, suffix in children(grads):
            yield from leaves(value, label + suffix)
    else:
        yield grads, label


def _collected(root: Node, grads: Any, label: str, count: int) -> list[Any]:
    """The gradients of a tree of ``count`` parameters, in their order."""
    found = [None] * count
    root.collect(grads, label, found)
    return found


def _adds_up(grads: Any) -> bool:
    """Whether it is a list of sparse gradients, which add up to that of one parameter."""
    return (
        isinstance(grads, list | tuple)
        and len(grads) > 0
        and all(isinstance(entry, arrays.Sparse) or arrays.is_sparse_tensor(entry) for entry in grads)
    )
