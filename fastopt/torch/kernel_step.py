"""Torch optimizers whose step is done by fastopt's kernels.

A class of torch.optim stays what it is: constructor, options, hooks, state and checkpoints are torch's own,
and so is whatever updates parameters that kernels can't take. Only the step of the others is replaced.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, overload

import torch

from fastopt._core.options import SHARED, checked_options
from fastopt._step.settings import StepInfo
from fastopt.torch import left
from fastopt.torch.fused import register
from fastopt.torch.kept import Kept, takes
from fastopt.torch.row_gradients import RowGradients
from fastopt.torch.tables import TableWeight, of_other_flushes, saved_with_checksums, tables_of
from fastopt.torch.traits import STEP, Traits

Loss = TypeVar("Loss")  # what a closure returns


class KernelStep(torch.optim.Optimizer):
    """The base of the classes of :mod:`fastopt.torch`, before that of torch.

    Args:
        params, and whatever else torch's class takes: as for that class. ``foreach`` and ``fused`` choose how
            parameters are updated that kernels do not take, and with ``fused=True`` a ``GradScaler`` leaves
            gradients scaled, which the step divides; groups with ``differentiable`` or ``capturable``
            go torch's own way.
        state_dtype, master_weights, rows, step_per_row, clip_row_norm, seed: as for
            :class:`fastopt.Optimizer`, of groups too.

    Parameters that kernels do not take (complex ones, those that are not C-contiguous, of other dtypes or on
    other devices, subclasses of tensors, those that share memory with another) are updated by torch's own
    step, before the others.

    Attributes:
        info: what the last step answered (see :class:`fastopt.StepInfo`), an empty answer before the first.
    """

    traits: ClassVar[Traits]
    # While it is made, the parameters of groups: torch's Adagrad makes state in memory of those that it finds
    # in the groups themselves, where tables in files are left out
    _apart: list[list[torch.Tensor]] | None = None

    def __init__(
        self,
        params: Any,
        *args: Any,
        state_dtype: Any = SHARED["state_dtype"],
        master_weights: bool = SHARED["master_weights"],
        rows: str = SHARED["rows"],
        step_per_row: bool = SHARED["step_per_row"],
        clip_row_norm: float | None = SHARED["clip_row_norm"],
        seed: int = SHARED["seed"],
        **options: Any,
    ) -> None:
        self._shared: dict[str, Any] = {
            "rows": rows,
            "step_per_row": step_per_row,
            "clip_row_norm": clip_row_norm,
            "state_dtype": state_dtype,
            "master_weights": master_weights,
            "seed": seed,
        }
        self._shared = checked_options(self._shared, type(self).__name__)
        self._kept: Kept | None = None
        self.info = StepInfo()
        self._apart = []
        super().__init__(params, *args, **options)
        for group, own in zip(self.param_groups, self._apart, strict=True):
            group["params"] = own
        self._apart = None
        self.defaults.update(self._shared)
        if not self.traits.in_torch:  # torch has checked nothing
            self.traits.check(self.param_groups)
        if not self.traits.in_torch or tables_of(self.param_groups):
            self._current()
        register(self)

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        own: Any = vars(cls).get("__init__")
        if KernelStep in cls.__bases__:
            # Its arguments are its own, or those of torch's class, and the shared ones.
            base: Any = cls.__mro__[cls.__mro__.index(KernelStep) + 1]
            made_by = inspect.signature(own or base.__init__).parameters.values()
            shared = inspect.signature(KernelStep.__init__).parameters.values()
            parameters = [
                *(one for one in made_by if one.kind is not inspect.Parameter.VAR_KEYWORD),
                *(one for one in shared if one.name in SHARED),
            ]
        elif own is not None:  # of a user's class
            parameters = list(inspect.signature(own).parameters.values())
        else:
            return
        cls.__signature__ = inspect.Signature(parameters[1:])  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        if self._kept is not None and self._kept.is_behind():
            raise RuntimeError(
                "rows of a table with rows='dense' are behind, which a copy would not know: call flush() "
                "before the model and its optimizer are copied"
            )
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._kept = None
        super().__setstate__(state)
        self.__dict__.setdefault("info", StepInfo())
        self._shared = {name: self.defaults.get(name, value) for name, value in SHARED.items()}
        for group in self.param_groups:
            self._complete(group)
        register(self)

    def _complete(self, group: dict[str, Any]) -> None:
        """Give a group those of the options that torch does not know, and have scalers know of ``fused``."""
        given = {name: group.get(name, value) for name, value in self._shared.items()}
        group.update(checked_options(given, type(self).__name__))
        # Whether a GradScaler leaves gradients as they are, and the step divides
        self._step_supports_amp_scaling = any(one.get("fused") for one in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._complete({**param_group})  # which refuses bad ones
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._complete(group)
        if self._apart is not None:
            self._apart.append(group["params"])
            group["params"] = [p for p in group["params"] if not isinstance(p, TableWeight)]
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Tables in files are flushed; only their steps and checksums are in it. With
        ``rows="dense"`` all rows are brought up to date first: take the model's state afterwards, or call
        :meth:`flush` before.

        Raises:
            OSError: a table's files can't be written; its former flush counts.
        """
        if self._kept is None and any(not p.table.closed for p in tables_of(self.param_groups)):
            self._current()
        if self._kept is not None:
            self._kept.catch_up()
            if self._kept.has_unflushed():  # a flush more would leave no way back to the last state but one
                self._kept.flush()
        with saved_with_checksums(self):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, of whose classes it takes the state, too: a copy. State that is not of the parameter's
        dtype stays what it is: torch would round it. Tables in files go back to the flush before their last
        one, if that was made with this state: with as many steps and, where it has one, its checksum.

        Raises:
            ValueError, TypeError: the state does not fit, or is of no such flush; nothing has changed then.
        """
        steps = self._current().steps_of_tables() if tables_of(self.param_groups) else {}
        before = {name: vars(self)[name] for name in ("state", "param_groups", "_kept")}
        loaded: list[dict[str, Any]] = []  # what the hooks of the user made of it
        handle = self.register_load_state_dict_pre_hook(lambda _, final: loaded.append(final))
        try:
            super().load_state_dict(state_dict)
            self._keep_what_torch_drops(loaded[-1], before["param_groups"])
            back = of_other_flushes(steps, self.state)
            self._current()
        except BaseException:
            vars(self).update(before)
            raise
        finally:
            handle.remove()
        for table in back:
            table.roll_back()
            self._kept = None  # its state arrays may be gone

    def _keep_what_torch_drops(self, loaded: dict[str, Any], before: list[dict[str, Any]]) -> None:
        """Put state that torch has converted back as it was saved, and keep options that were not."""
        for group, saved, old in zip(self.param_groups, loaded["param_groups"], before, strict=True):
            group.update({name: old[name] for name in SHARED if name not in saved})
            for p, number in zip(group["params"], saved["params"], strict=True):
                for name, value in loaded["state"].get(number, {}).items():
                    own = self.state[p].get(name)
                    if not isinstance(own, torch.Tensor) or not isinstance(value, torch.Tensor):
                        continue
                    if name != STEP and own.dtype != value.dtype and takes(p):
                        self.state[p][name] = value.detach().to(device=own.device, copy=True)

    def flush(self) -> None:
        """With ``rows="dense"``, bring all rows up to date, and tables in files to the disk (see
        :meth:`fastopt.Optimizer.flush`)."""
        self._current().flush()

    @overload
    def step(
        self, closure: None = None, *, clip_norm: float | None = None, clip_value: float | None = None
    ) -> None: ...

    @overload
    def step(
        self,
        closure: Callable[[], Loss],
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> Loss: ...

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> Any:
        """Update all parameters that have gradients.

        Args:
            closure: computes the loss once more, with gradients, and returns it.
            clip_norm, clip_value: as for :meth:`fastopt.Optimizer.step`; gradients themselves are not
                changed. Not with DTensors, nor where torch's own step is needed for some parameters.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ValueError, TypeError: an option, a gradient or a parameter does not fit; nothing has changed.
            RuntimeError: torch's class refuses one; only what its own step updates may have changed.

        With a ``GradScaler`` and ``fused=True`` gradients stay scaled, where torch's classes leave them
        divided by the scale.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and float(found_inf):  # which is no tensor where no gradient was
            self.info = StepInfo(skipped=True)
            return loss
        grad_scale = 1.0 if scale is None else 1.0 / scale.item()
        arguments = {"grad_scale": grad_scale, "clip_norm": clip_norm, "clip_value": clip_value}
        try:
            self.info = self._step_of_all(arguments)
        except (ValueError, TypeError):  # before anything was updated
            if not self._renewed():
                raise
            self.info = self._step_of_all(arguments)
        return loss

    def _step_of_all(self, arguments: dict[str, Any]) -> StepInfo:
        """Update the parameters that kernels take, and before those the others, since torch's step may still
        refuse what kernels' checks let pass."""
        kept = self._current()
        others = [[p for p in own if p.grad is not None] for own in kept.left]
        clips = arguments["clip_norm"] is not None or arguments["clip_value"] is not None
        if clips:
            left.check_whole(kept.params, kept.has_shards, arguments["clip_norm"])
        if any(others):
            if self._renewed():
                return self._step_of_all(arguments)
            for group, own in zip(self.param_groups, others, strict=True):
                self._check_left(group, own, clips)
            kept.check()
            self._step_by_torch(others, arguments["grad_scale"])
        return kept.step(kept.gradients, **arguments)

    def update(self, gradients: Mapping[int, RowGradients]) -> None:
        """Update those of the parameters whose ``id`` has a gradient here, for tables that are fused: no hook
        is called, and ``info`` stays that of the last step.

        Raises:
            TypeError: one of them is left to torch's own step.
        """
        kept = self._current()
        if not gradients.keys() <= set(map(id, kept.params)):
            raise TypeError(
                "a table that is fused is updated by torch's own step, as its group is capturable or "
                "differentiable: expected neither"
            )
        kept.step([gradients.get(id(p)) for p in kept.params])

    def _check_left(self, group: dict[str, Any], own: list[torch.Tensor], clips: bool) -> None:
        """Refuse parameters of a group that are left to torch's step, if it can't do what is asked for."""
        if own and not self.traits.in_torch:
            left.refuse(type(self).__name__, own[0])
        if clips:
            left.check_clipping(own)
        left.check_options(group, own)

    def _renewed(self) -> bool:
        """Take in what is not looked at in each step; returns whether parameters or the dtypes of gradients
        are other than they were."""
        if self._kept is None:
            return False
        if self._kept.is_outdated():
            self._kept = None
            return True
        return self._kept.meets_other_dtypes()

    def _current(self) -> Kept:
        """What the last step went on with, made anew if the optimizer has changed since."""
        for group in self.param_groups:
            if not group.keys() >= SHARED.keys():  # one that was put there by hand
                self._complete(group)
        if self._kept is not None and not self._kept.fits(self.param_groups, self.state):
            self._let_go()
        if self._kept is None:
            with torch.no_grad():
                self._kept = Kept(self.traits, self.param_groups, self.state, self)
        return self._kept

    def _let_go(self) -> None:
        if self._kept is not None:
            self._kept.catch_up()
        self._kept = None

    def _step_by_torch(self, others: list[list[torch.Tensor]], grad_scale: float) -> None:
        """Have torch's own step update these parameters of each group."""
        step = _step_of_torch(type(self))
        for p in (p for own in others for p in own):  # torch's step expects state of the parameter's dtype
            for name, value in self.state.get(p, {}).items():
                if isinstance(value, torch.Tensor) and value.ndim and value.is_floating_point():
                    self.state[p][name] = value.to(p.dtype) if p.is_floating_point() else value
        if grad_scale != 1.0:
            torch._foreach_mul_([p.grad for own in others for p in own if p.grad is not None], grad_scale)
        whole = self.param_groups
        scaling: dict[str, Any] = {
            name: vars(self).pop(name) for name in ("grad_scale", "found_inf") if name in vars(self)
        }
        self.param_groups = [
            {**group, "params": own} | ({"fused": None} if "fused" in group else {})
            for group, own in zip(whole, others, strict=True)
        ]
        try:
            step(self)
        finally:
            self.param_groups = whole
            vars(self).update(scaling)


def _step_of_torch(cls: type) -> Callable[[Any], Any]:
    """The step of torch's class that a class is made of, without the hooks, which are those of the whole
    step."""
    after = cls.__mro__[cls.__mro__.index(KernelStep) + 1 :]
    step: Any = next(vars(own)["step"] for own in after if "step" in vars(own))
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step
