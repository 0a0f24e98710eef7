"""Drop-in torch optimizers: one changed import.

    from fastopt.torch import AdamW      # was: from torch.optim import AdamW

Each class is a ``torch.optim.Optimizer``, and where torch has it a subclass of torch's own, with its
arguments, parameter groups, hooks, state and checkpoints, which load in either direction. Steps are done by
the kernels of :mod:`fastopt`, which share their memory with ``optimizer.state``.

:class:`EmbeddingBag` and :class:`Embedding` are torch's modules with lookups of :mod:`fastopt`, and gradients
that are never made: ``weight.grad`` is a :class:`RowGradients`, what was looked up and what came back.
:class:`EmbeddingBagCollection` looks many tables up at once. ``EmbeddingBag.from_table`` takes a table in
files, of :func:`fastopt.open_table`.
"""

from fastopt.torch.collection import EmbeddingBagCollection
from fastopt.torch.modules import Embedding, EmbeddingBag
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
from fastopt.torch.row_gradients import RowGradients

__all__ = [
    "LAMB",
    "SGD",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Embedding",
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "RowGradients",
    "RowwiseAdagrad",
    "RowwiseAdam",
    "SparseAdam",
]
