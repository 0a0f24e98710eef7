"""FBGEMM's tables, which are not installed with the rest."""

from typing import Any


def embedding_bags(tables: int, rows: int, dim: int, optimizer: str, device: str) -> Any:
    """FBGEMM's operator over tables of one shape, in the memory of ``device``, "cpu" or "cuda", the backward
    of which updates them by ``optimizer``, a name of its EmbOptimType.

    Raises:
        ImportError: FBGEMM is not installed.
    """
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        EmbeddingLocation,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    location = EmbeddingLocation.HOST if device == "cpu" else EmbeddingLocation.DEVICE
    table = rows, dim, location, getattr(ComputeDevice, device.upper())
    return SplitTableBatchedEmbeddingBagsCodegen(
        [table] * tables, optimizer=getattr(EmbOptimType, optimizer), learning_rate=0.01
    )
