"""Ops that compilers of torch leave as they are."""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("fastopt", "FRAGMENT")


def opaque(schema: str, looks_like: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make a function an op.

    Args:
        schema: the op's, in torch's notation. looks_like: takes arguments that have no numbers, and returns
            results of the right shapes and dtypes, without theirs.
    """

    def made(function: Callable[..., Any]) -> Any:
        name = _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastopt::{name}", looks_like, lib=_library)
        return getattr(torch.ops.fastopt, name)

    return made
