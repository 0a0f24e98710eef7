"""What a torch optimizer's step by kernels goes on with from step to step."""

from collections.abc import Mapping
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from fastopt._core.arrays import tensor_over
from fastopt._core.groups import checked_group
from fastopt._core.missed import LAST_STEP
from fastopt._core.options import SHARED, is_immutable
from fastopt._core.versions import written
from fastopt._step.settings import StepInfo
from fastopt.torch.gradients import Usable, last_by_rows, taken_dtype, usable
from fastopt.torch.loaded import state_of
from fastopt.torch.masters import Masters
from fastopt.torch.memory import DTYPES, HALF, beside, is_shard, local, sharing
from fastopt.torch.nadam import PART, NAdamOfTorch, scalar_dtype
from fastopt.torch.row_gradients import RowGradients
from fastopt.torch.shown import Shown, same
from fastopt.torch.tables import TableWeight, check_left, check_options, plain_parameter
from fastopt.torch.traits import PRODUCT, STEP, Owner, Traits

_KINDS = Tensor, Parameter, TableWeight


def takes(p: Tensor) -> bool:
    """Whether kernels can update a parameter where it lies."""
    return is_laid_out(p) and not local(p).is_neg()


def is_laid_out(p: Tensor) -> bool:
    """Whether the numbers of a parameter, or their negatives, lie as kernels take them."""
    own = local(p)
    return (
        type(own) in _KINDS
        and own.layout is torch.strided
        and own.dtype in DTYPES
        and own.device.type in ("cpu", "cuda")
        and own.is_contiguous()
    )


def _flags(group: Mapping[str, Any]) -> tuple:
    """The options that send a group torch's own way."""
    return bool(group.get("capturable")), bool(group.get("differentiable"))


# What a parameter that kernels take has to stay
_kind = attrgetter("dtype", "shape", "device", "layout")


class GroupOptions:
    """The options of a group for the plain optimizer, which are looked at in every step.

    Attributes:
        values: as they were last read, tensors among them as the numbers they held.
    """

    def __init__(self, traits: Traits, group: dict[str, Any]) -> None:
        self._traits = traits
        self._names = traits.names(group)
        self._get = itemgetter(*self._names)
        self.read(group)

    def read(self, group: dict[str, Any]) -> None:
        """Take the options as they are now."""
        self._seen = self._get(group)
        self._fixed = all(map(is_immutable, self._seen))
        self.values = self._traits.plain_options(dict(zip(self._names, self._seen, strict=True)))

    def may_differ(self, group: dict[str, Any]) -> bool:
        """Whether they may have changed: a tensor may at any time."""
        return not self._fixed or self._get(group) != self._seen


