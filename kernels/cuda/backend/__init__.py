"""CUDA devices behind the seam (see ``fastopt._core.backend``, which says what each name is to do)."""

from fastopt.kernels.cuda.backend.arrays import Arrays
from fastopt.kernels.cuda.backend.basics import Basics


class Cuda(Basics, Arrays):
    """The backend of one device."""
