"""NAdam with the product of momenta that torch keeps, in the precision of its default dtype."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import fastopt
from fastopt.kernels import rules
from fastopt.kernels.rule import Rule
from fastopt.kernels.rules.nadam import NEGLIGIBLE, NAdamH, momentum_of

_BLOCK = 1024  # steps


def scalar_dtype() -> str:
    """The dtype that torch keeps numbers of its state in."""
    return "float64" if torch.get_default_dtype() == torch.float64 else "float32"


class _Products:
    """The products of the momenta up to each step, each rounded."""

    def __init__(self, beta1: float, momentum_decay: float, dtype: np.dtype) -> None:
        self._given = beta1, momentum_decay
        self._found: np.ndarray = np.ones(1, dtype)

    def up_to(self, steps: Any) -> Any:
        """Those up to a step, or to each of an array of steps."""
        most = int(np.max(steps, initial=0))
        while len(self._found) <= most and self._found[-1] > NEGLIGIBLE:
            first = len(self._found)
            new = momentum_of(np.arange(first, first + _BLOCK, dtype=np.float64), *self._given)
            chain = np.concatenate([self._found[-1:], new.astype(self._found.dtype)])
            self._found = np.concatenate([self._found, np.cumprod(chain, dtype=chain.dtype)[1:]])
        found = self._found[np.minimum(np.asarray(steps, np.int64), len(self._found) - 1)]
        return found.astype(np.float64)


@functools.lru_cache(maxsize=64)
def products_of(beta1: float, momentum_decay: float, precision: str) -> _Products:
    """The products for these options, found once."""
    return _Products(beta1, momentum_decay, np.dtype(precision))


class _HyperOfTorch(NAdamH):
    """What is folded of NAdam's options with that product."""

    __slots__ = ()

    @classmethod
    def fold(cls, step, *, lr, betas, momentum_decay, eps, **_):
        product = products_of(betas[0], momentum_decay, scalar_dtype()).up_to(step)
        return NAdamH.with_product(product, step, lr, betas, momentum_decay, eps)


RULE = dataclasses.replace(rules.NADAM, hyper=_HyperOfTorch)  # whose kernels are those of NAdamH


class NAdamOfTorch(fastopt.NAdam):
    """NAdam with torch's product."""

    def rule(self, options: Mapping[str, Any]) -> Rule:
        return RULE
