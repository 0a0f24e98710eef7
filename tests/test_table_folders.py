"""Edited folders of tables, links in them, forked children, a full disk, interrupts and checksums."""

import errno
import json
import os
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest

import fastopt
from fastopt._core.backend import host
from fastopt.gradients import pooling
from fastopt.tables import mapped, undo_log
from fastopt.tables.open import open_table

ROWS, DIM = 300, 4
F32 = np.dtype(np.float32)
SLOTS = {"m": ((ROWS, DIM), F32, 0.0), "s": ((ROWS,), F32, 0.5)}


@pytest.fixture
def table(tmp_path):
    """Flushed as number 1 with all elements 1, then row 3 changed."""
    with open_table(tmp_path / "t", ROWS, DIM) as table:
        change(table, None, 1)
        table.flush({"number": 1})
        change(table, np.array([3]), 2)
        yield table
        table.close()


def change(table, rows, value):
    table.keep(rows)
    for array in (table.weights, *table.state(SLOTS).values()):
        array[... if rows is None else rows] = value


def killed(table, to):
    return Path(shutil.copytree(table.path, to))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def edited(meta, field, value):
    *path, last = field
    at = meta
    for name in path:
        at = at[name]
    if value is None:
        del at[last]
    else:
        at[last] = value


@pytest.mark.parametrize("file", ["meta.json", "meta-0.json"])
@pytest.mark.parametrize(
    ("field", "value"),
    [(("rows",), value) for value in ("300", True, 0, -1, 2**62, 1e300, 299, None)]
    + [(("dim",), 4.0), (("dtype",), "<f2"), (("dtype",), [1]), (("dtype",), None)]
    + [(("generation",), value) for value in (1.5, -1, "1", 2**70, None)]
    + [(("format",), 3), (("progress",), []), (("slots",), []), (("sums",), -1)]
    + [(("slots", name), {"shape": [ROWS, DIM], "dtype": "<f4"}) for name in ("x/../../v", "..", "a b", "")]
    + [(("slots", "m"), {"shape": shape, "dtype": "<f4"}) for shape in ([299, 4], [300, 2**62], [300, 0], 3)]
    + [(("slots", "m"), {"shape": [300, 4], "dtype": "O"}), (("slots", "m"), {"shape": [300, 4]})],
)
def test_edited_fields_are_refused_and_nothing_changes(table, tmp_path, file, field, value):
    copy = killed(table, tmp_path / "copy")
    meta = json.loads((copy / file).read_text())
    del meta["crc32"]
    edited(meta, field, value)
    meta["crc32"] = zlib.crc32(json.dumps(meta).encode())
    (copy / file).write_text(json.dumps(meta))
    before = files_of(copy)
    with pytest.raises(ValueError, match=str(copy)) as error:
        open_table(copy)
    assert any(name in str(error.value) for name in (*field, "file that can", "weights has"))
    assert files_of(copy) == before


