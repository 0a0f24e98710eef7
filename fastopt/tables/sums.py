"""Checksums of a table's rows, brought up to date by each flush at the cost of the rows that changed.

The sum of a block of rows is that of its words, each times a random odd number of its place, modulo 2^64
(multilinear hashing, Lemire & Kaser 2014). So rows can be taken out of it and put in again, and a block of
zeros, as a sparse file has, has the sum 0. Every changed bit shows, and other changes but for one in 2^32.
"""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from fastopt.tables.files import read_file
from fastopt.tables.mapped import Mapped, blocks

_BLOCKS, _LEAST_ROWS = 4096, 64  # blocks of a table at most, and rows of one at least
_CHUNK_WORDS = 1 << 16  # which stay in the cache


class Sums:
    """The sums of each array's blocks, modulo 2^64.

    Args:
        rows: of the table.
        values: uint64 [arrays, blocks].
    """

    def __init__(self, rows: int, values: np.ndarray) -> None:
        self._rows = rows
        self.values = values

    @classmethod
    def zeros(cls, rows: int, arrays: int) -> "Sums":
        return cls(rows, np.zeros((arrays, -(-rows // _block_rows(rows))), np.uint64))

    @classmethod
    def read(cls, path: Path, rows: int, arrays: int, crc: int) -> "Sums":
        """Raises:
        ValueError: the file is missing, or not as it was written.
        """
        sums = cls.zeros(rows, arrays)
        try:
            content = read_file(path)
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing: expected the checksums that meta.json tells of") from error
        if len(content) != sums.values.nbytes or zlib.crc32(content) != crc:
            raise ValueError(
                f"{path} is not as a flush wrote it: its checksum differs from that in meta.json"
            )
        return cls(rows, np.frombuffer(content, "<u8").reshape(sums.values.shape).astype(np.uint64))

    def content(self) -> bytes:
        return self.values.astype("<u8").tobytes()

    def with_arrays(self, count: int) -> "Sums":
        """A copy that is to change, with further arrays of zeros up to this count."""
        more = np.zeros((count - len(self.values), self.values.shape[1]), np.uint64)
        return Sums(self._rows, np.concatenate([self.values, more]))

    def add(
        self, array: int, rows: np.ndarray, content: np.ndarray, before: np.ndarray | None = None
    ) -> None:
        """Put rows (sorted) in, in place of what they held before."""
        words = _words(content)
        former = None if before is None else _words(before)
        weights = _random(np.arange(words.shape[1]), 1)
        step = max(1, _CHUNK_WORDS // words.shape[1])
        block_rows = _block_rows(self._rows)
        own = self.values[array]
        for first in range(0, len(rows), step):
            numbers = rows[first : first + step]
            part = words[first : first + step].astype(np.uint64)
            if former is not None:
                part -= former[first : first + step]
            sums = part @ weights
            sums *= _random(numbers, 2)
            block = numbers // block_rows
            starts = np.flatnonzero(np.diff(block, prepend=-1))
            block = block[starts]
            own[block] += np.add.reduceat(sums, starts)

    def check(self, arrays: Iterable[Mapped]) -> None:
        """Compare what the files hold.

        Raises:
            ValueError: it differs; names the file and the rows.
        """
        size = _block_rows(self._rows)
        for number, mapped in enumerate(arrays):
            found = self.zeros(self._rows, 1)
            row_bytes = mapped.slot.nbytes // self._rows
            for first, last in blocks(mapped.slot):
                content = np.frombuffer(mapped.read(first * row_bytes, (last - first) * row_bytes), np.uint8)
                if content.any():  # the sum of zeros is 0
                    found.add(0, np.arange(first, last), content.reshape(last - first, row_bytes))
            differing = np.flatnonzero(found.values[0] != self.values[number])
            if differing.size:
                at = int(differing[0]) * size
                raise ValueError(
                    f"{mapped.path} is not as it was flushed, in {differing.size} of "
                    f"{found.values.size} blocks, first among rows {at} to {min(at + size, self._rows) - 1}: "
                    "it is damaged, or was written to without keep; restore a copy of the table"
                )


def filling(sums: Sums, block: Callable[[int, int], np.ndarray]) -> Callable[[int, int], np.ndarray]:
    """``block``, whose rows are put in as the file of the first array is filled with them."""

    def summed(first: int, last: int) -> np.ndarray:
        content = block(first, last)
        sums.add(0, np.arange(first, last), content)
        return content

    return summed


def _block_rows(rows: int) -> int:
    return max(_LEAST_ROWS, -(-rows // _BLOCKS))


def _words(content: np.ndarray) -> np.ndarray:
    """The rows in words, of at most 4 bytes so that no two changes cancel by overflow."""
    rows = np.ascontiguousarray(content).reshape(len(content), -1).view(np.uint8)
    for dtype in ("<u4", "<u2"):
        if rows.shape[1] % int(dtype[-1]) == 0:
            return rows.view(dtype)
    return rows


def _random(numbers: np.ndarray, stream: int) -> np.ndarray:
    """Odd numbers of 64 bits that look random, of these numbers (SplitMix64)."""
    mixed = (numbers.astype(np.uint64) + np.uint64(stream << 48)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31)) | np.uint64(1)
