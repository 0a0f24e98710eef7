"""Drop-in torch optimizers: one changed import.

    from fastopt.torch import AdamW      # was: from torch.optim import AdamW

Each class is a ``torch.optim.Optimizer``, and where torch has it a subclass of torch's own, with its
arguments, parameter groups, hooks, state and checkpoints, which load in either direction. Steps are done by
the kernels of :mod:`fastopt`, which share their memory with ``optimizer.state``.
"""

from fastopt.torch.optimizers import (
    LAMB,
    SGD,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    Lion,
    NAdam,
    RAdam,
    RMSprop,
    RowwiseAdagrad,
    RowwiseAdam,
    SparseAdam,
)

__all__ = [
    "LAMB",
    "SGD",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "RowwiseAdagrad",
    "RowwiseAdam",
    "SparseAdam",
]
