"""Checkpoints of torch.distributed.checkpoint that another number of ranks, another plan, or one process
without any can load."""

import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.nn.parallel import DistributedDataParallel

from fastopt.distributed.agreement import agree, rank_in
from fastopt.distributed.collection import ShardedEmbeddingBagCollection
from fastopt.distributed.layout import ShardedTable
from fastopt.distributed.tensor_part import TensorPart
from fastopt.torch.tables import TableWeight

_METADATA = ".metadata"  # which a checkpoint has once it is whole
_MODEL, _STATE, _OPTIONS, _PROGRESS = "model.", "optimizer.", "options.", "progress"


def latest(folder: str | os.PathLike) -> Path | None:
    """The last checkpoint in a folder by name, such as ``folder / f"{step:08}"``, of those that are whole;
    None without any. What a killed save has left is none."""
    whole = sorted(path.parent for path in Path(folder).glob(f"*/{_METADATA}"))
    return whole[-1] if whole else None


class TrainingState:
    """A model and its optimizers as checkpoints, each a folder of ``torch.distributed.checkpoint``.

    Parameters and state are saved by name and place, each rank writing the parts that it has, and are read
    by whoever has a part of them: on more ranks or fewer, with another plan, or in one process, without a
    process group, whose tables are an ``EmbeddingBagCollection`` in the same place of the model.

    Args:
        model: with :class:`ShardedEmbeddingBagCollection` anywhere within; what ``DistributedDataParallel``
            wraps keeps the names that it has without; parameters may be DTensors, as ``fully_shard`` makes.
        optimizers: of its parameters, of :mod:`fastopt.torch` or torch itself.
        group: the process group of those that save together, None for the default one. Checkpoints have a
            gloo group of their own, so that collectives of a save in the background do not meet others; every
            rank makes its ``TrainingState`` at the same point.

    Raises:
        ValueError: an optimizer has a parameter that the model has not, or a table in files, which is stored
            by its flushes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *optimizers: torch.optim.Optimizer,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._model = model
        self._optimizers = optimizers
        self._names = {id(p): _plain_name(model, name) for name, p in model.named_parameters()}
        for k, optimizer in enumerate(optimizers):
            for p in _params(optimizer):
                if isinstance(p, TableWeight):
                    raise ValueError(f"optimizers[{k}] has {p.table!r}: expected none, its flushes store it")
                if id(p) not in self._names:
                    raise ValueError(
                        f"optimizers[{k}] has a parameter of shape {tuple(p.shape)} that is not the model's"
                    )
        self._saving: Future[Any] | None = None
        self._group = None
        if dist.is_initialized():
            rank_in(group)
            # Synchronised by its members alone only where others do not come here: names of such groups go
            # by how many groups a rank is in, which all members would have to have alike.
            whole = group is None or group is dist.group.WORLD
            ranks = None if whole else dist.get_process_group_ranks(group)
            self._group = dist.new_group(ranks, backend="gloo", use_local_synchronization=not whole)

    def save(self, path: str | os.PathLike, progress: Any = None) -> None:
        """Save all; every rank calls it.

        Args:
            path: a folder that is no checkpoint yet, the same for all ranks, which see the same files.
            progress: what else a run goes on from, such as the number of its next batch; of one rank, as are
                options. Read by ``pickle``.

        Raises:
            FileExistsError: the folder is a checkpoint.
        """
        self._wait()
        with self._alike():
            saved = self._saved(path, progress)
        dcp.save(saved, checkpoint_id=path, **self._together)

    def async_save(self, path: str | os.PathLike, progress: Any = None) -> "Future[Any]":
        """As :meth:`save`, of this instant: all is copied before this returns, and written while training
        goes on. ``result()`` of what it returns waits for that, and raises what went wrong; the next save
        waits, too."""
        self._wait()
        with self._alike():
            saved = self._saved(path, progress)
        own: Any = dcp.async_save(saved, checkpoint_id=path, **self._together)
        self._saving = own
        return own

    def load(self, path: str | os.PathLike) -> Any:
        """Go on from a checkpoint; every rank calls it.

        Returns:
            ``progress`` as it was saved.

        Raises:
            ValueError: the checkpoint has state of parameters that the model has not, other groups, or arrays
                of other shapes.
        """
        self._wait()
        with self._alike():
            known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
            target = {**self._model_state(), **self._space_for(known), _PROGRESS: None}
            options: dict[str, Any] = {f"{_OPTIONS}{k}": None for k in range(len(self._optimizers))}
            _check_shapes({**target, **options}, known)
        dcp.load(options, checkpoint_id=path, **self._together)
        with self._alike():
            groups = [pickle.loads(own) for own in options.values()]
            for k, optimizer in enumerate(self._optimizers):
                self._check_groups(optimizer, groups[k], f"optimizers[{k}]")
        dcp.load(target, checkpoint_id=path, **self._together)
        rest = {
            name: own for name, own in self._model.state_dict().items() if not isinstance(own, torch.Tensor)
        }
        if rest:
            loaded = {name: target[_MODEL + _plain_name(self._model, name)] for name in rest}
            self._model.load_state_dict(loaded, strict=False)
        for k, optimizer in enumerate(self._optimizers):
            self._load_optimizer(optimizer, target, groups[k])
        return pickle.loads(target[_PROGRESS])

    def _wait(self) -> None:
        """Wait until what is written in the background is: one group can't take two saves at once."""
        if self._saving is not None:
            futures.wait([self._saving])
            self._saving = None

    def _alike(self) -> AbstractContextManager:
        """An error within it on one rank is one of all, none of which waits for the others then."""
        return nullcontext() if self._group is None else agree(self._group)

    # What is saved

    @property
    def _together(self) -> dict[str, Any]:
        return {"no_dist": True} if self._group is None else {"process_group": self._group}

    def _saved(self, path: str | os.PathLike, progress: Any) -> dict[str, Any]:
        if (Path(path) / _METADATA).exists():
            raise FileExistsError(f"{path} is a checkpoint: expected a folder that is none")
        found, tables = {**self._model_state(), _PROGRESS: pickle.dumps(progress)}, self._tables()
        for k, optimizer in enumerate(self._optimizers):
            packed, params = optimizer.state_dict(), [*_params(optimizer)]
            for number, own in packed["state"].items():
                found.update(self._state_of(params[number], own, tables))
            groups = [
                {**group, "params": [self._names[id(params[number])] for number in group["params"]]}
                for group in packed["param_groups"]
            ]
            found[f"{_OPTIONS}{k}"] = pickle.dumps(groups)  # one object, not a tree of them
        return found

    def _model_state(self) -> dict[str, Any]:
        """The model's own memory, by name."""
        tables = self._tables()
        by_name = {self._names[p]: table for p, table in tables.items()}
        found = {}
        for full_name, own in self._model.state_dict().items():
            name = _plain_name(self._model, full_name)
            found[_MODEL + name] = _part(by_name[name], own, name) if name in by_name else own
        return found

    def _state_of(
        self, p: torch.Tensor, own: Mapping[str, Any], tables: Mapping[int, ShardedTable]
    ) -> dict[str, Any]:
        name, table = self._names[id(p)], tables.get(id(p))
        if table is not None and not p.numel():
            return {}  # what those have that have rows
        return {
            f"{_STATE}{name}.{key}": value
            if table is None or not isinstance(value, torch.Tensor) or not value.ndim
            else _part(table, value, f"{key!r} of {name}")
            for key, value in own.items()
        }

    def _tables(self) -> dict[int, ShardedTable]:
        """The sharded tables of the model, by the id of their parameter here."""
        return {
            id(table.own.weight): table
            for module in self._model.modules()
            if isinstance(module, ShardedEmbeddingBagCollection)
            for table in module.layout.tables
        }

    # What is loaded

    def _space_for(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Memory for the state of a checkpoint that belongs here, by name."""
        params = {self._names[id(p)]: p for optimizer in self._optimizers for p in _params(optimizer)}
        tables, found = self._tables(), {}
        for key, metadata in known.items():
            if not key.startswith(_STATE):
                continue
            name = key.removeprefix(_STATE).rpartition(".")[0]
            if name not in params:
                raise ValueError(f"the checkpoint has state of {name!r}: expected one of {[*params]}")
            p, table = params[name], tables.get(id(params[name]))
            if table is None or p.numel():
                found[key] = _space(p, table, metadata, key)
        return found

    def _check_groups(self, optimizer: torch.optim.Optimizer, options: Any, label: str) -> None:
        own = [[self._names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        if [group["params"] for group in options] != own:
            raise ValueError(
                f"{label} has groups of {own}: expected those of the checkpoint, "
                f"{[group['params'] for group in options]}"
            )

    def _load_optimizer(
        self, optimizer: torch.optim.Optimizer, target: Mapping[str, Any], options: Any
    ) -> None:
        numbers = {self._names[id(p)]: number for number, p in enumerate(_params(optimizer))}
        state: dict[int, dict[str, Any]] = {}
        for key, value in target.items():
            name, _, of = key.removeprefix(_STATE).rpartition(".")
            if key.startswith(_STATE) and name in numbers:
                loaded = value.local if isinstance(value, TensorPart) else value
                state.setdefault(numbers[name], {})[of] = loaded
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in options]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_shapes(target: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that has not all that is to be loaded, in its shape."""
    for name, own in target.items():
        if name not in known:
            raise ValueError(f"the checkpoint has no {name!r}: expected that of the same model")
        shape = getattr(known[name], "size", None)
        if shape is not None and isinstance(own, torch.Tensor) and own.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(own.shape)}: expected {tuple(shape)}, the checkpoint's"
            )


