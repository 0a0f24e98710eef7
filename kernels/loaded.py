"""Other libraries, which are looked at where they are loaded, and imported nowhere."""

import sys
from typing import Any

_whole: dict[str, Any] = {}  # what was found to be imported to its end


def loaded(name: str) -> Any:
    """The module of a library; None if it is not loaded, and nobody has an array of it.

    One that another thread is importing just now lacks some of its names: it counts as not loaded.
    """
    module = sys.modules.get(name)
    if module is _whole.get(name):
        return module
    if module is None or getattr(getattr(module, "__spec__", None), "_initializing", False):
        return None
    _whole[name] = module
    return module


def is_jax_array(value: Any) -> bool:
    """Whether it is an array of JAX, or what stands for one while JAX traces a function."""
    jax = loaded("jax")
    return jax is not None and isinstance(value, jax.Array)


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor of torch."""
    torch = loaded("torch")
    return torch is not None and isinstance(value, torch.Tensor)
