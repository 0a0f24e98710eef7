"""What callers may give in the place of a sparse gradient: torch's sparse tensors, and lists."""

from dataclasses import dataclass
from typing import Any

from fastopt._core.arrays import is_sparse_tensor
from fastopt.gradients.protocol import SparseGradient, SumOfGradients, check_all_sparse
from fastopt.gradients.rows import RowGradient
from fastopt.gradients.slices import IndexedSlices


@dataclass(frozen=True, eq=False)
class TensorSlices(IndexedSlices):
    """The slices of a sparse tensor that has so many rows."""

    rows: int = 0

    def checked(self, label: str, rows: int | None) -> RowGradient:
        """The slices, of a tensor with as many rows as the table."""
        if rows is not None and rows != self.rows:
            raise ValueError(f"{label} has {self.rows} rows but its parameter {rows}: they must be the same")
        return super().checked(label, self.rows)


def as_gradient(value: Any, label: str, writes: bool = False) -> Any:
    """A gradient of one parameter: a list or tuple of sparse ones as their sum, a sparse tensor with an index
    for each row as its slices, whether it is coalesced or not; anything else as it is.

    Values of a sparse tensor that are strided are copied, but where the step ``writes`` them.

    Raises:
        TypeError, ValueError: the list has others beside sparse gradients, or is empty.
    """
    if isinstance(value, list | tuple):
        gradients = [_of_tensor(own, writes) for own in value]
        if gradients and not any(isinstance(own, SparseGradient) for own in gradients):
            return value
        check_all_sparse(gradients, label)
        return SumOfGradients(gradients)
    return _of_tensor(value, writes)


def _of_tensor(value: Any, writes: bool) -> Any:
    if not is_sparse_tensor(value):
        return value
    tensor = value.detach()
    values = tensor._values() if writes else tensor._values().contiguous()
    return TensorSlices(tensor._indices()[0], values, rows=tensor.shape[0])
