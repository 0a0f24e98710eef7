"""Tables in files as parameters of torch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_map

from fastopt._core.arrays import array_view
from fastopt._core.versions import written
from fastopt.kernels.work import Array
from fastopt.tables.table import Table, checksums
from fastopt.torch.memory import local
from fastopt.torch.traits import STEP, Traits

CHECKSUM = "checksum"  # beside the step of a table in files in the state that is saved
_AS_IT_IS = torch.ops.aten.detach.default, torch.ops.aten.alias.default


class _TableMemory(torch.Tensor):
    """Memory of a table in files, or a part of it, which torch reads and does not write: the table's undo log
    would not know what rows held before, and the flush that a crash goes back to would be lost.

    Attributes:
        table: one of :func:`fastopt.open_table`.
    """

    table: Table

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for own, is_write in _aliased(func, args, kwargs):
            if is_write:
                own._refuse_write(func.overloadpacket.__name__)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for own, _ in _aliased(func, args, kwargs):  # of which this is a view, or a copy where it has to be
            kind = type(own) if func in _AS_IT_IS else _TablePart
            return tree_map(partial(own._viewed, kind), result)
        return result

    def _refuse_write(self, name: str) -> NoReturn:
        raise RuntimeError(
            f"{name} would write to the weights of {self.table!r} beside their undo log: expected updates by "
            "an optimizer of fastopt.torch, first values by init= of open_table, and table.keep(rows) before "
            "table.weights is written"
        )

    def _viewed(self, kind: "type[_TableMemory]", result: torch.Tensor) -> torch.Tensor:
        """What came of an operation that may return a view of this."""
        if result.untyped_storage().data_ptr() != self.untyped_storage().data_ptr():
            return result
        return self._with_table(kind, result)

    def _with_table(self, kind: "type[_TableMemory]", memory: torch.Tensor) -> Any:
        with torch._C._DisableTorchDispatch():
            own = torch.Tensor._make_subclass(kind, memory, False)
        own.table = self.table
        return own

    def _plain(self) -> torch.Tensor:
        """The same memory for torch to do with it what it likes."""
        with torch._C._DisableTorchDispatch():
            return torch.Tensor._make_subclass(torch.Tensor, self, self.requires_grad)

    def _get(self) -> Any:
        return super().data

    def _put(self, memory: torch.Tensor) -> None:
        self._refuse_write("an assignment to data")

    data: Any = property(_get, _put)

    def numpy(self, *, force: bool = False) -> Any:
        """As torch's, and read-only: ``table.weights`` is what can be written."""
        array = self._plain().numpy(force=force).view()
        array.flags.writeable = False
        return array

    def tolist(self) -> list:
        """As torch's."""
        return self._plain().tolist()


class _TablePart(_TableMemory):
    """A view of a table's weights."""


class TableWeight(_TableMemory, torch.nn.Parameter):
    """The weights of a table in files as a parameter: a tensor over the mapped memory.

    It is not copied or pickled; an optimizer of :mod:`fastopt.torch` updates the table that it is of, with
    the state in the table's files. Whatever else of torch writes to it, or to a view of it, raises
    ``RuntimeError``.

    Args:
        table: one of :func:`fastopt.open_table`. requires_grad: True by default.

    Attributes:
        table: as given.
    """

    def __new__(cls, table: Table, requires_grad: bool = True) -> "TableWeight":
        if not isinstance(table, Table):
            raise TypeError(f"table is {type(table).__name__}: expected one of fastopt.open_table")
        own = torch.Tensor._make_subclass(cls, torch.from_numpy(table.weights), requires_grad)
        own.table = table
        return own

    def detach(self) -> "TableWeight":
        """The same memory without gradients, still known to be a table's."""
        return self._with_table(TableWeight, self)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.table.__reduce__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.table.__reduce__()


