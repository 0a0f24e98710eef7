"""A part of a tensor whose other parts lie on other ranks, for checkpoints."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class TensorPart(torch.Tensor):
    """A tensor of which one rectangle lies here, for ``torch.distributed.checkpoint`` alone, which asks by
    the methods of its protocol for checkpointable tensors what to write and to read. A DTensor can't say it:
    its parts are equally large, and all ranks have some.

    Args:
        local: the part. offsets: where it begins. shape: of the whole.

    Attributes:
        local: as given. offsets.
    """

    local: torch.Tensor
    offsets: torch.Size

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, local: torch.Tensor, offsets: Sequence[int], shape: Sequence[int]) -> "TensorPart":
        return torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=local.dtype, device=local.device
        )

    def __init__(self, local: torch.Tensor, offsets: Sequence[int], shape: Sequence[int]) -> None:
        self.local = local.detach()
        self.offsets = torch.Size(offsets)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"TensorPart(shape={tuple(self.shape)}, offsets={tuple(self.offsets)}, local={self.local})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        own = args[0]
        if func is torch.ops.aten.new_empty.default:  # for a copy, which then gets the attributes' copies
            return cls(own.local, own.offsets, args[1])
        if func is torch.ops.aten.detach.default:
            return cls(own.local, own.offsets, own.shape)
        raise NotImplementedError(f"{func} of a TensorPart: expected its use in checkpoints alone")

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=self.offsets, sizes=self.local.shape)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        if not self.local.numel():
            return []
        data = TensorWriteData(self._chunk(), TensorProperties.create_from_tensor(self.local), self.shape)
        return [WriteItem(MetadataIndex(fqn, self.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()] if self.local.numel() else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.local
