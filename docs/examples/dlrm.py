"""A recommendation model trained by torch, and the same by fastopt: two lines of the builder differ. Tables
that are looked up together are faster, and a few lines more.

    python docs/examples/dlrm.py                # each of the three, on the same batches
    python docs/examples/dlrm.py --bags 20      # twenty lookups a feature in place of one
    python docs/examples/dlrm.py --optimizer adam --steps 10

The model is a DLRM (Naumov et al. 2019, "Deep Learning Recommendation Model for Personalization and
Recommendation Systems"): each categorical feature has an embedding table, whose rows are added up for the ids
of a sample; dense features go through a bottom MLP; the dot products of all pairs of these vectors, and the
dense one itself, go through a top MLP to the logarithm of the odds of a click.

The batches have the shape of Criteo's: 26 categorical features, of a thousand to a million ids that follow a
power law, 13 dense features, and a click or none. They are made below, with a truth that can be learned.

With SparseAdam the losses are the same: in float64 to the last bits, in float32 until rounding has been
amplified, after some dozens of steps, when torch's own losses in float32 and float64 have parted as far. One
Adam for all, ``--optimizer adam``, is another algorithm than torch's: it leaves the rows that were not looked
up as they are, where torch's moves all rows of all tables in each step.
"""

import itertools
import time
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import torch
import typer

import fastopt.torch

DENSE = 13
ZIPF = 1.05  # The id of rank k is drawn about as often as k ** -ZIPF says.


class Optimizer(StrEnum):
    """sparse: SparseAdam for the tables, Adam for the rest. adam: one Adam for all."""

    sparse = "sparse"
    adam = "adam"


# Before: torch


def torch_model(sizes, dim, lr, optimizer):
    torch.manual_seed(0)
    tables = [torch.nn.EmbeddingBag(rows, dim, mode="sum", sparse=optimizer == "sparse") for rows in sizes]
    model = DLRM(Tables(tables), dim)
    optim = torch.optim
    if optimizer == "adam":
        return model, [optim.Adam(model.parameters(), lr=lr)]
    tables, others = model.tables.parameters(), model.others()
    return model, [optim.SparseAdam(tables, lr=lr), optim.Adam(others, lr=lr)]


# After: fastopt


def fastopt_model(sizes, dim, lr, optimizer):
    torch.manual_seed(0)
    tables = [fastopt.torch.EmbeddingBag(rows, dim, mode="sum") for rows in sizes]
    model = DLRM(Tables(tables), dim)
    optim = fastopt.torch
    if optimizer == "adam":
        return model, [optim.Adam(model.parameters(), lr=lr)]
    tables, others = model.tables.parameters(), model.others()
    return model, [optim.SparseAdam(tables, lr=lr), optim.Adam(others, lr=lr)]


def together_model(sizes, dim, lr, optimizer):
    """The same, whose tables are a collection."""
    model, optimizers = fastopt_model(sizes, dim, lr, optimizer)
    model.tables = Together(model.tables.tables)
    return model, optimizers


# The model


class Tables(torch.nn.Module):
    """An embedding table for each categorical feature."""

    def __init__(self, tables):
        super().__init__()
        self.tables = torch.nn.ModuleList(tables)
        for table in tables:
            bound = table.num_embeddings**-0.5
            torch.nn.init.uniform_(table.weight, -bound, bound)

    def forward(self, indices, offsets):
        """The sums of rows, [batch, dim] of each table, for ids and the offsets of samples in them."""
        return [table(*own) for table, *own in zip(self.tables, indices, offsets, strict=True)]


class Together(torch.nn.Module):
    """The same tables, one lookup for all."""

    def __init__(self, tables):
        super().__init__()
        self.tables = fastopt.torch.EmbeddingBagCollection({str(k): table for k, table in enumerate(tables)})

    def forward(self, indices, offsets):
        """The sums of rows, [batch, dims of all tables], in a list."""
        ids = zip(self.tables.features, zip(indices, offsets, strict=True), strict=True)
        return [self.tables(dict(ids))]


