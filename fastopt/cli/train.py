"""``fastopt train``: its options, and the course of a training."""

import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from threadpoolctl import threadpool_limits

from fastopt.cli.display import Display, show_neighbours
from fastopt.train import corpus, results
from fastopt.train.skipgram import LEARNING_RATES, OPTIMIZERS, Settings, Training, expected_centres

CHECKPOINT_SECONDS = 5  # the least time between two checkpoints
# A batch is chosen such that an epoch has this many steps, but within these limits.
STEPS_OF_EPOCH = 300
SHORTEST_BATCH, LONGEST_BATCH = 16, 1024


def _path(text: str | Path) -> Path:
    """A path of the command line; an empty one, as of an unset variable, is not the current folder."""
    if not str(text):
        raise typer.BadParameter("the path is empty")
    return Path(text)


Paths = Annotated[list[Path] | None, typer.Argument(help="Further texts.", show_default=False, parser=_path)]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        help="A file or folder of text in UTF-8; may be repeated. "
        "Without one: the source files of Python's standard library.",
        show_default=False,
        parser=_path,
    ),
]
Optimizer = Annotated[str, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")]
Rate = Annotated[float | None, typer.Option(help="Learning rate at the start.", show_default="by optimizer")]
Dim = Annotated[int, typer.Option(min=1, help="Length of an embedding.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the text.")]
Negatives = Annotated[int, typer.Option(min=1, help="Weight of the noise words, for each pair.")]
Window = Annotated[int, typer.Option(min=1, help="Words to each side that are context.")]
Vocabulary = Annotated[
    int, typer.Option(min=corpus.MINIMUM_VOCABULARY, help="Words to embed, the most frequent.")
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Centre words of a step, each with its context.", show_default="by size of the text"
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.", parser=_path)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")]


def command(
    paths: Paths = None,
    text: Text = None,
    optimizer: Optimizer = "adam",
    lr: Rate = None,
    dim: Dim = 64,
    epochs: Epochs = 3,
    negatives: Negatives = 5,
    window: Window = 5,
    vocabulary: Vocabulary = 10_000,
    batch_size: BatchSize = None,
    seed: Seed = 1,
    out: Out = Path("fastopt-train"),
    resume: Resume = False,
) -> None:
    """Train word embeddings: skip-gram with negative sampling.

    Writes embeddings.safetensors, vocabulary.txt, loss.png and checkpoint.safetensors to --out.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"--optimizer is {optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
    lr = LEARNING_RATES[optimizer] if lr is None else lr
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"--lr is {lr}: expected a finite number above 0")
    console = Console(highlight=False)
    checkpoint = _prepare(out, resume)

    named = [*(text or []), *(paths or [])]
    own = {out.resolve() / name for name in results.NAMES}
    texts = corpus.build(corpus.texts(named or corpus.default_files(), own), vocabulary)
    console.print(f"{int(texts.counts.sum()):,} words of text, {len(texts.words):,} different")
    centres = expected_centres(texts)
    batch_size = batch_size or min(LONGEST_BATCH, max(SHORTEST_BATCH, centres // STEPS_OF_EPOCH))
    settings = Settings(optimizer, lr, dim, epochs, negatives, window, vocabulary, batch_size, seed)
    # Matrix products are small here, and neither the bits nor the speed should depend on what cores are free.
    with threadpool_limits(1, user_api="blas"):
        training = Training(texts, settings)
        _start(training, checkpoint, resume, console)
        signum = _run(training, checkpoint, console)
    if signum:
        arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
        again = shlex.join(["fastopt", arguments[0], "--resume", *arguments[1:]])
        console.print(f"Stopped. To go on: {again}", soft_wrap=True, markup=False)
        raise typer.Exit(128 + signum)
    results.write(training, texts, out)
    show_neighbours(training, texts.words, console)
    console.print(f"Written to {out}", soft_wrap=True, markup=False)


def _prepare(out: Path, resume: bool) -> Path:
    """Make the folder; the checkpoint's path, if this run may write it."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / results.CHECKPOINT
    if checkpoint.exists() and not resume and not results.read(checkpoint).finished:
        raise ValueError(
            f"{out} holds a training that is not finished: go on with --resume, or choose another --out"
        )
    return checkpoint


def _start(training: Training, checkpoint: Path, resume: bool, console: Console) -> None:
    """Go to the place of the checkpoint, or write the first one."""
    if resume and checkpoint.exists():
        _check_same(training, checkpoint)
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


def _check_same(training: Training, checkpoint: Path) -> None:
    """Raise if the checkpoint is of another training."""
    saved = results.read(checkpoint)
    name = saved.difference(training.settings, training.digest)
    if name == "text":
        raise ValueError(
            f"the text differs from that of the training in {checkpoint}: resume it with the same --text, "
            "or choose another --out"
        )
    if name is not None:
        option, before = "--" + name.replace("_", "-"), saved.settings.get(name)
        raise ValueError(
            f"{option} is {getattr(training.settings, name)}, but {before} in the training in {checkpoint}: "
            f"resume it with {option} {before}, or choose another --out"
        )


def _run(training: Training, checkpoint: Path, console: Console) -> int:
    """Train to the end or to a signal, which is returned, saving now and then."""
    display = Display(training, console)
    quiet = np.errstate(over="ignore", invalid="ignore")  # A training that diverges is reported below.
    with _signals() as received, display.progress, quiet:
        due = time.monotonic() + CHECKPOINT_SECONDS
        epoch = training.epoch
        for step in training.steps():
            if not math.isfinite(step.loss):
                checkpoint.unlink()  # It would diverge again, and stand in the way of another --lr.
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
                # A large model, which is slow to write, is written less often.
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
