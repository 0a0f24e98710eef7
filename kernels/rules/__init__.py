"""Every update rule, once: a scalar function that reads like the paper's formula.

A rule takes ``(h, p, g, *slots)``: the folded hyperparameters of one launch, one element of the
parameter, of its gradient and of each state slot; it returns the new ``(p, *slots)``. Dense and
sparse kernels on the CPU and the GPU all call it, in float32 or float64.

- What depends on the step alone (bias corrections, products with the learning rate) is folded
  on the host in float64, by the ``fold`` of the rule's NamedTuple, and cast once.
- Rules hold no literals: numbers in the code are 64 bits wide and would promote float32 arithmetic.
  (What is computed once for a whole array is in float64, and may hold them.)
- A slot that a variant does without is ``None``; its branch is dropped at compile time.

In the formulas, g is the gradient, scaled and clipped and with an L2 penalty if there is one, p the
parameter, t the step (1 for the first), and all operations are element-wise. Where torch.optim 2.13
differs from the paper, torch is followed and the docstring says so.

Each file has a family of rules, and registers them; an optimizer needs no other file of the kernels.
"""

from fastopt.kernels.rules.adafactor import ADAFACTOR
from fastopt.kernels.rules.adagrad import ADAGRAD, ROWWISE_ADAGRAD
from fastopt.kernels.rules.adam import ADAM, AMSGRAD, ROWWISE_ADAM, SPARSE_ADAM
from fastopt.kernels.rules.lamb import LAMB
from fastopt.kernels.rules.lion import LION
from fastopt.kernels.rules.nadam import NADAM
from fastopt.kernels.rules.radam import RADAM
from fastopt.kernels.rules.rmsprop import (
    CENTERED_RMSPROP,
    CENTERED_RMSPROP_MOMENTUM,
    RMSPROP,
    RMSPROP_MOMENTUM,
)
from fastopt.kernels.rules.sgd import MOMENTUM, SGD

__all__ = [
    "ADAFACTOR",
    "ADAGRAD",
    "ADAM",
    "AMSGRAD",
    "CENTERED_RMSPROP",
    "CENTERED_RMSPROP_MOMENTUM",
    "LAMB",
    "LION",
    "MOMENTUM",
    "NADAM",
    "RADAM",
    "RMSPROP",
    "RMSPROP_MOMENTUM",
    "ROWWISE_ADAGRAD",
    "ROWWISE_ADAM",
    "SGD",
    "SPARSE_ADAM",
]
