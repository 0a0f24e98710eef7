"""CUDA devices behind the seam (see ``fastopt._core.backend``, which says what each name is to do)."""

from fastopt.kernels.cuda.backend.arrays import Arrays
from fastopt.kernels.cuda.backend.basics import Basics
from fastopt.kernels.cuda.backend.catch_up import CatchUp
from fastopt.kernels.cuda.backend.indices import Indices
from fastopt.kernels.cuda.backend.norms import Norms


class Cuda(Basics, Arrays, Indices, Norms, CatchUp):
    """The backend of one device."""
