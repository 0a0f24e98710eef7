"""NAdam with the products of momenta that torch keeps, in the precision of its default dtype.

Torch multiplies the product of each parameter by the momentum of the step, so that it remembers all betas
that there were, as ``OneCycleLR`` moves them. The plain NAdam finds it from the step.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

import fastopt
from fastopt.kernels import rules
from fastopt.kernels.rule import Rule
from fastopt.kernels.rules.nadam import NAdamH, momentum_of, mu_product

PART = "part"  # the option that tells which parameters of Products a group has


def scalar_dtype() -> str:
    """The dtype that torch keeps numbers of its state in."""
    return "float64" if torch.get_default_dtype() == torch.float64 else "float32"


class Products:
    """The product of momenta of each parameter, and the hyperparameters of NAdam that follow from it.

    Those of a part that have made equally many steps have the same product, unless :meth:`differ`.

    Attributes:
        numbers: the products, which may be changed.
    """

    def __init__(self) -> None:
        self.numbers: np.ndarray = np.ones(0)
        self._counts: np.ndarray = np.zeros(0, np.int64)
        self._part_of: np.ndarray = np.zeros(0, np.int64)

    def begin(self, numbers: np.ndarray, counts: np.ndarray, part_of: np.ndarray) -> None:
        """Go on from these products, after so many steps of each parameter; ``part_of``: its part."""
        self.numbers, self._counts, self._part_of = numbers, counts.copy(), part_of

    def fold(
        self,
        step: Any,
        *,
        part: int,
        lr: float,
        betas: tuple[float, float],
        momentum_decay: float,
        eps: float,
    ) -> NAdamH:
        """The hyperparameters of a step of a part's parameters. For rows with counts of their own, and for
        steps that are made up for, the product is that of the plain NAdam."""
        product = mu_product(step, betas[0], momentum_decay)
        if not isinstance(step, np.ndarray):
            before = np.flatnonzero((self._counts == step - 1) & (self._part_of == part))
            if len(before):
                momentum = momentum_of(float(step), betas[0], momentum_decay)
                product = float(self.numbers[before[0]] * self.numbers.dtype.type(momentum))
        return NAdamH.with_product(product, step, lr, betas, momentum_decay, eps)

    def count(self, counts: np.ndarray, options: Sequence[Mapping[str, Any]]) -> None:
        """Multiply the products on to these numbers of steps, by the options of each part."""
        for part, own in enumerate(options):
            members = np.flatnonzero(self._part_of == part)
            while len(members := members[self._counts[members] < counts[members]]):
                self._counts[members] += 1
                steps = self._counts[members].astype(np.float64)
                momenta = momentum_of(steps, own["betas"][0], own["momentum_decay"])
                self.numbers[members] *= momenta.astype(self.numbers.dtype)

    def differ(self) -> bool:
        """Whether some of a part have made equally many steps, but with other betas."""
        if (self.numbers == self.numbers[:1]).all():
            return False
        pairs = np.stack([self._part_of, self._counts, self.numbers])
        return np.unique(pairs, axis=1).shape[1] != np.unique(pairs[:2], axis=1).shape[1]


class NAdamOfTorch(fastopt.NAdam):
    """NAdam with torch's products, whose groups have one more option, ``part``."""

    def __init__(self, params: Any) -> None:
        self.products = Products()
        # The kernels are those of NAdamH, which it folds.
        folded: Any = self.products
        self._rule = dataclasses.replace(rules.NADAM, hyper=folded)
        fastopt.Optimizer.__init__(
            self, params, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, momentum_decay=4e-3,
            decoupled_weight_decay=False, maximize=False, **{PART: 0},
        )  # fmt: skip

    def rule(self, options: Mapping[str, Any]) -> Rule:
        return self._rule
