"""Tables in files as parameters: the bits of arrays, and what a crash leaves of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import cases
import numpy as np
import pytest

import fastopt
from fastopt import BagGradient, IndexedSlices, schedules

ROWS, DIM = 300, 6
F32, F64 = np.float32, np.float64


def start(first, last, dim=DIM, dtype=F32):
    rng = np.random.default_rng(1)
    return cases.parameter(rng, (ROWS, dim), dtype)[first:last]


def new_table(path, **more):
    return fastopt.open_table(path, ROWS, DIM, init=start, **more)


def gradient(at, dtype=F32, dense=False):
    """That of step ``at``, the same in every process."""
    rng = np.random.default_rng([2, at])
    if dense:
        return cases.parameter(rng, (ROWS, DIM), dtype)
    indices = rng.integers(0, ROWS, 20)
    if at % 3 == 1:
        return BagGradient(indices, np.array([0, 5, 11]), cases.parameter(rng, (3, DIM), dtype), "mean")
    return IndexedSlices(indices, cases.parameter(rng, (20, DIM), dtype))


# Options of optimizers, by a name that scripts take too
MAKERS = {
    "adam": lambda p: fastopt.Adam(p, lr=0.05 * schedules.warmup_cosine(warmup=3, total=60)),
    "adam_dense": lambda p: fastopt.Adam(p, lr=0.05 * schedules.cosine(60), rows="dense"),
    "adam_per_row": lambda p: fastopt.Adam(p, lr=0.05, step_per_row=True),
    "rowwise_adagrad": lambda p: fastopt.RowwiseAdaGrad(p, lr=0.1, initial_accumulator_value=0.5),
    "sgd": lambda p: fastopt.SGD(p, lr=0.1, clip_row_norm=0.5),
    "momentum_dense": lambda p: fastopt.SGD(p, lr=0.1, momentum=0.9, rows="dense"),
}
EACH = pytest.mark.parametrize("name", MAKERS)


def in_memory(name, steps, flush_at=(), dense_at=(), dtype=F32):
    """The table, its state and the optimizer after steps in memory, with the same flushes."""
    p = start(0, ROWS, dtype=dtype).copy()
    opt = MAKERS[name]([p])
    for at in range(steps):
        opt.step([gradient(at, dtype, at in dense_at)])
        if at + 1 in flush_at:
            opt.flush()
    return p, opt


def assert_same(table, opt, p, twin, key=0):
    assert table.weights.tobytes() == p.tobytes()
    own, other = opt.state_dict()["state"][key], twin.state_dict()["state"][0]
    assert own.keys() == other.keys()
    for slot in own:
        np.testing.assert_array_equal(own[slot], other[slot], strict=True, err_msg=slot)
    assert opt.steps == twin.steps


def python(script, *arguments, **options):
    folder = str(Path(__file__).parent)
    header = f"import os, sys; sys.path.insert(0, {folder!r})\nfrom test_open_table import *\n"
    return subprocess.Popen(
        [sys.executable, "-c", header + textwrap.dedent(script), *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        **options,
    )


# The same bits as in memory


@EACH
def test_tables_in_files_have_the_bits_of_arrays(name, tmp_path):
    dense_at = (4, 9)
    with new_table(tmp_path / "t") as table:
        opt = MAKERS[name]([table])
        for at in range(15):
            opt.step([gradient(at, dense=at in dense_at)])
            if at + 1 == 12:
                opt.flush()
        p, twin = in_memory(name, 15, (12,), dense_at)
        rows = np.arange(0, ROWS, 7)
        got = fastopt.embedding(table, rows, optimizer=opt)
        assert got.tobytes() == fastopt.embedding(p, rows, optimizer=twin).tobytes()
        bags = rows[:40].reshape(10, 4)
        for mode in ("sum", "max"):
            got = fastopt.embedding_bag(table, bags, mode=mode, optimizer=opt)
            want = fastopt.embedding_bag(p, bags, mode=mode, optimizer=twin)
            assert got.tobytes() == want.tobytes()
        assert_same(table, opt, p, twin)


def test_tables_and_arrays_mix_in_one_optimizer(tmp_path):
    rng = np.random.default_rng(3)
    with new_table(tmp_path / "a") as a, fastopt.open_table(tmp_path / "b", 50, 3, F64) as b:
        bias = np.zeros(4, F32)
        arrays = [start(0, ROWS).copy(), np.zeros((50, 3)), np.zeros(4, F32)]
        opt = fastopt.AdamW([{"params": [a, bias]}, {"params": [b], "lr": 0.1}])
        twin = fastopt.AdamW([{"params": [arrays[0], arrays[2]]}, {"params": [arrays[1]], "lr": 0.1}])
        for at in range(6):
            g = cases.gradient(rng, 4, F32)
            h = IndexedSlices(rng.integers(0, 50, 6), cases.parameter(rng, (6, 3), F64)) if at % 2 else None
            for one in (opt, twin):
                one.step([[gradient(at), g], [h]], clip_norm=1.0)
        assert a.weights.tobytes() == arrays[0].tobytes()
        assert b.weights.tobytes() == arrays[1].tobytes()
        assert bias.tobytes() == arrays[2].tobytes()
        assert "50" in repr(b) and "2 arrays" in repr(opt)
        opt.flush()


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("adam", {"exp_avg": 4 * ROWS * DIM, "exp_avg_sq": 4 * ROWS * DIM}),
     ("adam_per_row", {"exp_avg": 4 * ROWS * DIM, "exp_avg_sq": 4 * ROWS * DIM, "row_steps": 8 * ROWS}),
     ("rowwise_adagrad", {"sum": 4 * ROWS}), ("sgd", {}),
     ("momentum_dense", {"momentum_buffer": 4 * ROWS * DIM})],
)  # fmt: skip
def test_state_lives_in_files(name, shapes, tmp_path):
    with new_table(tmp_path / "t") as table:
        opt = MAKERS[name](table)
        opt.step(gradient(0))
        opt.flush()
        state = opt.state_dict()["state"][0]
        files = {path.name: path for path in (tmp_path / "t").iterdir()}
        assert {name.removeprefix("state-") for name in files if name.startswith("state-")} == set(shapes)
        for slot, size in shapes.items():
            assert files[f"state-{slot}"].stat().st_size == size
            assert files[f"state-{slot}"].read_bytes() == state[slot].tobytes()
        assert files["weights"].read_bytes() == table.weights.tobytes()
        assert json.loads(files["meta.json"].read_text())["progress"]["step"] == 1


# Going on


@EACH
def test_a_reopened_table_goes_on_bit_for_bit(name, tmp_path):
    table = new_table(tmp_path / "t")
    at, flushes = 0, []
    for steps in (5, 4, 6):
        opt = MAKERS[name]([table])
        assert opt.steps == at
        for _ in range(steps):
            opt.step([gradient(at)])
            at += 1
        opt.flush()
        flushes.append(at)
        opt.step([gradient(99)])  # which is undone
        table.close()
        table = fastopt.open_table(tmp_path / "t")
    opt = MAKERS[name]([table])
    assert_same(table, opt, *in_memory(name, at, flushes))
    table.close()


def test_a_table_flushed_alone_goes_on(tmp_path):
    for name in ("adam", "momentum_dense"):
        with new_table(tmp_path / name) as table:
            opt = MAKERS[name]([table])
            for at in range(7):
                opt.step([gradient(at)])
            table.flush()
            opt.step([gradient(7)])
            table.close()
        with fastopt.open_table(tmp_path / name) as table:
            opt = MAKERS[name]([table])
            assert_same(table, opt, *in_memory(name, 7, (7,)))


def test_leaving_the_blocks_of_two_tables_flushes_them_to_be_opened_again(tmp_path):
    with new_table(tmp_path / "a") as a, new_table(tmp_path / "b") as b:
        opt = fastopt.SGD([a, b], lr=0.1)
        opt.step([gradient(0), gradient(1)])
        opt.flush()
        opt.step([gradient(2), None])
    with fastopt.open_table(tmp_path / "a") as a, fastopt.open_table(tmp_path / "b") as b:
        opt = fastopt.SGD([a, b], lr=0.1)
        assert opt.steps in (1, 2)


def test_leaving_after_a_flush_changes_nothing(tmp_path):
    with new_table(tmp_path / "a") as a, new_table(tmp_path / "b") as b:
        opt = fastopt.SGD([a, b], lr=0.1)
        opt.step([gradient(0), gradient(1)])
        opt.flush()
    with fastopt.open_table(tmp_path / "a") as a, fastopt.open_table(tmp_path / "b") as b:
        assert fastopt.SGD([a, b], lr=0.1).steps == 1


def test_a_table_without_gradients_goes_on_too(tmp_path):
    with new_table(tmp_path / "a") as a, new_table(tmp_path / "b") as b:
        opt = fastopt.Adam([a, b])
        opt.step([gradient(0), None])
        opt.flush()
        a.close()
        b.close()
    with fastopt.open_table(tmp_path / "a") as a, fastopt.open_table(tmp_path / "b") as b:
        opt = fastopt.Adam([a, b])
        assert opt.steps == 1
        state = opt.state_dict()["state"]
        assert (state[0]["step"], state[1]) == (1, {"step": 0})
        a.close()
        b.close()


# Crashes

LOOP = """
name, path = sys.argv[1:]
table = fastopt.open_table(path)
opt = MAKERS[name]([table])
begin = opt.steps
while True:
    opt.step([gradient(opt.steps)])
    if opt.steps % 4 == 0:
        opt.flush()
    if opt.steps == begin + 5:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("name", ["adam", "rowwise_adagrad", "adam_per_row", "momentum_dense"])
