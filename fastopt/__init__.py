"""Optimizer steps at the speed of memory: dense and sparse, in place, by Numba kernels."""

__version__ = "0.1.0"

from pathlib import Path

if not (Path(__file__).parent / "kernels").is_dir():
    # In a source checkout kernels/ stands beside fastopt/; it is to be found as in an installed package.
    __path__.append(str(Path(__file__).parents[1]))

from fastopt import schedules
from fastopt._core.indices import IndexPlan
from fastopt._step.settings import StepInfo
from fastopt.buffer import FlatBuffer
from fastopt.clipping import clip_grad_norm, clip_grad_value, grad_norm
from fastopt.custom import register_rule
from fastopt.embedding import embedding, embedding_bag
from fastopt.gradients import BagGradient, IndexedSlices, SparseGradient, SumOfGradients
from fastopt.optimizer import Optimizer
from fastopt.optimizers import (
    LAMB,
    SGD,
    Adafactor,
    AdaGrad,
    Adam,
    AdamW,
    AMSGrad,
    Lion,
    NAdam,
    RAdam,
    RMSProp,
    RowwiseAdaGrad,
    RowwiseAdam,
    SparseAdam,
)
from fastopt.tables.open import open_table
from fastopt.tables.table import Table

__all__ = [
    "LAMB",
    "SGD",
    "AMSGrad",
    "AdaGrad",
    "Adafactor",
    "Adam",
    "AdamW",
    "BagGradient",
    "FlatBuffer",
    "IndexPlan",
    "IndexedSlices",
    "Lion",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSProp",
    "RowwiseAdaGrad",
    "RowwiseAdam",
    "SparseAdam",
    "SparseGradient",
    "StepInfo",
    "SumOfGradients",
    "Table",
    "clip_grad_norm",
    "clip_grad_value",
    "embedding",
    "embedding_bag",
    "grad_norm",
    "open_table",
    "register_rule",
    "schedules",
]
