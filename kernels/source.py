"""Functions from source text: their lines depend on how many slots a rule has and how these are stored."""

import hashlib
from collections.abc import Callable


def define(name: str, arguments: str, *lines: str, **names: object) -> Callable:
    """A function from source text, which sees ``names``.

    A digest of both ends its name. Numba tells compiled functions apart by name, types of arguments and a
    number that it counts in each process: two that were compiled in two processes and are loaded from the
    cache into a third can agree in all of them, and the one that was loaded first is called for both.
    """
    seen = [f"{key}: {_told(value)}" for key, value in sorted(names.items())]
    name += "_" + hashlib.sha256("\n".join([arguments, *lines, *seen]).encode()).hexdigest()[:16]
    exec(f"def {name}({arguments}):\n" + "".join(f"    {line}\n" for line in lines), names)
    return names[name]  # type: ignore[return-value]


def _told(value: object) -> str:
    """What a function or constant is, by which others differ."""
    value = getattr(value, "py_func", value)
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if name else repr(value)
