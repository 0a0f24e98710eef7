"""Torch's optimizers as peers, in each version that torch has of a rule."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

try:
    import torch
except ImportError:  # then there is nothing to compare to
    torch = None  # type: ignore[assignment]

VERSIONS = {
    "torch fused": {"fused": True},
    "torch foreach": {"foreach": True},
    "torch for-loop": {"foreach": False},
}


def torch_parameters(shapes: Sequence[Any], grads: Sequence[Any], dtype: Any = None) -> list[Any]:
    """Ones, as leaves, with ``grads``, which are NumPy arrays (then shared) or torch tensors."""
    parameters = [torch.ones(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = torch.from_numpy(grad) if isinstance(grad, np.ndarray) else grad
    return parameters


def torch_optimizers(
    name: str | None,
    options: dict[str, Any],
    parameters: Callable[[], list[Any]],
    versions: Sequence[str] = tuple(VERSIONS),
) -> dict[str, Any]:
    """An optimizer ``torch.optim.<name>`` for each version that it has, each of ``parameters()`` anew.

    None without torch, or if ``name`` is None.
    """
    if torch is None or name is None:
        return {}
    found = {}
    for version in versions:
        try:
            found[version] = getattr(torch.optim, name)(parameters(), **options, **VERSIONS[version])
        except TypeError:  # no such version
            continue
    return found
