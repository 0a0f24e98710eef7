"""The optimizer that all others derive from: parameters, state, and the step."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, TypedDict

import numpy as np

from fastopt import arrays, stored
from fastopt.clipping import check_limit, clip_factor, total_norm
from fastopt.gradients import (
    BagGradient,
    DenseGradient,
    IndexedSlices,
    RowGradient,
    row_gradient,
    values_of,
)
from fastopt.hyperparameters import checked_options
from fastopt.kernels import rules
from fastopt.kernels.cpu.flat import flat, flat_rows
from fastopt.kernels.cpu.rows import Lazy, PerRow
from fastopt.kernels.scratch import ALIGNMENT, aligned
from fastopt.launch import Launch, RowUpdate, catch_up_launch, row_launches
from fastopt.plan import Indices, group_all
from fastopt.state import state_arrays
from fastopt.storage import Table
from fastopt.tables import ROW_STEPS, Counts, Tracking


class StepInfo(NamedTuple):
    """What a step did.

    norm: L2 norm of the gradients times ``grad_scale``, before clipping; None if it was not needed.
    clipped: whether the gradients were scaled down to ``clip_norm``.
    skipped: whether nothing was updated, because a gradient was not finite.
    """

    norm: float | None = None
    clipped: bool = False
    skipped: bool = False


class TableOptions(TypedDict, total=False):
    """Options that all optimizers have, for parameters with sparse gradients (see :class:`Optimizer`)."""

    rows: str
    step_per_row: bool
    clip_row_norm: float | None


TABLE_DEFAULTS: dict[str, Any] = {"rows": "lazy", "step_per_row": False, "clip_row_norm": None}


Slot = tuple[tuple[int, ...], np.dtype, float]  # shape, dtype and first value of a state array


@dataclass(eq=False)
class _Parameter:
    """One of the caller's arrays, and what the optimizer keeps for it."""

    value: Any
    key: str | int
    label: str
    shape: tuple[int, ...]
    dtype: np.dtype
    step: int = 0
    state: dict[str, np.ndarray] = field(default_factory=dict)
    tracking: Tracking | None = None
    counts: Counts = field(default_factory=Counts)

    @property
    def stored(self) -> Table | None:
        """The table in files that the parameter is, if it is one."""
        return self.value if isinstance(self.value, Table) else None

    def before_writing(self, rows: np.ndarray | None) -> None:
        """Have a table in files keep what is about to change: rows, or all."""
        if self.stored is not None:
            self.stored.keep(rows)

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def view(self) -> np.ndarray:
        """The array as it is now; a torch parameter may have moved."""
        array = arrays.parameter_view(self.value, self.label)
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(
                f"{self.label} now has shape {array.shape} and dtype {array.dtype}, at first "
                f"{self.shape} and {self.dtype}: make a new optimizer for changed parameters"
            )
        return array

    def by_row(self, array: np.ndarray) -> np.ndarray:
        """``array``, of the parameter's shape, with one row for each index of its first axis."""
        return array.reshape(self.rows, array.size // max(self.rows, 1))

    def every_row(self) -> Indices:
        """Each row once, which needs no sorting."""
        return Indices.of_all(self.rows)


class _Update(NamedTuple):
    """A parameter and its gradient in one step, checked."""

    parameter: _Parameter
    group: "_Group"
    view: np.ndarray
    gradient: DenseGradient | RowGradient


@dataclass(eq=False)
class _Group:
    """Parameters that share options; ``options`` is the dict the caller sees."""

    options: dict[str, Any]
    params: Any
    parameters: list[_Parameter]
    label: str
    rule: rules.Rule
    checked: dict[str, Any]


class Optimizer:
    """Updates parameters in place, in one pass over each.

    Every optimizer shares what is said here; its own class says what it computes.

    Args:
        params: the arrays to update: one array, a sequence of arrays, a dict name -> array, or a
            sequence of groups, dicts with the key ``params`` (any of the former) and options of
            their own. Arrays are NumPy or torch CPU (same memory, no copy), float32 or float64,
            C-contiguous, writable, and none shares memory with another; or a table in files, of
            :func:`fastopt.open_table`, which has the state in files too.
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
            more the nearer 1 - beta2 comes to (1 - beta1) / 2, see ``fastopt.kernels.rest``. It costs
            no more for the steps missed than for one, but for an L2 ``weight_decay`` with a rule that
            divides by a root (AdaGrad, RMSProp, Adam, RAdam, NAdam) and for Lion, where steps are gone
            through one by one. Needs lr * weight_decay below 1.
        step_per_row: count the steps of each row, from its first gradient on, for what depends on
            the step (Adam's bias corrections, AdaGrad's ``lr_decay``), instead of the parameter's.
            Not with rows="dense".
        clip_row_norm: scale the gradient of each row of a 2-D parameter, after ``grad_scale`` and
            ``clip_norm``, by ``min(1, clip_row_norm / (norm + 1e-6))``; None, the default, does not.

    Attributes:
        param_groups: list of dicts with each group's ``params`` and options; options may be
            changed between steps, also ``lr``.
        steps: number of finished steps.

    Raises:
        ValueError, TypeError: from the constructor and from ``step``, before any array is touched,
            naming the argument, what was got and what was expected.
    """

    def __init__(
        self, params: Any, table_options: Mapping[str, Any] = MappingProxyType({}), /, **defaults: Any
    ) -> None:
        for name in table_options:
            if name not in TABLE_DEFAULTS:
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
        self.defaults = {**defaults, **TABLE_DEFAULTS, **table_options}
        self._steps = 0
        self.param_groups: list[dict[str, Any]] = []
        self._groups: list[_Group] = []
        params = _as_container(params, "params")
        self._grouped = _is_groups(params)
        if not self._grouped:
            self._add_group({"params": params}, "params", "params")
        else:
            for number, group in enumerate(params):
                self._add_group(group, f"params[{number}]", f"params[{number}]['params']")
        if not any(group.parameters for group in self._groups):
            raise ValueError("params holds no arrays: expected at least one to update")
        arrays.check_apart([(p.view(), p.label) for p in self._parameters()], [])
        stored.resume(self)

    @property
    def steps(self) -> int:
        """How many steps are finished, those that were skipped not counted."""
        return self._steps

    # What an optimizer defines

    def rule(self, options: Mapping[str, Any]) -> rules.Rule:
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
        params = options["params"] = _as_container(group["params"], params_label)
        taken = {parameter.key for parameter in self._parameters()}
        parameters = []
        for key, value, one_label in _entries(params, params_label):
            view = arrays.parameter_view(value, one_label)
            if not isinstance(key, str):
                key += len(taken)
            elif key in taken:
                raise ValueError(
                    f"{params_label} has the name {key!r} of an earlier group: expected each name once"
                )
            parameters.append(_Parameter(value, key, one_label, view.shape, view.dtype))
        checked = self._check(options, label)
        self._check_table_options(checked, label)
        self.param_groups.append(options)
        self._groups.append(_Group(options, params, parameters, label, self.rule(checked), checked))

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

    def _check_table_options(self, checked: Mapping[str, Any], label: str) -> None:
        """Refuse combinations that can't be honoured."""
        if checked["rows"] == "dense" and checked["step_per_row"]:
            raise ValueError(
                f"{label} has rows='dense' and step_per_row=True: expected one of them, since dense rows "
                "all have the parameter's step"
            )

    def _parameters(self) -> Iterator[_Parameter]:
        for group in self._groups:
            yield from group.parameters

    # Step

    def step(
        self,
        grads: Any,
        *,
        clip_norm: float | None = None,
        grad_scale: float = 1.0,
        skip_nonfinite: bool = False,
    ) -> StepInfo:
        """Update all parameters in place.

        Args:
            grads: gradients in the structure of ``params``: one array, a sequence, a dict, or a
                sequence with one of these, or ``{"params": ...}`` of it, for each group. Each is an array
                of its parameter's shape and dtype, :class:`fastopt.IndexedSlices` or
                :class:`fastopt.BagGradient` for a 2-D parameter, or ``None`` to leave the parameter and
                its step count alone. They are not changed.
            clip_norm: scale all gradients by ``min(1, clip_norm / (norm + 1e-6))``, norm being the
                L2 norm over all of them, as ``torch.nn.utils.clip_grad_norm_``.
            grad_scale: factor on the gradients, before anything else; more than 0.
            skip_nonfinite: update nothing at all if any gradient holds NaN or infinity, or if
                the norm of all is beyond float64.

        Returns:
            What was done: ``norm``, ``clipped``, ``skipped``.

        Raises:
            ValueError, TypeError: an argument or an option does not fit; nothing has changed then.

        With sparse gradients each row named gets the sum of its gradients and one update; what other
        rows see is chosen by the option ``rows``. All tables are sorted and updated in one launch.
        """
        if clip_norm is not None:
            clip_norm = check_limit(clip_norm, "clip_norm")
        grad_scale = check_limit(grad_scale, "grad_scale")
        if grad_scale == 0 or math.isinf(grad_scale):
            raise ValueError(f"grad_scale is {grad_scale!r}: expected a finite number above 0")
        if not isinstance(skip_nonfinite, bool):
            raise TypeError(f"skip_nonfinite is {skip_nonfinite!r}: expected True or False")
        if not isinstance(self.param_groups, list):
            raise TypeError(f"param_groups is {self.param_groups!r}: expected the list it was at first")
        if [id(options) for options in self.param_groups] != [id(group.options) for group in self._groups]:
            raise ValueError("param_groups holds other dicts than at first: change the options in those")
        checked = {id(group): self._changed_options(group) for group in self._groups}
        learning_rates = {id(group): self._learning_rate(group, checked[id(group)]) for group in self._groups}
        updates = self._match(grads, checked)
        sparse = [update.gradient for update in updates if isinstance(update.gradient, RowGradient)]
        group_all([gradient.indices for gradient in sparse])
        for group in self._groups:
            self._adopt(group, checked[id(group)])
        self._take_maxima(updates)

        norm, factor = None, 1.0
        if clip_norm is not None or skip_nonfinite:
            unscaled = total_norm(update.gradient for update in updates)
            norm = grad_scale * unscaled
            if skip_nonfinite and not math.isfinite(unscaled):
                return StepInfo(norm, skipped=True)
            if clip_norm is not None:
                factor = clip_factor(norm, clip_norm)

        folded: dict[tuple[int, int, np.dtype], tuple[Any, Any]] = {}
        for update in updates:
            key = id(update.group), update.parameter.step, update.parameter.dtype
            if key not in folded:
                folded[key] = self._fold(update, learning_rates[key[0]], grad_scale * factor)
        before = [(update.parameter, update.parameter.state, update.parameter.tracking) for update in updates]
        try:
            launches = self._launches(updates, folded, learning_rates)
        except BaseException:
            for parameter, state, tracking in before:
                parameter.state, parameter.tracking = state, tracking
            raise
        for launch in launches:
            launch.run()
        for update in updates:
            parameter = update.parameter
            parameter.step += 1
            if parameter.tracking is not None:
                parameter.tracking.history.advance(learning_rates[id(update.group)])
        self._steps += 1
        return StepInfo(norm, clipped=factor != 1.0)

    def _launches(
        self,
        updates: list[_Update],
        folded: Mapping[Any, tuple[Any, Any]],
        learning_rates: Mapping[int, float],
    ) -> list[Launch]:
        """All launches of a step, compiled, and what they write kept where it is in files."""
        launches, rows = [], []
        for update in updates:
            self._prepare_rows(update)
            h, c = folded[id(update.group), update.parameter.step, update.parameter.dtype]
            if isinstance(update.gradient, RowGradient):
                rows.append(self._row_update(update, h, c, learning_rates[id(update.group)]))
            else:
                launches.append(_dense_launch(update, h, c))
        launches += row_launches(rows)
        if len(launches) > 1:  # compiling takes seconds, and must not be interrupted after a first write
            for launch in launches:
                launch.compile()
        for update in updates:
            if update.parameter.stored is not None:
                update.parameter.stored.keep(_rows_written(update.gradient))
        return launches

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

    def _changed_options(self, group: _Group) -> dict[str, Any]:
        """The group's options, checked anew if they were changed since the last step."""
        checked = group.checked
        if group.options.get("params") is not group.params or not _same(group):
            raise ValueError(
                f"the params of {group.label} were changed: make a new optimizer for other parameters"
            )
        if not _changed(group.options, checked):
            return checked
        checked = self._check(group.options, group.label)
        rule = self.rule(checked)
        if rule != group.rule:
            raise ValueError(
                f"the options of {group.label} now need the state {_names(rule)}, at first "
                f"{_names(group.rule)}: make a new optimizer to change them"
            )
        for name in ("rows", "step_per_row"):
            if checked[name] != group.checked[name]:
                raise ValueError(
                    f"{name} of {group.label} is now {checked[name]!r}, at first {group.checked[name]!r}: "
                    "make a new optimizer to change it"
                )
        return checked

    def _adopt(self, group: _Group, checked: dict[str, Any]) -> None:
        """Go on with changed options; rows first take the steps they have missed under the old ones."""
        if {**checked, "lr": None} != {**group.checked, "lr": None}:
            for parameter in group.parameters:
                self._catch_up(parameter)
        group.checked = checked

    def _adopt_options(self) -> None:
        """Where rows are behind, adopt options changed since the last step."""
        for group in self._groups:
            if any(parameter.tracking is not None for parameter in group.parameters):
                self._adopt(group, self._changed_options(group))

    def _learning_rate(self, group: _Group, checked: Mapping[str, Any]) -> float:
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

    def _match(self, grads: Any, checked: Mapping[int, Mapping[str, Any]]) -> list[_Update]:
        """Pair parameters and gradients, checked."""
        for parameter in self._parameters():
            if parameter.stored is not None and parameter.stored.owner not in (self, None):
                raise ValueError(
                    f"{parameter.label} now belongs to another optimizer: expected the last one made"
                )
        views = {id(p): p.view() for p in self._parameters()}
        written = [(views[id(p)], p.label) for p in self._parameters()]
        updates, read = [], []
        for group, group_grads, label in self._group_grads(grads):
            for parameter, value, one_label in _paired(group, group_grads, label):
                if value is None:
                    continue
                view = views[id(parameter)]
                gradient: DenseGradient | RowGradient
                if isinstance(value, IndexedSlices | BagGradient):
                    gradient = row_gradient(value, one_label, view, parameter.label)
                    read.append((gradient.values, values_of(value, one_label)[1]))
                else:
                    array = arrays.gradient_view(value, one_label, view, parameter.label)
                    gradient = _as_rows(array, parameter, checked[id(group)], one_label)
                    read.append((array, one_label))
                updates.append(_Update(parameter, group, view, gradient))
        arrays.check_apart(written, read)
        return updates

    def _group_grads(self, grads: Any) -> Iterator[tuple[_Group, Any, str]]:
        if not self._grouped:
            yield self._groups[0], grads, "grads"
            return
        if not isinstance(grads, list | tuple) or len(grads) != len(self._groups):
            raise ValueError(
                f"grads is {_describe(grads)}: expected a list of {len(self._groups)}, one entry a group"
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
            if (
                isinstance(gradient, RowGradient)
                and gradient.bags is not None
                and gradient.bags.mode == "max"
            ):
                self._catch_up(update.parameter, gradient.indices)
                gradient.find_winners(update.view)

    def _slots(self, group: _Group, parameter: _Parameter) -> dict[str, Slot]:
        """Shape, dtype and first value of each state array."""
        first = self.initial_state(group.checked)
        rule = group.rule
        shapes = dict.fromkeys(rule.state_slots, parameter.shape)
        shapes |= dict.fromkeys(rule.row_slots, (parameter.rows,))
        slots = {name: (shape, parameter.dtype, first.get(name, 0.0)) for name, shape in shapes.items()}
        if group.checked["step_per_row"] and len(parameter.shape) == 2:
            slots[ROW_STEPS] = (parameter.rows,), np.dtype(np.int64), 0.0
        return slots

    def _prepare_rows(self, update: _Update) -> None:
        """Have the state, made at the parameter's first gradient, as this gradient needs it."""
        parameter, group = update.parameter, update.group
        slots = {} if parameter.state else self._slots(group, parameter)
        if slots:
            if parameter.stored is not None:
                parameter.state = parameter.stored.state(slots)
            else:
                together = group.rule.state_slots if isinstance(update.gradient, RowGradient) else ()
                parameter.state = _new_state(slots, together)
        if group.checked["rows"] != "dense":
            return
        full = parameter.tracking is not None and parameter.tracking.full
        if full or isinstance(update.gradient, DenseGradient):
            self._catch_up(parameter)
        if isinstance(update.gradient, RowGradient) and parameter.tracking is None:
            last_step = np.full(parameter.rows, parameter.step, np.int64)
            decay = self._decay(group.checked)
            parameter.tracking = Tracking(group.rule, decay, group.checked, parameter.step, last_step)

    def _row_update(self, update: _Update, h: Any, c: Any, lr: float) -> RowUpdate:
        parameter, checked, rule = update.parameter, update.group.checked, update.group.rule
        assert isinstance(update.gradient, RowGradient)
        mode: Any = Lazy()
        row_steps = numbers = None
        if ROW_STEPS in parameter.state:
            mode, row_steps = PerRow(), parameter.state[ROW_STEPS]
            numbers = parameter.counts.up_to(parameter.step + 1, rule, checked)
            h = h._replace(**{h._fields[0]: parameter.dtype.type(lr)})
        elif parameter.tracking is not None:
            mode = parameter.tracking.history.kind()
        limit = checked["clip_row_norm"]
        return RowUpdate(
            mode,
            h,
            c,
            update.view,
            update.gradient,
            tuple(parameter.state[slot] for slot in (*rule.state_slots, *rule.row_slots)),
            math.inf if limit is None else limit,
            parameter.step + 1,
            row_steps,
            numbers,
            parameter.tracking,
        )

    def _catch_up(self, parameter: _Parameter, indices: Indices | None = None) -> None:
        """Let rows, those that ``indices`` name or all, take the steps that they have missed."""
        tracking = parameter.tracking
        if tracking is None:
            return
        if tracking.history.now > tracking.history.base:
            group = next(group for group in self._groups if parameter in group.parameters)
            h, c = self._fold_options(group, parameter, tracking.options, 0.0, 1.0, parameter.step)
            rows = None if indices is None else indices.groups.own_rows()
            launch = catch_up_launch(
                tracking, parameter.view(), parameter.state, group.rule, h, c, parameter.step, rows
            )
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

    def _fold(self, update: _Update, lr: float, scale: float) -> tuple[Any, Any]:
        parameter = update.parameter
        return self._fold_options(
            update.group, parameter, update.group.checked, lr, scale, parameter.step + 1
        )

    def _decay(self, options: Mapping[str, Any]) -> type:
        """The type of weight decay."""
        if not options["weight_decay"]:
            return rules.Scaled
        return rules.Decoupled if self.decoupled(options) else rules.L2

    def _fold_options(
        self,
        group: _Group,
        parameter: _Parameter,
        options: Mapping[str, Any],
        lr: float,
        scale: float,
        step: int,
    ) -> tuple[Any, Any]:
        """The hyperparameters of a launch, in the parameter's dtype."""
        h = group.rule.fold(step, {**options, "lr": lr})
        if options["maximize"]:
            scale = -scale
        decay = self._decay(options)
        c: Any
        if decay is rules.Scaled:
            c = rules.Scaled(scale, limit)
        elif decay is rules.Decoupled:
            c = rules.Decoupled(scale, limit, 1.0 - lr * options["weight_decay"])
        else:
            c = rules.L2(scale, limit, options["weight_decay"])
        dtype = parameter.dtype.type
        return _cast(h, dtype, group.label), _cast(c, dtype, group.label)

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
                if group.options.get(name) != TABLE_DEFAULTS.get(name, ())
            )
            lines.append(f"{len(group.parameters)} {noun}, {size:,} parameters: {options}")
        body = lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines) + "\n"
        return f"{type(self).__name__}({body})"


