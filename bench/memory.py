"""How many bytes of state does each optimizer keep for a parameter? ``python bench/memory.py``.

Counted in ``state_dict()`` after a step over 10 M parameters, 156,250 rows of 64, whose gradient is dense; of
8-bit state also after ``/`` where it is of rows (``IndexedSlices``): then each row has a scale of its own.
``master_weights`` is for parameters of bfloat16.
"""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

import fastopt

ROWS, DIM = 156_250, 64
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("AdaGrad", {}),
    ("RowwiseAdaGrad", {}),
    ("RowwiseAdam", {}),
    ("RMSProp", {}),
    ("RMSProp", {"centered": True}),
    ("RMSProp", {"momentum": 0.9}),
    ("RMSProp", {"centered": True, "momentum": 0.9}),
    ("Adam", {}),
    ("AdamW", {}),
    ("AMSGrad", {}),
    ("RAdam", {}),
    ("NAdam", {}),
    ("Lion", {}),
    ("LAMB", {}),
    ("Adafactor", {}),
]
DENSE_ONLY = ("Adafactor",)
# heading, dtype of the parameters, options
COLUMNS: list[tuple[str, Any, dict[str, Any]]] = [
    ("float32", np.float32, {}),
    ("bfloat16", np.float32, {"state_dtype": "bfloat16"}),
    ("8bit", np.float32, {"state_dtype": "8bit"}),
    ("float32, masters", ml_dtypes.bfloat16, {"master_weights": True}),
    ("bfloat16, masters", ml_dtypes.bfloat16, {"master_weights": True, "state_dtype": "bfloat16"}),
    ("8bit, masters", ml_dtypes.bfloat16, {"master_weights": True, "state_dtype": "8bit"}),
]


def state_bytes(name: str, dtype: Any, options: dict[str, Any], sparse: bool) -> float:
    """Bytes of state for each parameter."""
    p = np.ones((ROWS, DIM), dtype)
    g: Any = np.ones((ROWS, DIM), dtype)
    if sparse:
        g = fastopt.IndexedSlices(np.arange(ROWS), g)
    opt = getattr(fastopt, name)(p, **options)
    opt.step(g)
    (state,) = opt.state_dict()["state"].values()
    return sum(value.nbytes for value in state.values() if isinstance(value, np.ndarray)) / p.size


def cell(name: str, dtype: Any, options: dict[str, Any]) -> str:
    both = options.get("state_dtype") == "8bit" and name not in DENSE_ONLY
    ways = (False, True) if both else (False,)
    found = [f"{state_bytes(name, dtype, options, sparse):.4g}" for sparse in ways]
    return " / ".join(dict.fromkeys(found))


def lines() -> Iterator[list[str]]:
    for name, options in OPTIMIZERS:
        arguments = ", ".join(f"{option}={value}" for option, value in options.items())
        label = f"{name}({arguments})" if arguments else name
        yield [label, *(cell(name, dtype, {**options, **more}) for _, dtype, more in COLUMNS)]


def main() -> None:
    heading = ["optimizer", *(title for title, *_ in COLUMNS)]
    table = Table(*heading, title="bytes of state for each parameter: state_dtype, masters or none")
    rows = list(lines())
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    for row in (heading, ["---"] * len(heading), *rows):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
