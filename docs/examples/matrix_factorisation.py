"""Ratings as products of a vector of the user and one of the item, trained by torch's modules and by NumPy.

    python docs/examples/matrix_factorisation.py

Koren, Bell & Volinsky 2009, "Matrix Factorization Techniques for Recommender Systems", equation 4: a rating
is the mean of all plus what the user and the item add to it plus the dot product of their vectors. The
ratings are made below, of such a truth and noise, so that the best possible error is known: the noise's.

A batch names many users and items several times. The gradient of each rating alone is enough, as autograd or
``IndexedSlices`` hand it over: a row named several times gets the sum of its gradients, and one update.
"""

from typing import NamedTuple

import numpy as np
import torch
import typer

import fastopt
import fastopt.torch

MEAN, NOISE, RANK = 3.5, 0.5, 4  # of the truth


class Ratings(NamedTuple):
    """users, items: int64 [ratings]. values: float32 [ratings]."""

    users: np.ndarray
    items: np.ndarray
    values: np.ndarray

    def batches(self, size, seed):
        """All ratings once, in random order."""
        order = np.random.default_rng(seed).permutation(len(self.values))
        for first in range(0, len(order), size):
            yield Ratings(*(column[order[first : first + size]] for column in self))


def make_ratings(users, items, count):
    """Ratings for training and a tenth as many for the test, of the same truth."""
    rng = np.random.default_rng(0)
    vectors = [rng.normal(0, RANK**-0.25, (rows, RANK)) for rows in (users, items)]
    biases = [rng.normal(0, 0.5, rows) for rows in (users, items)]

    def draw(number):
        u, i = rng.integers(0, users, number), rng.integers(0, items, number)
        values = MEAN + biases[0][u] + biases[1][i] + (vectors[0][u] * vectors[1][i]).sum(1)
        return Ratings(u, i, (values + rng.normal(0, NOISE, number)).astype(np.float32))

    return draw(count), draw(count // 10)


def start(users, items, dim):
    """Vectors and biases of users and items before training: four tables."""
    rng = np.random.default_rng(1)
    vectors = [rng.normal(0, 0.1, (rows, dim)).astype(np.float32) for rows in (users, items)]
    return [*vectors, np.zeros((users, 1), np.float32), np.zeros((items, 1), np.float32)]


# With torch


class Factors(torch.nn.Module):
    def __init__(self, tables):
        super().__init__()
        tables = [fastopt.torch.Embedding.from_pretrained(torch.tensor(own), freeze=False) for own in tables]
        self.user, self.item, self.user_bias, self.item_bias = tables

    def forward(self, users, items):
        product = (self.user(users) * self.item(items)).sum(1)
        return MEAN + self.user_bias(users)[:, 0] + self.item_bias(items)[:, 0] + product


def train_torch(tables, ratings, test, epochs, batch, lr):
    """The error on the test's ratings after each epoch."""
    model = Factors(tables)
    opt = fastopt.torch.Adam(model.parameters(), lr=lr)
    errors = []
    for epoch in range(epochs):
        for part in ratings.batches(batch, epoch):
            users, items, values = map(torch.from_numpy, part)
            opt.zero_grad()
            (model(users, items) - values).square().mean().backward()
            opt.step()
        with torch.no_grad():
            users, items, values = map(torch.from_numpy, test)
            errors.append((model(users, items) - values).square().mean().sqrt().item())
    return errors


# With NumPy


def train_numpy(tables, ratings, test, epochs, batch, lr):
    """The same, with gradients by hand; the tables are updated in place."""
    opt = fastopt.Adam(tables, lr=lr)
    errors = []
    for epoch in range(epochs):
        for part in ratings.batches(batch, epoch):
            vectors, error = looked_up(tables, part)
            slope = (2 / len(error)) * error[:, None]  # of the mean of squares, for each rating
            opt.step(
                [
                    fastopt.IndexedSlices(part.users, slope * vectors[1]),
                    fastopt.IndexedSlices(part.items, slope * vectors[0]),
                    fastopt.IndexedSlices(part.users, slope),
                    fastopt.IndexedSlices(part.items, slope),
                ]
            )
        _, error = looked_up(tables, test)
        errors.append(float(np.sqrt(np.square(error).mean())))
    return errors


def looked_up(tables, part):
    """The vectors of the users and items of ratings, and how far the predictions are off."""
    indices = part.users, part.items, part.users, part.items
    user, item, user_bias, item_bias = map(fastopt.embedding, tables, indices)
    predicted = MEAN + user_bias[:, 0] + item_bias[:, 0] + (user * item).sum(1)
    return (user, item), predicted - part.values


def main(
    users: int = 5_000,
    items: int = 1_000,
    ratings: int = 500_000,
    dim: int = RANK,
    epochs: int = 10,
    batch: int = 4_096,
    lr: float = 0.01,
):
    """Train both and print their errors; returns them by name."""
    train, test = make_ratings(users, items, ratings)
    errors = {
        name: run(start(users, items, dim), train, test, epochs, batch, lr)
        for name, run in (("torch", train_torch), ("numpy", train_numpy))
    }
    print(f"root of the mean squared error on ratings not seen; that of the noise is {NOISE}")
    print(f"{'epoch':>6}{'torch':>10}{'numpy':>10}")
    for epoch in range(epochs):
        print(f"{epoch + 1:6}{errors['torch'][epoch]:10.5f}{errors['numpy'][epoch]:10.5f}")
    return errors


if __name__ == "__main__":
    typer.run(main)
