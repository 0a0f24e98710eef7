"""Tables in memory-mapped files: what is stored, and what is left of it by crashes of every kind."""

import contextlib
import errno
import gc
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastopt.tables import folder, mapped, undo_log
from fastopt.tables.open import open_table

ROWS, DIM = 500, 4
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
SLOTS = {"exp_avg": ((ROWS, DIM), F32, 0.0), "sum": ((ROWS,), F64, 0.5)}


def arrays_of(table):
    return {"weights": table.weights, **table.state(SLOTS)}


def contents(table):
    return {name: array.copy() for name, array in arrays_of(table).items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def change(table, rows, value):
    """Set rows as an optimizer would."""
    table.keep(np.asarray(rows))
    for array in arrays_of(table).values():
        array[rows] = value


def image(table, to):
    """A copy of the files as a crash now would leave them."""
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(table.path, to)


def reopened(path):
    with open_table(path) as table:
        return table.progress, contents(table)


@pytest.fixture
def table(tmp_path):
    """A table with state, flushed as number 1, all elements 1."""
    with open_table(tmp_path / "table", ROWS, DIM) as table:
        table.keep(None)
        for array in arrays_of(table).values():
            array[...] = 1
        table.flush({"number": 1})
        yield table


def failing(monkeypatch, name, at, before=lambda *args: None):
    """Have the call of os.NAME with number ``at`` fail, counted from 0; returns the counter."""
    real, count = getattr(os, name), [0]

    def wrapped(*args):
        count[0] += 1
        if count[0] - 1 == at:
            before(*args)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    monkeypatch.setattr(os, name, wrapped)
    return count


def python(script, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        **options,
    )


# What is stored


@pytest.mark.parametrize("dtype", [F32, F64])
def test_round_trip(tmp_path, dtype):
    table = open_table(tmp_path / "t", 7, 3, dtype)
    assert (table.shape, table.dtype, table.ndim, table.nbytes) == ((7, 3), dtype, 2, 21 * dtype.itemsize)
    assert table.path == tmp_path / "t"
    assert table.progress is None and table.previous is None
    assert table.weights.flags.writeable and table.weights.flags.c_contiguous and table.weights.flags.aligned
    assert not table.weights.any()
    state = table.state({"v": ((7, 3), dtype, 0.25), "s": ((7,), F64, 0.0)})
    assert list(state) == ["v", "s"]
    np.testing.assert_array_equal(state["v"], np.full((7, 3), 0.25, dtype))
    assert not state["s"].any()
    table.keep(np.array([6, 2]))
    table.weights[[6, 2]] = [[1, 2, 3], [4, 5, 6]]
    state["s"][6] = 8
    table.flush({"step": 3, "nested": [1, None]})
    table.close()

    with open_table(tmp_path / "t", 7, 3, dtype) as table:
        assert table.progress == {"step": 3, "nested": [1, None]}
        np.testing.assert_array_equal(table.weights[[6, 2]], [[1, 2, 3], [4, 5, 6]])
        assert table.weights.sum() == 21
        state = table.state({"s": ((7,), F64, 9.0), "v": ((7, 3), dtype, 9.0)})  # stored: not filled again
        assert list(state) == ["s", "v"]
        np.testing.assert_array_equal(state["s"], [0, 0, 0, 0, 0, 0, 8])
        assert (state["v"] == 0.25).all()
        assert "7 rows of 3" in repr(table) and "v, s" in repr(table) and "closed" not in repr(table)
    assert "closed" in repr(table)


def test_is_no_array(table):
    for name in ("__array__", "__array_interface__", "__buffer__", "__len__", "__getitem__"):
        assert not hasattr(table, name)


def test_flush_without_progress_keeps_the_former(table):
    change(table, [3], 7)
    table.flush()
    assert table.progress == table.previous == {"number": 1}
    table.close()
    assert reopened(table.path)[0] == {"number": 1}


def test_leaving_a_block_flushes_unless_it_raises(tmp_path):
    with open_table(tmp_path / "t", 5, 2) as table:
        table.keep(np.array([1]))
        table.weights[1] = 3
    with pytest.raises(KeyError), open_table(tmp_path / "t") as table:
        assert (table.weights[1] == 3).all()
        table.keep(np.array([1]))
        table.weights[1] = 4
        raise KeyError
    assert (tmp_path / "t" / "undo-1").stat().st_size > undo_log._HEAD.size
    with open_table(tmp_path / "t") as table:
        assert (tmp_path / "t" / "undo-1").stat().st_size == undo_log._HEAD.size
        assert (table.weights[1] == 3).all()


def test_init_by_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "FILL_BYTES", 300)
    calls = []

    def init(first, last):
        calls.append((first, last))
        return np.arange(first * 2, last * 2).reshape(-1, 2)  # whole numbers are converted

    with open_table(tmp_path / "t", 100, 2, init=init) as table:
        np.testing.assert_array_equal(table.weights, np.arange(200).reshape(100, 2))
        np.testing.assert_array_equal(table.state({"a": ((100,), F64, 0.5)})["a"], np.full(100, 0.5))
    assert calls == [(0, 37), (37, 74), (74, 100)]
    open_table(tmp_path / "t", 100, 2, init=init).close()
    assert len(calls) == 3


