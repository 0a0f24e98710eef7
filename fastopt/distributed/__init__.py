"""Tables shared out over the processes of ``torch.distributed``.

:class:`ShardedEmbeddingBagCollection` has each table whole on a rank, by rows or by columns on several, as a
:func:`plan` says. Everything travels through process groups of torch, which the caller makes.
"""

from fastopt.distributed.checkpoint import TrainingState, latest
from fastopt.distributed.clipping import clip_grad_norm_
from fastopt.distributed.collection import ShardedEmbeddingBagCollection
from fastopt.distributed.loads import Size
from fastopt.distributed.placement import ByColumns, ByRows, Whole
from fastopt.distributed.planner import plan
from fastopt.distributed.plans import Plan

__all__ = [
    "ByColumns",
    "ByRows",
    "Plan",
    "ShardedEmbeddingBagCollection",
    "Size",
    "TrainingState",
    "Whole",
    "clip_grad_norm_",
    "latest",
    "plan",
]
