"""The version counters of torch's tensors, which say that a tensor was written.

A graph that saved a tensor compares its counter in the backward pass, and raises RuntimeError if it has
moved on since: the numbers that it needs are gone. Kernels write to memory, of which torch knows nothing: it
has to be told. A tensor shares its counter with its views and with what ``detach`` returns, but not with what
``.data`` returns. An array that shares memory with a tensor (by ``torch.from_numpy`` or ``.numpy()``) does
not know it: writing to such an array advances no counter, as in torch and NumPy themselves.
"""

from collections.abc import Sequence
from typing import Any

from fastopt.kernels.loaded import loaded


def written(values: Sequence[Any]) -> None:
    """Advance the counters of those of ``values`` that are torch tensors: call it before they are written.

    Nothing happens to tensors made in ``torch.inference_mode``: they have no counter, as no graph saves them.
    """
    torch = loaded("torch")
    if torch is None:
        return
    # Thousands of values are of few types, and a look at each value can take longer than its update.
    are_tensors = {kind: issubclass(kind, torch.Tensor) for kind in set(map(type, values))}
    if not any(are_tensors.values()):
        return
    if not all(are_tensors.values()):
        values = [value for value in values if are_tensors[type(value)]]
    increment = torch.autograd.graph.increment_version
    try:
        increment(values)
    except (TypeError, RuntimeError):  # torch 2.4 takes one tensor at a time, and none without a counter
        for value in values:
            if not value.is_inference():
                increment(value)