def _raise(first, last):
    raise KeyError("init")


@pytest.mark.parametrize(
    ("init", "error"),
    [
        (lambda first, last: np.zeros((last - first, 3)), ValueError),
        (lambda first, last: np.zeros((1, 2)), ValueError),
        (lambda first, last: np.zeros((last - first, 2), complex), TypeError),
        (lambda first, last: [[0.0, 0.0]] * (last - first), TypeError),
        (lambda first, last: np.full((last - first, 2), np.nan), ValueError),
        (lambda first, last: np.full((last - first, 2), 1e300), ValueError),
        (_raise, KeyError),
    ],
)
def test_wrong_init_leaves_nothing(tmp_path, init, error):
    with pytest.raises(error, match="init"):
        open_table(tmp_path / "t", 5, 2, init=init)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", range(4))
def test_failing_creation_leaves_nothing(tmp_path, monkeypatch, call):
    failing(monkeypatch, *[("fsync", 0), ("fsync", 1), ("fsync", 2), ("replace", 0)][call])
    with pytest.raises(OSError):
        open_table(tmp_path / "t", 5, 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"rows": ROWS + 1},
            ValueError,
            f"rows is {ROWS + 1} but .*{ROWS} rows of {DIM} float32: pass {ROWS}",
        ),
        ({"dim": 5}, ValueError, "dim is 5 but .*: pass 4"),
        ({"dtype": F64}, ValueError, "dtype is float64 but .*: pass float32"),
        ({"dtype": np.float16}, TypeError, "dtype has dtype float16: expected float32 or float64"),
        ({"dtype": "what"}, TypeError, "dtype has dtype 'what'"),
        ({"rows": 0}, ValueError, "rows is 0: expected a whole number, at least 1"),
        ({"rows": 2.5}, ValueError, "rows is 2.5"),
        ({"dim": True}, ValueError, "dim is True"),
    ],
)
def test_opening_with_other_sizes(table, given, error, message):
    table.close()
    with pytest.raises(error, match=message):
        open_table(table.path, **given)
    assert_same(reopened(table.path)[1], {name: np.ones(s[0]) for name, s in WITH_WEIGHTS.items()})


WITH_WEIGHTS = {"weights": ((ROWS, DIM), F32, 0.0), **SLOTS}


