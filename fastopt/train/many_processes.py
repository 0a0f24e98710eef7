"""A training in several processes, started by torchrun: each has some rows of both tables.

:class:`ManyProcesses` and :class:`ShardedTables` have the methods of ``OneProcess`` and ``Tables``, and write
the same files. Rows and gradients travel by :class:`fastopt.distributed.ShardedEmbeddingBagCollection`, and
the same optimizer updates them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import fastopt
from fastopt.distributed import ByRows, ShardedEmbeddingBagCollection
from fastopt.distributed.agreement import agree
from fastopt.torch import EmbeddingBag
from fastopt.train.one_process import Optimizers


class ShardedTables:
    """The two tables of a training, of which each process has some rows.

    Args:
        arrays, optimizers: as for ``one_process.Tables``, the same in every process.

    The first process has both as wholes while they are written or read.
    """

    def __init__(self, arrays: Sequence[np.ndarray], optimizers: Optimizers) -> None:
        self._optimizers = optimizers
        self._shape = arrays[0].shape
        # One for each, as a collection has equally many bags of all tables, and contexts outnumber centres.
        self._collections = [
            ShardedEmbeddingBagCollection(
                {"words": EmbeddingBag.from_pretrained(torch.from_numpy(own), freeze=False, mode="sum")},
                plan={"words": ByRows()},
            )
            for own in arrays
        ]
        self._weights: list[Any] = [own.tables["words"].weight for own in self._collections]
        self._optimizer = optimizers(self._weights)
        self._looked_up: list[torch.Tensor] = []

    def look_up(self, centres: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As in one process, of the words that this process names."""
        with torch.no_grad():
            first, second = self._pooled(centres, others)
        return first.numpy(), second.numpy()

    def look_up_to_learn(self, centres: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same, with a step to come."""
        self._looked_up = self._pooled(centres, others)
        first, second = (own.detach().numpy() for own in self._looked_up)
        return first, second

    def _pooled(self, *words: np.ndarray) -> list[torch.Tensor]:
        """The rows of words of the first table and of the second, as bags of one index."""
        indices = (torch.from_numpy(own)[:, None] for own in words)
        return [table({"words": own}) for table, own in zip(self._collections, indices, strict=True)]

    def step(self, gradients: Sequence[fastopt.IndexedSlices]) -> None:
        """Update both tables by the gradients of all processes."""
        ranks = dist.get_world_size()  # collections take the mean over them, and a training the sum
        torch.autograd.backward(self._looked_up, [torch.from_numpy(own.values) * ranks for own in gradients])
        self._optimizer.step([weight.grad.gradient() for weight in self._weights])
        for weight in self._weights:
            weight.grad = None

    def embeddings(self) -> np.ndarray:
        """The first table, in the first process; nothing of it in others."""
        return _gathered(self._weights[0].detach().numpy())

    def save(self, path: Path, metadata: dict[str, Any]) -> None:
        """Have the first process write the file that one process would."""
        arrays = [_gathered(weight.detach().numpy()) for weight in self._weights]
        own = self._optimizer.state_dict()
        state = _by_rows(own["state"], _gathered)
        with agree(None):
            if dist.get_rank() == 0:
                whole = self._optimizers(arrays)
                whole.load_state_dict({**own, "state": state})
                whole.save(path, params=True, metadata=metadata)

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a file, which the first process reads."""
        parts: list[Any] | None = None
        with agree(None):
            if dist.get_rank() == 0:
                arrays = [np.empty(self._shape, np.float32) for _ in self._weights]
                whole = self._optimizers(arrays)
                metadata = whole.load(path, params=True)
                state = whole.state_dict()
                parts = [
                    (
                        [own[rows] for own in arrays],
                        {"steps": state["steps"], "state": _by_rows(state["state"], itemgetter(rows))},
                        metadata,
                    )
                    for rows in self._rows_of_ranks()
                ]
        received: list[Any] = [None]
        dist.scatter_object_list(received, parts)
        [(own_arrays, own_state, metadata)] = received
        for weight, array in zip(self._weights, own_arrays, strict=True):
            weight.data.copy_(torch.from_numpy(array))
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), **own_state})
        return metadata

    def _rows_of_ranks(self) -> list[slice]:
        parts = self._collections[0].plan.parts["words"]
        return [slice(part.first_row, part.last_row) for part in parts]


def _gathered(own: np.ndarray) -> np.ndarray:
    """The rows of all processes, in the first; others get their own."""
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, parts)
    return own if parts is None else np.concatenate(parts)


def _by_rows(state: dict[Any, Any], change: Callable[[np.ndarray], np.ndarray]) -> dict[Any, Any]:
    """The state of an optimizer with what it has for each row changed."""
    return {
        key: {name: change(value) if np.ndim(value) else value for name, value in own.items()}
        for key, own in state.items()
    }


class ManyProcesses:
    """As :class:`OneProcess`, in a process group."""

    def __init__(self) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()

    def agreement(self) -> AbstractContextManager[dict[str, Any]]:
        """A block, whose errors are those of all processes, and a dict, which is compared at its end."""
        return agree(None)

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over all processes."""
        own = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(own)
        return own.tolist()

    def tables(self, arrays: Sequence[np.ndarray], optimizers: Optimizers) -> ShardedTables:
        """Tables that begin as these arrays."""
        return ShardedTables(arrays, optimizers)


@contextmanager
def joined() -> Iterator[ManyProcesses]:
    """The processes that torchrun has started.

    Raises:
        ConnectionError: another process has ended or does not answer.
    """
    try:
        dist.init_process_group("gloo")
        yield ManyProcesses()
    except RuntimeError as error:  # gloo's
        raise ConnectionError(f"another process has ended or does not answer: {error}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
