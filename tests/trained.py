"""A training of word embeddings that several processes share, for tests to run on ranks."""

from pathlib import Path

import numpy as np

from fastopt.train import corpus, skipgram
from fastopt.train.many_processes import ManyProcesses

WORDS = [f"{first}{second}" for first in "abcdefg" for second in "hijkl"]  # no multiple of the ranks


def training(optimizer, processes=None):
    """One of two epochs over words that often stand together."""
    steps = np.random.default_rng(5).integers(-2, 3, 6_000)
    text = " ".join(WORDS[number % len(WORDS)] for number in np.cumsum(steps))
    settings = skipgram.Settings(optimizer, skipgram.LEARNING_RATES[optimizer], 8, 2, 5, 4, 100, 250, 1)
    return skipgram.Training(corpus.build([text], 100), settings, processes)


def go_on(own, steps=None):
    """The losses of ``steps`` batches, or of all that are left."""
    limit = own.settings.epochs * own.batches if steps is None else steps
    return [step.loss for _, step in zip(range(limit), own.steps(), strict=False)]


def curve(optimizer):
    """On a rank: the losses of the whole training, those of held-out text, and the embeddings."""
    own = training(optimizer, ManyProcesses())
    return go_on(own), own.held_out_losses, own.tables.embeddings()


def relay(optimizer, path, steps):
    """On a rank: go on from a checkpoint, write it again, and one some steps later; their losses."""
    own = training(optimizer, ManyProcesses())
    own.load(Path(path))
    own.save(Path(path + "-again"))
    losses = go_on(own, steps)
    own.save(Path(path + "-later"))
    return losses