def test_no_table(tmp_path):
    for sizes in ({}, {"rows": 3}, {"dim": 3}):
        with pytest.raises(ValueError, match="expected both"):
            open_table(tmp_path / "t", **sizes)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(ValueError, match="holds no table"):
            open_table(tmp_path / name, 3, 3)
    with pytest.raises(FileNotFoundError, match="absent/t"):
        open_table(tmp_path / "absent" / "t", 3, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_damaged_files_are_refused(table):
    table.close()
    with open(table.path / "weights", "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="weights has 8004 bytes: expected 8000"):
        open_table(table.path)
    for text in ('{"format": 1', '{"format": 2}', '{"format": 1}', "[]"):
        (table.path / "meta.json").write_text(text)
        with pytest.raises(ValueError, match=r"meta\.json is not as open_table wrote it"):
            open_table(table.path)


@pytest.mark.parametrize(
    ("slots", "error", "message"),
    [
        ({"m": SLOTS["sum"]}, ValueError, "slots is m .* but .* holds the state exp_avg .*, sum"),
        ({}, ValueError, "slots is none but"),
        ({**SLOTS, "sum": ((ROWS,), F32, 0.5)}, ValueError, r"sum \(500,\) float32 but .* float64"),
        ({**SLOTS, "sum": ((ROWS, 1), F64, 0.5)}, ValueError, r"sum \(500, 1\) float64 but"),
        ({"m": ((ROWS + 1,), F32, 0.0)}, ValueError, "expected 500 rows"),
        ({"m": ((), F32, 0.0)}, ValueError, "expected 500 rows"),
        ({"m": ((ROWS, 0), F32, 0.0)}, ValueError, "a size of .* is 0"),
        ({"m": ((ROWS,), np.int32, 0.0)}, TypeError, "dtype int32"),
        ({"m": ((ROWS,), F32, "0")}, TypeError, "first value '0'"),
        ({"m": (ROWS,)}, TypeError, "expected a tuple"),
        ({"../m": ((ROWS,), F32, 0.0)}, ValueError, "expected an identifier"),
    ],
)
def test_other_state(table, slots, error, message):
    with pytest.raises(error, match=message):
        table.state(slots)
    assert contents(table)["sum"].dtype == F64


def test_state_that_fails_leaves_nothing(tmp_path, monkeypatch):
    with open_table(tmp_path / "t", ROWS, DIM) as table:
        real = folder.fill

        def fill(path, slot, value):
            real(path, slot, value)
            if value:
                raise OSError(errno.ENOSPC, "full")

        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(folder, "fill", fill)
            table.state(SLOTS)
        assert not list(table.path.glob("state-*"))
        assert table.state(SLOTS)["sum"][0] == 0.5


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([1], TypeError, "rows has type list: expected an array of whole numbers"),
        (np.array([1.0]), TypeError, "rows has dtype float64"),
        (np.array([[1]]), ValueError, r"rows has shape \(1, 1\)"),
        (np.array([1, ROWS]), ValueError, "rows holds 500: expected row numbers from 0 to 499"),
        (np.array([-1]), ValueError, "rows holds -1"),
        (np.array([2**64 - 1], np.uint64), ValueError, "rows holds 18446744073709551615"),
    ],
)
def test_wrong_rows(table, rows, error, message):
    with pytest.raises(error, match=message):
        table.keep(rows)
    table.keep(np.array([], np.int64))
    assert not table.changed and (table.path / "undo-1").stat().st_size == undo_log._HEAD.size


def test_wrong_calls(table):
    with pytest.raises(RuntimeError, match=r"commit of .* without a prepare"):
        table.commit()
    for progress in ([1], None):
        with pytest.raises(TypeError, match="progress is of type"):
            table.prepare(progress)
    with pytest.raises(TypeError, match="progress holds what JSON can't"):
        table.flush({"a": object()})
    table.close()
    table.close()
    for call in (
        lambda: table.weights,
        lambda: table.state(SLOTS),
        lambda: table.keep(np.array([1])),
        lambda: table.prepare({}),
        table.commit,
        table.flush,
        table.roll_back,
    ):
        with pytest.raises(ValueError, match="is closed"):
            call()


# The undo log


def test_a_row_is_logged_once_between_flushes(table, tmp_path):
    def size():
        return (table.path / "undo-1").stat().st_size

    row_bytes = 8 + 4 * DIM + 4 * DIM + 8
    change(table, [3, 400, 8, 9, 10], 2)
    assert size() == undo_log._HEAD.size + undo_log._RECORD.size + 5 * row_bytes
    change(table, [10, 3, 8], 3)
    assert size() == undo_log._HEAD.size + undo_log._RECORD.size + 5 * row_bytes
    change(table, [11, 10, 4], 3)
    assert size() == undo_log._HEAD.size + 2 * undo_log._RECORD.size + 7 * row_bytes
    table.keep(None)
    assert size() == undo_log._HEAD.size + 3 * undo_log._RECORD.size + ROWS * row_bytes
    assert_same(
        reopened(image(table, tmp_path / "image"))[1], {k: np.ones(s[0]) for k, s in WITH_WEIGHTS.items()}
    )


def test_log_in_blocks(table, tmp_path, monkeypatch):
    monkeypatch.setattr(undo_log, "LOG_BYTES", 500)
    before = contents(table)
    change(table, np.random.default_rng(0).permutation(ROWS)[:450], 2)
    table.keep(None)
    for array in arrays_of(table).values():
        array[...] = 3
    assert_same(reopened(image(table, tmp_path / "image"))[1], before)


def test_state_of_an_unfinished_interval_is_discarded(tmp_path):
    table = open_table(tmp_path / "t", ROWS, DIM)
    table.flush({"number": 1})
    change(table, [5], 2)  # makes the state after the rows were kept
    change(table, [6], 2)
    table.close()
    with open_table(tmp_path / "t") as table:
        assert not list(table.path.glob("state-*"))
        assert not table.weights.any()
        assert not table.state({"other": ((ROWS,), F32, 0.0)})["other"].any()


