"""safetensors files with checksums, which are taken while the bytes are written and read.

Such a file is eight bytes with the length of a header; the header, JSON, with the dtype, the shape and the
place of each tensor and, under ``__metadata__``, texts by name; and the tensors' bytes, one after the other.
One of these texts is ours: ``crc32`` has the checksum of each tensor, its dtype and shape included, and that
of the other texts and these checksums. Other readers of safetensors pass over it.
"""

import contextlib
import errno
import json
import math
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from fastopt._core.backend import backend_of
from fastopt._core.files import replacing
from fastopt.kernels.work import Array

CHECKSUMS = "crc32"
_METADATA = "__metadata__"
_PIECE = 1 << 20  # bytes that are written or read, and hashed while a cache still holds them
_LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
}
_NAMES = {np.dtype(kind): name for name, kind in _DTYPES.items()}


def write(path: Any, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write C-contiguous arrays, of any device, beside ``path``, bring the file to the disk, and rename it.

    Raises:
        OSError: it can't be written; the old file is as it was.
        TypeError: safetensors has no such dtype.
    """
    target = Path(os.path.realpath(path))
    _check_place(target)
    # The widest elements come first, so that all are aligned, as in the safetensors library.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    for name, array in tensors.items():
        if array.dtype not in _NAMES:
            raise TypeError(f"{name} has dtype {array.dtype}: expected one of {', '.join(map(str, _NAMES))}")
    with replacing(target) as temporary, open(temporary, "xb") as file:
        sums = {name: _first_sum(_NAMES[a.dtype], a.shape) for name, a in tensors.items()}
        file.write(_header(tensors, metadata, sums))
        for name, array in tensors.items():
            own = array if isinstance(array, np.ndarray) else backend_of(array).to_host(array)
            data = own.reshape(-1).view(np.uint8)
            for first in range(0, data.size, _PIECE):
                piece = data[first : first + _PIECE].data
                file.write(piece)
                sums[name] = zlib.crc32(piece, sums[name])
        file.seek(0)
        file.write(_header(tensors, metadata, sums))


def _check_place(target: Path) -> None:
    """Refuse to put a file in the place of a folder or a device."""
    mode = target.stat().st_mode if target.exists() else stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file, which a new one could replace", str(target))


def _header(tensors: Mapping[str, Array], metadata: Mapping[str, str], sums: Mapping[str, int]) -> bytes:
    """The header with its length before it, which does not depend on the checksums."""
    checksums = {"tensors": {name: _digits(own) for name, own in sums.items()}}
    texts = {**metadata, CHECKSUMS: json.dumps({**checksums, "texts": _sum_of_texts(metadata, checksums)})}
    header: dict[str, Any] = {_METADATA: texts}
    begin = 0
    for name, array in tensors.items():
        end = begin + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": array.shape, "data_offsets": (begin, end)}
        begin = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _first_sum(dtype: str, shape: tuple[int, ...]) -> int:
    """The checksum of a tensor before its first byte."""
    return zlib.crc32(f"{dtype} {list(shape)}".encode())


def _sum_of_texts(metadata: Mapping[str, str], checksums: Mapping[str, Any]) -> str:
    return _digits(zlib.crc32(json.dumps([dict(metadata), checksums], sort_keys=True).encode()))


def _digits(checksum: int) -> str:
    return f"{checksum:08x}"


class _Place(NamedTuple):
    """Of a tensor in a file; the offset is that of its first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TensorFile:
    """An open safetensors file.

    Attributes:
        metadata: its texts, without the checksums. checked: whether it has checksums.
    """

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.path, self._file = path, file
        header = self._read_header()
        texts = header.pop(_METADATA, {})
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise self._damaged(f"{_METADATA} is not a dict of texts")
        self.metadata: dict[str, str] = texts
        self._places = self._checked_places(header)
        self._sums = self._checked_sums(texts.pop(CHECKSUMS, None))

    @property
    def names(self) -> set[str]:
        """Of its tensors."""
        return set(self._places)

    @property
    def checked(self) -> bool:
        return self._sums is not None

    def read(self, name: str) -> np.ndarray:
        """A tensor.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        if name not in self._places:
            raise self._damaged(f"it lacks the tensor {name!r}")
        dtype, shape, offset, nbytes = self._places[name]
        array = np.empty(nbytes // np.dtype(_DTYPES[dtype]).itemsize, _DTYPES[dtype])
        data = array.view(np.uint8)
        checksum = _first_sum(dtype, shape)
        self._file.seek(offset)
        for first in range(0, nbytes, _PIECE):
            piece = data[first : first + _PIECE].data
            if self._file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                raise self._damaged(f"it ends within {name!r}")
            checksum = zlib.crc32(piece, checksum)
        if self._sums is not None and self._sums[name] != _digits(checksum):
            raise ValueError(
                f"{self.path} is damaged: the checksum of the tensor {name!r} is {_digits(checksum)}, "
                f"expected {self._sums[name]}; take another copy of the file"
            )
        try:
            return array.reshape(shape)
        except ValueError as error:  # more dimensions than NumPy has
            raise self._damaged(f"{name!r} has shape {shape}, {error}") from error

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is not a whole safetensors file: {why}")

    def _read_header(self) -> dict[str, Any]:
        self._size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        self._begin = 8 + length
        if self._size < 8 or length > _LONGEST_HEADER or self._begin > self._size:
            raise self._damaged(f"it has {self._size} bytes, and its header should have {length}")
        try:
            header = json.loads(self._file.read(length).decode())
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is no JSON: {error}") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is no dict")
        return header

    def _checked_places(self, header: dict[str, Any]) -> dict[str, _Place]:
        """Where each tensor lies: all bytes after the header belong to one."""
        places = {}
        for name, entry in header.items():
            match entry:
                case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [first, last]} if (
                    dtype in _DTYPES
                    and all(type(number) is int and number >= 0 for number in (*shape, first, last))
                ):
                    place = _Place(dtype, tuple(shape), self._begin + first, last - first)
                case _:
                    raise self._damaged(f"the header says of {name!r}: {str(entry)[:200]}")
            if place.nbytes != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
                raise self._damaged(f"{name!r} has shape {shape} and dtype {dtype}, but {place.nbytes} bytes")
            places[name] = place
        end = self._begin
        for name, place in sorted(places.items(), key=lambda item: item[1][2:]):
            if place.offset != end:
                raise self._damaged(f"{name!r} begins at byte {place.offset}, not at {end}")
            end += place.nbytes
        if end != self._size:
            raise self._damaged(f"it has {self._size} bytes, and its header speaks of {end}")
        return places

    def _checked_sums(self, text: str | None) -> dict[str, str] | None:
        """The checksum of each tensor; None if the file has none."""
        if text is None:
            return None
        try:
            checksums = json.loads(text)
        except (ValueError, RecursionError):
            checksums = None
        match checksums:
            case {"tensors": dict(sums), "texts": str(own)} if set(sums) == self.names:
                found = _sum_of_texts(self.metadata, {"tensors": sums})
                if own == found:
                    return sums
                raise ValueError(
                    f"{self.path} is damaged: the checksum of its metadata is {found}, expected {own}; take "
                    "another copy of the file"
                )
        raise ValueError(
            f"{self.path} is damaged: it has checksums of other tensors than its own; take another copy of it"
        )


@contextlib.contextmanager
def opened(path: Any) -> Iterator[TensorFile]:
    """A safetensors file, its header checked.

    Raises:
        OSError: it can't be read.
        ValueError: it is damaged, or something else.
    """
    with open(path, "rb") as file:
        yield TensorFile(file, os.fspath(path))
