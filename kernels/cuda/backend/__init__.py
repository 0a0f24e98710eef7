"""CUDA devices behind the seam (see ``fastopt._core.backend``, which says what each name is to do)."""

from fastopt.kernels.cuda.backend.arrays import Arrays
from fastopt.kernels.cuda.backend.basics import Basics
from fastopt.kernels.cuda.backend.catch_up import CatchUp
from fastopt.kernels.cuda.backend.elementwise import Elementwise
from fastopt.kernels.cuda.backend.indices import Indices
from fastopt.kernels.cuda.backend.lookups import Lookups
from fastopt.kernels.cuda.backend.norms import Norms
from fastopt.kernels.cuda.backend.positions import Positions
from fastopt.kernels.cuda.backend.rows import Rows


class Cuda(Basics, Arrays, Rows, CatchUp, Indices, Lookups, Positions, Elementwise, Norms):
    """The backend of one device."""
