"""What sets the torch optimizers apart for a step by kernels."""

import functools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastopt._core.options import SHARED, checked_options, plain
from fastopt.optimizer import Optimizer

STEP, PRODUCT = "step", "mu_product"  # names of torch's state that are numbers
# What torch takes of either sign once an optimizer is made, as from a schedule that goes on beyond its end
_SIGNED = "lr", "weight_decay"
_FLAGS = "maximize", "nesterov", "centered", "amsgrad", "decoupled_weight_decay"  # torch goes by their truth


class Owner(Protocol):
    """A torch optimizer, as the tables in files see it that it updates."""

    def flush(self) -> None:
        """Bring them to the disk."""


@dataclass(frozen=True)
class Traits:
    """Of one class.

    plain: the class of :mod:`fastopt` that updates its parameters. options: which of torch's options that one
    takes, by the same names. counts_as: how torch's state counts steps: as a tensor, an int, or, None, not at
    all. moves_all: whether momentum moves rows without a gradient, too. has_product: whether torch's state
    has NAdam's product of momenta. sparse_alone, dense_alone: whether all gradients are sparse, or dense.
    by_rows, by_tables: whether an element is updated by a norm or a mean of its whole row, or by those of the
    whole parameter. in_torch: whether it is a
    class of torch's, whose own step takes what kernels do not.
    """

    plain: type[Optimizer]
    options: tuple[str, ...]
    counts_as: type | None = torch.Tensor
    moves_all: bool = False
    has_product: bool = False
    sparse_alone: bool = False
    dense_alone: bool = False
    by_rows: bool = False
    by_tables: bool = False
    in_torch: bool = True

    def make(self, groups: list[dict[str, Any]], owner: Owner) -> Optimizer:
        """The plain optimizer of groups, which takes what torch's class takes in a step. Tables in files
        belong to ``owner``, which may have another one made for them."""
        return self._as_in_torch(groups, weakref.ref(owner))

    @functools.cached_property
    def _as_in_torch(self) -> Any:
        def begin(own: Any, groups: list[dict[str, Any]], owner: weakref.ref[Owner]) -> None:
            own.torch_owner = owner
            self.plain.__init__(own, groups)

        parts = {"signed": _SIGNED, "__init__": begin, "owner": property(lambda own: own.torch_owner())}
        return type(self.plain.__name__.removesuffix("OfTorch"), (self.plain,), parts)

    def check(self, groups: list[dict[str, Any]]) -> None:
        """Refuse options that no optimizer begins with."""
        for number, group in enumerate(groups):
            checked_options({name: group[name] for name in _SIGNED if name in group}, f"params[{number}]")

    def plain_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options with flags for what torch takes for flags, and numbers for tensors."""
        return {name: bool(own) if name in _FLAGS else plain(own) for name, own in options.items()}

    def takes(self, group: Mapping[str, Any], p: torch.Tensor) -> bool:
        """Whether kernels can do what the options of a group ask for."""
        if group.get("differentiable") or group.get("capturable"):
            return False
        if not self.sparse_alone:
            return True
        by_elements = p.grad is not None and p.grad.is_sparse and p.grad.sparse_dim() != 1
        return p.ndim == 2 and not by_elements

    def goes_dense(self, values: Mapping[str, Any]) -> bool:
        """Whether sparse gradients are to be made dense, in a group with these options, to move what torch
        moves: with ``rows="dense"`` rows are moved when they are next needed."""
        if self.dense_alone:
            return True
        return self.moves_all and bool(values["momentum"]) and values["rows"] == "lazy"

    def names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of those options of a group that the plain optimizer takes."""
        return *(name for name in self.options if name in group), *SHARED

    def has_counts(self, values: Mapping[str, Any]) -> bool:
        """Whether state in torch has counts of steps as tensors, in a group with these options: also where
        torch has none, but the random bits that fewer bits are rounded by follow from the count."""
        return self.counts_as is torch.Tensor or (self.counts_as is None and bool(values["state_dtype"]))

    def steps(self, state: Mapping[str, Any]) -> int:
        """How many steps a parameter with this state has made. Where state has no count it only matters
        whether there was one."""
        if self.counts_as is None and STEP not in state:
            return int(any(isinstance(value, torch.Tensor) for value in state.values()))
        return int(state.get(STEP, 0))