def _dense_launch(update: _Update, h: Any, c: Any) -> Launch:
    parameter, rule, gradient = update.parameter, update.group.rule, update.gradient
    for slot in rule.state_slots:  # rows of several arrays may lie together
        parameter.state[slot] = np.asarray(parameter.state[slot], order="C")
    slots = tuple(parameter.state[slot] for slot in rule.state_slots)
    row_slots = tuple(parameter.state[slot] for slot in rule.row_slots)
    work = gradient.values.size
    if rule.row_slots:
        by_row = parameter.by_row
        table = by_row(update.view), by_row(gradient.values), tuple(map(by_row, slots)), row_slots
        return Launch(flat_rows, work, (h, c, *table))
    buffers = update.view.reshape(-1), gradient.values, tuple(slot.reshape(-1) for slot in slots)
    return Launch(flat, work, (h, c, *buffers))


def _as_rows(
    array: np.ndarray, parameter: _Parameter, checked: Mapping[str, Any], label: str
) -> DenseGradient | RowGradient:
    """A dense gradient, by rows where an option needs them."""
    if checked["clip_row_norm"] is not None and array.ndim != 2:
        raise ValueError(
            f"{label} has shape {array.shape} and clip_row_norm is {checked['clip_row_norm']!r}: expected a "
            "2-D parameter, put others into a group without it"
        )
    if array.ndim == 2 and (checked["clip_row_norm"] is not None or checked["step_per_row"]):
        return RowGradient(array, parameter.every_row())
    return DenseGradient(array.reshape(-1))


