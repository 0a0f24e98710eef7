"""What a training shows on the console."""

import time

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastopt.train.skipgram import Step, Training, neighbours

SHOWN_WORDS, SHOWN_NEIGHBOURS = 10, 5
SHORTEST_SHOWN = 4  # letters of a word; shorter ones say little


class Display:
    """A line for each epoch, and on a terminal a progress bar, which stands while ``progress`` is entered."""

    def __init__(self, training: Training, console: Console) -> None:
        self.training = training
        self.console = console
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        total = training.settings.epochs * training.batches
        done = training.epoch * training.batches + training.batch
        self.task = self.progress.add_task(
            "", total=total, completed=done, epoch=training.epoch + 1, rates=""
        )
        self.compiling = True
        self._restart()

    def _restart(self) -> None:
        self.began, self.pairs, self.rows = time.monotonic(), 0, 0

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self.began, 1e-9)
        return f"{self.pairs / seconds:,.0f} pairs/s, {self.rows / seconds:,.0f} rows updated/s"

    def show(self, step: Step) -> None:
        """Move the bar on by a step."""
        if self.compiling:  # The first step compiles its kernels, and would falsify the rates.
            self.compiling = False
            self._restart()
        else:
            self.pairs += step.pairs
            self.rows += step.rows
        rates = f"{self._rates()}, loss {step.loss:.3f}"
        self.progress.update(self.task, advance=1, epoch=self.training.epoch + 1, rates=rates)

    def end_epoch(self) -> None:
        """Print the line of the epoch that has just ended."""
        training = self.training
        before, now = training.held_out_losses[0], training.held_out_losses[-1]
        self.console.print(
            f"epoch {training.epoch}/{training.settings.epochs}: loss {training.epoch_loss():.4f}, "
            f"held-out loss {now:.4f} ({now / before - 1:+.1%}), {self._rates()}",
            soft_wrap=True,
        )
        self._restart()


def show_neighbours(embeddings: np.ndarray, words: list[str], console: Console) -> None:
    """Print a table of frequent words and those nearest to them."""
    rows = [row for row, word in enumerate(words) if len(word) >= SHORTEST_SHOWN] or list(range(len(words)))
    table = Table("word", "nearest")
    for row in rows[:SHOWN_WORDS]:
        near = neighbours(embeddings, row, SHOWN_NEIGHBOURS)
        table.add_row(words[row], ", ".join(words[i] for i in near))
    console.print(table)
