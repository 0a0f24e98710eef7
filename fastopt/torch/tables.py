"""Tables in files as parameters of torch."""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch

from fastopt._core.arrays import array_view
from fastopt.kernels.work import Array
from fastopt.tables.table import Table
from fastopt.torch.memory import local
from fastopt.torch.traits import STEP, Traits


class TableWeight(torch.nn.Parameter):
    """The weights of a table in files as a parameter: a tensor over the mapped memory.

    It is not copied or pickled; an optimizer of :mod:`fastopt.torch` updates the table that it is of, with
    the state in the table's files.

    Args:
        table: one of :func:`fastopt.open_table`. requires_grad: True by default.

    Attributes:
        table: as given.
    """

    table: Table

    def __new__(cls, table: Table, requires_grad: bool = True) -> "TableWeight":
        if not isinstance(table, Table):
            raise TypeError(f"table is {type(table).__name__}: expected one of fastopt.open_table")
        own = torch.Tensor._make_subclass(cls, torch.from_numpy(table.weights), requires_grad)
        own.table = table
        return own

    def detach(self) -> "TableWeight":
        """The same memory without gradients, still known to be a table's."""
        own = torch.Tensor._make_subclass(TableWeight, super().detach(), False)
        own.table = self.table
        return own

    def __deepcopy__(self, memo: Any) -> Any:
        return self.table.__reduce__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.table.__reduce__()


def array_of_table(weight: torch.Tensor) -> Array:
    """What lookups read.

    Raises:
        ValueError: it is of a table in files that is closed.
    """
    return array_view(weight.table if isinstance(weight, TableWeight) else weight.detach(), "table")


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


def check_left(left: list[list[torch.Tensor]]) -> None:
    """Refuse tables in files among parameters that are left to torch's own step."""
    for p in (p for own in left for p in own):
        if isinstance(p, TableWeight):
            _refuse(
                p,
                "is left to torch's own step: expected neither capturable nor differentiable in its group, "
                "and one weight of a table (other.weight = module.weight has two modules share it)",
            )


def of_other_steps(steps: Mapping[TableWeight, int], state: Mapping[Any, Any]) -> list[Table]:
    """The tables that have to go back to the flush before their last one, to be at the steps that the state
    of a torch optimizer tells.

    Args:
        steps: how many each has made. state: of the optimizer.

    Raises:
        ValueError: one can't go there.
    """
    back = []
    for p, step in steps.items():
        table, wanted = p.table, int(state.get(p, {}).get(STEP, 0))
        if step == wanted:
            continue
        before = (table.previous or {}).get(STEP, 0)
        if table.changed or not table.has_previous or before != wanted:
            raise ValueError(
                f"state_dict has step {wanted} for {table!r}, which has made {step}: expected a state that "
                "was taken at its last flush or the one before, by state_dict(), which flushes"
            )
        back.append(table)
    return back