class Kept:
    """The plain optimizer of those parameters of a torch optimizer that kernels take, whose state it shares,
    and what both were when it was made.

    Args:
        traits: of the torch optimizer's class.
        groups: its ``param_groups``. state: its ``state``.
        owner: it, to which tables in files belong.

    Attributes:
        params: the parameters that kernels take, tables in files first: these know the optimizer that they
            were flushed with by their places. left: the others, of each group. has_shards: whether some
            are DTensors. tables: the weights of tables in files, by their positions.
    """

    def __init__(self, traits: Traits, groups: list[dict[str, Any]], state: Any, owner: Owner) -> None:
        self._traits = traits
        self._members = [list(group["params"]) for group in groups]
        taken = [[p for p in group["params"] if self._takes(group, p)] for group in groups]
        self._sharing = _sharing(taken) if traits.in_torch else set()
        taken = [[p for p in own if id(p) not in self._sharing] for own in taken]
        parts = [
            (number, own)
            for in_files in (True, False)
            for number, all_of in enumerate(taken)
            for own in self._parts([p for p in all_of if isinstance(p, TableWeight) is in_files], state)
        ]
        self.params = [p for _, own in parts for p in own]
        chosen = set(map(id, self.params))
        self.left = [[p for p in own if id(p) not in chosen] for own in self._members]
        check_left(self.left, groups, self._sharing)
        self.tables = {i: p for i, p in enumerate(self.params) if isinstance(p, TableWeight)}
        self._flags = [*map(_flags, groups)]
        self._numbers = [number for number, _ in parts]
        self._options = [GroupOptions(traits, groups[number]) for number in self._numbers]
        self._state = state
        own_groups = [
            {**options.values, "params": [*map(plain_parameter, own)]}
            for (_, own), options in zip(parts, self._options, strict=True)
        ]
        if traits.has_product:
            own_groups = [{**group, PART: k} for k, group in enumerate(own_groups)]
        self._group_of = np.repeat(range(len(parts)), [len(own) for _, own in parts])
        values = [options.values for options in self._options]
        counts = [*map(traits.has_counts, values)]
        check_options(traits, {p: values[self._group_of[i]] for i, p in self.tables.items()}, values)
        self._plain = traits.make(own_groups, owner) if own_groups else None
        self._rules = [self._plain.rule(group) for group in self._plain.param_groups] if self._plain else []
        self._seen: list[dict[str, Any]] = [{} for _ in self.params]  # the arrays that torch's state shows
        self._by_rows = [False for _ in self.params]  # whether the last gradient was, for which state moves
        self._not_shown: list[int] = []  # the positions of parameters that have no state yet
        self.has_shards = any(map(is_shard, self.params))
        self._counted = np.array([i in self.tables or counts[k] for i, k in enumerate(self._group_of)])
        self._kinds = [*map(_kind, self._locals())]
        self._as_they_are = not self.has_shards  # whether gradients need no closer look
        self._shown = Shown(state, self.has_shards)
        self._shards_at = self._find_shards()
        self._masters = Masters([p for i, p in enumerate(self.params) if self._has_master(i)], state)
        self._differ = False  # whether parameters of a part are no longer alike
        self._take_state()

    # Whether it still holds

    def fits(self, groups: list[dict[str, Any]], state: Any) -> bool:
        """Whether the torch optimizer is what it was, but for options that may change between steps, which
        are adopted."""
        if state is not self._state or len(groups) != len(self._members) or self._differ:
            return False
        pairs = zip(groups, self._members, strict=True)
        if not all(same(group["params"], own) for group, own in pairs) or not self._is_shown():
            return False
        if self._flags != [*map(_flags, groups)] or self._shards_at != self._find_shards():
            return False
        for group, own in zip(groups, self.left, strict=True):
            if any(self._takes(group, p) and id(p) not in self._sharing for p in own):
                return False
        return all(self._adopted(k, groups[number]) for k, number in enumerate(self._numbers))

    def _parts(self, params: list[Tensor], state: Any) -> list[list[Tensor]]:
        """The parameters of a group in parts: those of one that have made equally many steps have the same
        product, if any."""
        products: dict[int, list[float]] = {}
        parts: dict[int, list[Tensor]] = {}
        for p in params:
            own = state.get(p, {})
            known = products.setdefault(self._traits.steps(own), [])
            if _product(own) not in known:
                known.append(_product(own))
            parts.setdefault(known.index(_product(own)), []).append(p)
        return list(parts.values())

    def _takes(self, group: Mapping[str, Any], p: Tensor) -> bool:
        return self._traits.takes(group, p) and takes(p)

    def _find_shards(self) -> list[tuple]:
        """Where the parts of DTensors lie, which may be put elsewhere in the same DTensors."""
        return [(p.data_ptr(), p.dtype, p.shape) for p in self._locals()] if self.has_shards else []

    def is_outdated(self) -> bool:
        """Whether parameters are no longer what they were."""
        own = self._locals()
        same_kinds = [*map(_kind, own)] == self._kinds and set(map(type, own)) <= {*_KINDS}
        if not same_kinds or not all(map(Tensor.is_contiguous, own)) or any(map(Tensor.is_neg, own)):
            return True
        return self._traits.in_torch and bool(sharing(own))

    def _locals(self) -> list[Any]:
        """The parameters, of DTensors the parts that lie here."""
        return [*map(local, self.params)] if self.has_shards else self.params

    def meets_other_dtypes(self) -> bool:
        """Whether gradients are of dtypes that have to be converted, which they are from now on."""
        if not self._as_they_are:
            return False
        pairs = ((p.grad, p) for p in self.params if p.grad is not None)
        self._as_they_are = all(gradient.dtype == taken_dtype(gradient, p) for gradient, p in pairs)
        return not self._as_they_are

    def _is_shown(self) -> bool:
        """Whether torch's state is what was put there."""
        counted = not self._counted.any() or bool((self._steps == self._counts).all())
        return counted and (self._plain is None or self._shown.holds())

    def _adopted(self, k: int, group: dict[str, Any]) -> bool:
        """Go on with the options that a group has now; returns False if they need another state."""
        options = self._options[k]
        if not options.may_differ(group):
            return True
        assert self._plain is not None
        before, own = options.values, self._plain.param_groups[k]
        options.read(group)
        if any(options.values[name] != before[name] for name in SHARED):
            return False
        if self._plain.rule({**own, **options.values}) != self._rules[k]:
            return False
        own.update(options.values)
        return True

    # State

    def _take_state(self) -> None:
        """Begin with what torch's state holds."""
        states = [self._state.get(p, {}) for p in self.params]
        scalar = scalar_dtype()
        self._counts = np.array([self._traits.steps(own) for own in states], np.int64)
        for i in self.tables:  # which were taken up at their last flush, if this optimizer is new
            assert self._plain is not None
            self._counts[i] = states[i].get(STEP, self._plain.step_counts[i])
        self._steps: np.ndarray = self._counts.astype(scalar)
        self._products: np.ndarray = np.array([*map(_product, states)], scalar)
        if self._plain is None:
            return
        if isinstance(self._plain, NAdamOfTorch):
            self._plain.products.begin(self._products, self._counts, self._group_of)
        if any(states):
            self._load(states)
        self._show()

    def _load(self, states: list[dict[str, Any]]) -> None:
        """Have the plain optimizer begin with the states that torch has of parameters; that of tables lies in
        their files."""
        assert self._plain is not None
        slots = [{} if i in self.tables else own for i, own in enumerate(self._plain.slots.values())]
        begun = (self._counts > 0).tolist()
        found = [state_of(own, slots[i], begun=begun[i]) for i, own in enumerate(states)]
        saved = {
            "optimizer": type(self._plain).__name__,
            "steps": max(self._plain.steps, int(self._counts.max())),
            "state": {i: {STEP: int(self._counts[i]), **arrays} for i, arrays in enumerate(found)},
            "param_groups": [
                {**group, "params": np.flatnonzero(self._group_of == k).tolist()}
                for k, group in enumerate(self._plain.param_groups)
            ],
        }
        self._plain.load_state_dict(saved, options=False)
        for own, arrays, names in zip(states, found, slots, strict=True):
            for name in () if arrays else own.keys() & names.keys():  # first values, which the step makes
                del own[name]

    def _show(self) -> None:
        """Have torch's state show the state arrays, and the counts of steps, as tensors over their memory."""
        assert self._plain is not None
        live = self._plain.state
        for i, p in enumerate(self.params):
            arrays, seen = {} if i in self.tables else live[i], self._seen[i]
            if not arrays and not self._counts[i]:
                continue
            self._seen[i] = {**arrays, STEP: True}
            if not arrays and self._traits.counts_as is None and i not in self.tables:
                continue
            own = self._state[p]
            for name, array in arrays.items():
                if seen.get(name) is not array:
                    own[name] = beside(p, tensor_over(array))
            if not seen:
                self._show_numbers(i, own)
        self._remember()

    def _show_numbers(self, i: int, own: dict[str, Any]) -> None:
        if self._traits.counts_as is int:
            own[STEP] = int(self._counts[i])
        elif self._counted[i]:
            own[STEP] = torch.from_numpy(self._steps[i : i + 1])[0]
        if self._traits.has_product:
            own[PRODUCT] = torch.from_numpy(self._products[i : i + 1])[0]

    def _remember(self) -> None:
        self._not_shown = [i for i, seen in enumerate(self._seen) if not seen]
        self._shown.remember(zip(self.params, self._seen, strict=True), (STEP, PRODUCT))

    # Steps

    @property
    def gradients(self) -> list[Tensor | None]:
        """Those that the parameters have."""
        return [p.grad for p in self.params]

    def usable(self, given: list[Tensor | None]) -> Usable:
        """Gradients of the parameters as the plain optimizer takes them.

        Raises:
            RuntimeError: one is dense, where only sparse ones are expected, or sparse, where only dense ones
                are.
        """
        if self._traits.sparse_alone and not all(map(_is_by_rows, given)):
            raise RuntimeError("SparseAdam does not support dense gradients, please consider Adam instead")
        if self._traits.dense_alone and any(map(_is_sparse, given)):
            raise RuntimeError(f"{self._traits.plain.__name__} does not support sparse gradients")
        found = usable(given, self.params, self._as_they_are, self._goes_dense)
        if found.by_rows:
            self._check_lookups(given)
        return found

    def _check_lookups(self, given: list[Tensor | None]) -> None:
        """Refuse lookups of tables whose rows are not up to date when they are read."""
        for i, gradient in enumerate(given):
            values = self._options[self._group_of[i]].values
            if isinstance(gradient, RowGradients) and values["rows"] == "dense":
                raise ValueError(
                    "rows is 'dense' in the group of a table that modules look up, which would read rows "
                    "that are behind: expected 'lazy', or lookups by fastopt.embedding_bag(..., optimizer=)"
                )

    def _has_master(self, i: int) -> bool:
        return self.params[i].dtype in HALF and self._options[self._group_of[i]].values["master_weights"]

    def _goes_dense(self, i: int) -> bool:
        """Whether a sparse gradient of the parameter at a position is to be made dense."""
        return self._traits.goes_dense(self._options[self._group_of[i]].values)

    def check(self) -> None:
        """Refuse gradients and options that a step would refuse.

        Raises:
            ValueError, TypeError, RuntimeError: nothing has changed.
        """
        if self._plain is None:
            return
        self.usable(self.gradients)
        for k, own in enumerate(self._plain.param_groups):
            checked = checked_group(own, f"param_groups[{self._numbers[k]}]", self._plain)
            self._plain.check_options(checked, f"param_groups[{self._numbers[k]}]")

    def step(self, given: list[Tensor | None], **arguments: Any) -> StepInfo:
        """Update those of the parameters that have gradients, which are given."""
        if self._plain is None or (arguments.get("clip_norm") is None and not any(map(_is_there, given))):
            return StepInfo()
        gradients, by_rows, without = self.usable(given)
        self._masters.follow()
        info = self._plain.step(gradients, **arguments)
        self._masters.remember()
        if not info.skipped:
            self._count(without)
            written([p for i, p in self.tables.items() if gradients[i] is not None])
            kinds = last_by_rows(gradients, self._by_rows) if by_rows or any(self._by_rows) else self._by_rows
            if kinds != self._by_rows or any(gradients[i] is not None for i in self._not_shown):
                self._show()
                self._by_rows = kinds
        return info

    def _count(self, without: list[int]) -> None:
        """Have torch's state count a step of all parameters but some, and what an interrupt has left out."""
        assert self._plain is not None
        self._counts = self._plain.step_counts
        self._steps[...] = self._counts
        if self._traits.counts_as is int:
            for i in set(range(len(self.params))).difference(without):
                self._state[self.params[i]][STEP] = int(self._counts[i])
        if isinstance(self._plain, NAdamOfTorch):
            self._plain.products.count(self._counts, [options.values for options in self._options])
            self._differ = self._plain.products.differ()

    def is_behind(self) -> bool:
        """Whether rows have missed steps."""
        if self._plain is None or all(options.values["rows"] == "lazy" for options in self._options):
            return False
        return any(LAST_STEP in own for own in self._plain.state_dict()["state"].values())

    def catch_up(self) -> None:
        """Bring all rows up to date; those of tables in files always are."""
        if self._plain is not None and not self.tables:
            self._plain.flush()

    def flush(self) -> None:
        """Bring all rows up to date, and tables in files to the disk."""
        if self._plain is not None:
            self._plain.flush()

    def has_unflushed(self) -> bool:
        """Whether tables in files have made steps since their last flush."""
        return any(
            p.table.changed or (p.table.progress or {}).get(STEP, 0) != steps
            for p, steps in self.steps_of_tables().items()
            if not p.table.closed
        )

    def steps_of_tables(self) -> dict[TableWeight, int]:
        """How many steps each table in files has made."""
        return {p: int(self._counts[i]) for i, p in self.tables.items()}


def _product(own: Mapping[str, Any]) -> float:
    """NAdam's product in a parameter's state in torch."""
    return float(own.get(PRODUCT, 1.0))


def _sharing(taken: list[list[Tensor]]) -> set[int]:
    """The ids of parameters that share memory with another, which kernels would update at the same time."""
    params = [p for own in taken for p in own]
    return {id(params[i]) for i in sharing([*map(local, params)])}


def _is_there(gradient: Tensor | None) -> bool:
    return gradient is not None


def _is_sparse(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.is_sparse


def _is_by_rows(gradient: Tensor | None) -> bool:
    """Whether there is no gradient that names every row."""
    return gradient is None or gradient.is_sparse or isinstance(gradient, RowGradients)
