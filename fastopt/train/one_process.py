"""A training in one process: its tables lie here, and there is nobody to agree with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import fastopt

Optimizers = Callable[[Sequence[Any]], fastopt.Optimizer]  # what makes the optimizer of both tables


class Tables:
    """The two tables of a training, and their optimizer.

    Args:
        arrays: float32 [vocabulary, dim] each, the rows of words as centres and as contexts, which are
            updated in place.
        optimizers: makes the optimizer of both.
    """

    def __init__(self, arrays: Sequence[np.ndarray], optimizers: Optimizers) -> None:
        self._arrays = arrays
        self._optimizer = optimizers(arrays)

    def look_up(self, centres: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the first table and of the second, [indices, dim] each."""
        first, second = self._arrays
        return fastopt.embedding(first, centres), fastopt.embedding(second, others)

    look_up_to_learn = look_up

    def step(self, gradients: Sequence[fastopt.IndexedSlices]) -> None:
        """Update both tables, by the gradients of the rows that were last looked up to learn."""
        self._optimizer.step(gradients)

    def embeddings(self) -> np.ndarray:
        """The first table."""
        return self._arrays[0]

    def save(self, path: Path, metadata: dict[str, Any]) -> None:
        """Write tables and optimizer to one file, whole or not at all."""
        self._optimizer.save(path, params=True, metadata=metadata)

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a file; returns its metadata."""
        return self._optimizer.load(path, params=True)


class OneProcess:
    """Attributes: rank, ranks: which process of how many this is."""

    rank, ranks = 0, 1

    @contextmanager
    def agreement(self) -> Iterator[dict[str, Any]]:
        """A block, whose errors are those of all processes, and a dict, which is compared at its end."""
        yield {}

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over all processes, where all call it."""
        return [*numbers]

    def tables(self, arrays: Sequence[np.ndarray], optimizers: Optimizers) -> Tables:
        """The tables that begin as these arrays."""
        return Tables(arrays, optimizers)
