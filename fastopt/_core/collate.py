"""What torch's DataLoader makes of ours: its default collate refuses all types that are not in a table of its
own, where ours are entered when torch is loaded and there is something to collate."""

from collections.abc import Callable, Sequence
from typing import Any

from fastopt.kernels.loaded import loaded


def let_torch_collate(kind: type, joined: Callable[[Sequence[Any]], Any]) -> None:
    """Have torch's default collate call ``joined`` with what items of a batch have of ``kind``; nothing if
    torch is not loaded."""
    collate = loaded("torch.utils.data._utils.collate")
    if collate is not None and kind not in collate.default_collate_fn_map:
        collate.default_collate_fn_map[kind] = lambda batch, *, collate_fn_map=None: joined(batch)