def _aliased(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[tuple[_TableMemory, bool]]:
    """The memory of tables that an operation of torch writes, or returns views of, and whether it writes."""
    for k, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None:
            given = args[k] if k < len(args) else kwargs.get(argument.name)
            for own in given if isinstance(given, list | tuple) else [given]:
                if isinstance(own, _TableMemory):
                    yield own, argument.alias_info.is_write


def writable(weight: torch.Tensor) -> torch.Tensor:
    """A weight for torch to write to; of a table in files, rows that were kept, and graphs learn of it."""
    if not isinstance(weight, TableWeight):
        return weight
    written([weight])
    return torch.from_numpy(weight.table.weights)


def array_of_table(weight: torch.Tensor) -> Array:
    """What lookups read.

    Raises:
        ValueError: it is of a table in files that is closed.
    """
    return array_view(weight.table if isinstance(weight, TableWeight) else weight.detach(), "table")


def tables_of(groups: Iterable[Mapping[str, Any]]) -> list[TableWeight]:
    """The parameters of groups that are tables in files."""
    return [p for group in groups for p in group["params"] if isinstance(p, TableWeight)]


def plain_parameter(p: Any) -> Any:
    """A parameter as the plain optimizers take it: of a DTensor the part that lies here."""
    return p.table if isinstance(p, TableWeight) else local(p)


def check_options(
    traits: Traits, tables: Mapping[TableWeight, Mapping[str, Any]], every: Iterable[Mapping[str, Any]]
) -> None:
    """Refuse what an optimizer would do for all rows of a table in files.

    Args:
        traits: of the optimizer's class. tables: the options of each. every: those of all groups.
    """
    name = traits.plain.__name__
    behind = any(values["rows"] == "dense" for values in every)
    for weight, values in tables.items():
        if traits.dense_alone:
            _refuse(weight, f"{name} takes dense gradients alone")
        if traits.has_product:
            _refuse(weight, "the products of NAdam's momenta do not lie in its files")
        if traits.goes_dense(values):
            _refuse(weight, f"the momentum of torch's {name} moves every row: expected momentum 0")
        if behind:
            _refuse(weight, "rows is 'dense' in a group: expected 'lazy' in all")


def _refuse(weight: TableWeight, why: str) -> NoReturn:
    raise ValueError(f"{weight.table!r} is among the parameters, but {why}")


def check_left(left: list[list[torch.Tensor]], groups: Sequence[Mapping[str, Any]], shared: set[int]) -> None:
    """Refuse tables in files among parameters that are left to torch's own step.

    Args:
        left: of each of the ``groups``. shared: the ids of parameters that share memory with another.
    """
    for own, group in zip(left, groups, strict=True):
        for p in own:
            if not isinstance(p, TableWeight):
                continue
            if id(p) in shared:
                _refuse(
                    p,
                    "so is another weight of it: expected one weight of a table (other.weight = "
                    "module.weight has two modules share it)",
                )
            for name in ("capturable", "differentiable"):
                if group.get(name):
                    _refuse(p, f"{name} in its group leaves it to torch's own step: expected {name}=False")
            _refuse(p, "its gradient names single elements: expected rows, as lookups leave them")


def _check_loaded(params: Iterable[torch.Tensor], state: Mapping[Any, Mapping[str, Any]]) -> None:
    """Refuse state of tables in files that is not theirs: it would be saved again and again, and not used.

    Raises:
        ValueError: there is some.
    """
    for p in params:
        others = [name for name in state.get(p, {}) if name not in (STEP, CHECKSUM)]
        if isinstance(p, TableWeight) and others:
            raise ValueError(
                f"state_dict has {', '.join(map(repr, others))} for {p.table!r}: expected its step alone, "
                "since its state lies in its files; that of a table in memory can't be loaded into one"
            )


@contextmanager
def saved_with_checksums(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While this lasts, the state that an optimizer saves tells which flush of tables in files it is of."""
    params = [group["params"] for group in optimizer.param_groups]

    def add(_: torch.optim.Optimizer, packed: Any) -> None:
        for own, group in zip(params, packed["param_groups"], strict=True):
            for p, number in zip(own, group["params"], strict=True):
                if isinstance(p, TableWeight) and number in packed["state"]:
                    checksum = checksums(p.table)[0]
                    if checksum is not None:
                        packed["state"][number] = {**packed["state"][number], CHECKSUM: checksum}

    handle = optimizer.register_state_dict_post_hook(add, prepend=True)  # those of the user see it
    try:
        yield
    finally:
        handle.remove()


def of_other_flushes(steps: Mapping[TableWeight, int], state: Mapping[Any, dict[str, Any]]) -> list[Table]:
    """The tables that have to go back to the flush before their last one, to be at the one that the state of
    a torch optimizer belongs to: where they had made its steps, and held the rows of its checksum.

    Args:
        steps: how many each has made. state: of the optimizer; checksums are taken out of it.

    Raises:
        ValueError: one can't go there, or the state has more of it than that.
    """
    _check_loaded(steps, state)
    back = []
    for p, step in steps.items():
        table, own = p.table, state.get(p, {})
        wanted, known = int(own.get(STEP, 0)), own.pop(CHECKSUM, None)
        before, (last, former) = (table.previous or {}).get(STEP, 0), checksums(table)
        if step == wanted and known in (None, last):
            continue
        can_go = not table.changed and table.has_previous
        if can_go and before == wanted and known in (None, former):
            back.append(table)
            continue
        found = f"which has made {step}"
        if step == wanted or (can_go and before == wanted):
            found = "which held other rows then: it is of another run, or of one that went on otherwise"
        raise ValueError(
            f"state_dict has step {wanted} for {table!r}, {found}: expected a state that was taken at its "
            "last flush or the one before, by state_dict(), which flushes"
        )
    return back
