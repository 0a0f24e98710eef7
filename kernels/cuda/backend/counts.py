"""Where rows count their own updates: what is folded for each count, in memory of a device."""

from collections import OrderedDict

import numpy as np

from fastopt.kernels.cuda.array import DeviceArray, upload
from fastopt.kernels.cuda.driver import driver
from fastopt.kernels.cuda.streams import Current, current
from fastopt.kernels.work import CountFold, RowSteps

FIRST_CAPACITY = 1024  # counts
MOST_TABULATED = 1 << 22  # counts, a quarter of a gigabyte
MOST_FOLDS = 8  # whose tables are kept


class CountTables:
    """Tables of what is folded, which grow with the counts, so that nobody has to wait for the counts that
    rows have. Those of the folds that were last asked for are kept, each with the stream that it was brought
    to the device on: optimizers that share one may work on several."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._tables: OrderedDict[CountFold, tuple[DeviceArray, Current]] = OrderedDict()

    def of_rows(self, counts: DeviceArray, fold: CountFold, steps: int) -> RowSteps:
        """What a launch needs for rows that count their updates, none of which has had more than ``steps``.

        The history has a row for each count from 0 on, which goes without numbers of its own. Beyond
        MOST_TABULATED it has one for each of the different counts that rows have after their next update,
        ascending, for which this waits.
        """
        if steps >= MOST_TABULATED:
            after = np.unique(np.maximum(counts.copy_to_host(), 0)) + 1
            return RowSteps(counts, upload(self._device, fold(after.astype(np.float64))))
        table, stream = self._tables.pop(fold, (None, current(self._device)))
        if table is None or len(table) < steps + 2:
            size = FIRST_CAPACITY if table is None else len(table)
            while size < steps + 2:
                size *= 2
            table, stream = upload(self._device, _tabulated(fold, size)), current(self._device)
        driver().wait_for(self._device, stream.handle)
        self._tables[fold] = table, stream
        if len(self._tables) > MOST_FOLDS:
            self._tables.popitem(last=False)
        return RowSteps(counts, table)


def _tabulated(fold: CountFold, size: int) -> np.ndarray:
    counts = np.arange(size, dtype=np.float64)
    found = fold(np.maximum(counts, 1.0))
    found[:, 0] = counts
    return found
