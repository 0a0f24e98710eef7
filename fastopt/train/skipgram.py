"""Skip-gram word embeddings with negative sampling, trained by a fastopt optimizer.

Mikolov et al. 2013, "Distributed Representations of Words and Phrases and their
Compositionality": two tables, in which a word has a vector v as a centre and a vector u as a
context, and for each centre c with a context o the loss

    -log sigmoid(u_o . v_c) - negatives * E[log sigmoid(-u_n . v_c)]

(equation 4), where n is drawn from the noise distribution, counts ** 0.75. The paper estimates the
expectation from ``negatives`` words a pair; here all pairs of a batch share the mean over
``NOISE_WORDS`` words, which makes it a product of two small matrices.

Only NumPy and fastopt's public interface are used: :func:`fastopt.embedding` reads the rows of
a batch, :class:`fastopt.IndexedSlices` carries their gradients, and ``step``, ``save`` and
``load`` do the rest (``one_process.py``). Random numbers depend on the seed and the place in the
training alone, so that training resumed from a checkpoint ends in the same bits as training never
stopped, and so that several processes (``many_processes.py``) draw the same batches, of which each
takes its part of the centres.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import fastopt
from fastopt.train.corpus import Corpus
from fastopt.train.one_process import OneProcess

if TYPE_CHECKING:
    from fastopt.train.many_processes import ManyProcesses

OPTIMIZERS: dict[str, type[fastopt.Optimizer]] = {
    "sgd": fastopt.SGD,
    "adagrad": fastopt.AdaGrad,
    "rowwiseadagrad": fastopt.RowwiseAdaGrad,
    "rmsprop": fastopt.RMSProp,
    "adam": fastopt.Adam,
    "adamw": fastopt.AdamW,
    "amsgrad": fastopt.AMSGrad,
    "radam": fastopt.RAdam,
    "nadam": fastopt.NAdam,
    "lion": fastopt.Lion,
}
LEARNING_RATES = {
    "sgd": 0.02,
    "adagrad": 0.2,
    "rowwiseadagrad": 0.2,
    "rmsprop": 0.01,
    "adam": 0.02,
    "adamw": 0.02,
    "amsgrad": 0.02,
    "radam": 0.02,
    "nadam": 0.02,
    "lion": 0.01,
}
FINAL_RATE = 0.05  # The cosine schedule ends at this share of the learning rate.
FREQUENT = 1e-3  # A word is frequent from this share of the text on: t in the paper's equation 5.
NOISE_WORDS = 128  # So many noise words are drawn for each batch.
# This share of the text is held out, in blocks of at most so many words, and the text has at least so many
# blocks. The loss is measured on at most so many held-out centres, in batches.
HELD_OUT, LONGEST_BLOCK, BLOCKS = 0.05, 1_000, 100
HELD_OUT_CENTRES, HELD_OUT_BATCH = 10_000, 1_000
POINTS = 100  # The loss curve has at most so many points for each epoch.

# Each purpose of random numbers has its own number, which is the second word of their seed.
START, SPLIT, MEASURE, EPOCH, BATCH = range(5)


@dataclass(frozen=True)
class Settings:
    """What a training's result depends on, next to the text."""

    optimizer: str
    lr: float
    dim: int
    epochs: int
    negatives: int
    window: int
    vocabulary: int
    batch_size: int
    seed: int
    state_dtype: str | None = None