def test_killed_at_any_time_it_is_as_at_the_last_flush(name, tmp_path):
    rng = np.random.default_rng(4)
    new_table(tmp_path / "t").close()
    seen = []
    for _ in range(2):
        process = python(LOOP, name, tmp_path / "t")
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with fastopt.open_table(tmp_path / "t") as table:
            opt = MAKERS[name]([table])
            steps = opt.steps
            assert steps % 4 == 0
            seen.append(steps)
            assert_same(table, opt, *in_memory(name, steps, range(4, steps + 1, 4)))
            for at in range(steps, steps + 4):
                opt.step([gradient(at)])
            opt.flush()
            assert_same(table, opt, *in_memory(name, steps + 4, range(4, steps + 5, 4)))
            table.close()
    assert seen == sorted(seen) and seen[-1] > 8


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("commits", [0, 1, 2])
def test_two_tables_come_back_at_a_common_flush(commits, first, tmp_path):
    script = """
        a, b = (new_table(f"{sys.argv[1]}/{name}") for name in "ab")
        opt = fastopt.Adam([a, b], lr=0.1)
        first, left = sys.argv[3] == "True", [int(sys.argv[2])]
        for at in range(2):
            opt.step([gradient(at), gradient(at + 50)])
        if not first:
            opt.flush()
            opt.step([gradient(2), gradient(52)])
        replace = os.replace
        def dying(*args):
            if not left[0]:
                os._exit(3)
            left[0] -= 1
            replace(*args)
        os.replace = dying
        opt.flush()
        os._exit(3)
    """
    process = python(script, tmp_path, commits, first)
    process.communicate()
    assert process.returncode == 3
    before, after = (0, 2) if first else (2, 3)
    steps = after if commits == 2 else before
    with fastopt.open_table(tmp_path / "a") as a, fastopt.open_table(tmp_path / "b") as b:
        arrays = [start(0, ROWS).copy(), start(0, ROWS).copy()]
        opt, twin = fastopt.Adam([a, b], lr=0.1), fastopt.Adam(arrays, lr=0.1)
        assert opt.steps == steps
        for at in range(steps + 3):
            grads = [gradient(at), gradient(at + 50)]
            twin.step(grads)
            if at >= steps:
                opt.step(grads)
        opt.flush()
        for key, (table, p) in enumerate(zip((a, b), arrays, strict=True)):
            assert table.weights.tobytes() == p.tobytes()
            state, other = opt.state_dict()["state"][key], twin.state_dict()["state"][key]
            for slot in state:
                np.testing.assert_array_equal(state[slot], other[slot], err_msg=slot)
        a.close()
        b.close()
    with fastopt.open_table(tmp_path / "a") as a, fastopt.open_table(tmp_path / "b") as b:
        assert fastopt.Adam([a, b], lr=0.1).steps == steps + 3
        a.close()
        b.close()


