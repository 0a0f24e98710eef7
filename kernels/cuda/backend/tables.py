"""What kernels are told of a table: its columns of ``fastopt.kernels.layout``."""

from fastopt.kernels.cuda.backend.placed import place
from fastopt.kernels.cuda.row_vectors import RowVectors
from fastopt.kernels.cuda.segments import DeviceSegments
from fastopt.kernels.layout import table_row
from fastopt.kernels.work import RowSteps, StoredTable


def of_table(stored: StoredTable) -> dict[str, int]:
    """Columns of the table and of its random bits."""
    columns = {
        "parameter": place(stored.table),
        "dim": stored.table.shape[1],
        "master": place(stored.master),
        "position": stored.position,
        "key": stored.key,
    }
    if stored.state:
        first, _ = stored.state[0]
        columns["state_stride"] = first.strides[0] // first.itemsize
    return columns


def of_row_steps(row_steps: RowSteps) -> dict[str, int]:
    """Columns of how far rows are."""
    columns = {
        "row_steps": place(row_steps.counts),
        "history": place(row_steps.history),
        "history_rows": row_steps.history.shape[0],
        "history_columns": row_steps.history.shape[1],
        "history_base": row_steps.base,
        "history_window": row_steps.window,
    }
    if row_steps.tabulated is not None:
        columns["tabulated"] = place(row_steps.tabulated)
        columns["tabulated_columns"] = row_steps.tabulated.shape[1]
        columns["tabulated_from"] = row_steps.tabulated_from
    return columns


def of_segments(segments: DeviceSegments) -> dict[str, int]:
    """Columns of which rows there are."""
    return {"rows": place(segments.rows), "first_row": segments.first_row}


def places_of(stored: StoredTable) -> list[int]:
    """Two addresses of each state array."""
    pairs = [*stored.state, *((array, None) for array in stored.row_state)]
    return [place(array) for pair in pairs for array in pair]


def rows_aligned(vectors: RowVectors, stored: StoredTable) -> bool:
    """Whether each row allows loads and stores of whole vectors."""
    columns = of_table(stored)
    row = table_row(places_of(stored), columns)
    addresses = all(row[column] % size == 0 for column, size in vectors.aligned().items())
    strides = columns["dim"], columns.get("state_stride", 0)
    return addresses and all(stride % vectors.length == 0 for stride in strides)
