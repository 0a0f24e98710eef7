"""Attributes that are computed when first asked for."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class lazy(Generic[T]):
    """As ``functools.cached_property``, without the lock that Python 3.11 has there.

    It is one for all instances, and would stay held in a child that is forked meanwhile.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.__doc__ = function.__doc__
        self._function = function

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        return instance.__dict__.setdefault(self._name, self._function(instance))
