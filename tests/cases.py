"""Every optimizer in every variant, with its reference and its counterpart in torch.optim."""

from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
import pytest
import reference
from hypothesis import strategies as st

import fastopt

needs_two_threads = pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread")

RANGES = {
    "lr": (1e-4, 0.1),
    "momentum": (0.1, 0.99),
    "dampening": (0.1, 0.9),
    "lr_decay": (0.001, 0.5),
    "momentum_decay": (0.001, 0.5),
    "initial_accumulator_value": (0.01, 1.0),
    "eps": (1e-10, 1e-3),
    # a small alpha leaves the variance v - mean^2 of a centered RMSProp few correct digits
    "alpha": (0.8, 0.999),
    "beta1": (0.0, 0.99),
    "beta2": (0.5, 0.9999),
    "weight_decay": (1e-3, 0.1),
}


@dataclass(frozen=True)
class Case:
    """``optimizer(**options)`` with the ``free`` hyperparameters drawn from RANGES.

    rule: the function in reference.py. torch: the class in torch.optim, or None.
    fixed: options of both; torch_own, reference_own: of torch's and of the reference's alone.
    decoupled: whether weight decay is.
    """

    name: str
    optimizer: str
    rule: str
    torch: str | None
    free: tuple[str, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)
    torch_own: dict[str, Any] = field(default_factory=dict)
    reference_own: dict[str, Any] = field(default_factory=dict)
    decoupled: bool = False

    def __str__(self):
        return self.name

    def make(self, params, options):
        return getattr(fastopt, self.optimizer)(params, **options)

    def reference(self, p, options):
        """``p`` under the reference."""
        options = {k: v for k, v in options.items() if k not in ("decoupled_weight_decay",)}
        if self.rule == "sgd":
            options.pop("momentum", None)
        own = {**options, **self.reference_own, "decoupled": self.decoupled}
        return reference.Tracked(getattr(reference, self.rule), p, own)

    def _options(self, numbers, maximize, weight_decay):
        options = {**self.fixed, "maximize": maximize}
        for name, value in numbers.items():
            if name not in ("beta1", "beta2", "weight_decay"):
                options[name] = value
        if "beta1" in numbers:
            options["betas"] = numbers["beta1"], numbers["beta2"]
        options["weight_decay"] = numbers["weight_decay"] if weight_decay else 0.0
        return options

    @property
    def drawn(self):
        return ("lr", "weight_decay", *self.free)

    def options(self, rng, weight_decay):
        """Random options; ``weight_decay`` says whether there is some."""
        numbers = {name: float(rng.uniform(*RANGES[name])) for name in self.drawn}
        return self._options(numbers, bool(rng.integers(2)), weight_decay)

    def strategy(self, weight_decay):
        """The same as a strategy."""
        numbers = st.fixed_dictionaries({name: st.floats(*RANGES[name]) for name in self.drawn})
        return st.builds(self._options, numbers, st.booleans(), st.just(weight_decay))


ADAM = ("beta1", "beta2", "eps")
ADAGRAD = ("lr_decay", "initial_accumulator_value", "eps")
RMSPROP = ("alpha", "eps")

