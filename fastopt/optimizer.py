"""The optimizer that all others derive from: parameters, state, and the step."""

import functools
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fastopt import arrays, dense, precision, stored
from fastopt.clipping import check_limit, clip_factor, norm_of
from fastopt.gradients import BagGradient, IndexedSlices, RowGradient, row_gradient, values_of
from fastopt.groups import Group, Parameter, as_container, describe, entries_of, is_groups, paired
from fastopt.hyperparameters import FIXED, SHARED, checked_options
from fastopt.kernels import formats
from fastopt.kernels.cpu.headers import UNKNOWN, Headers
from fastopt.kernels.cpu.memory import ALIGNMENT, aligned
from fastopt.kernels.cpu.rows import Lazy, PerRow
from fastopt.kernels.rule import L2, Decoupled, Rule, Scaled
from fastopt.launch import Launch, RowUpdate, Stored, catch_up_launch, row_launches
from fastopt.plan import Indices, find_segments_of
from fastopt.precision import Slot
from fastopt.state import state_arrays
from fastopt.tables import ROW_STEPS, Tracking


class StepInfo(NamedTuple):
    """What a step did.

    norm: L2 norm of the gradients times ``grad_scale``, before clipping; None if it was not needed.
    clipped: whether the gradients were scaled down to ``clip_norm``.
    skipped: whether nothing was updated, because a gradient was not finite.
    nonfinite: then the name, or position, of the first parameter whose gradient holds NaN or infinity; None
        if none does and the norm of all is beyond float64.
    """

    norm: float | None = None
    clipped: bool = False
    skipped: bool = False
    nonfinite: str | int | None = None


_DONE = StepInfo()
_AS_BEFORE = (False, False), (False, False)  # neither parameters nor gradients have changed or are unknown


class _Update(NamedTuple):
    """A parameter and its gradient by rows in one step, checked."""

    parameter: Parameter
    group: "Group"
    view: np.ndarray
    gradient: RowGradient