def test_state_made_between_prepare_and_commit_is_of_the_next_flush(tmp_path):
    table = open_table(tmp_path / "t", ROWS, DIM)
    table.prepare({"number": 1})
    table.state(SLOTS)
    table.commit()
    change(table, [5], 2)
    assert not list(reopened(image(table, tmp_path / "image"))[1]["exp_avg"].nonzero()[0])
    table.flush({"number": 2})
    table.close()
    assert (reopened(table.path)[1]["sum"][[4, 5]] == [0.5, 2]).all()


def _cuts():
    """Where a log of two records is cut: bytes from the start of the second."""
    record = undo_log._RECORD.size
    return [0, 1, record - 1, record, record + 1, record + 20, -1, None]


@pytest.mark.parametrize("cut", _cuts())
def test_torn_last_record(table, tmp_path, cut):
    before = contents(table)
    change(table, [1, 2, 300], 2)
    log = table.path / "undo-1"
    start = log.stat().st_size
    head = log.read_bytes()[: undo_log._HEAD.size]
    table.keep(np.array([4, 5, 6]))
    copy = image(table, tmp_path / "image")
    size = log.stat().st_size
    with open(copy / "undo-1", "r+b") as file:  # a kill came before the head told of the record
        file.write(head)
        file.truncate(size if cut is None else start + cut if cut >= 0 else size + cut)
    progress, content = reopened(copy)
    assert progress == {"number": 1}
    assert_same(content, before)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("cut", _cuts()[:-1])
def test_cut_log_is_seen(table, tmp_path, cut, sealed):
    change(table, [1, 2, 300], 2)
    start = (table.path / "undo-1").stat().st_size
    change(table, [4, 5, 6], 2)
    if sealed:
        table.prepare({"number": 2})
    copy = image(table, tmp_path / "image")
    size = (copy / "undo-1").stat().st_size
    for left in (start + cut if cut >= 0 else size + cut, cut % undo_log._HEAD.size, 0):
        os.truncate(copy / "undo-1", left)
        files = {path.name: path.read_bytes() for path in copy.iterdir()}
        with pytest.raises(RuntimeError, match=r"undo-1 is damaged: .*restore a copy"):
            open_table(copy)
        assert {path.name: path.read_bytes() for path in copy.iterdir()} == files


@pytest.mark.parametrize("changed", [False, True])
def test_missing_log_is_seen(table, tmp_path, changed):
    if changed:
        change(table, [1, 2, 300], 2)
    copy = image(table, tmp_path / "image")
    (copy / "undo-1").unlink()
    with pytest.raises(RuntimeError, match=r"undo-1 is damaged: it is missing"):
        open_table(copy)


def test_log_of_another_flush_is_seen(table, tmp_path):
    change(table, [1, 2], 2)
    table.flush({"number": 2})
    copy = image(table, tmp_path / "image")
    shutil.copy(copy / "undo-1", copy / "undo-2")
    with pytest.raises(RuntimeError, match=r"undo-2 is damaged: it is that of flush 1, not 2"):
        open_table(copy)


def test_roll_back_sees_a_cut_log_before_anything_changes(table, tmp_path):
    change(table, [1, 2], 2)
    table.flush({"number": 2})
    after = contents(table)
    os.truncate(table.path / "undo-1", (table.path / "undo-1").stat().st_size - 1)
    with pytest.raises(RuntimeError, match=r"undo-1 is damaged"):
        table.roll_back()
    assert table.progress == {"number": 2}
    assert_same(contents(table), after)
    change(table, [3], 3)
    table.flush({"number": 3})
    assert table.previous == {"number": 2}


def _bytes():
    head, record = undo_log._HEAD.size, undo_log._RECORD.size
    return [0, 10, head - 5, head - 1, head, head + 8, head + 16, head + 24, head + 28, head + record, -1]


