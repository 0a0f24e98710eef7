"""The trainer: its gradients, its results, and what stops it."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fastopt
from fastopt import cli
from fastopt.train import corpus, skipgram

FASTOPT = Path(sys.executable).with_name("fastopt")
OUTPUTS = ["checkpoint.safetensors", "embeddings.safetensors", "loss.png", "vocabulary.txt"]


def command(*arguments):
    return [str(FASTOPT), "train", *map(str, arguments)]


def train(*arguments, **options):
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, encoding="utf-8", timeout=300, **options
    )


@pytest.fixture
def complaint(monkeypatch, capsys):
    """``complaint(*arguments)``: the one line that the trainer, run in this process, ends with."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastopt", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code in (1, 2)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("fastopt: ")
        return line

    return run


def assert_one_line_error(result, *parts):
    lines = result.stderr.splitlines()
    assert result.returncode in (1, 2), result
    assert len(lines) == 1 and lines[0].startswith("fastopt: "), result.stderr
    assert "Traceback" not in result.stdout
    for part in parts:
        assert part in lines[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sentences of five topics with ten words each, in Cyrillic letters."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(1_500):
        topic = rng.integers(5)
        lines.append(" ".join(f"{'абвгд'[topic]}{'клмнопрсту'[i]}ю" for i in rng.integers(0, 10, 12)) + ".\n")
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


SMALL = ("--dim", 16, "--batch-size", 64, "--epochs", 4)


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """An uninterrupted run: its folder and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    result = train("--text", text, *SMALL, "--out", out)
    assert result.returncode == 0, result.stderr
    return out, result


# Gradients


@pytest.fixture
def tables():
    rng = np.random.default_rng(1)
    return rng.normal(0, 0.7, (9, 4)), rng.normal(0, 0.7, (9, 4))


BATCH = skipgram.Batch(
    np.array([3, 0, 3], np.int32),
    np.array([2, 1, 3]),
    np.array([1, 3, 8, 1, 5, 5], np.int32),
    np.array([2, 1, 1, 7], np.int32),
)


def loss_and_gradients(v, u):
    return skipgram.loss_and_gradients(v[BATCH.centres], u[BATCH.others], BATCH, 5)


def dense(slices, table):
    total = np.zeros_like(table)
    np.add.at(total, slices.indices, slices.values)
    return total


def test_loss_is_the_papers(tables):
    """Equation 4, summed pair by pair, with the mean over the noise for the expectation."""
    v, u = tables
    centres = np.repeat(BATCH.centres, BATCH.counts)
    expected = 0.0
    for centre, context in zip(centres, BATCH.contexts, strict=True):
        expected += np.log1p(np.exp(-u[context] @ v[centre]))
        expected += 5 * np.mean(np.log1p(np.exp(u[BATCH.noise] @ v[centre])))
    assert loss_and_gradients(v, u).total == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_against_differences(tables, which):
    loss = loss_and_gradients(*tables)
    table = tables[which]
    numeric = np.zeros_like(table)
    for at in np.ndindex(*table.shape):
        kept = table[at]
        sides = []
        for shift in (1e-5, -1e-5):
            table[at] = kept + shift
            sides.append(loss_and_gradients(*tables).total)
        table[at] = kept
        numeric[at] = (sides[0] - sides[1]) / 2e-5
    np.testing.assert_allclose(dense(loss[1 + which], table), numeric, rtol=1e-7, atol=1e-8)


def test_loss_far_out_is_finite():
    table = np.full((9, 4), 50, np.float32)
    loss = loss_and_gradients(table, -table)
    assert loss.total == pytest.approx(6 * 4 * 2500)
    assert np.isfinite(loss.grad_in.values).all() and np.isfinite(loss.grad_out.values).all()


# Batches


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_parts_of_a_batch_are_the_batch(tables, ranks):
    """Every centre is in one of them, with its contexts; five processes for three centres leave some none."""
    parts = [BATCH.part(rank, ranks) for rank in range(ranks)]
    for name in ("centres", "counts", "contexts"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(BATCH, name))
    v, u = tables
    losses = [skipgram.loss_and_gradients(v[own.centres], u[own.others], own, 5) for own in parts]
    whole = loss_and_gradients(v, u)
    assert sum(own.total for own in losses) == pytest.approx(whole.total, rel=1e-12)
    for which, table in ((1, v), (2, u)):
        summed = sum(dense(own[which], table) for own in losses)
        np.testing.assert_allclose(summed, dense(whole[which], table), rtol=1e-12)


def test_windows_stay_within_segments():
    stream = np.array([0, 1, 2, -1, 3, 4, -1, -1, 5, -1], np.int32)
    sampler = skipgram.Sampler(np.full(6, 1), 4)
    segments = skipgram.segments_of(stream)
    seen = set()
    for seed in range(20):
        batch = sampler.batch(stream, segments, np.flatnonzero(stream >= 0), np.random.default_rng(seed))
        seen |= set(
            zip(np.repeat(batch.centres, batch.counts).tolist(), batch.contexts.tolist(), strict=True)
        )
        assert (batch.counts > 0).all()
    assert seen == {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (3, 4), (4, 3)}


def test_frequent_words_are_thinned_and_noise_is_flattened():
    counts = np.array([900_000, 90_000, 500])
    sampler = skipgram.Sampler(counts, 5)
    frequency = counts / counts.sum()
    np.testing.assert_allclose(sampler.keep, np.minimum(1, np.sqrt(skipgram.FREQUENT / frequency)), rtol=1e-6)
    np.testing.assert_allclose(np.diff(sampler.noise, prepend=0), counts**0.75 / (counts**0.75).sum())
    stream = np.repeat(np.array([0, -1], np.int32), [100_000, 10])
    thinned = sampler.thin(stream, np.random.default_rng(0))
    assert np.count_nonzero(thinned < 0) == 10
    assert np.count_nonzero(thinned == 0) == pytest.approx(100_000 * sampler.keep[0], rel=0.05)


def test_held_out_text_is_not_trained_on():
    stream = np.arange(5_000, dtype=np.int32)
    trained, held_out = skipgram.split(stream, 3)
    assert ((trained < 0) != (held_out < 0)).all()
    assert np.count_nonzero(held_out >= 0) == 250


# Texts


def test_words_of_any_script():
    decomposed = "Чай и\u0306 ЁЖ"
    words = [word for block in corpus.words_of(f"{decomposed} snake_case2 Größe\n東京 x") for word in block]
    assert words == ["чай", "й", "ёж", "snake", "case", "größe", "東京", "x"]


def test_blocks_cut_no_word(monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 3)
    text = "alpha beta\tgamma  delta\nepsilon"
    assert [word for block in corpus.words_of(text) for word in block] == text.split()


def test_corpus_numbers_by_frequency():
    built = corpus.build(
        ["a b " * 300 + "once", " ".join(f"w{chr(97 + i)} " * (30 - i) for i in range(25))], 22
    )
    assert built.words[:4] == ["a", "b", "wa", "wb"]
    assert len(built.words) == 22 and "once" not in built.words
    assert built.counts[:3].tolist() == [300, 300, 30]
    assert built.stream[:4].tolist() == [0, 1, 0, 1]
    assert np.flatnonzero(built.stream < 0).tolist() == [600, built.stream.size - 1]
    np.testing.assert_array_equal(np.bincount(built.stream[built.stream >= 0]), built.counts)


def test_digest_tells_texts_apart():
    words = [chr(97 + i // 5) + chr(97 + i % 5) for i in range(25)]
    texts = [" ".join(words * 30), " ".join(words[::-1] * 30)]
    digests = [corpus.build([text], 100).digest() for text in texts]
    assert digests[0] != digests[1]
    assert digests[0] == corpus.build([texts[0]], 100).digest()


def test_folders_are_read_in_order_without_binaries(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "nul").write_bytes(b"text\0text")
    (tmp_path / "noise").write_bytes(bytes(range(128, 256)))
    assert list(corpus.texts([tmp_path])) == ["first", "second"]


def test_default_text_is_the_standard_library():
    files = corpus.default_files()
    names = {path.name for path in files}
    assert {"argparse.py", "decoder.py"} <= names
    assert all(path.suffix == ".py" for path in files)
    assert not any(corpus.SKIPPED_FOLDERS & set(path.parts) for path in files)


# Runs


def test_run_writes_its_results(finished):
    out, result = finished
    assert sorted(path.name for path in out.iterdir()) == OUTPUTS
    assert "\x1b" not in result.stdout and "\r" not in result.stdout
    embeddings = load_file(out / "embeddings.safetensors")["embeddings"]
    assert embeddings.shape == (50, 16) and embeddings.dtype == np.float32
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    lines = (out / "vocabulary.txt").read_text(encoding="utf-8").splitlines()
    words = [line.split("\t")[0] for line in lines]
    counts = [int(line.split("\t")[1]) for line in lines]
    assert len(set(words)) == 50 and sum(counts) == 18_000
    assert counts == sorted(counts, reverse=True)

    epochs = [line for line in result.stdout.splitlines() if line.startswith("epoch ")]
    held_out = [float(line.split("held-out loss ")[1].split()[0]) for line in epochs]
    assert len(held_out) == 4
    assert f"untrained: held-out loss {6 * np.log(2):.4f}" in result.stdout
    assert held_out[0] < 6 * np.log(2) and held_out[-1] < 0.8 * 6 * np.log(2)

    # rows are the words of the file: a word's nearest are of its topic
    for row, word in enumerate(words):
        nearest = skipgram.neighbours(embeddings, row, 3)
        assert all(words[i][0] == word[0] for i in nearest)


@pytest.mark.parametrize("optimizer", skipgram.OPTIMIZERS)
def test_every_optimizer_learns(text, optimizer):
    built = corpus.build([text.read_text(encoding="utf-8")], 100)
    lr = skipgram.LEARNING_RATES[optimizer]
    training = skipgram.Training(built, skipgram.Settings(optimizer, lr, 16, 2, 5, 5, 100, 64, 1))
    for _ in training.steps():
        pass
    assert training.held_out_losses[-1] < 0.9 * training.held_out_losses[0]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_run_resumes_to_the_same_bits(text, finished, tmp_path, signum):
    arguments = ["--text", text, *SMALL, "--out", tmp_path / "out"]
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=60)
    assert stderr == ""
    assert not (tmp_path / "out" / "embeddings.safetensors").exists()  # else it was not stopped at all
    if signum == signal.SIGKILL:
        assert process.returncode == -signum
    else:
        assert process.returncode == 128 + signum
        assert stdout.splitlines()[-1].startswith("Stopped. To go on: fastopt train --resume --text ")

    assert_one_line_error(train(*arguments), "--resume")
    resumed = train(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming in epoch" in resumed.stdout
    for name in OUTPUTS[:3]:
        assert (tmp_path / "out" / name).read_bytes() == (finished[0] / name).read_bytes(), name


def test_every_place_resumes_to_the_same_bits(text, tmp_path):
    """Saving and loading between any two batches changes nothing, with an epoch's end among them."""
    built = corpus.build([text.read_text(encoding="utf-8")], 100)
    settings = skipgram.Settings("adam", 0.01, 8, 2, 5, 5, 100, 2_000, 1)
    whole = skipgram.Training(built, settings)
    for _ in whole.steps():
        pass
    path = tmp_path / "checkpoint"
    training = skipgram.Training(built, settings)
    steps = 0
    while not training.finished:
        training.save(path)
        training = skipgram.Training(built, settings)
        training.load(path)
        next(training.steps())
        steps += 1
    assert steps == 2 * whole.batches
    assert training.tables.embeddings().tobytes() == whole.tables.embeddings().tobytes()
    assert (training.losses, training.held_out_losses) == (whole.losses, whole.held_out_losses)


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copied")


def test_finished_run_is_written_again(text, finished, copied):
    (copied / "embeddings.safetensors").unlink()
    result = train("--text", text, *SMALL, "--out", copied, "--resume")
    assert result.returncode == 0 and "finished" in result.stdout
    assert (copied / "embeddings.safetensors").read_bytes() == (
        finished[0] / "embeddings.safetensors"
    ).read_bytes()


def test_new_run_replaces_a_finished_one(text, copied):
    before = (copied / "embeddings.safetensors").read_bytes()
    result = train("--text", text, *SMALL, "--seed", 2, "--out", copied)
    assert result.returncode == 0
    assert (copied / "embeddings.safetensors").read_bytes() != before


def test_resume_without_a_checkpoint_starts(text, tmp_path):
    result = train("--text", text, "--dim", 4, "--epochs", 1, "--out", tmp_path / "new", "--resume")
    assert result.returncode == 0 and "from the beginning" in result.stdout
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == OUTPUTS


def test_paths_after_the_first_are_texts_too(text, tmp_path):
    result = train("--text", text, text, text, "--epochs", 1, "--dim", 4, "--out", tmp_path / "o")
    assert result.returncode == 0 and result.stdout.startswith("54,000 words")


# Errors


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--optimizer", "adamw"),
        ("--lr", 0.5),
        ("--dim", 17),
        ("--epochs", 5),
        ("--negatives", 6),
        ("--window", 4),
        ("--vocabulary", 49),
        ("--batch-size", 65),
        ("--seed", 2),
    ],
)
def test_resume_with_another_setting(text, finished, complaint, option, value):
    line = complaint("--text", text, *SMALL, option, value, "--out", finished[0], "--resume")
    assert f"{option} is {value}" in line


