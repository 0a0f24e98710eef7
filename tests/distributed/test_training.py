"""``fastopt train`` in several processes."""

import signal
import subprocess
import sys

import numpy as np
import pytest
import trained

from fastopt.train.skipgram import OPTIMIZERS

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_losses_are_those_of_one_process(ranks, optimizer):
    one = trained.training(optimizer)
    losses = trained.go_on(one)
    found = ranks.run(trained.curve, optimizer)
    for rank, (own, held_out, _) in enumerate(found):
        np.testing.assert_allclose(own, losses, rtol=1e-5, err_msg=f"rank {rank}")
        np.testing.assert_allclose(held_out, one.held_out_losses, rtol=1e-5)
    assert one.held_out_losses[-1] < one.held_out_losses[0]
    np.testing.assert_allclose(found[0][2], one.tables.embeddings(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_training_goes_on_with_another_number_of_processes(ranks, optimizer, tmp_path):
    """One process, then four, then one: what is read is written again to the bit."""
    whole = trained.training(optimizer)
    losses = trained.go_on(whole)
    path = tmp_path / "checkpoint"
    own = trained.training(optimizer)
    found = trained.go_on(own, 3)
    own.save(path)
    found += ranks.run(trained.relay, optimizer, str(path), 4)[0]
    assert path.read_bytes() == path.with_name("checkpoint-again").read_bytes()
    last = trained.training(optimizer)
    last.load(path.with_name("checkpoint-later"))
    last.save(path)
    assert path.read_bytes() == path.with_name("checkpoint-later").read_bytes()
    found += trained.go_on(last)
    assert last.finished
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    np.testing.assert_allclose(last.held_out_losses, whole.held_out_losses, rtol=1e-5)


def losses_in(printed):
    """The lines with losses, without rates; each start begins with that of the untrained embeddings."""
    return [line.split("(")[0].strip() for line in printed.splitlines() if "held-out loss" in line]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    numbers = np.cumsum(np.random.default_rng(2).integers(-2, 3, 30_000))
    path.write_text(" ".join(trained.WORDS[number % len(trained.WORDS)] for number in numbers))
    return path


def command(launch, text, out, *others):
    options = ["--text", text, "--dim", 8, "--epochs", 3, "--batch-size", 64, "--out", out, *others]
    return [*launch, "-m", "fastopt", "train", *map(str, options)]


def run(launch, *arguments):
    return subprocess.run(command(launch, *arguments), capture_output=True, text=True, timeout=300)


def test_the_command_under_torchrun(text, tmp_path):
    """It prints what one process prints, once, and stops and goes on as that does."""
    one = run([sys.executable], text, tmp_path / "one")
    out = tmp_path / "many"
    process = subprocess.Popen(
        command(LAUNCH, text, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    printed = ""
    while "epoch 1/" not in printed:
        printed += process.stdout.readline()
    process.send_signal(signal.SIGTERM)  # which torchrun hands on
    printed += process.communicate(timeout=120)[0]
    assert "Stopped. To go on:" in printed
    assert not (out / "embeddings.safetensors").exists()
    resumed = run(LAUNCH, text, out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert losses_in(printed) + losses_in(resumed.stdout)[1:] == losses_in(one.stdout)
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


def test_processes_that_were_told_different_things_are_refused(text, tmp_path):
    script = tmp_path / "differs.py"
    script.write_text(
        "import os, sys\nfrom fastopt.cli import main\nsys.argv += ['--seed', os.environ['RANK']]\nmain()\n"
    )
    out = tmp_path / "out"
    arguments = [*LAUNCH, script, "train", "--text", text, "--out", out]
    result = subprocess.run([*map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "settings.seed is 0 on rank 0 and 1 on rank 1" in result.stderr
    assert not any(out.iterdir())