def killed(paths, to):
    """Copies of the tables' files as a kill now would leave them, opened."""
    shutil.rmtree(to, ignore_errors=True)
    return [fastopt.open_table(shutil.copytree(path, to / path.name)) for path in paths]


@pytest.mark.parametrize("error", [OSError(5, "disk"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("stepped", ["", "a", "b", "ab"])
@pytest.mark.parametrize("renamed", [0, 1])
def test_a_flush_that_fails_between_two_tables_can_be_repeated(
    error, stepped, renamed, tmp_path, monkeypatch
):
    """At each later renaming, a kill leaves tables at a common step."""
    paths = [tmp_path / "a", tmp_path / "b"]
    twins = [start(0, ROWS).copy(), start(0, ROWS).copy()]
    twin, at_steps = fastopt.Adam(twins), {}

    def check():
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            tables = killed(paths, tmp_path / "killed")
            opt = fastopt.Adam(tables)
            for table, own in zip(tables, at_steps[opt.steps], strict=True):
                assert table.weights.tobytes() == own
                table.close()
        return opt.steps

    replace, calls = os.replace, []

    def checking(*args):
        assert check() >= 1
        calls.append(args)
        if len(calls) - 1 == renamed:
            raise error
        replace(*args)

    with new_table(paths[0]) as a, new_table(paths[1]) as b:
        opt = fastopt.Adam([a, b])

        def step(at, which="ab"):
            grads = [gradient(at) if "a" in which else None, gradient(at + 50) if "b" in which else None]
            for one in (opt, twin):
                one.step(grads)
            at_steps[opt.steps] = [twin.tobytes() for twin in twins]

        step(0)
        opt.flush()
        step(1)
        monkeypatch.setattr(os, "replace", checking)
        with pytest.raises(type(error)):
            opt.flush()
        assert check() == 1
        if stepped:
            step(2, stepped)
            assert check() in (1, 2)
        opt.flush()
        assert check() == opt.steps == (3 if stepped else 2)
        for table, own in zip((a, b), twins, strict=True):
            assert table.weights.tobytes() == own.tobytes()
            table.close()


def test_rows_scaled_to_a_norm_are_undone(tmp_path):
    table = new_table(tmp_path / "t")
    opt = fastopt.SGD([table], lr=0.1)
    opt.flush()
    before = table.weights.copy()
    fastopt.embedding(table, np.arange(50), max_norm=0.1)
    fastopt.embedding_bag(table, np.arange(50, 90).reshape(10, 4), max_norm=0.1, optimizer=opt, mode="sum")
    assert (table.weights[:90] != before[:90]).any(axis=1).all()
    assert table.weights[90:].tobytes() == before[90:].tobytes()
    table.close()
    with fastopt.open_table(tmp_path / "t") as table:
        assert table.weights.tobytes() == before.tobytes()


@pytest.mark.parametrize("name", ["adam_dense", "momentum_dense"])
def test_rows_caught_up_for_reading_are_undone(name, tmp_path):
    table = new_table(tmp_path / "t")
    opt = MAKERS[name]([table])
    for at in range(4):
        opt.step([gradient(at)])
    opt.flush()
    opt.step([gradient(4)])
    fastopt.embedding(table, np.arange(ROWS), optimizer=opt)
    opt.param_groups[0]["lr"] = 0.5
    opt.step([gradient(5, dense=True)])
    table.close()
    with fastopt.open_table(tmp_path / "t") as table:
        opt = MAKERS[name]([table])
        assert_same(table, opt, *in_memory(name, 4, (4,)))


# Loading into tables


@pytest.mark.parametrize("flushed", [False, True])
@EACH
def test_loaded_state_and_parameters_go_on(name, flushed, tmp_path):
    p, source = in_memory(name, 6)
    source.flush()
    source.save(tmp_path / "saved", params=True)
    table = new_table(tmp_path / "t")
    opt = MAKERS[name]([table])
    for at in range(20, 23):  # something else
        opt.step([gradient(at)])
    if flushed:
        opt.flush()
    before = table.weights.copy()
    opt.load(tmp_path / "saved", params=True)
    assert_same(table, opt, p, source)
    for at in range(6, 9):
        opt.step([gradient(at)])
    table.close()
    table = fastopt.open_table(tmp_path / "t")  # undone
    assert table.weights.tobytes() == (before if flushed else start(0, ROWS)).tobytes()
    opt = MAKERS[name]([table])
    opt.load(tmp_path / "saved", params=True)
    for at in range(6, 9):
        opt.step([gradient(at)])
        source.step([gradient(at)])
    opt.flush()
    source.flush()
    table.close()
    with fastopt.open_table(tmp_path / "t") as table:
        assert_same(table, MAKERS[name]([table]), p, source)


def test_the_state_of_a_table_behind_can_be_loaded_into_another(tmp_path):
    p, source = in_memory("adam_dense", 6)
    with new_table(tmp_path / "t") as table:
        table.keep(None)
        table.weights[:] = p
        opt = MAKERS["adam_dense"]([table])
        opt.load_state_dict(source.state_dict())
        assert_same(table, opt, p, source)
        for one in (opt, source):
            one.step([gradient(6)])
            one.flush()
        assert_same(table, opt, p, source)


@pytest.mark.parametrize("flushed", [False, True])
def test_loading_a_state_before_the_first_step_starts_anew(flushed, tmp_path):
    with new_table(tmp_path / "t") as table:
        opt = fastopt.Adam([table])
        first = opt.state_dict()
        opt.step([gradient(0)])
        if flushed:
            opt.flush()
        opt.load_state_dict(first)
        assert opt.steps == 0
        p = table.weights.copy()
        twin = fastopt.Adam([p])
        for at in range(1, 4):
            opt.step([gradient(at)])
            twin.step([gradient(at)])
        assert_same(table, opt, p, twin)


# What is refused


def test_a_state_of_steps_alone_leaves_the_arrays_in_the_files(tmp_path):
    with new_table(tmp_path / "t") as table:
        opt = MAKERS["rowwise_adagrad"](table)
        opt.step(gradient(0))
        own = opt.state[0]["sum"].copy()
        state = opt.state_dict()
        state["state"][0], state["steps"] = {"step": 5}, 8
        opt.load_state_dict(state)
        assert opt.state[0]["sum"].tobytes() == own.tobytes() and (own != 0.5).any()
        assert opt.steps == 8 and opt.step_counts.tolist() == [5]
        opt.flush()
        assert table.progress["steps"] == 8 and table.progress["step"] == 5


def trained(path, make):
    table = new_table(path)
    opt = make(table)
    for at in range(3):
        opt.step(gradient(at))
    opt.flush()
    table.close()
    return fastopt.open_table(path)


@pytest.mark.parametrize(
    ("make", "other", "message"),
    [
        (fastopt.Adam, fastopt.SGD, "params, .*t, was updated by the optimizer 'Adam': expected 'SGD'"),
        (fastopt.Adam, fastopt.AdamW, "updated by the optimizer 'Adam'"),
        (fastopt.Adam, lambda p: fastopt.Adam(p, amsgrad=True), "has the state exp_avg"),
        (
            fastopt.Adam,
            lambda p: fastopt.Adam(p, step_per_row=True),
            "the options need exp_avg, exp_avg_sq, row_steps",
        ),
        (
            lambda p: fastopt.Adam(p, step_per_row=True),
            fastopt.Adam,
            "has the state exp_avg, exp_avg_sq, row_steps",
        ),
        (lambda p: fastopt.SGD(p, momentum=0.9), fastopt.SGD, "momentum_buffer"),
        (fastopt.SGD, lambda p: fastopt.SGD(p, momentum=0.9), "momentum_buffer"),
        (fastopt.SGD, lambda p: fastopt.SGD(p, step_per_row=True), "row_steps"),
        (lambda p: fastopt.SGD(p, step_per_row=True), fastopt.SGD, "row_steps"),
    ],
)
def test_another_optimizer_is_refused(make, other, message, tmp_path):
    table = trained(tmp_path / "t", make)
    weights, progress = table.weights.copy(), table.progress
    try:
        with pytest.raises(ValueError, match=message):
            other(table)
    finally:
        table.close()
    with fastopt.open_table(tmp_path / "t") as table:
        assert table.weights.tobytes() == weights.tobytes() and table.progress == progress
        assert make(table).steps == 3


def test_an_optimizer_that_was_refused_has_no_hold_on_the_table(tmp_path):
    with trained(tmp_path / "t", fastopt.Adam) as table:
        with pytest.raises(ValueError, match="updated by the optimizer 'Adam'") as kept:
            fastopt.SGD(table)
        table.flush()
        assert table.progress["optimizer"] == "Adam" and kept.value
        table.close()
    with fastopt.open_table(tmp_path / "t") as table:
        assert fastopt.Adam(table).steps == 3


def test_tables_of_different_flushes_are_refused(tmp_path):
    a, b = (trained(tmp_path / name, fastopt.Adam) for name in "ab")
    opt = fastopt.Adam(b)
    opt.step(gradient(7))
    opt.step(gradient(8))
    opt.flush()
    opt.flush()
    with pytest.raises(ValueError, match=r"params\[1\].* was flushed at step 5 .* but another table at 3"):
        fastopt.Adam([a, b])
    assert fastopt.Adam([a]).steps == 3
    assert fastopt.Adam([b]).steps == 5
    a.close()
    b.close()


def test_a_closed_table_is_refused(tmp_path):
    table = new_table(tmp_path / "t")
    opt = fastopt.Adam([table])
    opt.step([gradient(0)])
    table.close()
    for call in (lambda: opt.step([gradient(1)]), opt.flush, lambda: fastopt.Adam([table]),
                 lambda: fastopt.embedding(table, np.array([0])),
                 lambda: fastopt.embedding(table, np.array([0]), optimizer=opt)):  # fmt: skip
        with pytest.raises(ValueError, match="is closed: open it again"):
            call()


def test_bad_gradients_write_nothing(tmp_path):
    with new_table(tmp_path / "t") as table:
        opt = fastopt.Adam([table])
        opt.step([gradient(0)])
        opt.flush()
        before = table.weights.tobytes()
        for bad in (np.ones((ROWS, DIM)), np.ones((2, DIM), F32),
                    IndexedSlices(np.array([ROWS]), np.ones((1, DIM), F32))):  # fmt: skip
            with pytest.raises((ValueError, TypeError)):
                opt.step([bad])
        info = opt.step([np.full((ROWS, DIM), np.nan, F32)], skip_nonfinite=True)
        assert info.skipped and table.weights.tobytes() == before
        assert opt.steps == 1


def test_the_same_table_twice_is_refused(tmp_path):
    with new_table(tmp_path / "t") as table:
        for params in ([table, table], [table, table.weights]):
            with pytest.raises(ValueError, match="shares memory"):
                fastopt.SGD(params)


# Larger than memory


def test_training_touches_few_pages_of_a_huge_table(tmp_path):
    rows, dim, size = 2**22, 128, 1000  # 2 GiB, 6 GiB with the state
    script = """
        import resource
        rows, dim, size = 2**22, 128, 1000
        def step(opt, seed):
            rng = np.random.default_rng(seed)
            opt.step(IndexedSlices(rng.integers(0, rows, size), np.ones((size, dim), np.float32)))
        warm = np.zeros((rows // 4096, dim), np.float32)
        opt = fastopt.Adam(warm)
        opt.step(IndexedSlices(np.arange(size), np.ones((size, dim), np.float32)))
        opt.step(IndexedSlices(np.zeros(4000, int), np.ones((4000, dim), np.float32)))
        with open("/proc/self/status") as file:
            [used] = [int(line.split()[1]) << 10 for line in file if line.startswith("VmData")]
        limit = used + (200 << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        with fastopt.open_table(sys.argv[1], rows, dim) as table:
            opt = fastopt.Adam(table)
            for seed in range(3):
                step(opt, seed)
                opt.flush()
            step(opt, 3)
        print("done")
    """
    process = python(script, tmp_path / "t")
    assert process.communicate()[0] == "done\n"
    files = {path.name: path.stat() for path in (tmp_path / "t").iterdir()}
    for name in ("weights", "state-exp_avg", "state-exp_avg_sq"):
        assert files[name].st_size == rows * dim * 4
        used = files[name].st_blocks * 512
        assert 4 * size * dim * 4 * 0.9 < used <= 4 * size * 2 * 4096
    with fastopt.open_table(tmp_path / "t") as table:
        opt = fastopt.Adam(table)
        assert opt.steps == 4
        assert np.count_nonzero(table.weights[np.random.default_rng(3).integers(0, rows, size)]) == size * dim


def test_a_flush_of_one_table_is_one_of_all(tmp_path):
    with new_table(tmp_path / "a") as a, new_table(tmp_path / "b") as b:
        opt = fastopt.Adam([a, b])
        for at in range(3):
            opt.step([gradient(at), gradient(at)])
            a.flush()
        weights = a.weights.copy(), b.weights.copy()
    with fastopt.open_table(tmp_path / "a") as a, fastopt.open_table(tmp_path / "b") as b:
        assert fastopt.Adam([a, b]).steps == 3
        assert (a.weights.tobytes(), b.weights.tobytes()) == (weights[0].tobytes(), weights[1].tobytes())
        with pytest.raises(ValueError, match="was the parameter 1 of its optimizer"):
            fastopt.Adam(b)


def test_a_table_keeps_its_optimizer_until_it_is_closed(tmp_path):
    def train(table):
        opt = fastopt.Adam(table)
        for at in range(3):
            opt.step(gradient(at))

    with new_table(tmp_path / "t") as table:
        train(table)
        with pytest.raises(ValueError, match="changed by another optimizer since its last flush"):
            fastopt.Adam(table)
    with fastopt.open_table(tmp_path / "t") as table:
        opt = fastopt.Adam(table)
        assert opt.steps == 3
        later = fastopt.Adam(table)
        with pytest.raises(ValueError, match="now belongs to another optimizer"):
            opt.step(gradient(3))
        later.step(gradient(3))


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_state_in_fewer_bits_lies_in_files_and_goes_on_with_the_same_bits(tmp_path, state_dtype):
    def steps(opt, table, seeds):
        for seed in seeds:
            rng = np.random.default_rng(seed)
            indices = rng.integers(0, 40, 30)
            opt.step(fastopt.IndexedSlices(indices, rng.standard_normal((30, 300), dtype=np.float32)))
            opt.step(rng.standard_normal((40, 300), dtype=np.float32))

    options = {"lr": 0.01, "state_dtype": state_dtype, "seed": 3}
    for seeds in (range(2), range(2, 4)):
        with fastopt.open_table(tmp_path / "table", rows=40, dim=300) as table:
            opt = fastopt.Adam(table, **options)
            steps(opt, table, seeds)
            opt.flush()
            weights, state = table.weights.copy(), opt.state_dict()["state"][0]
    alone = np.zeros((40, 300), np.float32)
    other = fastopt.Adam(alone, **options)
    steps(other, alone, range(4))
    np.testing.assert_array_equal(weights, alone)
    for slot, array in other.state_dict()["state"][0].items():
        np.testing.assert_array_equal(state[slot], array, strict=True)


@pytest.mark.parametrize(
    ("given", "alone", "remedy"),
    [
        (
            lambda t: {"items": t},
            lambda t: t,
            r"parameter 'items' .* here it is 0: pass .*\{'items': table\}",
        ),
        (
            lambda t: [t],
            lambda t: {"items": t},
            r"parameter 0 .* here it is 'items': pass it first, as \[table\]",
        ),
        (
            lambda t: [np.zeros(3, F32), t],
            lambda t: t,
            "parameter 1 .* here it is 0: pass the 1 parameters before",
        ),
    ],
)
def test_a_table_under_another_name_is_refused_with_what_works(given, alone, remedy, tmp_path):
    with new_table(tmp_path / "t") as table:
        fastopt.SGD(given(table), lr=0.1).flush()
    with fastopt.open_table(tmp_path / "t") as table:
        with pytest.raises(ValueError, match=remedy):
            fastopt.SGD(alone(table), lr=0.1)
        fastopt.SGD(given(table), lr=0.1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", "x"),
        ("steps", -5),
        ("steps", 1e300),
        ("step", 1.5),
        ("step", 1),
        ("tables", 3),
        ("slots", [None]),
        ("key", []),
    ],
)
def test_edited_progress_is_refused(field, value, tmp_path):
    with new_table(tmp_path / "t") as table:
        fastopt.SGD(table, lr=0.1).flush()
    meta = json.loads((tmp_path / "t" / "meta.json").read_text())
    for bad in (
        {**meta["progress"], field: value},
        {k: v for k, v in meta["progress"].items() if k != field},
    ):
        stored = {name: value for name, value in meta.items() if name != "crc32"} | {"progress": bad}
        stored["crc32"] = zlib.crc32(json.dumps(stored).encode())
        (tmp_path / "t" / "meta.json").write_text(json.dumps(stored))
        table = fastopt.open_table(tmp_path / "t")
        with pytest.raises(ValueError, match=rf"progress of params.*meta\.json.*{field}"):
            fastopt.SGD(table, lr=0.1)
        table.close()