class Optimizer:
    """Updates parameters in place, in one pass over each.

    Every optimizer shares what is said here; its own class says what it computes.

    Args:
        params: the arrays to update: one array, a sequence of arrays, a dict name -> array, or a
            sequence of groups, dicts with the key ``params`` (any of the former) and options of
            their own. Arrays are NumPy or torch CPU (same memory, no copy), float32, float64, float16 or
            bfloat16, C-contiguous, writable, and none shares memory with another; or a table in files, of
            :func:`fastopt.open_table`, which has the state in files too. Those of 16 bits are computed with
            in float32, and rounded to the nearest.
        lr: learning rate, at least 0, or a function of the step, such as
            ``1e-3 * fastopt.schedules.cosine(1000)``.
        weight_decay: at least 0; an L2 penalty unless the optimizer says decoupled.
        maximize: ascend the gradient.
        rows: what rows of a 2-D parameter see that a sparse gradient does not name. "lazy", the
            default: nothing happens to them, as in torch.optim.SparseAdam and FBGEMM; weight decay
            and momentum act on named rows alone. "dense": what a dense gradient of zeros would have
            done, momentum, moments and weight decay going on, made up for when the row is next
            named or read (by ``fastopt.embedding(..., optimizer=)``), or by :meth:`flush`. Exact up to
            rounding but for Adam and its kin where eps is not small against the root of the second
            moment: there the movement missed is off by at most 3e-6 of itself for betas (0.9, 0.999), and
            more the nearer 1 - beta2 comes to (1 - beta1) / 2, see ``fastopt.kernels.catch_up``. It costs
            no more for the steps missed than for one, but for an L2 ``weight_decay`` with a rule that
            divides by a root (AdaGrad, RMSProp, Adam, RAdam, NAdam) and for Lion, where steps are gone
            through one by one. Needs lr * weight_decay below 1.
        step_per_row: count the steps of each row, from its first gradient on, for what depends on
            the step (Adam's bias corrections, AdaGrad's ``lr_decay``), instead of the parameter's.
            Not with rows="dense".
        clip_row_norm: scale the gradient of each row of a 2-D parameter, after ``grad_scale`` and
            ``clip_norm``, by ``min(1, clip_row_norm / (norm + 1e-6))``; None, the default, does not.
        state_dtype: what the state that is shaped as the parameter is stored in, None, the default, standing
            for float64 for float64 parameters and for float32 for all others: "float32"; "bfloat16", with
            stochastic rounding; or "8bit", codes in blocks of 256 elements with their own scales (see
            ``fastopt.kernels.formats``), rounded stochastically. A dtype of NumPy or torch will do.
        master_weights: keep a float32 copy, made at the first step, of each float16 or bfloat16 parameter,
            update that, and round the parameter from it.
        seed: of the random bits of stochastic rounding, which depend on nothing but this, the step and the
            position of an element among those of all parameters; default 0.

    Attributes:
        param_groups: list of dicts with each group's ``params`` and options; options may be
            changed between steps, also ``lr``.
        steps: number of finished steps.

    Raises:
        ValueError, TypeError: from the constructor and from ``step``, before any array is touched,
            naming the argument, what was got and what was expected.
    """

    def __init__(
        self, params: Any, shared: Mapping[str, Any] = MappingProxyType({}), /, **defaults: Any
    ) -> None:
        for name in shared:
            if name not in SHARED:
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
        self.defaults = {**defaults, **SHARED, **shared}
        self._steps = 0
        self.param_groups: list[dict[str, Any]] = []
        self._groups: list[Group] = []
        params = as_container(params, "params")
        self._grouped = is_groups(params)
        if not self._grouped:
            self._add_group({"params": params}, "params", "params")
        else:
            for number, group in enumerate(params):
                self._add_group(group, f"params[{number}]", f"params[{number}]['params']")
        if not any(group.parameters for group in self._groups):
            raise ValueError("params holds no arrays: expected at least one to update")
        self._all = list(self._parameters())
        self._group_of = [group for group in self._groups for _ in group.parameters]
        self._values = [parameter.value for parameter in self._all]
        sizes = np.array([parameter.size for parameter in self._all])
        self._sizes, self._bytes = sizes, sizes * [parameter.dtype.itemsize for parameter in self._all]
        self._clock = np.zeros(len(self._all), np.int64)
        for i, (parameter, last) in enumerate(zip(self._all, np.cumsum(sizes).tolist(), strict=True)):
            parameter.index, parameter.position, parameter.steps = i, last - parameter.size, self._clock
        self._in_files = [parameter for parameter in self._all if parameter.stored is not None]
        self._dense_rows = any(group.checked["rows"] == "dense" for group in self._groups)
        self._begin()
        arrays.check_apart([(p.view(), p.label) for p in self._all])
        stored.resume(self)

    def _begin(self) -> None:
        """What belongs to these very objects in memory, and is not copied with the optimizer."""
        self._headers = Headers([p.dtype for p in self._all], [p.shape for p in self._all])
        self._parameters_at = np.empty(0, np.int64)
        self._batch: dense.Batch | None = None
        self._tensors: list[arrays.Tensors | None] = [None, None]
        self._may_repeat = False
        self._looked = False  # whether the headers were read without a step being made
        self._expecting = False  # whether the headers know which dense gradients are used by rows
        self._own_dicts = [group.options for group in self._groups]
        for group in self._groups:
            group.identify()

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "_headers",
            "_parameters_at",
            "_batch",
            "_expecting",
            "_own_dicts",
            "_tensors",
            "_may_repeat",
            "_looked",
        )
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    def steps(self) -> int:
        """How many steps are finished, those that were skipped not counted."""
        return self._steps

    # What an optimizer defines

    def rule(self, options: Mapping[str, Any]) -> Rule:
        """The update rule that the options choose."""
        raise NotImplementedError

    def decoupled(self, options: Mapping[str, Any]) -> bool:
        """Whether weight decay is decoupled from the gradient."""
        return False

    def initial_state(self, options: Mapping[str, Any]) -> dict[str, float]:
        """First values of state slots that do not start from 0."""
        return {}

    # Parameters

    def _add_group(self, group: dict[str, Any], label: str, params_label: str) -> None:
        options = {**self.defaults, **group}
        params = options["params"] = as_container(group["params"], params_label)
        taken = {parameter.key for parameter in self._parameters()}
        parameters = []
        for key, value, one_label in entries_of(params, params_label):
            view = arrays.parameter_view(value, one_label)
            if not isinstance(key, str):
                key += len(taken)
            elif key in taken:
                raise ValueError(
                    f"{params_label} has the name {key!r} of an earlier group: expected each name once"
                )
            dtype = np.dtype(view.dtype.type)  # the one object that stands for it
            suffix = one_label.removeprefix(params_label)
            parameters.append(Parameter(value, key, one_label, suffix, view.shape, dtype))
        checked = self._check(options, label)
        self._check_combinations(checked, label)
        self.param_groups.append(options)
        number = len(self._groups)
        rule = self.rule(checked)
        self._groups.append(Group(options, params, parameters, label, rule, checked, number))
        self._groups[-1].take_over(checked)

    def _check(self, options: dict[str, Any], label: str) -> dict[str, Any]:
        own = {name: value for name, value in options.items() if name != "params"}
        unknown = set(own) - set(self.defaults)
        if unknown:
            raise ValueError(
                f"{label} has the option {min(map(str, unknown))!r}: {type(self).__name__} has "
                f"{', '.join(self.defaults)}"
            )
        missing = set(self.defaults) - set(own)
        if missing:
            raise ValueError(f"{label} lacks the option {min(missing)!r}: set it again")
        return checked_options(own, label)

    def _check_combinations(self, checked: Mapping[str, Any], label: str) -> None:
        """Refuse combinations that can't be honoured."""
        rule = self.rule(checked)
        if checked["rows"] == "dense" and rule.trust_ratio is not None:
            raise ValueError(
                f"{label} has rows='dense': expected 'lazy', as the steps of {type(self).__name__} depend on "
                "whole layers"
            )
        if rule.matrix_slots and (checked["step_per_row"] or checked["clip_row_norm"] is not None):
            name = "step_per_row" if checked["step_per_row"] else "clip_row_norm"
            raise ValueError(
                f"{label} has {name} {checked[name]!r}: {type(self).__name__} does not go by rows, leave it "
                "out"
            )
        if checked["rows"] == "dense" and checked["step_per_row"]:
            raise ValueError(
                f"{label} has rows='dense' and step_per_row=True: expected one of them, since dense rows "
                "all have the parameter's step"
            )

    def _parameters(self) -> Iterator[Parameter]:
        for group in self._groups:
            yield from group.parameters

    # Step

    def step(
        self,
        grads: Any,
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        grad_scale: float = 1.0,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> StepInfo:
        """Update all parameters in place.

        Args:
            grads: gradients in the structure of ``params``: one array, a sequence, a dict, or a
                sequence with one of these, or ``{"params": ...}`` of it, for each group. Each is an array
                of its parameter's shape and dtype (or float32 for a parameter of 16 bits),
                :class:`fastopt.IndexedSlices` or :class:`fastopt.BagGradient` for a 2-D parameter, or
                ``None`` to leave the parameter and its step count alone. They are not changed.
            clip_norm: scale all gradients by ``min(1, clip_norm / (norm + 1e-6))``, norm being the
                L2 norm over all of them, as ``torch.nn.utils.clip_grad_norm_``.
            clip_value: clip each element to [-clip_value, clip_value], as
                ``torch.nn.utils.clip_grad_value_``, after ``clip_norm`` and ``clip_row_norm``.
            grad_scale: factor on the gradients, before anything else; more than 0.
            skip_nonfinite: update nothing at all if any gradient holds NaN or infinity, or if
                the norm of all is beyond float64.
            zero_grads: set all gradients to zero once they are used, of sparse ones the values; not if the
                step is skipped.

        Returns:
            What was done: ``norm``, ``clipped``, ``skipped``, ``nonfinite``.

        Raises:
            ValueError, TypeError: an argument or an option does not fit; nothing has changed then.

        All parameters with dense gradients that share a rule and dtypes are updated in one launch, and so are
        all tables with sparse ones, of which each row named gets the sum of its gradients and one update;
        what other rows see is chosen by the option ``rows``.
        """
        plain = clip_norm is clip_value is None and skip_nonfinite is zero_grads is False
        plain = plain and type(grad_scale) is float and grad_scale == 1.0
        if plain and self._may_repeat and self._repeat(grads):
            return _DONE
        self._may_repeat = False
        if clip_norm is not None:
            clip_norm = check_limit(clip_norm, "clip_norm")
        limit = math.inf if clip_value is None else check_limit(clip_value, "clip_value")
        if grad_scale != 1.0 or type(grad_scale) is not float:
            grad_scale = check_limit(grad_scale, "grad_scale")
            if grad_scale == 0 or math.isinf(grad_scale):
                raise ValueError(f"grad_scale is {grad_scale!r}: expected a finite number above 0")
        if skip_nonfinite is not False and skip_nonfinite is not True:
            raise TypeError(f"skip_nonfinite is {skip_nonfinite!r}: expected True or False")
        if zero_grads is not False and zero_grads is not True:
            raise TypeError(f"zero_grads is {zero_grads!r}: expected True or False")
        self._check_groups()
        checked, rates, same = [], [], True
        for group in self._groups:
            own = self._changed_options(group)
            same = same and own is group.checked
            checked.append(own)
            lr = own["lr"]
            rates.append(self._learning_rate(group, own) if callable(lr) or self._dense_rows else lr)
        if not same:
            self._forget()
        batch, rows = self._match(grads, checked, zero_grads)
        if rows:
            find_segments_of([update.gradient.indices for update in rows])
        if not same:
            for group, own in zip(self._groups, checked, strict=True):
                self._adopt(group, own)
        self._take_maxima(rows)

        norm, factor = None, 1.0
        if clip_norm is not None or skip_nonfinite:
            unscaled = norm_of(batch, [update.gradient for update in rows])
            norm = grad_scale * unscaled
            if skip_nonfinite and not math.isfinite(unscaled):
                return StepInfo(norm, skipped=True, nonfinite=self._first_nonfinite(grads, rows))
            if clip_norm is not None:
                factor = clip_factor(norm, clip_norm)

        fold = functools.partial(self._fold, rates, grad_scale * factor, limit)
        if batch.placed and not rows and not self._dense_rows and not self._in_files:
            for bundle in batch.bundles:
                bundle.prepare(fold, zero_grads)
            launches = []
        else:
            launches = self._prepared(batch, rows, rates, fold, zero_grads)
        for bundle in batch.bundles:
            bundle.run()
        for launch in launches:
            launch.run()
        if zero_grads:
            for update in rows:
                update.gradient.clear()
        np.add(self._clock, batch.increments, out=self._clock)
        for update in rows:
            if update.parameter.tracking is not None:
                update.parameter.tracking.history.advance(rates[update.group.number])
        self._steps += 1
        self._may_repeat = plain and batch.may_repeat and all(group.is_steady for group in self._groups)
        return _DONE if norm is None else StepInfo(norm, factor != 1.0)

    def _repeat(self, grads: Any) -> bool:
        """Make a step that differs from the one before in the numbers of the gradients alone; returns
        whether it is one. For small arrays, whose update takes less time than looking at everything anew."""
        self._check_groups()
        for group in self._groups:
            if not (group.as_seen() and group.holds_the_same()):
                return False
        entries, batch = self._entries(grads), self._batch
        assert batch is not None
        self._looked = True
        if self._headers.read(self._values, entries) != _AS_BEFORE:
            return False
        options = [group.checked for group in self._groups]
        for bundle in batch.bundles:
            assert isinstance(bundle, dense.Bundle)
            if not bundle.prepare_again(options):
                return False
        self._looked = False
        for bundle in batch.bundles:
            bundle.run()
        np.add(self._clock, batch.increments, self._clock)
        self._steps += 1
        return True

    def _prepared(
        self, batch: dense.Batch, rows: list[_Update], rates: list[float], fold: Callable, zero_grads: bool
    ) -> list[Launch]:
        """Make ready all launches of a step, the batch's and those returned, compiled, with what they write
        kept where it is in files. Nothing has changed if that fails."""
        before = [
            (p, p.state, p.tracking) for p in (*self._without_state(batch), *(u.parameter for u in rows))
        ]
        try:
            if not batch.complete:
                batch.bundles, batch.complete = self._bundles(batch), True
            if not batch.placed:
                for bundle in batch.bundles:
                    bundle.place(self._parameters_at, batch.where)
                batch.placed = True
            if self._dense_rows:
                for i in batch.dense:
                    self._catch_up(self._all[i])
            for bundle in batch.bundles:
                bundle.prepare(fold, zero_grads)
            launches = (
                row_launches([self._row_update(update, rates, fold) for update in rows]) if rows else []
            )
            # compiling takes seconds, and must not be interrupted after a first write
            if len(launches) + len(batch.bundles) > 1:
                for launch in launches:
                    launch.compile()
            for update in rows if self._in_files else ():
                update.parameter.before_writing(update.gradient.rows_written)
            for i in batch.dense if self._in_files else ():
                self._all[i].before_writing(None)
        except BaseException:
            for parameter, state, tracking in before:
                parameter.state, parameter.tracking = state, tracking
            self._forget()
            raise
        return launches

    def _check_groups(self) -> None:
        """Refuse changes of ``param_groups`` that can't be followed."""
        if not isinstance(self.param_groups, list):
            raise TypeError(f"param_groups is {self.param_groups!r}: expected the list it was at first")
        own = self._own_dicts
        if len(self.param_groups) != len(own) or not all(map(operator.is_, self.param_groups, own)):
            raise ValueError("param_groups holds other dicts than at first: change the options in those")

    def flush(self) -> None:
        """Bring every row up to date, and tables in files to the disk.

        With ``rows="dense"`` all rows take the steps that they have missed: call it before you read a
        table directly, to evaluate or export it. A table of :func:`fastopt.open_table` has from now on
        what a crash goes back to; all tables of the optimizer together.

        Raises:
            OSError: a table's files can't be written; its former flush counts.
        """
        for parameter in self._parameters():
            if parameter.stored is None or not parameter.stored.closed:
                self._catch_up(parameter)
        stored.flush(self)

    def _changed_options(self, group: Group) -> dict[str, Any]:
        """The group's options, checked anew if they were changed since the last step."""
        checked = group.checked
        if group.options.get("params") is not group.params or not group.holds_the_same():
            raise ValueError(
                f"the params of {group.label} were changed: make a new optimizer for other parameters"
            )
        if not group.changed():
            return checked
        checked = self._check(group.options, group.label)
        rule = self.rule(checked)
        if rule != group.rule:
            raise ValueError(
                f"the options of {group.label} now need the state {_names(rule)}, at first "
                f"{_names(group.rule)}: make a new optimizer to change them"
            )
        for name in FIXED:
            if checked[name] != group.checked[name]:
                raise ValueError(
                    f"{name} of {group.label} is now {checked[name]!r}, at first {group.checked[name]!r}: "
                    "make a new optimizer to change it"
                )
        self._check_combinations(checked, group.label)
        return group.checked if checked == group.checked else checked

    def _adopt(self, group: Group, checked: dict[str, Any]) -> None:
        """Go on with changed options; rows first take the steps they have missed under the old ones."""
        if {**checked, "lr": None} != {**group.checked, "lr": None}:
            for parameter in group.parameters:
                self._catch_up(parameter)
        if checked is not group.checked:
            group.take_over(checked)

    def _adopt_options(self) -> None:
        """Where rows are behind, adopt options changed since the last step."""
        for group in self._groups:
            if any(parameter.tracking is not None for parameter in group.parameters):
                checked = self._changed_options(group)
                if checked is not group.checked:
                    self._adopt(group, checked)
                    self._forget()

    def _learning_rate(self, group: Group, checked: Mapping[str, Any]) -> float:
        """The learning rate of this step."""
        lr = checked["lr"]
        if callable(lr):
            lr = checked_options({"lr": lr(self.steps)}, f"{group.label}, at step {self.steps},")["lr"]
        weight_decay = checked["weight_decay"]
        if checked["rows"] == "dense" and lr * weight_decay >= 1:
            raise ValueError(
                f"lr is {lr!r} and weight_decay {weight_decay!r} in {group.label}: rows='dense' needs "
                "lr * weight_decay below 1"
            )
        return lr

    def _match(
        self, grads: Any, checked: list[dict[str, Any]], zero_grads: bool
    ) -> tuple[dense.Batch, list[_Update]]:
        """Pair parameters and gradients, checked: what is dense, and the others."""
        for parameter in self._in_files:
            if parameter.value.owner not in (self, None):
                raise ValueError(
                    f"{parameter.label} now belongs to another optimizer: expected the last one made"
                )
        entries = self._entries(grads)
        if not self._expecting:
            self._headers.expect(self._expected_gradients(checked))
            self._tensors[1] = None
            self._expecting = True
        self._headers.expect_writeable(zero_grads)
        batch, self._batch = (
            self._batch,
            None,
        )  # until all is checked: the headers' next read compares with this
        (changed, odd), (moved, unknown) = self._headers.read(self._values, entries)
        if changed or odd or self._looked:
            changed = self._locate_parameters()
        moved = moved or self._looked
        self._looked = False
        if batch is not None and not (changed or moved or unknown) and (batch.may_clear or not zero_grads):
            self._batch = batch
            return batch, []

        where, kinds = self._headers.addresses[1].copy(), np.zeros(len(entries), np.int8)
        rows: list[_Update] = []
        for i in self._odd(1, entries, where):
            where[i], kinds[i], update = self._look_at(grads, entries[i], i, checked)
            if update is not None:
                rows.append(update)
        if batch is None or batch.kinds.tobytes() != kinds.tobytes():
            batch = dense.Batch(kinds, [p.dtype for p in self._all], self._sizes)
        moved = batch.take_over(where) or changed
        batch.placed = batch.placed and not moved
        if rows or not batch.placed or zero_grads:
            self._check_apart(grads, batch, rows, zero_grads)
            batch.may_clear = zero_grads
        self._batch = batch
        return batch, rows

    def _look_at(
        self, grads: Any, value: Any, i: int, checked: list[dict[str, Any]]
    ) -> tuple[int, int, _Update | None]:
        """Where the gradient of parameter ``i`` is, what it is, and the update if it is by rows."""
        parameter = self._all[i]
        group = self._group_of[i]
        if value is None:
            return 0, dense.NONE, None
        if not isinstance(value, IndexedSlices | BagGradient):
            by_rows = self._takes_rows(parameter, group, checked[group.number])
            label, view = self._label(grads, i), parameter.view()
            if by_rows and group.rule.trust_ratio is not None:
                raise ValueError(
                    f"{label} is dense but is used row by row (clip_row_norm, step_per_row, or 8-bit state "
                    f"made for sparse gradients): {type(self).__name__} needs the whole array, expected "
                    "IndexedSlices"
                )
            array = arrays.gradient_view(value, label, view, parameter.label)
            if not by_rows:
                kind = dense.SAME if array.dtype == parameter.dtype else dense.FLOAT32
                return arrays.address(array), kind, None
            if checked[group.number]["clip_row_norm"] is not None and array.ndim != 2:
                raise ValueError(
                    f"{label} has shape {array.shape} and clip_row_norm is "
                    f"{checked[group.number]['clip_row_norm']!r}: expected a 2-D parameter, put others into "
                    "a group without it"
                )
            values = parameter.rows_of(array)
            gradient = RowGradient(values, parameter.every_row(), dense=True)
            return 0, dense.ROWS, _Update(parameter, group, parameter.rows_of(view), gradient)
        label, view = self._label(grads, i), parameter.view()
        if group.rule.matrix_slots:
            raise TypeError(
                f"{label} is {type(value).__name__}: {type(self).__name__} has means over columns, expected "
                "a dense gradient"
            )
        gradient = row_gradient(value, label, view, parameter.label)
        return 0, dense.ROWS, _Update(parameter, group, view, gradient)

    def _takes_rows(self, parameter: Parameter, group: Group, checked: Mapping[str, Any]) -> bool:
        """Whether a dense gradient is used row by row."""
        if group.rule.row_slots or checked["clip_row_norm"] is not None:
            return True
        if parameter.stored is not None and checked["state_dtype"] == "8bit":
            return True
        return len(parameter.shape) == 2 and (checked["step_per_row"] or parameter.by_row)

    def _expected_gradients(self, checked: list[dict[str, Any]]) -> list[np.dtype | None]:
        """The dtypes of the dense gradients that need no closer look."""
        dtypes: list[np.dtype | None] = [p.dtype for p in self._all]
        for i, (parameter, group) in enumerate(zip(self._all, self._group_of, strict=True)):
            if self._takes_rows(parameter, group, checked[group.number]):
                dtypes[i] = None
        return dtypes

    def _odd(self, which: int, values: Any, where: np.ndarray) -> list[int]:
        """The UNKNOWN ones among parameters (0) or gradients (1) that are no tensors as expected either."""
        numbers = np.flatnonzero(where == UNKNOWN).tolist()
        if not numbers or "torch" not in sys.modules:
            return numbers
        tensors = self._tensors[which]
        if tensors is None:
            dtypes = self._headers.dtypes[which]
            tensors = self._tensors[which] = arrays.Tensors(dtypes, [p.shape for p in self._all])
        return tensors.find(values, numbers, where)

    def _locate_parameters(self) -> bool:
        """Set where parameters are; returns whether one has moved."""
        where = self._headers.addresses[0].copy()
        for i in self._odd(0, self._values, where):
            where[i] = arrays.address(self._all[i].view())
        moved = not np.array_equal(where, self._parameters_at)
        self._parameters_at = where
        return moved

    def _check_apart(self, grads: Any, batch: dense.Batch, rows: list[_Update], zero_grads: bool) -> None:
        """Refuse parameters, and gradients that are to become zero, that share memory with others."""
        values = [update.gradient.values for update in rows]
        addresses = [array.__array_interface__["data"][0] for array in values]
        starts = np.concatenate(
            [self._parameters_at, batch.where[batch.dense], np.array(addresses, np.int64)]
        )
        sizes = np.concatenate([self._bytes, batch.bytes, np.array([a.nbytes for a in values], np.int64)])
        written = np.full(len(starts), zero_grads)
        written[: len(self._all)] = True
        found = arrays.overlapping(starts, starts + sizes, written)
        if found is not None:
            indices = [*range(len(self._all)), *batch.dense.tolist(), *(u.parameter.index for u in rows)]
            labels = [p.label for p in self._all]
            labels += [self._label(grads, i) for i in indices[len(self._all) :]]
            for k, update in enumerate(rows, len(indices) - len(rows)):
                value = self._entries(grads)[update.parameter.index]
                if isinstance(value, IndexedSlices | BagGradient):
                    labels[k] = values_of(value, labels[k])[1]
            arrays.refuse_overlap(labels[found[0]], labels[found[1]])
        if zero_grads:
            self._check_writable(grads, batch, rows)

    def _check_writable(self, grads: Any, batch: dense.Batch, rows: list[_Update]) -> None:
        """Refuse gradients that can't be set to zero."""
        entries = self._entries(grads)
        for i in [*batch.dense.tolist(), *(update.parameter.index for update in rows)]:
            value, label = entries[i], self._label(grads, i)
            if isinstance(value, IndexedSlices | BagGradient):
                value, label = values_of(value, label)
            if not arrays.host_array(value, label).flags.writeable:
                raise ValueError(
                    f"{label} is read-only: expected a gradient that can be set to zero, pass a copy of it "
                    "or zero_grads=False"
                )

    def _first_nonfinite(self, grads: Any, rows: list[_Update]) -> str | int | None:
        """The key of the first parameter whose gradient holds NaN or infinity."""
        by_row = {update.parameter.index: update.gradient for update in rows}
        for parameter, value in zip(self._all, self._entries(grads), strict=True):
            if value is None:
                continue
            gradient = by_row.get(parameter.index)
            flat = (gradient.values_used if gradient else arrays.host_array(value, "")).reshape(-1)
            slices = (flat[k : k + _SLICE] for k in range(0, flat.size, _SLICE))
            if not all(np.isfinite(part).all() for part in slices):
                return parameter.key
        return None

    def _without_state(self, batch: dense.Batch) -> list[Parameter]:
        """Parameters of the batch that are to get a state."""
        return [] if batch.complete else [self._all[i] for i in batch.dense.tolist()]

    def _bundles(self, batch: dense.Batch) -> list[dense.Bundle | dense.Matrix]:
        """The launches for the dense gradients."""
        found: dict[tuple, dict[type, list[dense.Member]]] = {}
        matrices: list[dense.Matrix] = []
        for i in batch.dense.tolist():
            parameter, group = self._all[i], self._group_of[i]
            rule, options, state = group.rule, group.checked, self._ready_state(parameter, group, False)
            kinds = (
                precision.parameter_format(parameter.dtype, options),
                batch.formats[i],
                *precision.state_formats(rule, parameter.dtype, options),
            )
            places = []
            for slot in rule.state_slots if not precision.is_factored(rule, parameter.shape) else ():
                state[slot] = np.asarray(state[slot], order="C")  # rows of several arrays may lie together
                scales = state.get(slot + precision.SCALES)
                places += [arrays.address(state[slot]), 0 if scales is None else arrays.address(scales)]
            master = state.get(precision.MASTER)
            member = dense.Member(
                i,
                group.number,
                parameter.step,
                parameter.size,
                parameter.position,
                options["seed"],
                0 if master is None else arrays.address(master),
                places,
            )
            if precision.is_factored(rule, parameter.shape):
                kind = dense.Kind(
                    rule, self._decay(options), precision.computed_with(parameter.dtype), kinds[:2]
                )
                means = [state[slot] for slot in rule.matrix_slots]
                matrices.append(dense.Matrix(kind, member, parameter.shape, means))
                continue
            by_decay = found.setdefault((rule, precision.computed_with(parameter.dtype), kinds), {})
            by_decay.setdefault(self._decay(options), []).append(member)
        bundles: list[dense.Bundle | dense.Matrix] = [*matrices]
        for (rule, like, kinds), by_decay in found.items():
            if len(by_decay) > 1 and Scaled in by_decay:  # none is a decay by 0
                other = next(decay for decay in by_decay if decay is not Scaled)
                by_decay[other] = sorted(by_decay[other] + by_decay.pop(Scaled))
            for decay, members in by_decay.items():
                bundles.append(dense.Bundle(dense.Kind(rule, decay, like, kinds), members))
        return bundles

    def _forget(self) -> None:
        """Have all that is kept from step to step found anew."""
        self._batch, self._expecting, self._may_repeat = None, False, False

    def _entries(self, grads: Any) -> list | tuple:
        """The gradient of each parameter."""
        if not self._grouped:
            params = self._groups[0].params
            if isinstance(params, list) and isinstance(grads, list | tuple) and len(grads) == len(params):
                return grads
            if type(grads) is np.ndarray and not isinstance(params, list | dict):
                return [grads]
        entries: list[Any] = []
        for group, group_grads, label in self._group_grads(grads):
            entries += paired(group, group_grads, label)
        return entries

    def _label(self, grads: Any, i: int) -> str:
        """What the gradient of parameter ``i`` is called in messages."""
        group = self._group_of[i]
        for own, _, label in self._group_grads(grads):
            if own is group:
                return label + group.parameters[i - group.parameters[0].index].suffix
        raise AssertionError(i)

    def _group_grads(self, grads: Any) -> Iterator[tuple[Group, Any, str]]:
        if not self._grouped:
            yield self._groups[0], grads, "grads"
            return
        if not isinstance(grads, list | tuple) or len(grads) != len(self._groups):
            raise ValueError(
                f"grads is {describe(grads)}: expected a list of {len(self._groups)}, one entry a group"
            )
        for number, (group, entry) in enumerate(zip(self._groups, grads, strict=True)):
            label = f"grads[{number}]"
            if isinstance(entry, dict) and "params" in entry and not isinstance(group.params, dict):
                entry, label = entry["params"], f"{label}['params']"
            yield group, entry, label

    def _take_maxima(self, updates: list[_Update]) -> None:
        """Find where the maxima of bags come from, in rows that are up to date."""
        for update in updates:
            gradient = update.gradient
            if gradient.bags is not None and gradient.bags.mode == "max":
                self._catch_up(update.parameter, gradient.indices)
                gradient.find_winners(update.view)

    def _slots(self, group: Group, parameter: Parameter, by_row: bool = False) -> dict[str, Slot]:
        """The state arrays that a parameter has; ``by_row``: blocks of 8-bit codes end with its rows, as they
        do with those of a table in files."""
        first = self.initial_state(group.checked)
        by_row = by_row or parameter.stored is not None
        slots = precision.state_slots(
            group.rule, parameter.shape, parameter.dtype, group.checked, first, by_row
        )
        if group.checked["step_per_row"] and len(parameter.shape) == 2:
            slots[ROW_STEPS] = Slot((parameter.rows,), np.dtype(np.int64))
        return slots

    def _ready_state(self, parameter: Parameter, group: Group, by_row: bool) -> dict[str, np.ndarray]:
        """The parameter's state, made at its first gradient."""
        slots = {} if parameter.state else self._slots(group, parameter, by_row)
        if slots:
            if parameter.stored is not None:
                parameter.state = parameter.stored.state(slots)
            else:
                together = group.rule.state_slots if by_row and len(parameter.shape) == 2 else ()
                parameter.state = _new_state(slots, together)
                if precision.MASTER in slots:
                    parameter.state[precision.MASTER][...] = parameter.view()
        elif by_row and not parameter.by_row:
            kinds = precision.state_formats(group.rule, parameter.dtype, group.checked)
            state = dict(parameter.state)
            for slot, kind in zip(group.rule.state_slots, kinds, strict=True):
                if kind.coded:
                    scales = slot + precision.SCALES
                    state[slot], state[scales] = precision.by_rows(kind, state[slot], state[scales])
            parameter.state = state
        self._expecting = self._expecting and not parameter.by_row
        return parameter.state

    def _row_update(self, update: _Update, rates: list[float], fold: Callable) -> RowUpdate:
        parameter, group = update.parameter, update.group
        checked, rule = group.checked, group.rule
        self._ready_state(parameter, group, True)
        if checked["rows"] == "dense":
            self._track(parameter, group, update.gradient)
        dtype = precision.computed_with(parameter.dtype)
        h, c = fold(group.number, self._decay(checked), dtype, parameter.step + 1)
        h, c = _cast(h, dtype.type), _cast(c, dtype.type)
        mode: Any = Lazy()
        row_steps = numbers = None
        if ROW_STEPS in parameter.state:
            mode, row_steps = PerRow(), parameter.state[ROW_STEPS]
            numbers = parameter.counts.up_to(parameter.step + 1, rule, checked)
            h = h._replace(**{h._fields[0]: dtype.type(rates[group.number])})
        elif parameter.tracking is not None:
            mode = parameter.tracking.history.kind()
        limit = checked["clip_row_norm"]
        return RowUpdate(
            mode,
            h,
            c,
            update.view,
            update.gradient,
            math.inf if limit is None else limit,
            parameter.step + 1,
            row_steps,
            numbers,
            parameter.tracking,
            self._stored(parameter, group, parameter.step + 1),
        )

    def _stored(self, parameter: Parameter, group: Group, step: int) -> Stored:
        """How a table and its state are stored; step: of the random numbers."""
        rule, options, state = group.rule, group.checked, parameter.state
        members = (
            precision.parameter_format(parameter.dtype, options),
            formats.PLAIN,
            *precision.state_formats(rule, parameter.dtype, options),
        )
        slots: list[tuple[np.ndarray, np.ndarray | None]] = [
            (parameter.rows_of(state[slot]), state.get(slot + precision.SCALES)) for slot in rule.state_slots
        ]
        slots += [(state[slot], None) for slot in rule.row_slots]
        return Stored(
            precision.computed_with(parameter.dtype),
            members,
            tuple(slots),
            state.get(precision.MASTER),
            parameter.position,
            precision.random_key(options["seed"], step),
        )

    def _track(self, parameter: Parameter, group: Group, gradient: RowGradient) -> None:
        """For ``rows="dense"``, have it known which rows are behind."""
        if parameter.tracking is not None and parameter.tracking.full:
            self._catch_up(parameter)
        if gradient.dense:
            self._catch_up(parameter)
        elif parameter.tracking is None:
            last_step = np.full(parameter.rows, parameter.step, np.int64)
            decay = self._decay(group.checked)
            parameter.tracking = Tracking(group.rule, decay, group.checked, parameter.step, last_step)

    def _catch_up(self, parameter: Parameter, indices: Indices | None = None) -> None:
        """Let rows, those that ``indices`` name or all, take the steps that they have missed."""
        tracking = parameter.tracking
        if tracking is None:
            return
        if tracking.history.now > tracking.history.base:
            group = next(group for group in self._groups if parameter in group.parameters)
            dtype = precision.computed_with(parameter.dtype)
            folded = self._folded(
                group,
                tracking.options,
                self._decay(tracking.options),
                dtype,
                0.0,
                1.0,
                math.inf,
                parameter.step,
            )
            h, c = (_cast(numbers, dtype.type) for numbers in folded)
            rows = None if indices is None else indices.segments.own_rows()
            # other random numbers than those of the update of that step
            stored = self._stored(parameter, group, -parameter.step - 1)
            launch = catch_up_launch(tracking, parameter.view(), stored, h, c, parameter.step, rows)
            parameter.before_writing(rows)
            launch.run()
        if indices is None:
            parameter.tracking = None

    def _bring_up_to_date(self, table: Any, indices: Indices) -> None:
        """Before rows of ``table`` are read."""
        found = next((p for p in self._parameters() if p.value is table), None)
        if found is None:
            view = arrays.host_array(table, "table")
            here = arrays.address(view), view.shape, view.dtype
            same = (p for p in self._parameters() if (arrays.address(p.view()), p.shape, p.dtype) == here)
            found = next(same, None)
        if found is None:
            raise ValueError(
                "table is not a parameter of optimizer: expected the whole of one that it updates"
            )
        self._catch_up(found, indices)

    def _decay(self, options: Mapping[str, Any]) -> type:
        """The type of weight decay."""
        if self.rule(options).own_decay or not options["weight_decay"]:
            return Scaled
        return Decoupled if self.decoupled(options) else L2

    def _fold(
        self,
        rates: list[float],
        scale: float,
        limit: float,
        number: int,
        decay: type,
        dtype: np.dtype,
        step: int,
    ) -> tuple[Any, Any]:
        """The hyperparameters of a launch for parameters of a group, computed with ``dtype``."""
        group = self._groups[number]
        return self._folded(group, group.checked, decay, dtype, rates[number], scale, limit, step)

    def _folded(
        self,
        group: Group,
        options: Mapping[str, Any],
        decay: type,
        dtype: np.dtype,
        lr: float,
        scale: float,
        limit: float,
        step: int,
    ) -> tuple[Any, Any]:
        h = group.rule.fold(step, options if options["lr"] is lr else {**options, "lr": lr}, dtype)
        if options["maximize"]:
            scale = -scale
        c: Any
        if decay is Scaled:
            c = Scaled(scale, limit)
        elif decay is Decoupled:
            c = Decoupled(scale, limit, 1.0 - lr * options["weight_decay"])
        else:
            c = L2(scale, limit, options["weight_decay"])
        if (
            max(map(abs, h)) > _MOST[dtype]
            or not _LEAST[dtype] <= abs(scale) <= _MOST[dtype]
            or (decay is not Scaled and abs(c[-1]) > _MOST[dtype])
        ):
            _check_range(h, dtype, group.label)
            _check_range(c, dtype, group.label)
            if 0 < abs(scale) < _LEAST[dtype]:
                raise ValueError(
                    f"grad_scale, with clipping, makes {scale!r} for {group.label}: expected a factor that "
                    f"is not 0 in {dtype}"
                )
        return h, c

    # State

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything but the parameters.

        With ``rows="dense"`` rows may be behind: their last steps and the learning rates since then
        are part of the state, so that a resumed run has the same bits. (Options changed since the
        last step are adopted first, see :meth:`step`.)

        Returns:
            ``optimizer``: the class name. ``steps``. ``state``: for each parameter's name, or
            position, a dict with its ``step`` and state arrays. ``param_groups``: each group's
            options, with ``params`` the names.
        """
        self._adopt_options()
        return {
            "optimizer": type(self).__name__,
            "steps": self.steps,
            "state": {
                p.key: {"step": p.step, **{slot: a.copy() for slot, a in state_arrays(p).items()}}
                for p in self._parameters()
            },
            "param_groups": [
                {**{k: v for k, v in group.options.items() if k != "params"},
                 "params": [p.key for p in group.parameters]}
                for group in self._groups
            ],
        }  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; arrays are copied.

        Raises:
            ValueError, TypeError: the state is of another optimizer, of other parameters, shapes or
                dtypes, or has options out of range. Nothing has changed then.
        """
        from fastopt.state import restore

        restore(self, state_dict)

    def save(self, path: Any, *, params: bool = False, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the state to a safetensors file, atomically: a crash leaves the old file whole.

        Args:
            path: the file.
            params: write the parameters too, so that the file is a whole checkpoint.
            metadata: a dict of anything that JSON holds; :meth:`load` returns it, keys as strings.

        Raises:
            OSError: the file can't be written.
            TypeError: JSON can't hold ``metadata``.
        """
        from fastopt.checkpoint import save

        save(self, path, params=params, metadata=metadata)

    def load(self, path: Any, *, params: bool = False) -> dict[str, Any]:
        """Restore what :meth:`save` wrote, into an optimizer built in the same way.

        Args:
            path: the file.
            params: read the parameters too, in place.

        Returns:
            The ``metadata`` given to :meth:`save`.

        Raises:
            OSError: the file can't be read.
            ValueError, TypeError: it is damaged, or of another optimizer or other parameters. Nothing has
                changed then.
        """
        from fastopt.checkpoint import load

        return load(self, path, params=params)

    def __repr__(self) -> str:
        lines = []
        for group in self._groups:
            size = sum(math.prod(p.shape) for p in group.parameters)
            noun = "array" if len(group.parameters) == 1 else "arrays"
            options = ", ".join(
                f"{name}={group.options.get(name)!r}"
                for name in self.defaults
                if group.options.get(name) != SHARED.get(name, ())
            )
            lines.append(f"{len(group.parameters)} {noun}, {size:,} parameters: {options}")
        body = lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines) + "\n"
        return f"{type(self).__name__}({body})"


_SLICE = 1 << 20  # elements that are looked at at a time
_COMPUTED = precision.SINGLE, precision.DOUBLE
_LEAST = {dtype: float(np.finfo(dtype).smallest_subnormal) for dtype in _COMPUTED}
_MOST = {dtype: float(np.finfo(dtype).max) for dtype in _COMPUTED}


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that begin with a cache line. They come from the system unread: a huge table costs
    nothing until rows are touched."""
    size = math.prod(shape) * dtype.itemsize
    return aligned(np.zeros(size + ALIGNMENT, np.uint8), size).view(dtype).reshape(shape)


def _new_state(slots: Mapping[str, Slot], together: tuple[str, ...]) -> dict[str, np.ndarray]:
    """State arrays; those of ``together`` lie row by row side by side, which memory answers faster."""
    state = {}
    if len(together) > 1:
        (rows, dim), dtype, _ = slots[together[0]]
        both = _zeros((rows, len(together), dim), dtype)
        state = {slot: both[:, k] for k, slot in enumerate(together)}
    for name, (shape, dtype, value) in slots.items():
        if name not in state:
            state[name] = _zeros(shape, dtype)
        if value:
            state[name][...] = value
    return {name: state[name] for name in slots}


def _check_range(values: Any, dtype: np.dtype, label: str) -> None:
    for name, value in zip(values._fields, values, strict=True):
        if _MOST[dtype] < abs(value) < math.inf:
            raise ValueError(
                f"the options of {label} make {name} {value!r}: expected a number that fits {dtype}"
            )


def _cast(values: Any, dtype: type[np.floating]) -> Any:
    """A tuple of hyperparameters in the type that is computed with; flags stay flags."""
    return type(values)(*(value if isinstance(value, bool) else dtype(value) for value in values))


def _names(rule: Rule) -> str:
    return ", ".join((*rule.state_slots, *rule.row_slots)) or "none"