@pytest.mark.parametrize("at", _bytes())
def test_damaged_log_is_refused_and_changes_nothing(table, tmp_path, at):
    change(table, [1, 2, 300], 2)
    change(table, [7], 3)
    copy = image(table, tmp_path / "image")
    content = bytearray((copy / "undo-1").read_bytes())
    content[at] ^= 1
    (copy / "undo-1").write_bytes(content)
    files = {path.name: path.read_bytes() for path in copy.iterdir()}
    for _ in range(2):  # the lock is free again
        with pytest.raises(RuntimeError, match=r"undo-1 is damaged: .* restore a copy"):
            open_table(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == files


def with_boot(log, boot):
    content = log.read_bytes()
    magic, _, *rest, _ = undo_log._HEAD.unpack(content[: undo_log._HEAD.size])
    head = undo_log._HEAD.pack(magic, boot, *rest, 0)[:-4]
    head += zlib.crc32(head).to_bytes(4, "little")
    log.write_bytes(head + content[undo_log._HEAD.size :])


def test_machine_that_stopped(table, tmp_path):
    before = contents(table)
    change(table, [1, 2], 2)
    copy = image(table, tmp_path / "image")
    with_boot(copy / "undo-1", b"another".ljust(36))
    with pytest.raises(RuntimeError, match=r"in use when the machine stopped: .* restore a copy"):
        open_table(copy)

    table.prepare({"number": 2})  # brings the log to the disk
    copy = image(table, tmp_path / "image")
    with_boot(copy / "undo-1", b"another".ljust(36))
    progress, content = reopened(copy)
    assert progress == {"number": 1}
    assert_same(content, before)

    table.keep(np.array([1]))  # takes that back, though the row is logged
    copy = image(table, tmp_path / "image")
    with_boot(copy / "undo-1", b"another".ljust(36))
    with pytest.raises(RuntimeError, match="in use when the machine stopped"):
        open_table(copy)

    table.flush({"number": 2})
    copy = image(table, tmp_path / "image")
    with_boot(copy / "undo-1", b"another".ljust(36))
    with open_table(copy) as later:
        later.roll_back()
        assert_same(contents(later), before)


def test_without_boot_ids(table, tmp_path, monkeypatch):
    monkeypatch.setattr(undo_log, "_BOOT_ID", tmp_path / "absent")
    before = contents(table)
    change(table, [1, 2], 2)
    assert_same(reopened(image(table, tmp_path / "image"))[1], before)


# Failures


@pytest.mark.parametrize("part", [0, 20, 70, 170])
def test_log_that_cannot_be_written(table, tmp_path, monkeypatch, part):
    before = contents(table)
    change(table, [1, 2], 2)
    real = os.pwrite
    with monkeypatch.context() as patch:
        failing(patch, "pwrite", 0, lambda file, content, at: real(file, bytes(content)[:part], at))
        with pytest.raises(OSError):
            table.keep(np.array([4, 5, 6]))
        assert_same(reopened(image(table, tmp_path / "image"))[1], before)
    change(table, [5], 3)  # shorter than what was torn
    assert_same(reopened(image(table, tmp_path / "image"))[1], before)
    change(table, [4, 5, 6], 3)
    assert_same(reopened(image(table, tmp_path / "image"))[1], before)
    after = contents(table)
    table.flush({"number": 2})
    assert_same(reopened(image(table, tmp_path / "image"))[1], after)


@pytest.mark.parametrize("name", ["pwrite", "fsync"])
@pytest.mark.parametrize("at", [0, 1])
def test_log_that_cannot_be_begun(table, tmp_path, monkeypatch, name, at):
    before = contents(table)
    with monkeypatch.context() as patch:
        failing(patch, name, at)
        with pytest.raises(OSError):
            change(table, [1, 2], 2)
    assert_same(contents(table), before)
    assert_same(reopened(image(table, tmp_path / "image"))[1], before)
    change(table, [1, 2, 3], 2)
    assert_same(reopened(image(table, tmp_path / "image"))[1], before)


@pytest.mark.parametrize("name", ["fsync", "pwrite", "replace"])
def test_flush_that_fails_at_any_call(tmp_path, monkeypatch, name):
    at, outcomes = 0, set()
    while True:
        with open_table(tmp_path / f"t{at}", ROWS, DIM) as table:
            change(table, np.arange(ROWS), 1)
            table.flush({"number": 1})
            states = {1: contents(table)}
            change(table, [1, 2, 300], 2)
            states[2] = contents(table)
            with monkeypatch.context() as patch:
                count = failing(patch, name, at)
                with contextlib.suppress(OSError):
                    table.flush({"number": 2})
            failed = count[0] > at
            progress, content = reopened(image(table, tmp_path / "image"))
            assert progress["number"] == (table.progress["number"] if failed else 2)
            assert_same(content, states[progress["number"]])
            # and going on after it
            change(table, [3, 2], 3)
            progress, content = reopened(image(table, tmp_path / "image"))
            assert progress == table.progress
            assert_same(content, states[progress["number"]])
            states[3] = contents(table)
            try:
                table.flush({"number": 3})
                outcomes.add("went on")
            except RuntimeError as error:
                assert "could not be written to the disk before" in str(error)
                outcomes.add("refused")
                table.close()
                table = open_table(table.path)
                assert_same(contents(table), states[1])
                change(table, [3], 3)
                states[3] = contents(table)
                table.flush({"number": 3})
            progress, content = reopened(image(table, tmp_path / "image"))
            assert progress == {"number": 3}
            assert_same(content, states[3])
            table.close()
            table = open_table(table.path)  # for the end of the block
        if not failed:
            break
        at += 1
    assert at >= {"fsync": 8, "pwrite": 1, "replace": 1}[name]
    assert outcomes == ({"went on", "refused"} if name == "fsync" else {"went on"})


def test_commit_can_be_repeated(table, tmp_path, monkeypatch):
    change(table, [1], 2)
    table.prepare({"number": 2})
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch, pytest.raises(OSError):
            failing(patch, name, 0)
            table.commit()
    assert table.progress == {"number": 2}
    assert reopened(image(table, tmp_path / "image"))[0] == {"number": 2}


@pytest.mark.parametrize("then", ["commit", "keep"])
def test_commit_interrupted_after_renaming(table, tmp_path, monkeypatch, then):
    change(table, [1, 2], 2)
    after = contents(table)
    table.prepare({"number": 2})
    real = os.replace

    def replace(*args):
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        table.commit()
    if then == "commit":
        table.commit()
    change(table, [1, 3], 3)
    assert table.progress == {"number": 2} and table.previous == {"number": 1}
    progress, content = reopened(image(table, tmp_path / "image"))
    assert progress == {"number": 2}
    assert_same(content, after)


@pytest.mark.parametrize("rows", [np.array([1]), None])
def test_keeping_takes_a_prepare_back(table, rows):
    change(table, [1], 2)
    table.prepare({"number": 2})
    table.keep(rows)
    with pytest.raises(RuntimeError, match=r"commit of .* without a prepare"):
        table.commit()


# Rolling back


def test_roll_back(table, tmp_path):
    before = contents(table)
    assert table.previous is None  # flush 0 had no progress
    change(table, [1, 2], 2)
    table.flush({"number": 2})
    assert table.previous == {"number": 1}
    change(table, [2, 3], 3)
    with pytest.raises(ValueError, match="were kept since its last flush"):
        table.roll_back()
    table.close()
    with open_table(table.path) as again:
        assert (again.progress, again.previous) == ({"number": 2}, {"number": 1})
        weights = again.weights
        again.roll_back()
        assert (again.progress, again.previous) == ({"number": 1}, None)
        assert_same(contents(again), before)
        np.testing.assert_array_equal(weights, before["weights"])  # the same memory
        assert_same(reopened(image(again, tmp_path / "image"))[1], before)
        with pytest.raises(ValueError, match="no flush before the last one"):
            again.roll_back()
        change(again, [7], 7)
        assert_same(reopened(image(again, tmp_path / "image"))[1], before)
        again.flush({"number": 8})
        assert again.previous == {"number": 1}


def test_roll_back_to_a_flush_without_state(tmp_path):
    with open_table(tmp_path / "t", ROWS, DIM) as table:
        with pytest.raises(ValueError, match="no flush before the last one"):
            table.roll_back()
        change(table, [1], 2)
        table.flush({"number": 1})
        table.roll_back()
        assert table.progress is None
        assert not table.weights.any()
        assert not list(table.path.glob("state-*"))
        assert table.state(SLOTS)["sum"][1] == 0.5


def test_roll_back_without_a_log(table):
    table.flush({"number": 2})
    table.flush({"number": 3})
    table.roll_back()
    assert table.progress == {"number": 2}
    table.close()
    assert reopened(table.path)[0] == {"number": 2}


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_roll_back_that_fails_at_any_call(tmp_path, monkeypatch, name):
    at = 0
    while True:
        table = open_table(tmp_path / f"t{at}", ROWS, DIM)
        change(table, np.arange(ROWS), 1)
        states = {}
        for number in (1, 2):
            change(table, [1, number], number)
            table.flush({"number": number})
            states[number] = contents(table)
        with monkeypatch.context() as patch:
            failing(patch, name, at)
            try:
                table.roll_back()
            except OSError:
                failed = True
            else:
                failed = False
        if failed:
            with pytest.raises(ValueError, match="is closed"):
                table.keep(np.array([1]))
        table.close()
        progress, content = reopened(table.path)
        assert progress == {"number": 2 if name == "replace" and failed else 1}
        assert_same(content, states[progress["number"]])
        if not failed:
            break
        at += 1
    assert at >= (1 if name == "replace" else 3)


# Any order of calls, against a model

CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("change"), st.sets(st.integers(0, 19), min_size=1)),
        st.sampled_from([("change all",), ("flush",), ("prepare",), ("crash",), ("roll back",)]),
    ),
    max_size=25,
)
SMALL = {"m": ((20, 3), F32, 0.0), "s": ((20,), F64, 0.5)}


