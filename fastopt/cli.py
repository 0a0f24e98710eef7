"""The command line: ``fastopt train``."""

import math
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from safetensors import SafetensorError

from fastopt import corpus
from fastopt._core.files import TEMPORARY
from fastopt.checkpoint import write_tensors
from fastopt.skipgram import (
    LEARNING_RATES,
    OPTIMIZERS,
    Settings,
    Step,
    Training,
    expected_centres,
    neighbours,
)

if TYPE_CHECKING:
    from rich.console import Console

CHECKPOINT, EMBEDDINGS = "checkpoint.safetensors", "embeddings.safetensors"
RESULTS = (CHECKPOINT, EMBEDDINGS, "vocabulary.txt", "loss.png")
CHECKPOINT_SECONDS = 5
SHORTEST_BATCH, LONGEST_BATCH = 16, 1024  # of the batches chosen by the size of the text
STEPS_OF_EPOCH = 300  # at least, but for the shortest batches
SHOWN_WORDS, SHOWN_LETTERS, SHOWN_NEIGHBOURS = 10, 4, 5

# what typer raises for a wrong command line; click's own, or a copy in typer
USAGE_ERROR: type[Exception] = typer.BadParameter.mro()[1]

app = typer.Typer(add_completion=False)


def main() -> None:
    """Run the command; an error is one line."""
    # a console that lacks a word's letters shows others instead
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    except USAGE_ERROR as error:
        code = _complain(f"{error.format_message()} (see fastopt train --help)")  # type: ignore[attr-defined]
    except OSError as error:
        code = _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError as error:
        code = _complain(f"out of memory: {error}")
    except ValueError as error:
        code = _complain(str(error))
    sys.exit(code)


def _complain(message: str) -> int:
    print("fastopt:", " ".join(message.split()), file=sys.stderr)
    return 2


def _path(text: str | Path) -> Path:
    """A path of the command line; an empty one, as of an unset variable, is not the current folder."""
    if not str(text):
        raise typer.BadParameter("the path is empty")
    return Path(text)


@app.callback()
def root() -> None:
    """Optimizer steps at the speed of memory."""


