"""How tables are trained: by rules that parts can follow, and on all ranks alike."""

from collections.abc import Mapping
from typing import Any

from fastopt.distributed.agreement import Described
from fastopt.distributed.layout import Layout

Owners = Mapping[int, tuple[Any, Mapping[str, Any]]]  # optimizers and groups by the id of a parameter


def check_rules(layout: Layout, owners: Owners) -> None:
    """Refuse to train parts by rules that need whole tables or rows, or that move rows which are not looked
    up only when they are.

    Raises:
        ValueError: an optimizer has a table that it can't train.
    """
    for table in layout.tables:
        if id(table.own.weight) not in owners:
            continue
        optimizer, group = owners[id(table.own.weight)]
        rule, clips = type(optimizer).__name__, group["clip_row_norm"] is not None
        if group["rows"] == "dense":
            raise ValueError(
                f"rows is 'dense' in the group of table {table.name!r}, whose lookups would read rows that "
                "are behind: expected 'lazy'"
            )
        if table.is_split and optimizer.traits.by_tables:
            raise ValueError(
                f"table {table.name!r} is split, {table.placement}, and {rule} needs the whole of it: "
                "expected Whole in the plan"
            )
        if table.has_parts_of_rows and (optimizer.traits.by_rows or clips):
            raise ValueError(
                f"table {table.name!r} is placed by columns, and {'clip_row_norm' if clips else rule} needs "
                "whole rows: expected Whole or ByRows in the plan"
            )


def state_of(layout: Layout, owners: Owners, *, learns: bool) -> Described:
    """What may have changed since the collection was made, on all ranks alike.

    Args:
        learns: whether there is a backward pass, for which options of optimizers count.
    """
    found: Described = {"whether there is a backward pass": learns}
    together: dict[int, tuple[Any, Mapping[str, Any], list[str]]] = {}
    for table in layout.tables:
        p = table.own.weight
        found[f"tables[{table.name!r}]"] = {"dtype": str(p.dtype), "requires_grad": p.requires_grad}
        if learns and id(p) in owners:
            optimizer, group = owners[id(p)]
            together.setdefault(id(group), (optimizer, group, []))[2].append(table.name)
    for optimizer, group, tables in together.values():
        options = {name: group[name] for name in optimizer.traits.names(group)}
        found[f"the optimizer of tables {tables}"] = type(optimizer).__name__
        found[f"the group of tables {tables}"] = optimizer.traits.plain_options(options)
    return found