CASES = [
    Case("sgd", "SGD", "sgd", "SGD"),
    Case("momentum", "SGD", "momentum", "SGD", ("momentum",)),
    Case("dampening", "SGD", "momentum", "SGD", ("momentum", "dampening")),
    Case("nesterov", "SGD", "momentum", "SGD", ("momentum",), {"nesterov": True}),
    Case("adagrad", "AdaGrad", "adagrad", "Adagrad", ("eps",)),
    Case("adagrad_decay", "AdaGrad", "adagrad", "Adagrad", ADAGRAD),
    Case("rowwise_adagrad", "RowwiseAdaGrad", "rowwise_adagrad", None, ADAGRAD),
    Case("rowwise_adagrad_decoupled", "RowwiseAdaGrad", "rowwise_adagrad", None, ("eps",),
         {"decoupled_weight_decay": True}, decoupled=True),
    Case("rmsprop", "RMSProp", "rmsprop", "RMSprop", RMSPROP),
    Case("rmsprop_momentum", "RMSProp", "rmsprop", "RMSprop", (*RMSPROP, "momentum")),
    Case("rmsprop_centered", "RMSProp", "rmsprop", "RMSprop", RMSPROP, {"centered": True}),
    Case("rmsprop_centered_momentum", "RMSProp", "rmsprop", "RMSprop",
         (*RMSPROP, "momentum"), {"centered": True}),
    Case("adam", "Adam", "adam", "Adam", ADAM),
    Case("adam_amsgrad", "Adam", "adam", "Adam", ADAM, {"amsgrad": True}),
    Case("amsgrad", "AMSGrad", "adam", "Adam", ADAM, torch_own={"amsgrad": True},
         reference_own={"amsgrad": True}),
    Case("adamw", "AdamW", "adam", "AdamW", ADAM, decoupled=True),
    Case("adamw_amsgrad", "AdamW", "adam", "AdamW", ADAM, {"amsgrad": True}, decoupled=True),
    Case("sparse_adam", "SparseAdam", "sparse_adam", None, ADAM),
    Case("rowwise_adam", "RowwiseAdam", "rowwise_adam", None, ADAM),
    Case("rowwise_adam_decoupled", "RowwiseAdam", "rowwise_adam", None, ADAM,
         {"decoupled_weight_decay": True}, decoupled=True),
    Case("radam", "RAdam", "radam", "RAdam", ADAM),
    Case("radam_decoupled", "RAdam", "radam", "RAdam", ADAM, {"decoupled_weight_decay": True},
         decoupled=True),
    Case("nadam", "NAdam", "nadam", "NAdam", (*ADAM, "momentum_decay")),
    Case("nadam_decoupled", "NAdam", "nadam", "NAdam", (*ADAM, "momentum_decay"),
         {"decoupled_weight_decay": True}, decoupled=True),
    # betas of few bits, with which the direction is exact, its sign included
    Case("lion", "Lion", "lion", None, fixed={"betas": (0.75, 0.25)}, decoupled=True),
]  # fmt: skip

BY_NAME = {case.name: case for case in CASES}

# One for each rule that has kernels of its own.
RULES = [BY_NAME[name] for name in (
    "sgd", "dampening", "adagrad_decay", "rowwise_adagrad", "rmsprop", "rmsprop_momentum",
    "rmsprop_centered", "rmsprop_centered_momentum", "adam", "amsgrad", "sparse_adam", "rowwise_adam",
    "radam", "nadam", "lion",
)]  # fmt: skip


def has_weight_decay(case, dtype):
    """Whether tests that go over all cases use weight decay.

    With and without it a kernel is compiled apart, and so it is for each dtype; the loop and the
    rule being the same, two of the four pairs tell as much, with Adam and AdamW for the others.
    """
    return np.dtype(dtype) == np.float64


COMBINATIONS = [(case, dtype, has_weight_decay(case, dtype)) for case in CASES
                for dtype in (np.float32, np.float64)]  # fmt: skip
COMBINATIONS += [(BY_NAME[name], dtype, not has_weight_decay(BY_NAME[name], dtype))
                 for name in ("adam", "adamw") for dtype in (np.float32, np.float64)]  # fmt: skip
IDS = [f"{case}-{np.dtype(dtype)}-{'decay' if decay else 'plain'}" for case, dtype, decay in COMBINATIONS]

# Sparse gradients take each rule through the same loops, which take a second or two to compile for each: with
# weight decay, and in parallel, these rules alone, by element and by row.
DECAYED = [BY_NAME[name] for name in (
    "momentum", "adam", "adamw", "rowwise_adagrad", "rowwise_adagrad_decoupled",
)]  # fmt: skip
SPARSE = [combination for combination in zip(COMBINATIONS, IDS, strict=True)
          if not combination[0][2] or combination[0][0] in DECAYED]  # fmt: skip
SPARSE_COMBINATIONS, SPARSE_IDS = zip(*SPARSE, strict=True)
PARALLEL_SPARSE = [BY_NAME[name] for name in (
    "sgd", "dampening", "rowwise_adagrad", "adam", "amsgrad", "rowwise_adam",
)]  # fmt: skip


def gradient(rng, shape, dtype):
    """Random multiples of 1/64, few enough bits for sums of float32 duplicates to be exact."""
    return np.asarray(np.rint(rng.standard_normal(shape) * 64) / 64, dtype)


def parameter(rng, shape, dtype):
    return np.asarray(rng.standard_normal(shape), dtype)
