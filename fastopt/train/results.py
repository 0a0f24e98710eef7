"""The files that a training keeps in its folder: the checkpoint, the embeddings, the words and a plot."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastopt.checkpoint import tensors
from fastopt.checkpoint.files import load_metadata
from fastopt.train.corpus import Corpus
from fastopt.train.skipgram import Settings, Training

CHECKPOINT, EMBEDDINGS = "checkpoint.safetensors", "embeddings.safetensors"
VOCABULARY, PLOT = "vocabulary.txt", "loss.png"
NAMES = CHECKPOINT, EMBEDDINGS, VOCABULARY, PLOT


class Saved(NamedTuple):
    """What a checkpoint says of its training, read without the arrays."""

    settings: dict[str, Any]
    digest: str
    epoch: int

    @property
    def finished(self) -> bool:
        return self.epoch >= self.settings["epochs"]

    def difference(self, settings: Settings, digest: str) -> str | None:
        """The name of the first setting that differs, or "text", or None if the training is the same."""
        own = asdict(settings)
        # A smaller vocabulary changes the digest of the text, and another text changes other settings.
        if self.settings.get("vocabulary") == settings.vocabulary and self.digest != digest:
            return "text"
        first = sorted(own, key=lambda name: name != "vocabulary")
        return next((name for name in first if self.settings.get(name) != own[name]), None)


def read(checkpoint: Path) -> Saved:
    """What the checkpoint says of its training.

    Raises:
        OSError: the file can't be read.
        ValueError: a training did not write it.
    """
    try:
        saved = load_metadata(checkpoint)["skipgram"]
        return Saved(saved["settings"], saved["digest"], saved["place"]["epoch"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{checkpoint} is not a checkpoint of fastopt train: choose another --out"
        ) from error
    except ValueError as error:
        raise ValueError(f"{error}; choose another --out") from error


def write(training: Training, embeddings: np.ndarray, corpus: Corpus, folder: Path) -> None:
    """Write the embeddings, their words with the number of occurrences, and a plot of the losses."""
    tensors.write(folder / EMBEDDINGS, {"embeddings": embeddings}, {})
    lines = (f"{word}\t{count}\n" for word, count in zip(corpus.words, corpus.counts, strict=True))
    (folder / VOCABULARY).write_text("".join(lines), encoding="utf-8")
    _plot(training, folder / PLOT)


def _plot(training: Training, path: Path) -> None:
    # Imported here because its first import builds a cache of fonts, which only a finished training should
    # wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    places = [(i + 1) / training.points for i in range(len(training.losses))]
    axes.plot(places, training.losses, linewidth=1, label="training")
    axes.plot(range(len(training.held_out_losses)), training.held_out_losses, "o-", label="held out")
    axes.set(xlabel="epoch", ylabel="loss of a pair", title=f"Skip-gram, {training.settings.optimizer}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
