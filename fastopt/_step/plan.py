"""A plan: what a step is going to do, found and checked; nothing has changed yet."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fastopt._core import arrays
from fastopt._core.backend import Calls, Factor, Norm, backend_of
from fastopt._core.parameters import Parameter, Parameters
from fastopt._core.state import gradient_format
from fastopt._core.structure import Gradients
from fastopt._step.catch_up import catch_up
from fastopt._step.dense import DenseUpdate, dense_updates
from fastopt._step.norms import DenseSquares, known, unread_norm
from fastopt._step.numbers import Conditions
from fastopt._step.rows import RowUpdate, ready_rows, row_launches
from fastopt._step.settings import Settings, StepInfo, scaled
from fastopt.gradients.protocol import numbers_of

# The gradient of a parameter is an array of its dtype, one of float32 for a parameter of 16 bits, none, or
# by rows.
SAME, FLOAT32, NONE, ROWS = range(4)

_SLICE = 1 << 20  # elements that are looked at at a time


class CapturedStep(NamedTuple):
    """What replays of a step need.

    settings: its arguments. written: the caller's arrays that it changes. info: what it answered. factor: of
    the norm that it clips to. Nobody else may get the memory that these have as long as the step may be
    replayed.
    """

    settings: Settings
    written: Sequence[Any]
    info: StepInfo
    factor: Factor


def not_captured(reason: str) -> RuntimeError:
    """The error for a step that can't be captured in a graph."""
    return RuntimeError(
        f"this step can't be captured in a graph: {reason}; make one ordinary step, with the same arrays, "
        "options and arguments, before the capture"
    )