@settings(max_examples=4 * settings().max_examples)
@given(CALLS)
def test_any_order_of_calls(calls):
    with tempfile.TemporaryDirectory() as folder:
        table = open_table(Path(folder) / "t", 20, 3)
        now = {"weights": np.zeros((20, 3)), **{name: np.full(s[0], s[2]) for name, s in SMALL.items()}}
        flushed, former, clean = (None, _copy(now)), None, True
        for value, (call, *rows) in enumerate(calls):
            if call.startswith("change"):
                kept = np.array(list(rows[0])) if rows else None
                table.keep(kept)
                for array in (table.weights, *table.state(SMALL).values()):
                    array[kept if rows else ...] = value
                for array in now.values():
                    array[kept if rows else ...] = value
                clean = False
            elif call == "flush":
                table.state(SMALL)
                table.flush({"value": value})
                former, flushed, clean = flushed, ({"value": value}, _copy(now)), True
            elif call == "prepare":
                table.prepare({"value": -1})
            elif call == "crash":
                table.close()
                table = open_table(table.path)
                now, clean = _copy(flushed[1]), True
            elif former is None or not clean:
                with pytest.raises(ValueError):
                    table.roll_back()
            else:
                table.roll_back()
                flushed, former, now = former, None, _copy(former[1])
            assert table.progress == flushed[0]
            assert table.previous == (former and former[0])
            assert_same({"weights": table.weights, **table.state(SMALL)}, now)
        table.close()


