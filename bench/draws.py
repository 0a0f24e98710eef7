"""Indices as they are in practice, and the bytes that work on them moves."""

import numpy as np


def draw(rng: np.random.Generator, kind: str, rows: int, count: int) -> np.ndarray:
    """Indices uniform, or with a popularity of rank**-1.05 over shuffled rows."""
    if kind == "uniform":
        return rng.integers(0, rows, count)
    weights = np.arange(1, rows + 1) ** -1.05
    return rng.permutation(rows)[rng.choice(rows, count, p=weights / weights.sum())]


def update_bytes(dim: int, indices: np.ndarray, arrays: int, gradients: int | None = None) -> int:
    """Each gradient row read (one for each index if not said), each distinct row of so many arrays read and
    written, float32."""
    count = indices.size if gradients is None else gradients
    return 4 * dim * (count + 2 * arrays * np.unique(indices).size)
