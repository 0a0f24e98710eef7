"""The kernels that sort indices, and find and make offsets."""

from collections.abc import Iterator

from fastopt.kernels.cuda import indices, sort
from fastopt.kernels.cuda.launch import Kernel


def sort_kernels() -> Iterator[tuple[str, str, Kernel]]:
    """Of each kernel a name, the bytes that it moves for an int64 index, or for what it makes, and the
    kernel."""
    yield "sort: words", "16", sort.make_words()
    yield "sort: digits of tiles", "8", sort.count_digits()
    yield "sort: sums over tiles", "-", sort.add_up()
    yield "sort: a pass", "16", sort.move_words()
    yield "sort: heads of tiles", "8", sort.count_heads()
    yield "sort: segments", "12 and 12 a segment", sort.write_heads()
    yield "sort: segments of tables", "-", sort.find_tables()
    yield "sort: few indices", "-", sort.sort_tile()
    yield "bounds of indices", "8", indices.find_bounds()
    yield "check of offsets", "8", indices.check_offsets()
    yield "offsets, copied", "16", indices.copy_offsets()
    yield "offsets, regular", "8", indices.make_multiples()
    yield "segments of all rows", "16", indices.name_all()
    yield "segments with a row of the table", "-", indices.find_named()
    yield "rows of segments", "16", indices.subtract_number()
    yield "counts of segments", "8", indices.subtract_neighbours()