def _params(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _plain_name(model: torch.nn.Module, name: str) -> str:
    """A name within a model as it is without the modules of DistributedDataParallel."""
    wrapped: Iterable[str] = (
        own for own, module in model.named_modules() if isinstance(module, DistributedDataParallel)
    )
    for own in sorted(wrapped, key=len, reverse=True):
        before = f"{own}." if own else ""
        if name.startswith(f"{before}module."):
            name = before + name.removeprefix(f"{before}module.")
    return name


def _part(table: ShardedTable, own: torch.Tensor, what: str) -> torch.Tensor:
    """Memory of the table's shape, or with a row or a number for each of its rows, of which a part lies
    here; of a table that lies here as a whole any."""
    part = table.here
    if own.shape == part.shape:
        return TensorPart(own, (part.first_row, part.first_column), (table.rows, table.columns))
    if not table.is_split:
        return own
    if table.has_parts_of_rows or own.shape[0] != part.shape[0]:
        raise ValueError(
            f"{what} has shape {tuple(own.shape)} for a part of shape {part.shape} of a table: expected rows "
            "of its own shape, as other plans have no place for others; use another state_dtype by columns"
        )
    return TensorPart(own, (part.first_row, *[0] * (own.ndim - 1)), (table.rows, *own.shape[1:]))


def _space(p: torch.Tensor, table: ShardedTable | None, metadata: Any, key: str) -> Any:
    """Memory for a state array of a parameter."""
    if isinstance(metadata, BytesStorageMetadata):
        return None
    assert isinstance(metadata, TensorStorageMetadata)
    dtype, shape = metadata.properties.dtype, metadata.size
    if table is None or not shape or (not table.is_split and shape != (table.rows, table.columns)):
        return torch.empty_like(p, dtype=dtype) if shape == p.shape else p.new_empty(shape, dtype=dtype)
    if shape == (table.rows, table.columns):
        rows = table.here.shape
    else:
        rows = table.here.shape[0], *shape[1:]
    return _part(table, torch.empty(rows, dtype=dtype, device=p.device), key)
