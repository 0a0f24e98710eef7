"""What a kind of sparse gradient has to say, so that steps, norms and clipping can use it, and their sums."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastopt._core import arrays
from fastopt.gradients.joined import JoinedRows
from fastopt.gradients.rows import RowGradient
from fastopt.kernels.work import Array


class SparseGradient(arrays.Sparse, ABC):
    """A gradient of a 2-D parameter that names the rows it belongs to.

    A new kind of gradient derives from this class and says what it is in the two methods; a step, norms and
    clipping then take it wherever they take :class:`fastopt.IndexedSlices`. ``a + b`` adds up two gradients
    of the same parameter (see :class:`fastopt.SumOfGradients`).
    """

    @abstractmethod
    def numbers(self, label: str) -> tuple[Any, str]:
        """The array that it takes its numbers from, of the parameter's dtype, and what that is called where
        the gradient is called ``label``."""

    @abstractmethod
    def checked(self, label: str, rows: int | None) -> RowGradient:
        """What it says, checked for a table of so many rows, or for one that is not known.

        Raises:
            TypeError, ValueError: it contradicts itself, or names rows that the table does not have.
        """

    def for_parameter(self, label: str, parameter: Array, parameter_label: str) -> RowGradient:
        """What it says, checked against its parameter; its indices are not sorted yet."""
        if parameter.ndim != 2:
            name = type(self).__name__
            name = name if name.endswith("s") else arrays.article(name)
            raise ValueError(
                f"{label} is {name} but {parameter_label} has shape "
                f"{parameter.shape}: expected a 2-D parameter, pass a dense gradient"
            )
        values, values_label = self.numbers(label)
        array = arrays.array_view(values, values_label, arrays.GRADIENT)
        arrays.check_like(array, values_label, values, parameter, parameter_label)
        checked = self.checked(label, parameter.shape[0])
        if checked.values.shape[1] != parameter.shape[1]:
            raise ValueError(
                f"{values_label} has rows of {checked.values.shape[1]} but {parameter_label} of "
                f"{parameter.shape[1]}: they must be the same"
            )
        return checked

    def parts(self, label: str) -> list[tuple["SparseGradient", str]]:
        """The gradients whose sum it is, that are no sums, with what each is called."""
        return [(self, label)]

    def __add__(self, other: Any) -> "SumOfGradients":
        if not isinstance(other, SparseGradient):
            return NotImplemented
        return SumOfGradients([part for own in (self, other) for part, _ in own.parts("")])


@dataclass(frozen=True, eq=False)
class SumOfGradients(SparseGradient):
    """Several sparse gradients of one parameter, which are added up before they are used.

    ``a + b`` makes one, and so does a step of a list of gradients in the place of one. A row gets the sum of
    what all have for it, added in their order, and one update.

    Args:
        gradients: :class:`fastopt.IndexedSlices`, :class:`fastopt.BagGradient` and others, at least one.

    Example:
        >>> a = IndexedSlices(np.array([3, 0, 3]), np.ones((3, 2), np.float32))
        >>> b = BagGradient(np.array([3, 1]), np.array([0]), np.ones((1, 2), np.float32), mode="sum")
        >>> grad = a + b  # row 3 gets the sum of three
    """

    gradients: Sequence[SparseGradient]

    def __post_init__(self) -> None:
        gradients = tuple(self.gradients)
        check_all_sparse(gradients, "gradients")
        object.__setattr__(self, "gradients", gradients)

    def __len__(self) -> int:
        return len(self.gradients)

    def __getitem__(self, position: int) -> SparseGradient:
        return self.gradients[position]

    def numbers(self, label: str) -> tuple[Any, str]:
        """There is no array that all have their numbers from: each of the ``parts`` has its own."""
        raise TypeError(f"{label} is a sum: expected one of its parts")

    def parts(self, label: str) -> list[tuple[SparseGradient, str]]:
        """The gradients whose sum it is, those of sums among them too."""
        many = (own.parts(f"{label}[{position}]") for position, own in enumerate(self.gradients))
        return [part for parts in many for part in parts]

    def checked(self, label: str, rows: int | None) -> RowGradient:
        """The gradients, brought together."""
        parts = self.parts(label)
        checked = [part.checked(own_label, rows) for part, own_label in parts]
        first, first_label = parts[0][0].numbers(parts[0][1])
        first_array = arrays.array_view(first, first_label)
        for (part, own_label), found in zip(parts, checked, strict=True):
            value, values_label = part.numbers(own_label)
            arrays.check_beside(found.values, values_label, value, first_array, first_label)
            if found.values.dtype != checked[0].values.dtype:
                raise TypeError(
                    f"{values_label} has dtype {found.given[0].dtype} but {first_label} has "
                    f"{first_array.dtype}: expected gradients of one parameter"
                )
            if found.values.shape[1] != checked[0].values.shape[1]:
                raise ValueError(
                    f"{values_label} has rows of {found.values.shape[1]} but {first_label} of "
                    f"{checked[0].values.shape[1]}: expected gradients of one parameter"
                )
        return _brought_together(checked)

    def for_parameter(self, label: str, parameter: Array, parameter_label: str) -> RowGradient:
        """The gradients, each checked against the parameter, brought together."""
        parts = self.parts(label)
        return _brought_together([part.for_parameter(own, parameter, parameter_label) for part, own in parts])


def _brought_together(parts: Sequence[RowGradient]) -> RowGradient:
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def check_all_sparse(gradients: Sequence[Any], label: str) -> None:
    """Refuse to add up other gradients than sparse ones, or none."""
    if not gradients:
        raise ValueError(f"{label} is empty: expected at least one sparse gradient, or None in its place")
    for position, gradient in enumerate(gradients):
        if not isinstance(gradient, SparseGradient):
            kind = arrays.article(type(gradient).__name__)
            raise TypeError(
                f"{label}[{position}] is {kind}: expected a sparse gradient, such as IndexedSlices, as those "
                "in a list in the place of one gradient are added up"
            )


def numbers_of(gradient: Any, label: str) -> list[tuple[Any, str]]:
    """The arrays that a gradient of any kind takes its numbers from, with their labels."""
    if not isinstance(gradient, SparseGradient):
        return [(gradient, label)]
    return [part.numbers(own) for part, own in gradient.parts(label)]
