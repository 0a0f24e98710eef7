"""Trees: dicts, lists, tuples and named tuples within each other, with arrays as leaves, as JAX's pytrees.

The name of a leaf is its path, the keys, positions and fields that lead to it, with dots between them, such
as ``encoder.layers.3.weight``; messages say ``params['encoder']['layers'][3].weight``. None among parameters
stands for nothing at all, as in JAX, but in a list of arrays alone.
"""

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, Set
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from fastopt._core import arrays

_DICTS = dict, Mapping  # the common type first, as an abstract one takes long to ask
_CONTAINERS = list, tuple, *_DICTS


class Leaf(NamedTuple):
    """An array of a tree: its name, and what follows the tree's label in its own."""

    name: str
    value: Any
    suffix: str


def is_container(value: Any) -> bool:
    """Whether it holds others by key, position or field."""
    return isinstance(value, _CONTAINERS)


def has_fields(value: Any) -> bool:
    """Whether it is a named tuple."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def is_nested(params: Any) -> bool:
    """Whether it is a container that holds others, one whose entries are fields, or a dict with None in the
    place of an array; in a list of arrays that is more likely a mistake."""
    if not is_container(params):
        return False
    by_key = isinstance(params, Mapping)
    values = params.values() if by_key else params
    if by_key and any(value is None for value in values):
        return True
    return has_fields(params) or any(map(is_container, values))


def children(container: Any) -> Iterator[tuple[Any, Any, str]]:
    """Key, position or name of a field, value, and what follows the container's label, of each entry."""
    if isinstance(container, Mapping):
        for key, value in container.items():
            yield key, value, f"[{key!r}]"
    elif has_fields(container):
        for name, value in zip(container._fields, container, strict=True):
            yield name, value, f".{name}"
    else:
        for position, value in enumerate(container):
            yield position, value, f"[{position}]"


def leaves(tree: Any, label: str) -> list[Leaf]:
    """The leaves of a tree called ``label``, in order.

    Raises:
        TypeError: a key is no str.
        ValueError: two leaves would have the same name.
    """
    found: dict[str, Leaf] = {}
    for leaf in _leaves(tree, label, (), ""):
        other = found.setdefault(leaf.name, leaf)
        if other is not leaf:
            raise ValueError(
                f"{label}{other.suffix} and {label}{leaf.suffix} would both be called {leaf.name!r}: "
                "expected each name once, rename a key"
            )
    return list(found.values())


def _leaves(container: Any, label: str, path: tuple[str, ...], suffix: str) -> Iterator[Leaf]:
    by_key = isinstance(container, Mapping)
    for key, value, own in children(container):
        if by_key:
            check_key(key, label + suffix)
        if is_container(value):
            yield from _leaves(value, label, (*path, str(key)), suffix + own)
        elif value is not None:
            yield Leaf(".".join((*path, str(key))), value, suffix + own)


def check_key(key: Any, label: str) -> None:
    """Refuse keys that are no names."""
    if not isinstance(key, str):
        raise TypeError(f"{label} has the key {key!r}: expected names, of type str")


def values_of(tree: Any) -> list[Any]:
    """The arrays of a tree, in order, as it is now."""
    found: list[Any] = []
    _add_values(tree, found)
    return found


def _add_values(container: Any, found: list[Any]) -> None:
    for value in container.values() if isinstance(container, _DICTS) else container:
        if type(value) is np.ndarray:  # most are, and the look at others takes longer
            found.append(value)
        elif isinstance(value, _CONTAINERS):
            _add_values(value, found)
        elif value is not None:
            found.append(value)


