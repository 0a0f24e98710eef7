"""What kernels are told of a table on a device: its columns of ``fastopt.kernels.layout``."""

from fastopt.kernels.cuda.backend.placed import place
from fastopt.kernels.cuda.row_vectors import RowVectors
from fastopt.kernels.cuda.segments import DeviceSegments
from fastopt.kernels.layout import table_row
from fastopt.kernels.work import StoredTable


def of_segments(segments: DeviceSegments) -> dict[str, int]:
    """Columns of which rows there are."""
    return {"rows": place(segments.rows), "first_row": segments.first_row}


def rows_aligned(vectors: RowVectors, stored: StoredTable) -> bool:
    """Whether each row allows loads and stores of whole vectors."""
    columns = stored.columns(place)
    row = table_row(stored.places(place), columns)
    addresses = all(row[column] % size == 0 for column, size in vectors.aligned().items())
    strides = columns["dim"], columns.get("state_stride", 0)
    return addresses and all(stride % vectors.length == 0 for stride in strides)