def _copy(content):
    return {name: array.copy() for name, array in content.items()}


# Processes

LOOP = f"""
    import sys
    import numpy as np
    from fastopt import open_table
    path, side, seed = sys.argv[1:]
    rng = np.random.default_rng(int(seed))
    table = open_table(path)
    F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
    arrays = {{"weights": table.weights, **table.state(
        {{"exp_avg": (({ROWS}, {DIM}), F32, 0.0), "sum": (({ROWS},), F64, 0.5)}}
    )}}
    number = (table.progress or {{"number": 0}})["number"]
    print("ready", flush=True)
    while True:
        for _ in range(rng.integers(1, 30)):
            rows = rng.choice({ROWS}, rng.integers(1, 100), replace=False)
            table.keep(rows)
            for array in arrays.values():
                array[rows] = rng.standard_normal(array[rows].shape)
        number += 1
        np.savez(f"{{side}}/{{number}}.npz", **arrays)  # what flush number is to hold
        table.flush({{"number": number}})
"""


def test_killed_at_any_time(tmp_path):
    open_table(tmp_path / "t", ROWS, DIM).close()
    rng = np.random.default_rng(0)
    numbers, undone = [], 0
    for seed in range(8):
        process = python(LOOP, tmp_path / "t", tmp_path, seed)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        undone += any((tmp_path / "t").glob(f"undo-{_generation(tmp_path / 't')}"))
        with open_table(tmp_path / "t") as table:
            if table.progress is not None:
                if seed % 2 and table.previous is not None:
                    number = table.previous["number"]
                    table.roll_back()
                else:
                    number = table.progress["number"]
                assert table.progress["number"] == number
                assert_same(contents(table), dict(np.load(tmp_path / f"{number}.npz")))
                numbers.append(number)
    assert numbers and numbers[-1] > 3
    assert undone >= 2


def _generation(path):
    return json.loads((path / "meta.json").read_text())["generation"]


