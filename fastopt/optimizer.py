"""The optimizer that all others derive from: parameters, state, and the step."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fastopt import arrays
from fastopt.clipping import check_limit, clip_factor, total_norm
from fastopt.gradients import DenseGradient, IndexedSlices, RowGradient, row_gradient
from fastopt.hyperparameters import checked_options
from fastopt.kernels import rules
from fastopt.kernels.cpu.flat import flat, flat_rows
from fastopt.kernels.cpu.rows import update_rows
from fastopt.kernels.jit import Kernel


class StepInfo(NamedTuple):
    """What a step did.

    norm: L2 norm of the gradients times ``grad_scale``, before clipping; None if it was not needed.
    clipped: whether the gradients were scaled down to ``clip_norm``.
    skipped: whether nothing was updated, because a gradient was not finite.
    """

    norm: float | None = None
    clipped: bool = False
    skipped: bool = False


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
            C-contiguous, writable, and none shares memory with another.
        lr: learning rate, at least 0, or a function of the step, such as
            ``1e-3 * fastopt.schedules.cosine(1000)``.
        weight_decay: at least 0; an L2 penalty unless the optimizer says decoupled.
        maximize: ascend the gradient.

    Attributes:
        param_groups: list of dicts with each group's ``params`` and options; options may be
            changed between steps, also ``lr``.
        steps: number of finished steps.

    Raises:
        ValueError, TypeError: from the constructor and from ``step``, before any array is touched,
            naming the argument, what was got and what was expected.
    """

    def __init__(self, params: Any, **defaults: Any) -> None:
        self.defaults = defaults
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
                of its parameter's shape and dtype, :class:`fastopt.IndexedSlices` for a 2-D
                parameter, or ``None`` to leave the parameter and its step count alone. They are not changed.
            clip_norm: scale all gradients by ``min(1, clip_norm / (norm + 1e-6))``, norm being the
                L2 norm over all of them, as ``torch.nn.utils.clip_grad_norm_``.
            grad_scale: factor on the gradients, before anything else; more than 0.
            skip_nonfinite: update nothing at all if any gradient holds NaN or infinity, or if
                the norm of all is beyond float64.

        Returns:
            What was done: ``norm``, ``clipped``, ``skipped``.

        Raises:
            ValueError, TypeError: an argument or an option does not fit; nothing has changed then.

        With ``IndexedSlices`` each row named gets the sum of its gradients and one update; other
        rows are left as they are, so weight decay and momentum act on the named rows alone, as in
        torch.optim.SparseAdam.
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
        learning_rates = {id(group): self._learning_rate(group) for group in self._groups}
        updates = self._match(grads)

        norm, factor = None, 1.0
        if clip_norm is not None or skip_nonfinite:
            unscaled = total_norm(update.gradient for update in updates)
            norm = grad_scale * unscaled
            if skip_nonfinite and not math.isfinite(unscaled):
                return StepInfo(norm, skipped=True)
            if clip_norm is not None:
                factor = clip_factor(norm, clip_norm)

        states = [self._state(update) for update in updates]
        folded: dict[tuple[int, int, np.dtype], tuple[Any, Any]] = {}
        launches = []
        for update, state in zip(updates, states, strict=True):
            key = id(update.group), update.parameter.step, update.parameter.dtype
            if key not in folded:
                folded[key] = self._fold(update, learning_rates[key[0]], grad_scale * factor)
            launches.append(_launch(update, state, *folded[key]))
        if len(launches) > 1:  # compiling takes seconds, and must not be interrupted after a first write
            for launch in launches:
                launch.compile()
        for update, state, launch in zip(updates, states, launches, strict=True):
            launch.run()
            update.parameter.state = state
            update.parameter.step += 1
        self._steps += 1
        return StepInfo(norm, clipped=factor != 1.0)

    def _learning_rate(self, group: _Group) -> float:
        """Check options changed since the last step; the learning rate of this step."""
        checked = group.checked
        if group.options.get("params") is not group.params or not _same(group):
            raise ValueError(
                f"the params of {group.label} were changed: make a new optimizer for other parameters"
            )
        if _changed(group.options, checked):
            checked = self._check(group.options, group.label)
            rule = self.rule(checked)
            if rule != group.rule:
                raise ValueError(
                    f"the options of {group.label} now need the state {_names(rule)}, at first "
                    f"{_names(group.rule)}: make a new optimizer to change them"
                )
            group.checked = checked
        lr = checked["lr"]
        if not callable(lr):
            return lr
        return checked_options({"lr": lr(self.steps)}, f"{group.label}, at step {self.steps},")["lr"]

    def _match(self, grads: Any) -> list[_Update]:
        """Pair parameters and gradients, checked."""
        views = {id(p): p.view() for p in self._parameters()}
        written = [(views[id(p)], p.label) for p in self._parameters()]
        updates, read = [], []
        for group, group_grads, label in self._group_grads(grads):
            for parameter, value, one_label in _paired(group, group_grads, label):
                if value is None:
                    continue
                view = views[id(parameter)]
                gradient: DenseGradient | RowGradient
                if isinstance(value, IndexedSlices):
                    gradient = row_gradient(value, one_label, view, parameter.label)
                    read.append((gradient.values, f"{one_label}.values"))
                else:
                    array = arrays.gradient_view(value, one_label, view, parameter.label)
                    gradient = DenseGradient(array.reshape(-1))
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

    def _state(self, update: _Update) -> dict[str, np.ndarray]:
        """The parameter's state, made at its first gradient."""
        parameter = update.parameter
        if parameter.state or not (update.group.rule.state_slots or update.group.rule.row_slots):
            return parameter.state
        first = self.initial_state(update.group.checked)
        state = {}
        for slot, shape in self._slot_shapes(update.group, parameter):
            value = first.get(slot, 0.0)
            # zeros come from the system unread: a huge table costs nothing until rows are touched
            state[slot] = (
                np.full(shape, value, parameter.dtype) if value else np.zeros(shape, parameter.dtype)
            )
        return state

    @staticmethod
    def _slot_shapes(group: _Group, parameter: _Parameter) -> Iterator[tuple[str, tuple[int, ...]]]:
        for slot in group.rule.state_slots:
            yield slot, parameter.shape
        for slot in group.rule.row_slots:
            yield slot, (parameter.rows,)

    def _fold(self, update: _Update, lr: float, scale: float) -> tuple[Any, Any]:
        options = {**update.group.checked, "lr": lr}
        h = update.group.rule.fold(update.parameter.step + 1, options)
        if options["maximize"]:
            scale = -scale
        c: Any
        if not options["weight_decay"]:
            c = rules.Scaled(scale)
        elif self.decoupled(options):
            c = rules.Decoupled(scale, 1.0 - lr * options["weight_decay"])
        else:
            c = rules.L2(scale, options["weight_decay"])
        dtype = update.parameter.dtype.type
        return _cast(h, dtype, update.group.label), _cast(c, dtype, update.group.label)

    # State

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything but the parameters.

        Returns:
            ``optimizer``: the class name. ``steps``. ``state``: for each parameter's name, or
            position, a dict with its ``step`` and state arrays. ``param_groups``: each group's
            options, with ``params`` the names.
        """
        return {
            "optimizer": type(self).__name__,
            "steps": self.steps,
            "state": {
                p.key: {"step": p.step, **{slot: array.copy() for slot, array in p.state.items()}}
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
            options = ", ".join(f"{name}={group.options.get(name)!r}" for name in self.defaults)
            lines.append(f"{len(group.parameters)} {noun}, {size:,} parameters: {options}")
        body = lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines) + "\n"
        return f"{type(self).__name__}({body})"


class _Launch(NamedTuple):
    """A kernel and what it is to be called with."""

    kernel: Kernel
    work: int
    arguments: tuple

    def run(self) -> None:
        if self.work:
            self.kernel(self.work, *self.arguments)

    def compile(self) -> None:
        """Have the kernel compiled, by a call with empty arrays, if it has not been for such types."""
        if not self.work:
            return
        h, c, *rest = self.arguments
        kinds = tuple(_kind(value) for value in rest)
        key = self.kernel, self.kernel.runs_serial(self.work), type(h), type(c), kinds
        if key not in _compiled:
            self.kernel(self.work, h, c, *map(_emptied, rest))
            _compiled.add(key)


_compiled: set[tuple] = set()


def _kind(value: Any) -> Any:
    """What a kernel's machine code depends on, of an array or a tuple of them."""
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    return value.dtype, value.ndim, value.flags.writeable


def _emptied(value: Any) -> Any:
    return tuple(map(_emptied, value)) if isinstance(value, tuple) else value[:0]


def _launch(update: _Update, state: dict[str, np.ndarray], h: Any, c: Any) -> _Launch:
    parameter, rule, gradient = update.parameter, update.group.rule, update.gradient
    slots = tuple(state[slot] for slot in rule.state_slots)
    row_slots = tuple(state[slot] for slot in rule.row_slots)
    work = gradient.values.size
    if isinstance(gradient, RowGradient):
        rows = update.view, gradient.values, *gradient.groups, slots, row_slots
        return _Launch(update_rows, work, (h, c, *rows))
    if rule.row_slots:
        by_row = parameter.by_row
        table = by_row(update.view), by_row(gradient.values), tuple(map(by_row, slots)), row_slots
        return _Launch(flat_rows, work, (h, c, *table))
    buffers = update.view.reshape(-1), gradient.values, tuple(slot.reshape(-1) for slot in slots)
    return _Launch(flat, work, (h, c, *buffers))


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
