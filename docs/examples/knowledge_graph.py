"""Vectors for a knowledge graph: a table that is looked up three times in a step.

    python docs/examples/knowledge_graph.py

TransE (Bordes et al. 2013, "Translating Embeddings for Modeling Multi-relational Data"): where the graph says
that head and tail are in a relation, the vector of the head plus that of the relation should lie near that of
the tail, and far from those of other entities, drawn at random. The loss, that of Sun et al. 2019, "RotatE:
Knowledge Graph Embedding by Relational Rotation in Complex Space", with d the squared distance, is

    softplus(d(tail) - margin) + mean over negatives of softplus(margin - d(negative))

The graph is a map: its entities are the places of a grid, its relations are moves such as "one to the east"
or "two to the north". Some moves are kept back, and should be found.

Heads, tails and negatives are rows of one table. Its gradient is the list of three gradients; the optimizer
adds them up, whatever rows they have in common, and updates each row once.
"""

import numpy as np
import typer

import fastopt

MOVES = np.array([[1, 0], [0, 1], [-1, 0], [0, -1], [1, 1], [1, -1], [-2, 0], [0, 2], [3, 1], [-1, 3]])


def make_graph(width):
    """Triples (head, relation, tail) for training and for the test, int64 [triples, 3]."""
    places = np.stack(np.meshgrid(np.arange(width), np.arange(width), indexing="ij"), axis=-1).reshape(-1, 2)
    triples = []
    for relation, move in enumerate(MOVES):
        ends = places + move
        inside = ((ends >= 0) & (ends < width)).all(1)
        heads, tails = places[inside] @ [width, 1], ends[inside] @ [width, 1]
        triples.append(np.stack([heads, np.full_like(heads, relation), tails], axis=1))
    shuffled = np.random.default_rng(0).permutation(np.concatenate(triples))
    held_back = len(shuffled) // 20
    return shuffled[held_back:], shuffled[:held_back]


def loss_and_gradients(tables, triples, negatives, margin):
    """The mean loss of triples [batch, 3] with entities drawn for each, [batch, negatives], and its gradients
    by the two tables."""
    head, relation, tail = triples.T
    end = fastopt.embedding(tables["entities"], head) + fastopt.embedding(tables["relations"], relation)
    to_tail = fastopt.embedding(tables["entities"], tail) - end
    to_negatives = fastopt.embedding(tables["entities"], negatives) - end[:, None]

    near = np.square(to_tail).sum(-1) - margin  # should be below zero
    far = margin - np.square(to_negatives).sum(-1)  # and so should this
    loss = np.logaddexp(0, near).mean() + np.logaddexp(0, far).mean()

    of_tail = to_tail * (2 * sigmoid(near) / near.size)[..., None]
    of_negatives = -to_negatives * (2 * sigmoid(far) / far.size)[..., None]
    of_end = -of_tail - of_negatives.sum(1)
    return loss, {
        "entities": [
            fastopt.IndexedSlices(head, of_end),
            fastopt.IndexedSlices(tail, of_tail),
            fastopt.IndexedSlices(negatives, of_negatives),
        ],
        "relations": fastopt.IndexedSlices(relation, of_end),
    }


def sigmoid(x):
    return (1 + np.tanh(x / 2)) / 2  # which does not overflow


def share_found(tables, triples, among=10):
    """How often the tail is one of so many entities that are nearest to where the head and relation lead."""
    head, relation, tail = triples.T
    end = tables["entities"][head] + tables["relations"][relation]
    entities = tables["entities"]
    distances = np.square(entities).sum(1) - 2 * end @ entities.T  # but for a number that is the same for all
    nearer = distances < np.take_along_axis(distances, tail[:, None], axis=1)
    return float((nearer.sum(1) < among).mean())


def main(
    width: int = 24,
    dim: int = 16,
    epochs: int = 30,
    batch: int = 128,
    negatives: int = 16,
    margin: float = 3.0,
    lr: float = 0.1,
):
    """Train and print; returns the mean loss of each epoch and the shares found before and after."""
    train, test = make_graph(width)
    rng = np.random.default_rng(1)
    tables = {
        "entities": rng.normal(0, 0.5, (width**2, dim)).astype(np.float32),
        "relations": rng.normal(0, 0.1, (len(MOVES), dim)).astype(np.float32),
    }
    opt = fastopt.Adam(tables, lr=lr * fastopt.schedules.cosine(epochs * -(-len(train) // batch)))
    losses, before = [], share_found(tables, test)
    print(f"{width**2} entities, {len(train)} triples; found among ten before training: {before:.0%}")
    for epoch in range(epochs):
        order, sums = rng.permutation(len(train)), 0.0
        for first in range(0, len(train), batch):
            triples = train[order[first : first + batch]]
            drawn = rng.integers(0, width**2, (len(triples), negatives))
            loss, grads = loss_and_gradients(tables, triples, drawn, margin)
            opt.step(grads)
            sums += loss * len(triples)
        losses.append(sums / len(train))
        if (epoch + 1) % max(1, epochs // 10) == 0:
            print(f"epoch {epoch + 1:3}: loss {losses[-1]:.4f}, found {share_found(tables, test):.0%}")
    return losses, before, share_found(tables, test)


if __name__ == "__main__":
    typer.run(main)
