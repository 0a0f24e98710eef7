"""The parts of tables that lie on this rank, as modules."""

import zlib

import torch

from fastopt.distributed.placement import Part
from fastopt.torch.memory import mark_as_part
from fastopt.torch.modules import EmbeddingBag


def module_of_part(name: str, table: torch.nn.EmbeddingBag, part: Part) -> EmbeddingBag:
    """A module over a copy of a part of a table's weight, with the table's options; ``padding_idx`` where all
    rows are here alone. Of a table on the meta device the part is filled with first numbers, which go by the
    table's name."""
    own = part.of(table.weight.detach())
    if own.is_meta:
        weight = _drawn(name, part, table.padding_idx, own.dtype)
    else:
        weight = own.clone(memory_format=torch.contiguous_format)
    has_all_rows = part.shape[0] == table.num_embeddings
    found = EmbeddingBag(
        *part.shape,
        mode=table.mode,
        scale_grad_by_freq=table.scale_grad_by_freq,
        include_last_offset=table.include_last_offset,
        padding_idx=table.padding_idx if has_all_rows else None,
        fused=bool(getattr(table, "fused", False)),
        _weight=weight,
    )
    found.weight.requires_grad_(table.weight.requires_grad)
    mark_as_part(found.weight)
    return found.train(table.training)


def _drawn(name: str, part: Part, padding: int | None, dtype: torch.dtype) -> torch.Tensor:
    """As ``torch.nn.EmbeddingBag`` draws weights, from the seed of torch's generator and by the part's table
    and place, so that neither tables nor ranks with the same seed have the same rows."""
    table = zlib.crc32(name.encode())  # the hash of a string is another one in each process
    seed = hash((torch.initial_seed(), table, part.first_row, part.first_column))
    generator = torch.Generator().manual_seed(seed % 2**63)
    weight = torch.empty(part.shape, dtype=dtype)
    if not part.is_empty:
        weight.normal_(generator=generator)
    if padding is not None and part.first_row <= padding < part.last_row:
        weight[padding - part.first_row] = 0
    return weight
