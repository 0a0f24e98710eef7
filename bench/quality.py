"""Does training with smaller state end where training with float32 state does? ``python bench/quality.py``.

Two trainings, each with several optimizers, each state_dtype and seeds 0 to 4, some minutes on two cores:

digits: a network of 64, 128 and 10 units on scikit-learn's digits, dense gradients; the training loss of the
last epoch and the accuracy on the fifth held out.
words: ``fastopt.train.skipgram`` on the source files of the standard library, sparse gradients; the held-out
loss.

For each: mean, least and largest over the seeds; and the mean over seeds of the difference to float32 state
with the same seed, with its standard error. A mean is "within" if it lies between the least and the largest
of the float32 runs. Seeds differ in what text is held out too, so of words the difference says more.
"""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import numba
import numpy as np
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import fastopt
from fastopt.train import corpus
from fastopt.train.skipgram import LEARNING_RATES, Settings, Training

SEEDS = range(5)
STATES = None, "bfloat16", "8bit"
HIDDEN, BATCH, EPOCHS = 128, 64, 60
# name -> optimizer, learning rate, other options; a cosine brings the rate to 0
DIGITS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "Adam": ("Adam", 3e-3, {}),
    "AdamW": ("AdamW", 3e-3, {"weight_decay": 1e-2}),
    "SGD, momentum 0.9": ("SGD", 5e-2, {"momentum": 0.9}),
    "AdaGrad": ("AdaGrad", 5e-2, {}),
}
WORDS = {"Adam": "adam", "AdaGrad": "adagrad"}
FILES, VOCABULARY, WORD_EPOCHS = 400, 5_000, 2


class Task(NamedTuple):
    """One run, named for the process that makes it."""

    kind: str
    optimizer: str
    state_dtype: str | None
    seed: int


# Digits


class Network:
    """Logits of max(0, x w1 + b1) w2 + b2, in float32."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.parameters = {
            "w1": rng.normal(0, np.sqrt(2 / 64), (64, HIDDEN)).astype(np.float32),
            "b1": np.zeros(HIDDEN, np.float32),
            "w2": rng.normal(0, np.sqrt(1 / HIDDEN), (HIDDEN, 10)).astype(np.float32),
            "b2": np.zeros(10, np.float32),
        }

    def logits(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """And what the hidden units give."""
        p = self.parameters
        hidden = np.maximum(x @ p["w1"] + p["b1"], 0)
        return hidden, hidden @ p["w2"] + p["b2"]

    def loss_and_gradients(self, x: np.ndarray, y: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        """The mean cross entropy of a batch, and its gradients."""
        hidden, logits = self.logits(x)
        logits -= logits.max(axis=1, keepdims=True)
        log_likelihood = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        each = np.arange(len(y))
        miss = np.exp(log_likelihood)
        miss[each, y] -= 1
        miss /= len(y)
        back = (miss @ self.parameters["w2"].T) * (hidden > 0)
        gradients = {"w1": x.T @ back, "b1": back.sum(axis=0), "w2": hidden.T @ miss, "b2": miss.sum(axis=0)}
        return -float(log_likelihood[each, y].mean()), gradients


def train_digits(task: Task) -> dict[str, float]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    shuffled = np.random.default_rng(0).permutation(len(x))  # the same ones for all
    train, held_out = np.split(shuffled, [len(x) * 4 // 5])
    rng = np.random.default_rng(task.seed)
    network = Network(rng)
    name, lr, options = DIGITS[task.optimizer]
    steps = EPOCHS * -(-len(train) // BATCH)
    opt = getattr(fastopt, name)(
        network.parameters,
        lr=lr * fastopt.schedules.cosine(steps),
        state_dtype=task.state_dtype,
        seed=task.seed,
        **options,
    )
    for _ in range(EPOCHS):
        losses = []
        order = rng.permutation(train)
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            loss, gradients = network.loss_and_gradients(x[batch], y[batch])
            opt.step(gradients)
            losses.append(loss)
    predicted = network.logits(x[held_out])[1].argmax(axis=1)
    return {
        "training loss": float(np.mean(losses)),
        "held-out accuracy, %": 100 * float(np.mean(predicted == y[held_out])),
    }


# Words

_texts: list[corpus.Corpus] = []  # of this process


def text() -> corpus.Corpus:
    if not _texts:
        files = corpus.default_files()[:FILES]
        _texts.append(corpus.build(corpus.texts(files), VOCABULARY))
    return _texts[0]


def train_words(task: Task) -> dict[str, float]:
    optimizer = WORDS[task.optimizer]
    settings = Settings(
        optimizer=optimizer,
        lr=LEARNING_RATES[optimizer],
        dim=64,
        epochs=WORD_EPOCHS,
        negatives=5,
        window=5,
        vocabulary=VOCABULARY,
        batch_size=1024,
        seed=task.seed,
        state_dtype=task.state_dtype,
    )
    training = Training(text(), settings)
    for _ in training.steps():
        pass
    return {"held-out loss": training.held_out_losses[-1]}


# All

KINDS: dict[str, tuple[Callable[[Task], dict[str, float]], Any]] = {
    "digits": (train_digits, DIGITS),
    "words": (train_words, WORDS),
}


def run(task: Task) -> dict[str, float]:
    with threadpool_limits(1, "blas"):
        return KINDS[task.kind][0](task)


def start() -> None:
    numba.set_num_threads(1)


def rows(tasks: list[Task], results: list[dict[str, float]]) -> list[list[str]]:
    found = []
    for kind, (_, optimizers) in KINDS.items():
        for optimizer in optimizers:
            for measure in results[tasks.index(Task(kind, optimizer, None, SEEDS[0]))]:
                values = {
                    state: np.array(
                        [results[tasks.index(Task(kind, optimizer, state, seed))][measure] for seed in SEEDS]
                    )
                    for state in STATES
                }
                for state, runs in values.items():
                    first = [kind, optimizer, measure] if state is None else ["", "", ""]
                    found.append([*first, state or "float32", *described(runs, values[None], state is None)])
    return found


def described(runs: np.ndarray, reference: np.ndarray, same: bool) -> list[str]:
    spread = [f"{runs.mean():.5g}", f"{runs.min():.5g}", f"{runs.max():.5g}"]
    if same:
        return [*spread, "", ""]
    difference = (runs - reference).round(9)  # accuracies are quotients
    error = difference.std(ddof=1) / np.sqrt(len(runs))
    within = reference.min() <= runs.mean() <= reference.max()
    mean = difference.mean().round(9)
    return [*spread, f"{mean:+.2g} ± {error:.1g}", "yes" if within else "NO"]


def main() -> None:
    began = time.monotonic()
    tasks = [
        Task(kind, optimizer, state, seed)
        for kind, (_, optimizers) in KINDS.items()
        for optimizer in optimizers
        for state in STATES
        for seed in SEEDS
    ]
    processes = min(os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=start) as pool:
        results = list(pool.map(run, tasks))
    heading = ["training", "optimizer", "measure", "state", "mean", "least", "largest"]
    heading += ["difference to float32", "within"]
    table = Table(*heading, title=f"seeds {SEEDS[0]} to {SEEDS[-1]}")
    found = rows(tasks, results)
    for row in found:
        table.add_row(*row)
    Console(width=140).print(table)
    for row in (heading, ["---"] * len(heading), *found):
        print("| " + " | ".join(row) + " |")
    print(f"{len(tasks)} runs in {time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
