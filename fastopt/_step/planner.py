"""From gradients to a plan: what is the same as in the step before is not found out again."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fastopt._core import arrays
from fastopt._core.backend import host
from fastopt._core.groups import Definition, ParameterGroup, changed_options
from fastopt._core.indices import Indices, sort_together
from fastopt._core.parameters import Parameter, Parameters
from fastopt._core.structure import Gradients
from fastopt._step.catch_up import adopt
from fastopt._step.numbers import StepOptions, learning_rate
from fastopt._step.plan import FLOAT32, NONE, ROWS, SAME, Plan, not_captured
from fastopt._step.rows import RowUpdate
from fastopt.gradients.given import as_gradient
from fastopt.gradients.protocol import SparseGradient
from fastopt.gradients.rows import RowGradient
from fastopt.kernels.work import Array

Options = Mapping[str, Any]
Planned = tuple[Plan, list | tuple, Sequence[RowUpdate]]


class Planner:
    """Checks the gradients and options of a step against the parameters, and keeps the last plan.

    The plan is kept while options, the kinds of gradients and addresses stay what they were: this is how a
    step costs microseconds.
    """

    def __init__(self, parameters: Parameters, name: str) -> None:
        everyone = parameters.all
        self._parameters = parameters
        self._name = name
        self._values = [parameter.value for parameter in everyone]
        self._structure = parameters.structure()
        self._locator = host().Locator(
            [parameter.dtype for parameter in everyone],
            [parameter.shape for parameter in everyone],
            [parameter.device for parameter in everyone],
        )
        self._has_codes = any(group.checked["state_dtype"] == "8bit" for group in parameters.groups)
        self._plan: Plan | None = None
        self._steady: StepOptions | None = None  # the last options, if none had changed

    @property
    def kept(self) -> Plan | None:
        """The plan of the last step, None if the next one has to find it anew."""
        return self._plan

    def forget(self) -> None:
        """Find everything anew in the next step."""
        self._plan = self._steady = None

    def options(self, definition: Definition) -> StepOptions:
        """The options of the next step: of each group the very dict that was adopted, if it has not changed
        since.

        Raises:
            TypeError, ValueError: they, or the containers of parameters, were changed to what can't be
                followed.
        """
        parameters = self._parameters
        for group in parameters.groups:
            if not (group.is_steady() and self._structure.is_as_before(group.number)):
                break
        else:
            if self._steady is not None:
                return self._steady
        checked = [self.group_options(group, definition) for group in parameters.groups]
        pairs = list(zip(parameters.groups, checked, strict=True))
        rates = [learning_rate(group, own, parameters.steps) for group, own in pairs]
        changed = [(group, own) for group, own in pairs if own is not group.checked]
        other = any({**own, "lr": None} != {**group.checked, "lr": None} for group, own in changed)
        found = StepOptions(checked, rates, bool(changed), other)
        self._steady = None if changed else found
        return found

    def group_options(self, group: ParameterGroup, definition: Definition) -> dict[str, Any]:
        """The same for one group."""
        same = group.options.get("params") is group.params
        if not same or not self._structure.is_as_before(group.number):
            raise ValueError(
                f"the params of {group.label} were changed: make a new optimizer for other parameters"
            )
        return changed_options(group, definition)

    def adopt_where_behind(self, definition: Definition) -> None:
        """Adopt changed options of groups of which rows are behind, since the missed steps belong to the old
        ones."""
        for group in self._parameters.groups:
            if any(p.tracking is not None for p in self._parameters.of_group(group)):
                options = self.group_options(group, definition)
                if options is not group.checked:
                    adopt(self._parameters, group, options, definition)
                    self.forget()

    def plan(self, grads: Any, options: StepOptions, zero_grads: bool) -> Planned:
        """What a step with these gradients and options is to do, the gradient of each parameter, and the
        updates by rows.

        Raises:
            TypeError, ValueError: a gradient does not fit its parameter.
            RuntimeError: it is by rows, while the step is captured in a graph.
        """
        kept, self._plan = self._plan, None  # an error leaves none
        if options.other_plan:
            kept = None
        if kept is None or (self._has_codes and kept.rows_planned):
            self._locator.expect(self._expected(options.checked))
        if type(grads) is not np.ndarray:
            grads = self._structure.taken(grads)
        entries = self._structure.entries(grads)
        same = self._locator.unchanged(self._values, entries, zero_grads)
        if not same:
            given, entries = entries, arrays.numpy_views(entries)
            if entries is not given:
                same = self._locator.unchanged(self._values, entries, zero_grads)
        rows: Sequence[RowUpdate] = ()
        if kept is None or not same or (zero_grads and not kept.clears):
            gradients = Gradients(entries, grads, self._structure)
            kept, rows = self._looked_at(kept, gradients, options.checked, zero_grads)
            entries = gradients.entries
        self._plan = kept
        return kept, entries, rows

    def _expected(self, options: Sequence[Options]) -> list[np.dtype | None]:
        """The dtypes of the dense gradients that need no closer look."""
        return [
            None if parameter.takes_rows(options[parameter.group.number]) else parameter.dtype
            for parameter in self._parameters.all
        ]

    def _looked_at(
        self, kept: Plan | None, gradients: Gradients, options: Sequence[Options], zero_grads: bool
    ) -> tuple[Plan, list[RowUpdate]]:
        """A plan for gradients that are not all where they were, and the updates by rows."""
        everyone = self._parameters.all
        parameters_at, unknown = self._locator.parameters()
        views = {i: everyone[i].view() for i in unknown}  # the others are what they were
        for i, view in views.items():
            parameters_at[i] = everyone[i].backend.address(view)
        gradients_at, unknown = self._locator.gradients()
        gradients.replace(unknown, partial(as_gradient, writes=zero_grads))
        entries = gradients.entries
        kinds = np.full(len(entries), SAME, np.int8)
        rows: list[RowUpdate] = []
        for i in unknown:
            if entries[i] is None:
                gradients_at[i], kinds[i] = 0, NONE
                continue
            table = views[i] if i in views else arrays.array_view(everyone[i].value, everyone[i].label)
            found = _checked(everyone[i], table, gradients, options[everyone[i].group.number], self._name)
            if isinstance(found, RowGradient):
                rows.append(RowUpdate(everyone[i], found, table))
                gradients_at[i], kinds[i] = 0, ROWS
            else:
                gradients_at[i] = everyone[i].backend.address(found)
                kinds[i] = SAME if found.dtype == everyone[i].dtype else FLOAT32
        if kept is None or kept.kinds.tobytes() != kinds.tobytes():
            kept = Plan(self._parameters, kinds)
        moved = kept.place(parameters_at, gradients_at)
        if rows or moved or zero_grads:
            kept.check_apart(gradients, rows, zero_grads)
            kept.clears = zero_grads
        sort_together([update.gradient.indices for update in rows])
        return kept, rows


def _checked(
    parameter: Parameter, view: Array, gradients: Gradients, options: Options, optimizer: str
) -> Array | RowGradient:
    """A gradient checked against its parameter, whose array is ``view``: an array, or a gradient by rows."""
    value, label = gradients.entries[parameter.index], gradients.label(parameter.index)
    rule = parameter.group.rule
    if isinstance(value, SparseGradient):
        if parameter.backend.capturing:
            raise not_captured(f"{label} is by rows, which are others in each step")
        if rule.matrix_slots:
            raise TypeError(
                f"{label} is {type(value).__name__}: {optimizer} has means over columns, expected a dense "
                "gradient"
            )
        return value.for_parameter(label, view, parameter.label)
    by_rows = parameter.takes_rows(options)
    if by_rows and rule.trust_ratio is not None:
        raise ValueError(
            f"{label} is dense but is used row by row (clip_row_norm, step_per_row, or 8-bit state made for "
            f"sparse gradients): {optimizer} needs the whole array, expected IndexedSlices"
        )
    array = arrays.gradient_view(value, label, view, parameter.label)
    if not by_rows:
        return array
    if options["clip_row_norm"] is not None and array.ndim != 2:
        raise ValueError(
            f"{label} has shape {array.shape} and clip_row_norm is {options['clip_row_norm']!r}: expected a "
            "2-D parameter, put others into a group without it"
        )
    return RowGradient(
        parameter.rows_of(array), Indices.of_all(parameter.rows, parameter.backend), dense=True
    )