def _rows_written(gradient: DenseGradient | RowGradient) -> np.ndarray | None:
    """The rows that an update writes, None for all."""
    return None if isinstance(gradient, DenseGradient) else gradient.indices.groups.own_rows()


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


def _cast(values: Any, dtype: type[np.floating], label: str) -> Any:
    """A tuple of hyperparameters in the parameter's dtype; flags stay flags."""
    with np.errstate(over="ignore"):
        cast = [value if isinstance(value, bool) else dtype(value) for value in values]
    for name, before, after in zip(values._fields, values, cast, strict=True):
        if math.isinf(after) and not math.isinf(before):
            raise ValueError(
                f"the options of {label} make {name} {before!r}: expected a number that fits "
                f"{np.dtype(dtype)}"
            )
    return type(values)(*cast)


def _names(rule: rules.Rule) -> str:
    return ", ".join((*rule.state_slots, *rule.row_slots)) or "none"


def _is_groups(params: Any) -> bool:
    return (
        isinstance(params, list | tuple)
        and len(params) > 0
        and all(isinstance(entry, dict) and "params" in entry for entry in params)
    )


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _as_container(params: Any, label: str) -> Any:
    """``params`` with any other iterable than a dict made a list."""
    if isinstance(params, dict) or _is_array(params):
        return params
    if isinstance(params, str | bytes) or not hasattr(params, "__iter__"):
        arrays.host_array(params, label)  # raises
    return list(params)