@pytest.mark.parametrize(
    ("calls", "numbers"),
    [
        ("", (1, 1)),
        ("a.prepare(two)", (1, 1)),
        ("a.prepare(two); b.prepare(two)", (1, 1)),
        ("a.prepare(two); b.prepare(two); a.commit()", (2, 1)),
        ("a.prepare(two); b.prepare(two); a.commit(); b.commit()", (2, 2)),
    ],
)
def test_two_tables_killed_while_flushing(tmp_path, calls, numbers):
    script = f"""
        import os, signal, sys
        import numpy as np
        from fastopt import open_table
        tables = a, b = [open_table(path, 50, 2) for path in sys.argv[1:]]
        two = {{"number": 2}}
        for number in (1, 2):
            for table in tables:
                for rows in (np.arange(50), np.array([3])):
                    table.keep(rows)
                    table.weights[rows] = number
                if number == 1:
                    table.flush({{"number": 1}})
        {calls}
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process = python(script, tmp_path / "a", tmp_path / "b")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    tables = [open_table(tmp_path / name) for name in "ab"]
    assert tuple(table.progress["number"] for table in tables) == numbers
    for table in tables:
        assert (table.weights == table.progress["number"]).all()
    if numbers == (2, 1):
        assert tables[0].previous == tables[1].progress
        tables[0].roll_back()
        assert (tables[0].weights == 1).all()
    for table in tables:
        table.close()


def test_lock(tmp_path):
    table = open_table(tmp_path / "t", 5, 2)
    with pytest.raises(BlockingIOError, match=f"open already.*{tmp_path / 't'}"):
        open_table(tmp_path / "t")
    script = "import sys; from fastopt import open_table; open_table(sys.argv[1])"
    with pytest.raises(subprocess.CalledProcessError) as error:
        subprocess.run(
            [sys.executable, "-c", script, tmp_path / "t"], check=True, capture_output=True, text=True
        )
    assert "BlockingIOError" in error.value.stderr and str(tmp_path / "t") in error.value.stderr
    table.close()
    table = open_table(tmp_path / "t")
    del table
    gc.collect()
    open_table(tmp_path / "t").close()


def test_forked_child(tmp_path):
    script = """
        import os, sys
        from fastopt import open_table
        table = open_table(sys.argv[1], 5, 2)
        child = os.fork()
        if not child:
            table.close()
            os._exit(0)
        os.waitpid(child, 0)
        try:
            open_table(sys.argv[1])
        except BlockingIOError:
            print("locked")
        child = os.fork()
        if not child:
            sys.stdin.read()
            os._exit(0)
        table.close()
        open_table(sys.argv[1])
        print("opened", flush=True)
    """
    process = python(script, tmp_path / "t", stdin=subprocess.PIPE)
    assert process.communicate("")[0] == "locked\nopened\n"


def test_table_larger_than_memory(tmp_path):
    rows, dim, touched = 2**22, 128, 4000
    script = f"""
        import resource, sys
        import numpy as np
        from fastopt import open_table
        data = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
        limit = data * 1024 + 2**28
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            np.ones(2**26)
        except MemoryError:
            print("limited")
        table = open_table(sys.argv[1], {rows}, {dim})
        state = table.state({{name: (({rows}, {dim}), np.dtype(np.float32), 0.0) for name in ("m", "v")}})
        rng = np.random.default_rng(0)
        for number in range(4):
            chosen = np.unique(rng.integers(0, {rows}, {touched // 4}))
            table.keep(chosen)
            for array in (table.weights, *state.values()):
                array[chosen] += 1
            table.flush({{"number": number}})
        table.keep(chosen)
        table.weights[chosen] = 5
        table.close()
        table = open_table(sys.argv[1])
        assert (table.weights[chosen] < 5).all() and (table.weights[chosen] > 0).all()
        print(table.progress["number"])
    """
    start = sum(os.times()[2:4])  # seconds of the processor, which other work does not lengthen
    process = python(script, tmp_path / "t")
    assert process.communicate()[0] == "limited\n3\n"
    assert sum(os.times()[2:4]) - start < 20
    for name in ("weights", "state-m", "state-v"):
        status = (tmp_path / "t" / name).stat()
        assert status.st_size == rows * dim * 4
        # a page for each row, and what the file system needs to find them
        assert touched * 512 < status.st_blocks * 512 < 2 * touched * 4096
    shutil.rmtree(tmp_path / "t")


def test_files_have_the_permissions_of_new_files(table):
    (table.path.parent / "new").touch()
    (table.path.parent / "folder").mkdir()
    change(table, [1], 2)
    expected = stat.S_IMODE((table.path.parent / "new").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in table.path.iterdir()} == {expected}
    assert table.path.stat().st_mode == (table.path.parent / "folder").stat().st_mode