@app.command()
def train(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Further texts.", show_default=False, parser=_path)
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file or folder of text in UTF-8; may be repeated. "
            "Without one: the source files of Python's standard library.",
            show_default=False,
            parser=_path,
        ),
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(
            help="sgd, adagrad, rowwiseadagrad, rmsprop, adam, adamw, amsgrad, radam, nadam or lion."
        ),
    ] = "adam",
    lr: Annotated[
        float | None, typer.Option(help="Learning rate at the start.", show_default="by optimizer")
    ] = None,
    dim: Annotated[int, typer.Option(min=1, help="Length of an embedding.")] = 64,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the text.")] = 3,
    negatives: Annotated[int, typer.Option(min=1, help="Weight of the noise words, for each pair.")] = 5,
    window: Annotated[int, typer.Option(min=1, help="Words to each side that are context.")] = 5,
    vocabulary: Annotated[
        int, typer.Option(min=corpus.MINIMUM_VOCABULARY, help="Words to embed, the most frequent.")
    ] = 10_000,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Centre words of a step, each with its context.", show_default="by size of the text"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the results.", parser=_path)] = Path("fastopt-train"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
) -> None:
    """Train word embeddings: skip-gram with negative sampling.

    Writes embeddings.safetensors, vocabulary.txt, loss.png and checkpoint.safetensors to --out.
    """
    from rich.console import Console
    from threadpoolctl import threadpool_limits

    console = Console(highlight=False)
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"--optimizer is {optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
    lr = LEARNING_RATES[optimizer] if lr is None else lr
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"--lr is {lr}: expected a finite number above 0")
    checkpoint = _prepare(out, resume)

    named = [*(text or []), *(paths or [])]
    own = {out.resolve() / name for name in RESULTS}
    texts = corpus.build(corpus.texts(named or corpus.default_files(), own), vocabulary)
    console.print(f"{int(texts.counts.sum()):,} words of text, {len(texts.words):,} different")
    centres = expected_centres(texts)
    batch_size = batch_size or min(LONGEST_BATCH, max(SHORTEST_BATCH, centres // STEPS_OF_EPOCH))
    settings = Settings(optimizer, lr, dim, epochs, negatives, window, vocabulary, batch_size, seed)
    # its products are small, and neither the bits nor the speed should hang on what cores are free
    with threadpool_limits(1, user_api="blas"):
        training = Training(texts, settings)
        _start(training, checkpoint, resume, console)
        signum = _run(training, checkpoint, console)
    if signum:
        again = [argument for argument in sys.argv[1:] if argument != "--resume"]
        command = shlex.join(["fastopt", again[0], "--resume", *again[1:]])
        console.print(f"Stopped. To go on: {command}", soft_wrap=True, markup=False)
        raise typer.Exit(128 + signum)
    _write(training, texts.words, texts.counts, out)
    _show_neighbours(training, texts.words, console)
    console.print(f"Written to {out}", soft_wrap=True, markup=False)


def _prepare(out: Path, resume: bool) -> Path:
    """Make the folder; the checkpoint's path, if this run may write it."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / CHECKPOINT
    if checkpoint.exists() and not resume:
        described = _described(checkpoint)
        if described["place"]["epoch"] < described["settings"]["epochs"]:
            raise ValueError(
                f"{out} holds a training that is not finished: go on with --resume, or choose another --out"
            )
    return checkpoint


def _described(checkpoint: Path) -> dict[str, Any]:
    """What a training wrote about itself into its checkpoint, read without the arrays."""
    import json

    from safetensors import safe_open

    try:
        with open(checkpoint, "rb"), safe_open(checkpoint, framework="numpy") as file:
            return json.loads(file.metadata()["fastopt"])["metadata"]["skipgram"]
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"{checkpoint} is not a checkpoint of fastopt train: choose another --out"
        ) from error


def _start(training: Training, checkpoint: Path, resume: bool, console: "Console") -> None:
    """Go to the place of the checkpoint, or write the first one."""
    for name in (CHECKPOINT, EMBEDDINGS):  # left by a run that was killed while it wrote
        for leftover in checkpoint.parent.glob(f".{name}.*{TEMPORARY}"):
            shutil.rmtree(leftover, ignore_errors=True)
    if resume and checkpoint.exists():
        described = _described(checkpoint)
        _check_same(described, training.settings, training.digest, checkpoint)
        training.load(checkpoint)
        if training.finished:
            console.print("The training is finished; writing its results again")
        else:
            console.print(
                f"Resuming in epoch {training.epoch + 1}, after {training.batch:,} of "
                f"{training.batches:,} batches"
            )
    else:
        if resume:
            console.print("No checkpoint yet: starting from the beginning")
        training.save(checkpoint)
    console.print(f"untrained: held-out loss {training.held_out_losses[0]:.4f}")


def _check_same(described: dict[str, Any], settings: Settings, digest: str, checkpoint: Path) -> None:
    """Raise if the checkpoint is of another training."""
    _check_setting(described, settings, "vocabulary", checkpoint)
    # the text before the other settings, some of which follow from it
    if described["digest"] != digest:
        raise ValueError(
            f"the text differs from that of the training in {checkpoint}: resume it with the same --text, "
            "or choose another --out"
        )
    for name in asdict(settings):
        _check_setting(described, settings, name, checkpoint)


def _check_setting(described: dict[str, Any], settings: Settings, name: str, checkpoint: Path) -> None:
    saved, value = described["settings"].get(name), getattr(settings, name)
    if saved != value:
        option = "--" + name.replace("_", "-")
        raise ValueError(
            f"{option} is {value}, but {saved} in the training in {checkpoint}: resume it with "
            f"{option} {saved}, or choose another --out"
        )


def _run(training: Training, checkpoint: Path, console: "Console") -> int:
    """Train to the end or to a signal, which is returned, saving now and then."""
    quiet = np.errstate(over="ignore", invalid="ignore")  # divergence is told below
    with _signals() as received, _display(training, console) as display, quiet:
        due = time.monotonic() + CHECKPOINT_SECONDS
        epoch = training.epoch
        for step in training.steps():
            if not math.isfinite(step.loss):
                checkpoint.unlink()  # it would diverge again, and be in the way of another --lr
                raise ValueError(f"the loss is {step.loss}, training diverges: choose a smaller --lr")
            display.show(step)
            if training.epoch > epoch:
                epoch = training.epoch
                display.end_epoch()
            if received:
                break
            if time.monotonic() > due:
                began = time.monotonic()
                training.save(checkpoint)
                # a large model, slow to write, is written less often
                due = time.monotonic() + max(CHECKPOINT_SECONDS, 10 * (time.monotonic() - began))
        training.save(checkpoint)
    return received[0] if received and not training.finished else 0


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM that arrive meanwhile are put on the list, and do nothing else."""
    received: list[int] = []
    watched = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(signum, lambda number, _: received.append(number)) for signum in watched]
    try:
        yield received
    finally:
        for signum, handler in zip(watched, before, strict=True):
            signal.signal(signum, handler)


class _Display:
    """A line for each epoch, and on a terminal a progress bar."""

    def __init__(self, training: Training, console: "Console") -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

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
        if self.compiling:  # the first step of all compiles its kernels, and is no measure
            self.compiling = False
            self._restart()
        else:
            self.pairs += step.pairs
            self.rows += step.rows
        rates = f"{self._rates()}, loss {step.loss:.3f}"
        self.progress.update(self.task, advance=1, epoch=self.training.epoch + 1, rates=rates)

    def end_epoch(self) -> None:
        training = self.training
        before, now = training.held_out_losses[0], training.held_out_losses[-1]
        self.console.print(
            f"epoch {training.epoch}/{training.settings.epochs}: loss {training.epoch_loss():.4f}, "
            f"held-out loss {now:.4f} ({now / before - 1:+.1%}), {self._rates()}",
            soft_wrap=True,
        )
        self._restart()


@contextmanager
def _display(training: Training, console: "Console") -> Iterator[_Display]:
    display = _Display(training, console)
    with display.progress:
        yield display


def _write(training: Training, words: list[str], counts: Any, out: Path) -> None:
    """The results, next to the checkpoint."""
    write_tensors(out / EMBEDDINGS, {"embeddings": training.table_in}, {})
    lines = (f"{word}\t{count}\n" for word, count in zip(words, counts, strict=True))
    (out / "vocabulary.txt").write_text("".join(lines), encoding="utf-8")
    _plot(training, out / "loss.png")


def _plot(training: Training, path: Path) -> None:
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


def _show_neighbours(training: Training, words: list[str], console: "Console") -> None:
    """A table of frequent words and those nearest to them."""
    from rich.table import Table

    rows = [row for row, word in enumerate(words) if len(word) >= SHOWN_LETTERS] or list(range(len(words)))
    table = Table("word", "nearest")
    for row in rows[:SHOWN_WORDS]:
        near = neighbours(training.table_in, row, SHOWN_NEIGHBOURS)
        table.add_row(words[row], ", ".join(words[i] for i in near))
    console.print(table)