class Batch(NamedTuple):
    """Centres, each with at least one context, and the words drawn as noise.

    centres: int32 [C]. counts: int64 [C], how many of ``contexts`` belong to each centre.
    contexts: int32 [P], those of the first centre first. noise: int32 [N].
    """

    centres: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    noise: np.ndarray

    @property
    def others(self) -> np.ndarray:
        """Contexts and noise, the words of the second table."""
        return np.concatenate([self.contexts, self.noise])

    def part(self, rank: int, ranks: int) -> "Batch":
        """The batch of one of ``ranks`` processes: some centres with their contexts, and all noise."""
        bounds = [rank * self.centres.size // ranks, (rank + 1) * self.centres.size // ranks]
        first, last = np.r_[0, np.cumsum(self.counts)][bounds]
        centres = slice(*bounds)
        return Batch(self.centres[centres], self.counts[centres], self.contexts[first:last], self.noise)


class Loss(NamedTuple):
    """The loss summed over the pairs of a batch, and its gradients by the two tables."""

    total: float
    grad_in: fastopt.IndexedSlices
    grad_out: fastopt.IndexedSlices


class Step(NamedTuple):
    """One finished batch: pairs seen, rows updated in both tables, mean loss of a pair."""

    pairs: int
    rows: int
    loss: float


def loss_and_gradients(v: np.ndarray, others: np.ndarray, batch: Batch, negatives: float) -> Loss:
    """The loss of a batch and its gradients, of the rows v [C, dim] of centres and those [P + N, dim] of
    contexts u and noise n, float32 or float64.

    Sum over pairs of -log sigmoid(u . v) - negatives * mean over noise of log sigmoid(-n . v).
    """
    u, n = np.split(others, [batch.contexts.size])
    v_of_pair = np.repeat(v, batch.counts, axis=0)

    context_loss, context_miss = softplus(-np.einsum("pd,pd->p", u, v_of_pair))
    noise_loss, noise_miss = softplus(v @ n.T)
    # The noise term is the same for all pairs of a centre.
    weight = (batch.counts * (negatives / batch.noise.size)).astype(v.dtype)
    noise_miss *= weight[:, None]
    total = float(context_loss.sum(dtype=np.float64) + weight @ noise_loss.sum(axis=1))

    first_pair = np.cumsum(batch.counts) - batch.counts
    grad_v = noise_miss @ n - np.add.reduceat(u * context_miss[:, None], first_pair, axis=0)
    grad_u = -context_miss[:, None] * v_of_pair
    grad_n = noise_miss.T @ v
    return Loss(
        total,
        fastopt.IndexedSlices(batch.centres, grad_v),
        fastopt.IndexedSlices(batch.others, np.concatenate([grad_u, grad_n])),
    )


def softplus(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log(1 + exp(x)) and its derivative, sigmoid(x); neither overflows."""
    small = np.exp(-np.abs(x))
    return np.maximum(x, 0) + np.log(1 + small), np.where(x >= 0, 1, small) / (1 + small)


class Sampler:
    """Draws batches from a stream of words, -1 standing where no window reaches across."""

    def __init__(self, counts: np.ndarray, window: int) -> None:
        self.window = window
        noise = np.cumsum(counts**0.75)
        self.noise = noise / noise[-1]
        # Equation 5 drops a word with probability 1 - sqrt(t / frequency).
        self.keep = np.minimum(1, np.sqrt(FREQUENT * counts.sum() / counts)).astype(np.float32)

    def thin(self, stream: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """``stream`` without the occurrences of frequent words that are dropped."""
        kept = rng.random(stream.size, np.float32) < self.keep[stream]
        return stream[kept | (stream < 0)]

    def batch(
        self, stream: np.ndarray, segments: np.ndarray, places: np.ndarray, rng: np.random.Generator
    ) -> Batch:
        """A batch of the words at ``places`` of the stream.

        The window of each reaches 1 to ``window`` words far, at random, as near words say more.
        """
        reach = rng.integers(1, self.window + 1, (places.size, 1))
        noise = np.searchsorted(self.noise, rng.random(NOISE_WORDS), "right").astype(np.int32)
        distances = np.r_[-self.window : 0, 1 : self.window + 1]
        around = places[:, None] + distances
        np.clip(around, 0, stream.size - 1, out=around)
        inside = (np.abs(distances) <= reach) & (segments[around] == segments[places][:, None])
        inside &= around != places[:, None]
        counts = np.count_nonzero(inside, axis=1)
        paired = counts > 0
        return Batch(stream[places[paired]], counts[paired], stream[around[inside]], noise)


def segments_of(stream: np.ndarray) -> np.ndarray:
    """int32, the number of the unbroken run that each word is in, -1 where the stream has -1."""
    breaks = stream < 0
    return np.where(breaks, -1, np.cumsum(breaks, dtype=np.int32))


def split(stream: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The stream for training and the one held out, each with -1 where the other has words."""
    length = min(LONGEST_BLOCK, max(1, stream.size // BLOCKS))
    blocks = -(-stream.size // length)
    chosen = np.zeros(blocks, bool)
    chosen[np.random.default_rng([seed, SPLIT]).permutation(blocks)[: round(HELD_OUT * blocks)]] = True
    held_out = np.repeat(chosen, length)[: stream.size]
    return np.where(held_out, np.int32(-1), stream), np.where(held_out, stream, np.int32(-1))


def expected_centres(corpus: Corpus) -> int:
    """How many words of the training text an epoch is expected to see."""
    keep = Sampler(corpus.counts, 1).keep
    return int((1 - HELD_OUT) * (keep * corpus.counts).sum())


class Training:
    """A training and the place that it has come to.

    Where there are several processes, each makes one and calls its methods together with the others.

    Attributes:
        tables: float32 [vocabulary, dim] each; the rows of the first are the embeddings.
        batches: steps of an epoch.
        epoch, batch: finished epochs, and finished batches of the one after.
        losses: training loss, a mean for each of ``points`` parts of each epoch.
        held_out_losses: loss of the held-out text: untrained, and after each epoch.
    """

    def __init__(
        self, corpus: Corpus, settings: Settings, processes: "OneProcess | ManyProcesses | None" = None
    ) -> None:
        self.settings = settings
        self._processes = processes or OneProcess()
        self.digest = corpus.digest()
        self.sampler = Sampler(corpus.counts, settings.window)
        self.batches = max(1, round(expected_centres(corpus) / settings.batch_size))
        self.points = min(POINTS, self.batches)

        self._words = len(corpus.words)
        shape = self._words, settings.dim
        rng = np.random.default_rng([settings.seed, START])
        start = (rng.random(shape, np.float32) - np.float32(0.5)) / np.float32(settings.dim)
        # The schedule follows the optimizer's own count of steps, which its checkpoint restores.
        schedule = fastopt.schedules.cosine(settings.epochs * self.batches, FINAL_RATE)
        optimizer = partial(
            OPTIMIZERS[settings.optimizer],
            lr=settings.lr * schedule,
            state_dtype=settings.state_dtype,
            seed=settings.seed,
        )
        self.tables = self._processes.tables([start, np.zeros(shape, np.float32)], optimizer)

        self.stream, held_out = split(corpus.stream, settings.seed)
        self.held_out = self._held_out_batches(held_out)
        self.epoch = self.batch = 0
        self.losses: list[float] = []
        self.part = [0.0, 0]  # These are the loss and the pairs since the last of ``losses``.
        self.held_out_losses = [self.held_out_loss()]

    @property
    def finished(self) -> bool:
        return self.epoch == self.settings.epochs

    def steps(self) -> Iterator[Step]:
        """Train to the end; between two steps the training can be saved."""
        while not self.finished:
            rng = self._rng(EPOCH, self.epoch)
            stream = self.sampler.thin(self.stream, rng)
            segments = segments_of(stream)
            places = rng.permutation(np.flatnonzero(stream >= 0))
            for chosen in np.array_split(places, self.batches)[self.batch :]:
                rng = self._rng(BATCH, self.epoch, self.batch)
                step, total = self._step(self.sampler.batch(stream, segments, chosen, rng))
                self._advance(step, total)
                yield step

    def _step(self, batch: Batch) -> tuple[Step, float]:
        own = self._own(batch)
        rows = self.tables.look_up_to_learn(own.centres, own.others)
        loss = loss_and_gradients(*rows, own, self.settings.negatives)
        self.tables.step([loss.grad_in, loss.grad_out])
        [total] = self._processes.totals([loss.total])
        updated = sum(distinct(words, self._words) for words in (batch.centres, batch.others))
        pairs = batch.contexts.size
        return Step(pairs, updated, total / max(pairs, 1)), total

    def _own(self, batch: Batch) -> Batch:
        return batch.part(self._processes.rank, self._processes.ranks)

    def _advance(self, step: Step, total: float) -> None:
        self.part = [self.part[0] + total, self.part[1] + step.pairs]
        self.batch += 1
        if self.batch * self.points // self.batches > (self.batch - 1) * self.points // self.batches:
            self.losses.append(self.part[0] / max(self.part[1], 1))
            self.part = [0.0, 0]
        if self.batch == self.batches:
            self.epoch, self.batch = self.epoch + 1, 0
            self.held_out_losses.append(self.held_out_loss())

    def epoch_loss(self) -> float:
        """Mean training loss of the last finished epoch."""
        first = (self.epoch - 1) * self.points
        return float(np.mean(self.losses[first : first + self.points]))

    def held_out_loss(self) -> float:
        """Mean loss of the held-out pairs."""
        total = 0.0
        for own in map(self._own, self.held_out):
            rows = self.tables.look_up(own.centres, own.others)
            total += loss_and_gradients(*rows, own, self.settings.negatives).total
        [total] = self._processes.totals([total])
        return total / sum(batch.contexts.size for batch in self.held_out)

    def _held_out_batches(self, held_out: np.ndarray) -> list[Batch]:
        """The held-out pairs and their noise, the same ones at every measurement."""
        rng = self._rng(MEASURE)
        stream = self.sampler.thin(held_out, rng)
        segments = segments_of(stream)
        places = rng.permutation(np.flatnonzero(stream >= 0))[:HELD_OUT_CENTRES]
        parts = np.array_split(places, -(-places.size // HELD_OUT_BATCH) or 1)
        batches = [self.sampler.batch(stream, segments, part, rng) for part in parts]
        if not any(batch.contexts.size for batch in batches):
            raise ValueError("the text is too short: no two neighbouring words could be held out")
        return batches

    def _rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed, *purpose])

    def save(self, path: Path) -> None:
        """Write tables, optimizer and place to one file, whole or not at all."""
        place = {
            "epoch": self.epoch,
            "batch": self.batch,
            "losses": self.losses,
            "part": self.part,
            "held_out_losses": self.held_out_losses,
        }
        described = {"settings": asdict(self.settings), "digest": self.digest, "place": place}
        self.tables.save(path, {"skipgram": described})

    def load(self, path: Path) -> None:
        """Go to the place that :meth:`save` wrote, for the same text and settings."""
        place = self.tables.load(path)["skipgram"]["place"]
        self.epoch, self.batch = place["epoch"], place["batch"]
        self.losses, self.part = place["losses"], place["part"]
        self.held_out_losses = place["held_out_losses"]


def distinct(indices: np.ndarray, rows: int) -> int:
    """How many different rows ``indices`` name."""
    named = np.zeros(rows, bool)
    named[indices] = True
    return int(np.count_nonzero(named))


def neighbours(embeddings: np.ndarray, row: int, count: int) -> np.ndarray:
    """The rows nearest to ``row`` by the cosine, nearest first."""
    norms = np.linalg.norm(embeddings, axis=1)
    cosines = embeddings @ embeddings[row] / np.maximum(norms * norms[row], np.finfo(np.float32).tiny)
    cosines[row] = -np.inf
    return np.argsort(-cosines, kind="stable")[:count]
