"""The optimizer that all others derive from."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from fastopt._core.backend import host
from fastopt._core.exclusive import exclusive
from fastopt._core.groups import Definition
from fastopt._core.indices import Indices
from fastopt._core.options import SHARED
from fastopt._core.parameters import Parameters, Snapshot
from fastopt._core.state import Slot
from fastopt._core.versions import written
from fastopt._step.catch_up import adopt_changed, catch_up
from fastopt._step.numbers import Conditions
from fastopt._step.plan import CapturedStep
from fastopt._step.planner import Planner
from fastopt._step.replay import next_replay
from fastopt._step.rows import find_winners
from fastopt._step.settings import StepInfo, checked_settings
from fastopt.checkpoint import files
from fastopt.checkpoint import state_dict as states
from fastopt.checkpoint.take_over import take_over
from fastopt.tables import flushing


class Optimizer(Definition):
    """Updates parameters in place, in one pass over each.

    Every optimizer shares what is said here; its own class says what it computes.

    Args:
        params: the arrays to update: one array, a sequence of arrays, a dict name -> array, a tree (dicts,
            sequences and named tuples within each other, as JAX's pytrees; None in one is no parameter), or a
            sequence of groups, dicts with the key ``params`` (any of the former), options of their own and a
            ``name`` if you like. An array in a tree is called by the path to it, as in
            "encoder.layers.3.weight". Arrays are NumPy's, torch tensors or CUDA arrays (any with the CUDA
            array interface or DLPack), in place and not copied, float32, float64, float16 or bfloat16,
            C-contiguous, writable, and none shares memory with another; or a table in files, of
            :func:`fastopt.open_table`, which has the state in files too. They may lie on several devices;
            state lies beside its parameter. Those of 16 bits are computed with in float32, and rounded to the
            nearest.
        lr: learning rate, at least 0, or a function of the step, such as
            ``1e-3 * fastopt.schedules.cosine(1000)``. Any number may be a 0-d array, read at each step.
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
        RuntimeError: from a method, while another is at work on the same optimizer.
    """

    def __init__(
        self, params: Any, shared: Mapping[str, Any] = MappingProxyType({}), /, **defaults: Any
    ) -> None:
        for name in shared:
            if name not in SHARED:
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
        self.defaults = {**defaults, **SHARED, **shared}
        self._parameters = Parameters(params, self)
        self.param_groups = [group.options for group in self._parameters.groups]
        self._planner = Planner(self._parameters, type(self).__name__)
        self.calls: dict[object, None] = {}  # see fastopt._core.exclusive
        resumed = flushing.resume(self._snapshot(), self.owner)
        if resumed.steps is not None:
            self._parameters.clock[-1] = resumed.steps
        for parameter, step in resumed.steps_of:
            parameter.step = step

    @exclusive
    def __getstate__(self) -> dict[str, Any]:
        # The planner belongs to these very arrays in memory.
        return {name: value for name, value in self.__dict__.items() if name not in ("_planner", "calls")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.calls = {}
        self._planner = Planner(self._parameters, type(self).__name__)

    @property
    def owner(self) -> Any:
        """What the tables in files among the parameters belong to, whose ``flush`` is theirs: this optimizer,
        unless it is a part of another."""
        return self

    @property
    def steps(self) -> int:
        """How many steps are finished, those that were skipped not counted."""
        return self._parameters.steps

    @property
    def state(self) -> dict[str | int, dict[str, Any]]:
        """The state arrays of each parameter by its name, or position: those that steps work on, no copies;
        none before its first gradient. A step may put others in their place."""
        return {parameter.key: dict(parameter.state) for parameter in self._parameters.all}

    @property
    def step_counts(self) -> np.ndarray:
        """How many steps each parameter has finished, in order: a copy, int64."""
        return self._parameters.clock[:-1].copy()

    @property
    def slots(self) -> dict[str | int, dict[str, Slot]]:
        """Shape, dtype and first value of each of the state arrays that a parameter has, or gets with its
        first gradient, by its name, or position."""
        return {parameter.key: parameter.slots() for parameter in self._parameters.all}

    # Step

    @exclusive
    def step(
        self,
        grads: Any,
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        grad_scale: float = 1.0,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        norm: bool = False,
    ) -> StepInfo:
        """Update all parameters in place.

        Args:
            grads: gradients in the structure of ``params``: one array, a sequence or other iterable, a dict,
                a tree, or one of these, or ``{"params": ...}`` of it, for each group; or, for groups, one
                sequence, dict or tree of all (a sequence as long as there are groups is of all if it holds no
                list or dict). Each is an array of its parameter's shape and dtype (or float32 for one of 16
                bits), :class:`fastopt.IndexedSlices` or :class:`fastopt.BagGradient` for a 2-D parameter, or
                ``None`` to leave the parameter, or all below that place of a tree, and their step counts
                alone. Several sparse ones in a list or tuple in the place of one are added up (see
                :class:`fastopt.SumOfGradients`); a sparse tensor of torch with an index for each row stands
                for its slices. They are not changed.
            clip_norm: scale all gradients by ``min(1, clip_norm / (norm + 1e-6))``, norm being the
                L2 norm over all of them, as ``torch.nn.utils.clip_grad_norm_``.
            clip_value: clip each element to [-clip_value, clip_value], as
                ``torch.nn.utils.clip_grad_value_``, after ``clip_norm`` and ``clip_row_norm``.
            grad_scale: factor on the gradients, before anything else; more than 0.
            skip_nonfinite: update nothing at all if any gradient holds NaN or infinity, or if
                the norm of all is beyond float64.
            zero_grads: set all gradients to zero once they are used, of sparse ones the values; not if the
                step is skipped.
            norm: find the norm of all gradients, as ``StepInfo.norm``, where nothing else needs it.

        Returns:
            What was done: ``norm``, ``clipped``, ``skipped``, ``nonfinite``; and ``lr``. Work of a device is
            waited for by ``skip_nonfinite``, and when the first two are asked for; by nothing else.

        Raises:
            RuntimeError: the step can't be captured in a graph (see :meth:`before_replay`).
            ValueError, TypeError: an argument or an option does not fit; nothing has changed then.

        All parameters with dense gradients that share a rule and dtypes are updated in one launch, and so are
        all tables with sparse ones, of which each row named gets the sum of its gradients and one update;
        what other rows see is chosen by the option ``rows``.
        """
        settings = checked_settings(clip_norm, clip_value, grad_scale, skip_nonfinite, zero_grads, norm)
        parameters, planner = self._parameters, self._planner
        parameters.check_unchanged(self.param_groups, self.owner)
        options = planner.options(self)
        plan, entries, rows = planner.plan(grads, options, zero_grads)
        capturing = parameters.capturing
        if capturing:
            plan.check_capture(settings, rows)
        if options.changed:
            adopt_changed(parameters, options, self)
        if rows:
            find_winners(rows)
        info, scale, factor = StepInfo(rates=options.rates), settings.grad_scale, None
        if settings.need_norm:
            info, scale, factor = plan.scaled(settings, entries, rows, options.rates)
            if info.skipped:
                return info
        changed = plan.written_with(entries) if zero_grads else plan.written
        if capturing:
            alive = CapturedStep(settings, changed, info, factor)
            calls = plan.capture(alive)
        else:
            conditions = Conditions(options.rates, scale, settings.limit)
            calls, alive = plan.prepare(rows, conditions, zero_grads, factor)
        if changed:
            written(changed)
        host().run(calls)  # the one place where a step changes parameters, state and counts
        del alive
        return info

    @exclusive
    def before_replay(self) -> None:
        """Make the step that was captured in a CUDA graph ready to be replayed once, and count it.

        :meth:`step`, called while a graph is captured (``with torch.cuda.graph(graph): ...``), puts its work
        into the graph and updates nothing; it has to be like an ordinary step before it, with dense gradients
        on devices. Call this before each replay: learning rates, schedules and counts go on as in ordinary
        steps, while its arguments stay. As long as the graph is replayed, the optimizer has to live, and
        parameters and gradients stay where they are: clear those by ``zero_grads``, not by setting them anew.

        Raises:
            RuntimeError: no step was captured, or arrays, options or kinds of gradients changed since.
        """
        self._parameters.check_unchanged(self.param_groups, self.owner)
        host().run(next_replay(self._parameters, self._planner, self))

    @exclusive
    def catch_up(self, table: Any, indices: Any) -> None:
        """With ``rows="dense"``, let rows of a table take the steps that they have missed, in place.

        Args:
            table: a parameter of this optimizer.
            indices: the rows, as :func:`fastopt.embedding` takes them.

        Raises:
            ValueError: ``table`` is no parameter of this optimizer, or an index is out of range.
        """
        found = self._parameters.of(table)
        catch_up(found, Indices.checked(indices, "indices", found.rows))

    @exclusive
    def flush(self) -> None:
        """Bring every row up to date, and tables in files to the disk.

        With ``rows="dense"`` all rows take the steps that they have missed: call it before you read a
        table directly, to evaluate or export it. A table of :func:`fastopt.open_table` has from now on
        what a crash goes back to; all tables of the optimizer together.

        Raises:
            OSError: a table's files can't be written; its former flush counts.
        """
        for parameter in self._parameters.all:
            if parameter.in_files is None or not parameter.in_files.closed:
                catch_up(parameter)
        flushing.flush(self._snapshot())

    def _snapshot(self) -> Snapshot:
        return Snapshot(type(self).__name__, self.steps, self._parameters.groups, self._parameters.all)

    # State

    @exclusive
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
        self._planner.adopt_where_behind(self)
        return states.state_dict(self._snapshot())

    @exclusive
    def load_state_dict(self, state_dict: Mapping[str, Any], *, options: bool = True) -> None:
        """Restore what :meth:`state_dict` returned, copied; ``options`` as for :meth:`load`.

        The state of a table in files may be its ``step`` alone: then its arrays stay as the files have them.

        Raises:
            ValueError, TypeError: the state is of another optimizer, of other parameters, shapes or
                dtypes, or has options out of range. Nothing has changed then.
        """
        self._take_over(states.checked_state(self._snapshot(), self, state_dict, options=options))

    def _take_over(self, restored: states.Restored) -> None:
        self._planner.forget()
        take_over(self._parameters, restored, self)

    @exclusive
    def save(self, path: Any, *, params: bool = False, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the state to a safetensors file, atomically: a crash leaves the old file whole.

        Args:
            path: the file, or a link to it, which stays one. A schedule as lr is stored by its ``repr``.
            params: write the parameters too, so that the file is a whole checkpoint.
            metadata: a dict of anything that JSON holds; :meth:`load` returns it, keys as strings.

        Raises:
            OSError: the file can't be written.
            TypeError: JSON can't hold ``metadata``.
        """
        self._planner.adopt_where_behind(self)
        files.save(self._snapshot(), self, path, params=params, metadata=metadata)

    @exclusive
    def load(self, path: Any, *, params: bool | None = None, options: bool = True) -> dict[str, Any]:
        """Restore what :meth:`save` wrote to ``path``, all of it, and return its ``metadata``.

        Args:
            params: True: the file must hold parameters. False: keep your own.
            options: False: keep your own, such as a new lr or a longer schedule; but ``rows``,
                ``step_per_row``, ``state_dtype``, ``master_weights`` and the state must be the same. True: an
                lr that is a schedule is not replaced by a number or another that a file names: it raises.

        Raises:
            OSError: the file can't be read.
            ValueError, TypeError: it is damaged, or of another optimizer or other parameters. Nothing has
                changed then.
        """
        restored, metadata = files.load(self._snapshot(), self, path, params=params, options=options)
        self._take_over(restored)
        return metadata

    def __repr__(self) -> str:
        lines = []
        for group in self._parameters.groups:
            size = sum(parameter.size for parameter in self._parameters.of_group(group))
            lines.append(group.described(size, self.defaults))
        body = lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines) + "\n"
        return f"{type(self).__name__}({body})"