def _same(group: _Group) -> bool:
    """Whether the group's container still holds the arrays it held at first."""
    if _is_array(group.params):
        return True
    values = list(group.params.values() if isinstance(group.params, dict) else group.params)
    return [id(value) for value in values] == [id(parameter.value) for parameter in group.parameters]


def _changed(options: dict[str, Any], checked: dict[str, Any]) -> bool:
    try:
        return {**options, "params": None} != {**checked, "params": None}
    except ValueError:  # an array among them, which compares element by element
        return True


def _entries(params: Any, label: str) -> Iterator[tuple[str | int, Any, str]]:
    """Key, array and label of each parameter of a group."""
    if isinstance(params, dict):
        for key, value in params.items():
            if not isinstance(key, str):
                raise TypeError(f"{label} has the key {key!r}: expected names, of type str")
            yield key, value, f"{label}[{key!r}]"
    elif isinstance(params, list):
        for position, value in enumerate(params):
            yield position, value, f"{label}[{position}]"
    else:
        yield 0, params, label


def _paired(group: _Group, grads: Any, label: str) -> Iterator[tuple[_Parameter, Any, str]]:
    params = group.params
    if isinstance(params, dict):
        names = [p.key for p in group.parameters]
        if not isinstance(grads, Mapping) or set(grads) != set(names):
            missing = [name for name in names if not isinstance(grads, Mapping) or name not in grads]
            raise ValueError(
                f"{label} is {_describe(grads)}: expected a dict with the keys of the parameters, "
                + (
                    f"{missing[0]!r} is missing, pass None to skip it"
                    if missing
                    else f"{', '.join(map(repr, names))}"
                )
            )
        for parameter in group.parameters:
            yield parameter, grads[parameter.key], f"{label}[{parameter.key!r}]"
    elif isinstance(params, list):
        count = len(group.parameters)
        if not isinstance(grads, list | tuple) or len(grads) != count:
            raise ValueError(
                f"{label} is {_describe(grads)}: expected a list of {count}, one entry a parameter"
            )
        for position, (parameter, value) in enumerate(zip(group.parameters, grads, strict=True)):
            yield parameter, value, f"{label}[{position}]"
    else:
        if isinstance(grads, list | tuple | dict):
            raise ValueError(f"{label} is {_describe(grads)}: expected one array, as params is one")
        yield group.parameters[0], grads, label


def _describe(grads: Any) -> str:
    if isinstance(grads, Mapping):
        return f"a dict with the keys {', '.join(map(repr, grads)) or '(none)'}"
    if isinstance(grads, list | tuple):
        return f"a {type(grads).__name__} of {len(grads)}"
    return f"of type {type(grads).__name__}"
