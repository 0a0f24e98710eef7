"""Groups of parameters that share options, and the options as they were adopted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from fastopt._core.options import FIXED, SHARED, checked_options, is_immutable
from fastopt.kernels.rule import L2, Decoupled, Rule, Scaled

NAME = "name"  # of a group: beside its options, none of the optimizer's


class Definition:
    """What an optimizer's class says of it.

    Attributes:
        defaults: its options, with the values that groups have which say nothing else.
        signed: the options that may be negative, whatever their range is, but with ``rows="dense"``.
    """

    defaults: dict[str, Any]
    signed: ClassVar[tuple[str, ...]] = ()

    def rule(self, options: Mapping[str, Any]) -> Rule:
        """The update rule that the options choose."""
        raise NotImplementedError

    def decoupled(self, options: Mapping[str, Any]) -> bool:
        """Whether weight decay is decoupled from the gradient."""
        return options.get("decoupled_weight_decay", False)

    def initial_state(self, options: Mapping[str, Any]) -> dict[str, float]:
        """First values of state slots that do not start from 0."""
        return {}

    def check_options(self, options: Mapping[str, Any], label: str) -> None:
        """Refuse combinations of options that can't be honoured; ``label`` says whose they are."""
        rule = self.rule(options)
        if options["rows"] == "dense" and rule.trust_ratio is not None:
            raise ValueError(
                f"{label} has rows='dense': expected 'lazy', as the steps of {type(self).__name__} depend on "
                "whole layers"
            )
        if rule.matrix_slots and (options["step_per_row"] or options["clip_row_norm"] is not None):
            name = "step_per_row" if options["step_per_row"] else "clip_row_norm"
            raise ValueError(
                f"{label} has {name} {options[name]!r}: {type(self).__name__} does not go by rows, leave it "
                "out"
            )
        if options["rows"] == "dense" and options["step_per_row"]:
            raise ValueError(
                f"{label} has rows='dense' and step_per_row=True: expected one of them, since dense rows "
                "all have the parameter's step"
            )


@dataclass(eq=False)
class ParameterGroup:
    """Parameters that share options.

    Attributes:
        options: the dict that the caller sees and may change. place: where it stands in what the caller gave.
        params: the caller's container. keys: of its parameters, which know their group and not the other way
            round: a circle would keep memory until the collection of garbage.
        checked: the options as they were last adopted, checked.
        rule, decay: the rule that they choose, and the type of weight decay.
        first: first values of state slots that do not start from 0.
    """

    options: dict[str, Any]
    params: Any
    place: str
    number: int
    keys: list[str | int] = field(default_factory=list)
    checked: dict[str, Any] = field(init=False)
    rule: Rule = field(init=False)
    decay: type = field(init=False)
    first: dict[str, float] = field(init=False)
    _seen: dict[str, Any] | None = None  # the options as adopted, if they can only change by assignment
    _rate_type: type = float
    _fixed_rate: bool = False

    @property
    def label(self) -> str:
        """What messages call it."""
        name = self.options.get(NAME)
        return f"{self.place} ({name!r})" if isinstance(name, str) else self.place

    @property
    def named(self) -> dict[str, str]:
        """Its name, if it has one, as it stands among its options."""
        return {NAME: self.options[NAME]} if NAME in self.options else {}

    def adopt(self, checked: dict[str, Any], definition: Definition) -> None:
        """Go on with these options, ``options`` as it is now being what they were checked from."""
        self.adopting(checked, self.options, definition)()

    def adopting(
        self, checked: dict[str, Any], options: Mapping[str, Any], definition: Definition
    ) -> Callable[[], object]:
        """The call, of C, that goes on with these options, ``options`` being what they were checked from."""
        new = {
            "checked": checked,
            "rule": definition.rule(checked),
            "decay": decay_type(definition, checked),
            "first": definition.initial_state(checked),
            "_fixed_rate": not callable(checked["lr"]),
            **_remembered(options),
        }
        return partial(vars(self).update, new)

    def remember(self) -> None:
        """Take the options as they are for those adopted: they need no check until they change. With an array
        among them, which may change in place, they are checked in every step."""
        vars(self).update(_remembered(self.options))

    def is_steady(self) -> bool:
        """Whether its options are known to be those adopted, and give the same learning rate in each step."""
        return self._fixed_rate and not self.changed()

    def changed(self) -> bool:
        """Whether its options may differ from those adopted."""
        try:
            # A number of few bits equals every number that is rounded to it.
            return self._seen != self.options or type(self.options["lr"]) is not self._rate_type
        except (ValueError, RuntimeError):  # an array or a tensor, which compares element by element
            return True

    def described(self, size: int, defaults: Mapping[str, Any]) -> str:
        """Its ``size`` elements, and its options but for those that all optimizers have and that are as by
        default."""
        noun = "array" if len(self.keys) == 1 else "arrays"
        names = (name for name in defaults if self.options.get(name) != SHARED.get(name, ()))
        options = ", ".join(f"{name}={self.options.get(name)!r}" for name in names)
        name = "".join(f"{name!r}, " for name in self.named.values())
        return f"{name}{len(self.keys)} {noun}, {size:,} parameters: {options}"


def _remembered(options: Mapping[str, Any]) -> dict[str, Any]:
    fixed = all(name == "params" or is_immutable(value) for name, value in options.items())
    return {"_seen": dict(options) if fixed else None, "_rate_type": type(options["lr"])}


def decay_type(definition: Definition, checked: Mapping[str, Any]) -> type:
    """The type of weight decay that kernels see."""
    if not checked["weight_decay"] or definition.rule(checked).own_decay:
        return Scaled
    return Decoupled if definition.decoupled(checked) else L2


def checked_group(options: Mapping[str, Any], label: str, definition: Definition) -> dict[str, Any]:
    """A group's options but for ``params`` and its name, checked; ``label`` says whose they are.

    Raises:
        TypeError, ValueError: an option is unknown or missing, of another type or out of range.
    """
    if not isinstance(options.get(NAME, ""), str):
        raise TypeError(f"name of {label} is {options[NAME]!r}: expected a str, or none at all")
    own = {name: value for name, value in options.items() if name not in ("params", NAME)}
    unknown = set(own) - set(definition.defaults)
    if unknown:
        raise ValueError(
            f"{label} has the option {min(map(str, unknown))!r}: {type(definition).__name__} has "
            f"{', '.join(definition.defaults)}"
        )
    missing = set(definition.defaults) - set(own)
    if missing:
        raise ValueError(f"{label} lacks the option {min(missing)!r}: set it again")
    lazy = isinstance(own["rows"], str) and own["rows"] != "dense"
    return checked_options(own, label, definition.signed if lazy else ())


def changed_options(group: ParameterGroup, definition: Definition) -> dict[str, Any]:
    """The group's options, checked anew where they were changed since they were adopted; the very same dict
    where they were not.

    Raises:
        TypeError, ValueError: as for :func:`checked_group`, or they do not go together, or need another state
            than at first.
    """
    if not group.changed():
        return group.checked
    checked = checked_group(group.options, group.label, definition)
    rule = definition.rule(checked)
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
    definition.check_options(checked, group.label)
    if checked != group.checked:
        return checked
    group.remember()
    return group.checked


def _names(rule: Rule) -> str:
    return ", ".join((*rule.state_slots, *rule.row_slots)) or "none"