def test_every_flipped_bit_of_a_meta_file_is_seen(table, tmp_path):
    table.flush({"step": 100})
    copy = killed(table, tmp_path / "copy")
    content = (copy / "meta.json").read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (copy / "meta.json").write_bytes(flipped)
        with pytest.raises(ValueError, match="copy/meta"):
            open_table(copy)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 50_000, b"\xff", b"", b'{"format": 2, "format": 2}', b'{"rows": NaN}'],
)
def test_text_that_is_no_meta_is_refused(table, tmp_path, content):
    copy = killed(table, tmp_path / "copy")
    (copy / "meta.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"copy/meta\.json is not as open_table wrote it"):
        open_table(copy)


@pytest.mark.parametrize(
    "name", ["weights", "state-m", "undo-1", "meta.json", "meta-0.json", "lock", "sums-1"]
)
@pytest.mark.parametrize(
    "make",
    [lambda to, path: path.symlink_to(to), lambda to, path: os.link(to, path),
     lambda to, path: os.mkfifo(path), lambda to, path: path.mkdir()],
    ids=["symlink", "hard link", "pipe", "folder"],
)  # fmt: skip
def test_no_link_is_followed(table, tmp_path, name, make):
    copy = killed(table, tmp_path / "copy")
    victim = tmp_path / "victim"
    (copy / name).rename(victim)
    content = victim.read_bytes()
    make(victim, copy / name)
    before = files_of(copy)
    with pytest.raises(ValueError, match=f"copy/{name} (is no regular file|has 2 hard links)"):
        open_table(copy)
    assert victim.read_bytes() == content and files_of(copy) == before


@pytest.mark.parametrize("rows", [[ROWS], [-1], [2**62], [5, 4], [7, 7], [3]])
def test_rows_that_a_log_can_not_hold_are_refused(table, tmp_path, rows):
    log = undo_log.UndoLog(table.path / "undo-1", 1, [table.weights, *table.state(SLOTS).values()])
    copy = killed(table, tmp_path / "copy")
    kept = (copy / "undo-1").read_bytes()
    payload = np.array(rows, np.int64).tobytes() + bytes((log._row_bytes - 8) * len(rows))
    record = undo_log._stamped(
        undo_log._RECORD, b"undorows", len(rows), len(payload), undo_log.zlib.crc32(payload)
    )
    head = undo_log._head(1, len(kept) + len(record) + len(payload), sealed=False)
    (copy / "undo-1").write_bytes(head + kept[len(head) :] + record + payload)
    before = files_of(copy)
    with pytest.raises(RuntimeError, match="undo-1 is damaged: a record holds rows twice, or others"):
        open_table(copy)
    assert files_of(copy) == before


def test_a_forked_child_is_refused_and_leaves_the_table_to_its_parent(table, tmp_path):
    before = files_of(table.path)
    calls = [
        lambda: table.keep(np.array([5])),
        lambda: table.state(SLOTS),
        lambda: table.prepare({}),
        table.commit,
        table.flush,
        table.roll_back,
    ]
    child = os.fork()
    if not child:
        failed = 1
        try:
            for call in calls:
                with pytest.raises(RuntimeError, match="forked from"):
                    call()
            assert table.weights[3, 0] == 2
            with pytest.raises(RuntimeError, match="forked from"), table:
                pass
            assert table.closed
            failed = 0
        finally:
            os._exit(failed)
    assert os.waitpid(child, 0)[1] == 0
    child = os.fork()
    if not child:
        try:
            with table:
                raise KeyError
        except KeyError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert files_of(table.path) == before
    with pytest.raises(BlockingIOError):
        open_table(table.path)
    table.flush({"number": 2})
    assert table.progress == {"number": 2}


def test_a_disk_without_room_is_an_error_before_rows_change(tmp_path, monkeypatch):
    with open_table(tmp_path / "t", 5000, 16) as table:
        state = {"m": ((5000, 16), F32, 0.0)}
        table.state(state)
        table.flush({"number": 1})
        real, left = os.posix_fallocate, [3]

        def full(*args):
            if not left[0]:
                raise OSError(errno.ENOSPC, "full")
            left[0] -= 1
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            table.keep(np.array([7, 8]))
            with pytest.raises(OSError, match=str(tmp_path)):
                table.keep(np.array([700, 2000]))
        rows = np.array([7, 700, 4999])
        table.keep(rows)
        blocks = {name: (table.path / name).stat().st_blocks for name in ("weights", "state-m")}
        table.weights[rows] = 1
        table.state(state)["m"][rows] = 1
        table.flush({"number": 2})
        assert all((table.path / name).stat().st_blocks == before for name, before in blocks.items())
        table.check()


def test_without_posix_fallocate_rows_are_written_as_they_are(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.EOPNOTSUPP, "unsupported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    monkeypatch.setattr(mapped, "FILL_BYTES", 4096)
    with open_table(tmp_path / "t", 5000, 16) as table:
        table.keep(np.arange(0, 5000, 100))
        assert not table.weights.any()
        assert (table.path / "weights").stat().st_blocks > 0


def test_recovery_writes_only_what_differs(table, tmp_path, monkeypatch):
    change(table, np.array([4]), 1)  # to what it was
    copy = killed(table, tmp_path / "copy")
    real, writes = os.pwrite, []
    monkeypatch.setattr(os, "pwrite", lambda *args: writes.append(len(args[1])) or real(*args))
    with open_table(copy) as again:
        assert (again.weights == 1).all()
    assert sum(writes[:3]) < 2 * 16 + 4 and len(writes) >= 3


@pytest.mark.parametrize("name", ["fsync", "pwrite", "replace"])
def test_an_interrupt_in_a_flush_is_no_failure(table, tmp_path, monkeypatch, name):
    at, done = 0, False
    while not done:
        change(table, np.array([at % ROWS, 200]), at)
        now, count, real = table.weights.copy(), [0], getattr(os, name)

        def interrupted(*args, real=real, count=count, at=at):
            count[0] += 1
            if count[0] == at + 1:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, interrupted)
            try:
                table.flush({"number": at})
            except KeyboardInterrupt:
                pass
            else:
                done = True
        table.flush({"number": at})
        copy = killed(table, tmp_path / f"copy{at}")
        with open_table(copy) as again:
            assert again.progress == {"number": at}
            np.testing.assert_array_equal(again.weights, now)
            again.check()
        at += 1
    assert at > 1


def test_real_signals_leave_a_flush_before_or_after(table):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    former = signal.signal(signal.SIGALRM, stop)
    try:
        for number in range(40):
            table.flush({"number": number})
            change(table, np.array([number]), number)
            signal.setitimer(signal.ITIMER_REAL, 0.0001 + 0.0001 * number)
            try:
                table.flush({"number": number + 1})
            except Stop:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert table.progress["number"] in (number, number + 1)
    except Stop:  # it came between the end of the flush and the timer's
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    table.flush({"number": -1})
    table.check()


@pytest.mark.parametrize("name", ["weights", "state-m", "state-s"])
@pytest.mark.parametrize("at", [0, 100, -1])
def test_check_sees_changed_bits(table, tmp_path, name, at):
    table.flush({"number": 2})
    copy = killed(table, tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[at] ^= 128
    (copy / name).write_bytes(content)
    with (
        open_table(copy) as again,
        pytest.raises(ValueError, match=f"{name} is not as it was flushed, .*rows"),
    ):
        again.check()


def test_check_follows_flushes_and_roll_backs(tmp_path):
    with open_table(tmp_path / "t", ROWS, DIM, init=lambda a, b: np.full((b - a, DIM), 0.25)) as table:
        table.check()
        for number, rows in enumerate((np.array([5, 100]), np.array([5, 6]), None, np.arange(200))):
            change(table, rows, number)
            with pytest.raises(ValueError, match="flush it first"):
                table.check()
            table.flush({"number": number})
            table.check()
        table.roll_back()
        table.check()
        table.weights[7] = 9  # without keep
        with pytest.raises(ValueError, match=r"weights is not as it was flushed, .*rows 0 to 63"):
            table.check()


def test_a_table_of_an_earlier_version_has_no_checksums(tmp_path):
    shutil.copytree(Path(__file__).parent / "golden" / "table", tmp_path / "t")
    with open_table(tmp_path / "t") as table:
        with pytest.raises(ValueError, match="has no checksums"):
            table.check()
        table.keep(np.array([1]))
        table.flush({"number": 1})
        table.close()
    with open_table(tmp_path / "t") as table:
        table.roll_back()
        assert table.progress["optimizer"] == "RowwiseAdam"


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no reserving")
@pytest.mark.parametrize("kind", ["step_per_row", "max"])
def test_rows_are_kept_before_a_step_reads_them(tmp_path, kind, monkeypatch):
    """Reading a page of tmpfs that the disk has no room for would end the process."""
    with open_table(tmp_path / "t", 60_000, 4) as table:
        opt = fastopt.Adam(table, step_per_row=kind == "step_per_row")
        opt.step(fastopt.IndexedSlices(np.arange(3), np.ones((3, 4), np.float32)))
        opt.flush()
        read = []
        for module, name in ((pooling.Bags, "pool_max"), (host(), "counted_steps")):
            monkeypatch.setattr(module, name, lambda *_: read.append(1))

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)
        index, values = np.array([50_000]), np.ones((1, 4), np.float32)
        grad = fastopt.IndexedSlices(index, values)
        if kind == "max":
            grad = fastopt.BagGradient(index, np.array([0]), values, mode="max")
        with pytest.raises(OSError, match="No space"):
            opt.step(grad)
        assert not read and opt.steps == 1
