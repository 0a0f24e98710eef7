"""``fastopt train``: its options, and the course of a training."""

import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from threadpoolctl import threadpool_limits

from fastopt.cli.display import Display, show_neighbours
from fastopt.train import corpus, results
from fastopt.train.one_process import OneProcess
from fastopt.train.skipgram import LEARNING_RATES, OPTIMIZERS, Settings, Training, expected_centres

if TYPE_CHECKING:
    from fastopt.train.many_processes import ManyProcesses

    Processes = OneProcess | ManyProcesses

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

    Several processes share out the tables and each batch, where torch is installed: torchrun
    --nproc-per-node=2 -m fastopt train. The losses are those of one process, to rounding, and a
    training goes on with any number of them; the first reads and writes --out, and all read the text.
    """
    with _processes() as processes:
        console = Console(highlight=False, quiet=processes.rank > 0)
        with processes.agreement() as described:
            if optimizer not in OPTIMIZERS:
                raise ValueError(f"--optimizer is {optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
            lr = LEARNING_RATES[optimizer] if lr is None else lr
            if not (lr > 0 and math.isfinite(lr)):
                raise ValueError(f"--lr is {lr}: expected a finite number above 0")
            if processes.rank == 0:
                _prepare(out, resume)
            named = [*(text or []), *(paths or [])]
            own = {out.resolve() / name for name in results.NAMES}
            texts = corpus.build(corpus.texts(named or corpus.default_files(), own), vocabulary)
            console.print(f"{int(texts.counts.sum()):,} words of text, {len(texts.words):,} different")
            centres = expected_centres(texts)
            batch_size = batch_size or min(LONGEST_BATCH, max(SHORTEST_BATCH, centres // STEPS_OF_EPOCH))
            settings = Settings(optimizer, lr, dim, epochs, negatives, window, vocabulary, batch_size, seed)
            described.update(settings=asdict(settings), resume=resume, text=texts.digest())
        # Matrix products are small here, and neither bits nor speed should depend on what cores are free.
        with threadpool_limits(1, user_api="blas"):
            training = Training(texts, settings, processes)
            checkpoint = out / results.CHECKPOINT
            _start(training, checkpoint, resume, processes, console)
            signum = _run(training, checkpoint, processes, console)
        if signum:
            arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
            again = shlex.join(["fastopt", arguments[0], "--resume", *arguments[1:]])
            console.print(f"Stopped. To go on: {again}", soft_wrap=True, markup=False)
            raise typer.Exit(128 + signum)
        embeddings = training.tables.embeddings()
        if processes.rank == 0:
            results.write(training, embeddings, texts, out)
            show_neighbours(embeddings, texts.words, console)
            console.print(f"Written to {out}", soft_wrap=True, markup=False)


@contextmanager
def _processes() -> "Iterator[Processes]":
    """Those that train together: all that torchrun has started, or this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield OneProcess()
        return
    from fastopt.train.many_processes import joined  # which imports torch

    with joined() as processes:
        yield processes


def _prepare(out: Path, resume: bool) -> None:
    """Make the folder, and raise if this run may not write its checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / results.CHECKPOINT
    if checkpoint.exists() and not resume and not results.read(checkpoint).finished:
        raise ValueError(
            f"{out} holds a training that is not finished: go on with --resume, or choose another --out"
        )


def _start(
    training: Training, checkpoint: Path, resume: bool, processes: "Processes", console: Console
) -> None:
    """Go to the place of the checkpoint, or write the first one."""
    with processes.agreement():
        exists = resume and processes.rank == 0 and checkpoint.exists()
        if exists:
            _check_same(training, checkpoint)
    if any(processes.totals([exists])):
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


def _run(training: Training, checkpoint: Path, processes: "Processes", console: Console) -> int:
    """Train to the end or to a signal of any process, which is returned, saving now and then."""
    stopped = 0.0
    display = Display(training, console)
    quiet = np.errstate(over="ignore", invalid="ignore")  # A training that diverges is reported below.
    with _signals() as received, display.progress, quiet:
        due = time.monotonic() + CHECKPOINT_SECONDS
        epoch = training.epoch
        for step in training.steps():
            if not math.isfinite(step.loss):
                if processes.rank == 0:
                    checkpoint.unlink()  # It would diverge again, and stand in the way of another --lr.
                raise ValueError(f"the loss is {step.loss}, training diverges: choose a smaller --lr")
            display.show(step)
            if training.epoch > epoch:
                epoch = training.epoch
                display.end_epoch()
            is_first = processes.rank == 0
            stopped, saves = processes.totals([bool(received), is_first and time.monotonic() > due])
            if stopped:
                break
            if saves:
                began = time.monotonic()
                training.save(checkpoint)
                # A large model, which is slow to write, is written less often.
                due = time.monotonic() + max(CHECKPOINT_SECONDS, 10 * (time.monotonic() - began))
        training.save(checkpoint)
    if not stopped or training.finished:
        return 0
    return received[0] if received else signal.SIGTERM


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
