"""Positions in lists of indices, brought together by row, on a device."""

from typing import NamedTuple

from fastopt.kernels.cuda.array import DeviceArray


class DeviceSegments(NamedTuple):
    """The segments of one table's indices, which were sorted together with those of others.

    How many segments there are is known on the device alone, so that nothing waits for it: arrays have room
    for as many as there are positions. Segment k of the table, for k from ``bounds[table]`` up to
    ``bounds[table + 1]``, has the positions ``order[starts[k]:starts[k + 1]] - first_position``, ascending,
    and the row ``rows[k] - first_row``. The table's positions lie together in ``order``, from
    ``first_position`` on.

    An index that was not checked, and is outside the table, belongs to the row ``table_rows``, past the
    last one, which what works on rows leaves out.

    order: int32 [positions of all tables]. starts: int32 [positions of all tables + 1]. rows: int64
    [positions of all tables]. bounds: int64 [tables + 1]. positions: how many the table has. table_rows:
    how many rows it has.
    """

    order: DeviceArray
    starts: DeviceArray
    rows: DeviceArray
    bounds: DeviceArray
    table: int
    first_row: int
    first_position: int
    positions: int
    table_rows: int

    @property
    def own_bounds(self) -> int:
        """The address of the table's two numbers of ``bounds``."""
        return self.bounds.address + self.table * self.bounds.itemsize