def test_resume_with_another_text(text, finished, complaint, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8") + " end end", encoding="utf-8")
    assert "text differs" in complaint("--text", other, *SMALL, "--out", finished[0], "--resume")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "0 words"),
        (b"too short to train on", "5 words"),
        (b"same " * 5_000, "1 different words"),
        (b"\0\1\2" * 999, "binary"),
        (bytes(range(128, 256)) * 99, "binary"),
    ],
)
def test_unusable_text(tmp_path, complaint, content, part):
    path = tmp_path / "text"
    path.write_bytes(content)
    assert part in complaint("--text", path, "--out", tmp_path / "out")


def test_missing_text(tmp_path):
    result = train("--text", tmp_path / "none", "--out", tmp_path / "out")
    assert_one_line_error(result, f"{tmp_path / 'none'}: No such file")


def test_out_below_a_file(text, tmp_path, complaint):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert str(tmp_path / "file") in complaint("--text", text, "--out", out)


def test_out_with_a_foreign_checkpoint(text, tmp_path, complaint):
    checkpoint = tmp_path / "checkpoint.safetensors"
    foreign = [b"something else", b""]
    save_file({"a": np.zeros(3)}, checkpoint)
    foreign.append(checkpoint.read_bytes())
    fastopt.SGD([np.zeros(3)]).save(checkpoint)
    foreign.append(checkpoint.read_bytes())
    for content in foreign:
        checkpoint.write_bytes(content)
        for resume in ([], ["--resume"]):
            assert str(checkpoint) in complaint("--text", text, "--out", tmp_path, *resume)
        assert checkpoint.read_bytes() == content


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_full_disk(text, tmp_path):
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000))

    # no compiled kernels are written either, which must be no reason to fail
    result = train("--text", text, *SMALL, "--out", tmp_path, preexec_fn=limit)
    assert_one_line_error(result)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--dim", 0),
        ("--dim", "wide"),
        ("--epochs", 0),
        ("--negatives", -1),
        ("--window", 0),
        ("--vocabulary", 3),
        ("--batch-size", 0),
        ("--seed", -1),
        ("--lr", 0),
        ("--lr", "nan"),
        ("--optimizer", "sgdd"),
        ("--nothing", 1),
    ],
)
def test_option_out_of_range(text, tmp_path, complaint, option, value):
    assert option in complaint("--text", text, option, value, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_divergence(text, tmp_path, complaint):
    line = complaint("--text", text, "--optimizer", "sgd", "--lr", 1e30, "--out", tmp_path)
    assert "--lr" in line


def test_training_packages_are_imported_where_used():
    names = ["typer", "rich", "matplotlib", "safetensors"]
    code = f"import sys, fastopt; print([name for name in {names} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_letters_keep_their_marks():
    words = "हिन्दी भाषा İstanbul שָׁלוֹם العَرَبِيَّة naïve can't x_y2z"
    (found,) = corpus.words_of(words)
    assert found == [*words.lower().split()[:5], "naïve", "can", "t", "x", "y", "z"]


def test_only_its_own_leftovers_are_removed(text, tmp_path):
    for name, file in (
        (".work.tmp", "file"),
        (".checkpoint.safetensors.0123abcd.tmp", "checkpoint.safetensors"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("kept?")
    assert train("--text", text, *SMALL, "--out", tmp_path).returncode == 0
    assert [path.name for path in tmp_path.glob(".*")] == [".work.tmp"]
    assert (tmp_path / ".work.tmp" / "file").exists()


def test_results_are_not_read_as_text(text, tmp_path):
    shutil.copy(text, tmp_path)
    first, second = (train("--text", tmp_path, *SMALL, "--out", tmp_path).stdout for _ in range(2))
    assert first.splitlines()[0] == second.splitlines()[0]


def test_after_divergence_a_smaller_rate_can_be_chosen(text, tmp_path, complaint):
    assert "choose a smaller --lr" in complaint("--text", text, *SMALL, "--out", tmp_path, "--lr", 1e30)
    assert train("--text", text, *SMALL, "--out", tmp_path).returncode == 0


def test_an_empty_path_is_refused(complaint):
    assert "empty" in complaint("--text", "")
    assert "empty" in complaint("--out", "")
