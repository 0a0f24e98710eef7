"""The optimizers, a file a family.

Arguments, defaults and results are those of torch.optim 2.13 for every optimizer that torch has; a docstring
says where that differs from the paper. The formulas are computed by ``fastopt.kernels.rules``. In the
docstrings g is the gradient, p the parameter and t the number of its step, 1 being the first; all operations
are element-wise. The options that all optimizers share are explained by :class:`fastopt.Optimizer`.
"""

from fastopt.optimizers.adafactor import Adafactor
from fastopt.optimizers.adagrad import AdaGrad, RowwiseAdaGrad
from fastopt.optimizers.adam import Adam, AdamW, AMSGrad, RowwiseAdam, SparseAdam
from fastopt.optimizers.lamb import LAMB
from fastopt.optimizers.lion import Lion
from fastopt.optimizers.nadam import NAdam
from fastopt.optimizers.radam import RAdam
from fastopt.optimizers.rmsprop import RMSProp
from fastopt.optimizers.sgd import SGD

__all__ = [
    "LAMB", "SGD", "AMSGrad", "AdaGrad", "Adafactor", "Adam", "AdamW", "Lion", "NAdam", "RAdam", "RMSProp",
    "RowwiseAdaGrad", "RowwiseAdam", "SparseAdam",
]  # fmt: skip