class Node:
    """A container in a tree of parameters, which says what gradients may stand in its place.

    Attributes:
        by_key: whether it is a dict.
        children: by key, position or name of the field, the node of a container, or the number of the
            parameter that is there.
    """

    def __init__(self, container: Any, suffix: str, numbers: Iterator[int]) -> None:
        self.by_key = isinstance(container, Mapping)
        self.children: dict[Any, Node | int] = {}
        self._suffix = suffix
        self._fields = container._fields if has_fields(container) else None
        self._nothing = container is None
        for key, value, own in () if container is None else children(container):
            leaf = not is_container(value) and value is not None
            self.children[key] = next(numbers) if leaf else Node(value, suffix + own, numbers)

    @classmethod
    def of(cls, tree: Any, first: int = 0) -> "Node":
        """The root of a tree whose parameters have the numbers from ``first`` on."""
        return cls(tree, "", count(first))

    @classmethod
    def of_all(cls, nodes: Sequence["Node"]) -> "Node | None":
        """One dict with the entries of several; None if it would have two different ones at a place."""
        if not all(node.by_key for node in nodes):
            return None
        merged = cls({}, nodes[0]._suffix, count())
        places: dict[Any, list[Node | int]] = {}
        for node in nodes:
            for key, child in node.children.items():
                places.setdefault(key, []).append(child)
        for key, many in places.items():
            below = [child for child in many if not isinstance(child, int)]
            one = many[0] if len(many) == 1 else cls.of_all(below) if len(below) == len(many) else None
            if one is None:
                return None
            merged.children[key] = one
        return merged

    def suffixes(self) -> Iterator[tuple[int, str]]:
        """The number of each parameter, and what follows the tree's label in that of its gradient."""
        for key, child in self.children.items():
            if isinstance(child, int):
                yield child, self._suffix + (f"[{key!r}]" if self._fields is None else f".{key}")
            else:
                yield from child.suffixes()

    def collect(self, grads: Any, label: str, found: list[Any]) -> None:
        """Put the gradient of each parameter into ``found``, at its number. ``label``: of the whole tree.

        Raises:
            ValueError: ``grads`` has another structure.
        """
        for child, value in zip(self.children.values(), self._values(grads, label), strict=False):
            if isinstance(child, int):
                found[child] = value
            elif value is not None:  # which leaves all parameters there alone
                child.collect(value, label, found)

    def _values(self, grads: Any, label: str) -> Iterable[Any]:
        """What gradients have in the place of each of the children."""
        if self.by_key:
            if isinstance(grads, _DICTS) and grads.keys() == self.children.keys():
                return map(grads.__getitem__, self.children)
        elif not self._nothing:
            grads = listed(grads, label + self._suffix)
            fitting = isinstance(grads, list | tuple) and len(grads) == len(self.children)
            if fitting and (self._fields is None or getattr(grads, "_fields", self._fields) == self._fields):
                return grads
        raise ValueError(self._mismatch(grads, label + self._suffix))

    def _mismatch(self, grads: Any, label: str) -> str:
        names = ", ".join(map(repr, self.children)) or "none"
        if self.by_key and isinstance(grads, Mapping):
            missing = next((key for key in self.children if key not in grads), None)
            if missing is not None:
                return (
                    f"{label}[{missing!r}] is missing: expected the keys of the parameters, {names}, pass "
                    "None to skip one"
                )
            other = next(key for key in grads if key not in self.children)
            return f"{label}[{other!r}] belongs to no parameter: expected the keys of the parameters, {names}"
        if self._nothing:
            expected = "None, as there is no parameter"
        elif self.by_key:
            expected = f"a dict with the keys of the parameters, {names}"
        elif self._fields is not None:
            expected = f"a named tuple with the fields of the parameters, {', '.join(self._fields)}"
        else:
            expected = f"a list of {len(self.children)}, as that of the parameters"
        return f"{label} is {described(grads)}: expected {expected}"


def listed(value: Any, label: str) -> Any:
    """``value``, or a list of what it yields if it is an iterable but no array, list, tuple or dict.

    Raises:
        TypeError: it is a set, which has no order.
    """
    if type(value) is list or hasattr(value, "shape") or hasattr(value, "__cuda_array_interface__"):
        return value
    if isinstance(value, list | tuple | str | bytes | Mapping):
        return value
    if isinstance(value, Set) and not isinstance(value, KeysView | ItemsView):
        raise TypeError(f"{label} is {arrays.article(type(value).__name__)}, which has no order: pass a list")
    return list(value) if hasattr(value, "__iter__") else value


def described(grads: Any) -> str:
    """What there is in the place of gradients."""
    if isinstance(grads, Mapping):
        return f"a dict with the keys {', '.join(map(repr, grads)) or '(none)'}"
    if isinstance(grads, list | tuple):
        fields = getattr(grads, "_fields", ())
        named = f" with the fields {', '.join(fields)}" if fields else ""
        return f"a {type(grads).__name__} of {len(grads)}{named}"
    return f"of type {type(grads).__name__}"
