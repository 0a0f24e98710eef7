"""Master weights: the float32 copies of parameters of 16 bits that kernels update, and round those from."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastopt._core.state import MASTER
from fastopt.torch.memory import local


class Masters:
    """Of parameters that have some: what was written to these parameters since the last step is taken over.

    A model's ``load_state_dict``, ``init`` functions and whatever else writes in place advances the version
    counter of a tensor; ``.data =`` puts it over other memory. Only what is written through ``p.data`` goes
    unseen: it has a counter of its own.

    Args:
        params: the parameters. state: of the torch optimizer, where masters are found.
    """

    def __init__(self, params: Sequence[Any], state: Mapping[Any, dict[str, Any]]) -> None:
        self._params = params
        self._state = state
        self._seen: list[tuple[int, int]] = [(-1, 0)] * len(params)  # of masters that were loaded nothing is

    def follow(self) -> None:
        """Take over what was written since :meth:`remember`. Elements that are what their masters are
        rounded to leave these as they are."""
        with torch.no_grad():
            for p, seen in zip(self._params, self._seen, strict=True):
                if _written(p) != seen and MASTER in self._state.get(p, {}):
                    own, master = local(p), local(self._state[p][MASTER])
                    rounded = master.to(own.dtype)
                    master.copy_(torch.where(rounded == own, master, own.to(master.dtype)))

    def remember(self) -> None:
        """Take parameters as they are for what steps have made of them."""
        if self._params:
            with torch.no_grad():
                self._seen = [*map(_written, self._params)]


def _written(p: Any) -> tuple[int, int]:
    """What changes when a parameter is written, and where it lies."""
    own = local(p)
    return 0 if own.is_inference() else own._version, own.data_ptr()
