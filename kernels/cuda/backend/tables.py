"""What kernels are told of a table on a device: its columns of ``fastopt.kernels.layout``."""

from collections.abc import Sequence

from fastopt.kernels.cuda.backend.placed import place
from fastopt.kernels.cuda.row_vectors import RowVectors
from fastopt.kernels.cuda.segments import DeviceSegments
from fastopt.kernels.layout import TABLE_DIM, TABLE_STATE_STRIDE


def of_segments(segments: DeviceSegments) -> dict[str, int]:
    """Columns of which rows there are."""
    return {"rows": place(segments.rows), "first_row": segments.first_row}


def rows_aligned(vectors: RowVectors, table: Sequence[int]) -> bool:
    """Whether each row of a table, which has these columns, allows loads and stores of whole vectors."""
    addresses = all(table[column] % size == 0 for column, size in vectors.aligned.items())
    strides = table[TABLE_DIM], table[TABLE_STATE_STRIDE]
    return addresses and all(stride % vectors.length == 0 for stride in strides)
