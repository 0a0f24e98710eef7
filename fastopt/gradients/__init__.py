"""The kinds of sparse gradients, and what kernels see of them."""

from fastopt.gradients.bags import BagGradient
from fastopt.gradients.protocol import SparseGradient, SumOfGradients
from fastopt.gradients.slices import IndexedSlices

__all__ = ["BagGradient", "IndexedSlices", "SparseGradient", "SumOfGradients"]