class Plan:
    """The work of a step, and of later ones whose gradients are of the same kinds.

    Args:
        parameters: those of the optimizer.
        kinds: int8, one of SAME, FLOAT32, NONE and ROWS for each parameter.

    Attributes:
        dense: the parameters with dense gradients.
        clears: whether gradients were found to be such that they can be set to zero.
        parameters_at, gradients_at: addresses of all parameters, and of the dense gradients.
        written: the values of those parameters that the caller gave as something else than NumPy arrays.
        captured: the step of this plan that was last captured in a graph, None if none was, or if gradients
            or parameters have moved since.

    Updates by rows are those of one step, and are passed to the methods.
    """

    def __init__(self, parameters: Parameters, kinds: np.ndarray) -> None:
        self.kinds = kinds
        self.clears = False
        self.parameters_at = self.gradients_at = np.empty(0, np.int64)
        self._parameters = parameters
        self._dense_at = np.flatnonzero(kinds <= FLOAT32)
        nbytes = np.where(kinds == FLOAT32, 4 * parameters.sizes, parameters.nbytes)  # of the gradients
        self._dense_bytes = nbytes[self._dense_at]
        self.dense: list[Parameter] = [parameters.all[i] for i in self._dense_at]
        updated = [parameters.all[i].value for i in np.flatnonzero(kinds != NONE)]
        self.written = [value for value in updated if not isinstance(value, np.ndarray)]
        increments = np.append(kinds != NONE, True).astype(np.int64)
        self._count = partial(np.add, parameters.clock, increments, parameters.clock)
        self._squares: DenseSquares | None = None
        self._updates: list[DenseUpdate] | None = None  # kept from the first step on
        self._stepped = False  # whether a step was prepared with everything where it lies now
        self._summed = False  # whether the norm was found with everything where it lies now
        self._clipped = False  # whether a step was prepared with a factor of a norm that is on its way
        self.captured: CapturedStep | None = None

    @property
    def rows_planned(self) -> bool:
        """Whether some gradients are by rows."""
        return bool((self.kinds == ROWS).any())

    def gradient_dtype(self, parameter: Parameter) -> np.dtype:
        """The dtype of a dense gradient."""
        return arrays.DTYPES[0] if self.kinds[parameter.index] == FLOAT32 else parameter.dtype

    def place(self, parameters_at: np.ndarray, gradients_at: np.ndarray) -> bool:
        """Take over where everything lies; returns whether that is new."""
        if np.array_equal(self.parameters_at, parameters_at) and np.array_equal(
            self.gradients_at, gradients_at
        ):
            return False
        self.parameters_at, self.gradients_at = parameters_at, gradients_at
        self._stepped, self._summed, self.captured = False, False, None
        for update in self._updates or ():
            update.place(parameters_at, gradients_at)
        return True

    # The gradients of all parameters

    def norm(self, rows: Sequence[RowUpdate]) -> float | Norm:
        """The L2 norm of all gradients, or one that is on its way."""
        if self._squares is None:
            self._squares = DenseSquares((p.backend, self.gradient_dtype(p), p.size) for p in self.dense)
        addresses = self.gradients_at[self._dense_at]
        self._summed = True
        return unread_norm(self._squares, addresses, [update.gradient for update in rows])

    def scaled(
        self, settings: Settings, entries: Sequence, rows: Sequence[RowUpdate], rates: list[float]
    ) -> tuple[StepInfo, float, Factor]:
        """Of a step that needs the norm: what it answers, the factor on gradients, and what else launches are
        to multiply them by, if the norm is on its way (see Norm). Where it is skipped nothing is to be done.
        ``rates``: the learning rate of each group."""
        scale, norm = settings.grad_scale, self.norm(rows)
        if settings.skip_nonfinite:
            norm = known(norm)
            if not math.isfinite(norm):
                found = self.first_nonfinite(entries, rows)
                return StepInfo(scale * norm, skipped=True, nonfinite=found, rates=rates), scale, None
        return scaled(norm, scale, settings.clip_norm, rates)

    def first_nonfinite(self, entries: Sequence, rows: Sequence[RowUpdate]) -> str | int | None:
        """The key of the first parameter whose gradient holds NaN or infinity."""
        by_row = {parameter.index: gradient for parameter, gradient, _ in rows}
        for parameter, value in zip(self._parameters.all, entries, strict=True):
            if value is None:
                continue
            gradient = by_row.get(parameter.index)
            flat = (gradient.values_used if gradient else arrays.array_view(value, "")).reshape(-1)
            to_host = backend_of(flat).to_host
            slices = (flat[k : k + _SLICE] for k in range(0, flat.size, _SLICE))
            if not all(np.isfinite(to_host(part)).all() for part in slices):
                return parameter.key
        return None

    # The step

    def prepare(
        self, rows: Sequence[RowUpdate], conditions: Conditions, zero_grads: bool, factor: Factor = None
    ) -> tuple[Calls, Any]:
        """The calls that make the step, for ``Backend.run``, and what they work on, to be held until then.
        ``factor``: of a norm that is on its way (see Norm).

        Nothing of the step has happened yet: state that is missing is made, numbers are set, machine code is
        compiled, and tables in files keep what is about to change.
        """
        kept = self._updates
        if factor is not None:
            self._clipped = True
        if kept is not None and not rows and self._parameters.all_plain:
            calls: list[Callable[[], object]] = []
            for update in kept:
                update.set_numbers(conditions)
                calls += update.launch.prepare(zero_grads, factor)
            calls.append(self._count)
            self._stepped = True
            return calls, kept
        if self._parameters.dense_rows:
            for parameter in self.dense:
                catch_up(parameter)
        adopted: list[Callable[[], object]] = []
        if kept is None:
            states = [parameter.ready_state(by_row=False) for parameter in self.dense]
            kept = self._new_updates(states, conditions)
            adopted = [partial(setattr, p, "state", own) for p, own in zip(self.dense, states, strict=True)]
            adopted += [partial(setattr, p, "described", None) for p in self.dense]  # it keeps former state
            adopted.append(partial(setattr, self, "_updates", kept))
            adopted.append(partial(setattr, self, "_stepped", True))
        ready = [ready_rows(update) for update in rows]
        launches = row_launches(ready, conditions, factor) if ready else []
        calls = []
        for update in kept:
            update.set_numbers(conditions)
            calls += update.launch.prepare(zero_grads, factor)
        calls += [call for launch in launches for call in launch.prepare()]
        for parameter, gradient, _, state, tracking in ready:
            if state is not parameter.state:
                adopted.append(partial(setattr, parameter, "state", state))
            if tracking is not parameter.tracking:
                adopted.append(partial(setattr, parameter, "tracking", tracking))
            if tracking is not None:
                adopted += tracking.history.advance(conditions.rates[parameter.group.number])
            if zero_grads:
                adopted += gradient.clears
        if self._parameters.in_files:
            for parameter in self.dense:
                parameter.before_writing(None)
        return [*calls, *adopted, self._count], (kept, launches)

    def _new_updates(
        self, states: Sequence[dict[str, np.ndarray]], conditions: Conditions
    ) -> list[DenseUpdate]:
        formats = [gradient_format(self.gradient_dtype(parameter)) for parameter in self.dense]
        updates = dense_updates(zip(self.dense, states, formats, strict=True), conditions)
        for update in updates:
            update.place(self.parameters_at, self.gradients_at)
        return updates

    # Graphs

    def check_capture(self, settings: Settings, rows: Sequence[RowUpdate]) -> None:
        """Refuse to capture a step in a graph that would do more than launch what an earlier step made ready.

        Raises:
            RuntimeError: it would.
        """
        backends = {parameter.backend for parameter in self.dense}
        if rows:
            raise not_captured("some gradients are by rows, which are others in each step")
        if not self._parameters.all_plain:
            raise not_captured("rows='dense' and tables in files have work of their own in each step")
        if settings.skip_nonfinite:
            raise not_captured("skip_nonfinite waits for the gradients: leave it out")
        if not all(backend.capturing for backend in backends):
            raise not_captured("some parameters do not lie on a device that captures")
        if settings.need_norm and len(backends) > 1:
            raise not_captured("the norm over several devices is waited for: leave out clip_norm and norm")
        ready = self._updates is not None and self._stepped and (self._summed or not settings.need_norm)
        if not ready or (settings.clip_norm is not None and not self._clipped):
            raise not_captured("no step before it had its arrays, options and arguments")

    def capture(self, step: CapturedStep) -> Calls:
        """The calls that put a step, checked by :meth:`check_capture`, into a graph: the one that replays
        make from now on."""
        zero_grads = step.settings.zero_grads
        launches = [update.launch for update in self._updates or ()]
        calls = [call for launch in launches for call in launch.prepare(zero_grads, step.factor)]
        self.captured = step
        return calls

    def replay(self, rates: list[float]) -> Calls:
        """The calls that make the captured step ready for a replay, with these learning rates, and count
        it."""
        assert self.captured is not None
        settings = self.captured.settings
        conditions = Conditions(rates, settings.grad_scale, settings.limit)
        calls: list[Callable[[], object]] = []
        for update in self._updates or ():
            update.set_numbers(conditions)
            calls += update.launch.refresh()
        return [*calls, self.captured.info.going_on(rates), self._count]

    # Memory

    def written_with(self, entries: Sequence) -> list:
        """``written``, and the values of gradients, which the step sets to zero."""
        found = (numbers_of(entry, "") for entry in entries if entry is not None)
        return [*self.written, *(value for numbers in found for value, _ in numbers)]

    def check_apart(self, gradients: Gradients, rows: Sequence[RowUpdate], zero_grads: bool) -> None:
        """Refuse parameters, and gradients that are to become zero, that share memory with others."""
        all_parameters = self._parameters.all
        values = [array for update in rows for array in update.gradient.given]
        values_at = [backend_of(array).address(array) for array in values]
        parts = self.parameters_at, self.gradients_at[self._dense_at], np.array(values_at, np.int64)
        starts = np.concatenate(parts)
        rows_bytes = np.array([array.nbytes for array in values], np.int64)
        ends = starts + np.concatenate([self._parameters.nbytes, self._dense_bytes, rows_bytes])
        written = np.full(len(starts), zero_grads)
        written[: len(all_parameters)] = True
        found = arrays.overlapping(starts, ends, written)
        # The parameter whose gradient each belongs to, and its place among the arrays of that gradient.
        owners = [(index, 0) for index in self._dense_at.tolist()]
        for parameter, gradient, _ in rows:
            owners += [(parameter.index, k) for k in range(len(gradient.given))]
        if found is not None:
            labels = [
                all_parameters[k].label
                if k < len(all_parameters)
                else _numbers_of(gradients, *owners[k - len(all_parameters)])[1]
                for k in found
            ]
            arrays.refuse_overlap(*labels)
        for owner in owners if zero_grads else ():
            value, label = _numbers_of(gradients, *owner)
            if not arrays.array_view(value, label).flags.writeable:
                raise ValueError(
                    f"{label} is read-only: expected a gradient that can be set to zero; leave out zero_grads"
                )


def _numbers_of(gradients: Gradients, index: int, which: int) -> tuple[Any, str]:
    return numbers_of(gradients.entries[index], gradients.label(index))[which]