class DLRM(torch.nn.Module):
    def __init__(self, tables, dim):
        super().__init__()
        self.tables = tables
        self.bottom = mlp(DENSE, 512, 256, dim)
        vectors = 1 + len(list(tables.parameters()))
        self.first, self.second = torch.triu_indices(vectors, vectors, 1)  # all pairs
        self.top = torch.nn.Sequential(mlp(dim + len(self.first), 512, 256), torch.nn.Linear(256, 1))

    def forward(self, dense, indices, offsets):
        dense = self.bottom(dense)
        vectors = torch.cat([dense, *self.tables(indices, offsets)], dim=1).unflatten(1, (-1, dense.shape[1]))
        products = vectors @ vectors.transpose(1, 2)
        return self.top(torch.cat([dense, products[:, self.first, self.second]], dim=1)).squeeze(1)

    def others(self):
        """The parameters that are not tables."""
        return [*self.bottom.parameters(), *self.top.parameters()]


def mlp(*sizes):
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers)


# Data


class Batch(NamedTuple):
    """dense: [batch, 13]. indices: int64 [batch * bags] of each feature, those of the first sample first.
    offsets: int64 [batch] of each feature, where samples begin there. clicks: [batch], 0 or 1."""

    dense: torch.Tensor
    indices: list[torch.Tensor]
    offsets: list[torch.Tensor]
    clicks: torch.Tensor


class Clicks:
    """Batches of a made-up truth: ids and dense features have hidden vectors, whose mean over a sample,
    (a, b, c), makes the odds of a click."""

    def __init__(self, sizes, batch, bags):
        self.sizes, self.batch, self.bags = sizes, batch, bags
        rng = np.random.default_rng(1)
        self.hidden = [rng.standard_normal((rows, 3), dtype=np.float32) for rows in sizes]
        self.hidden_dense = rng.standard_normal((DENSE, 3), dtype=np.float32)

    def batches(self, steps) -> Iterator[Batch]:
        """The same ones at each call."""
        rng = np.random.default_rng(2)
        offsets = torch.arange(0, self.batch * self.bags, self.bags)
        for _ in range(steps):
            dense = rng.standard_normal((self.batch, DENSE), dtype=np.float32)
            indices = [self.draw(rng, rows) for rows in self.sizes]
            hidden = dense @ self.hidden_dense / DENSE**0.5
            for own, rows in zip(indices, self.hidden, strict=True):
                hidden += rows[own].reshape(self.batch, self.bags, 3).sum(1) / self.bags**0.5
            a, b, c = hidden.T / (1 + len(indices)) ** 0.5
            clicks = rng.random(self.batch) < 1 / (1 + np.exp(-2 * (a + b * c)))
            yield Batch(
                torch.tensor(dense, dtype=torch.get_default_dtype()),
                [torch.from_numpy(own) for own in indices],
                [offsets] * len(indices),
                torch.tensor(clicks, dtype=torch.get_default_dtype()),
            )

    def draw(self, rng, rows):
        """Ids of a power law: a rank, by the inverse of its distribution, and the ids of ranks scattered over
        the table."""
        u = rng.random(self.batch * self.bags)
        ranks = (1 + u * ((rows + 1.0) ** (1 - ZIPF) - 1)) ** (1 / (1 - ZIPF))
        return (np.minimum(ranks.astype(np.int64), rows) - 1) * 2_654_435_761 % rows


# Training


def train(model, optimizers, batches):
    """The loss of each batch, and the seconds that each took."""
    losses, seconds = [], []
    for dense, indices, offsets, clicks in batches:
        began = time.perf_counter()
        for opt in optimizers:
            opt.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(dense, indices, offsets), clicks)
        loss.backward()
        for opt in optimizers:
            opt.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    return losses, seconds


def main(
    optimizer: Optimizer = Optimizer.sparse,
    steps: int = 80,
    batch: int = 1_024,
    bags: int = 1,
    tables: int = 26,
    largest: int = 1_000_000,
    dim: int = 64,
    lr: float = 1e-3,
):
    """Train all three and print their losses; returns them by name."""
    sizes = np.geomspace(max(largest // 1_000, 10), largest, tables).astype(int).tolist()
    data = Clicks(sizes, batch, bags)
    curves = {}
    builders = {"torch": torch_model, "fastopt": fastopt_model, "together": together_model}
    for name, build in builders.items():
        model, optimizers = build(sizes, dim, lr, optimizer)
        curves[name], seconds = train(model, optimizers, data.batches(steps))
        print(f"{name}: {1e3 * np.median(seconds):.1f} ms a step")
        del model, optimizers  # before the next one takes its memory
    print(f"{'step':>6}", *(f"{name:>9}" for name in curves))
    for k in range(0, steps, max(1, steps // 10)):
        print(f"{k:6}", *(f"{losses[k]:9.5f}" for losses in curves.values()))
    return curves


if __name__ == "__main__":
    typer.run(main)
