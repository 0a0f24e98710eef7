"""Kernels for CUDA GPUs; needs the ``cuda`` extra."""
