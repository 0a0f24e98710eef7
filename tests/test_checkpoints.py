"""Checkpoints: what is restored, that damage and what does not fit are named, and that a save is whole or not
at all."""

import fcntl
import json
import os
import sys
import zlib

import numpy as np
import pytest

import fastopt
from fastopt.checkpoint import tensors
from fastopt.schedules import cosine, exponential


def told(opt, arrays):
    """Everything that a load may change."""
    saved = opt.state_dict()
    state = [
        (key, name, np.asarray(value).tobytes())
        for key, entry in saved["state"].items() for name, value in entry.items()
    ]  # fmt: skip
    return [a.tobytes() for a in arrays], saved["steps"], state, repr(saved["param_groups"])


def trained(steps=2, value=1.0, make=fastopt.Adam, **options):
    """An optimizer over a table and a vector after some steps, and these."""
    arrays = [np.full((6, 4), value), np.full(3, value, np.float32)]
    opt = make(arrays, **options)
    for _ in range(steps):
        opt.step([fastopt.IndexedSlices(np.array([1, 4]), np.ones((2, 4))), np.ones(3, np.float32)])
    return opt, arrays


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with parameters."""
    path = tmp_path / "saved"
    trained()[0].save(path, params=True, metadata={"epoch": 3})
    return path


def refused(path, match, error=(ValueError, TypeError), **options):
    """Expect that loading raises, with the file's name, and changes nothing."""
    opt, arrays = trained(1, 5.0)
    before = told(opt, arrays)
    with pytest.raises(error, match=match) as caught:
        opt.load(path, **options)
    assert str(path) in str(caught.value)
    assert told(opt, arrays) == before


# What is restored


def test_parameters_in_the_file_are_restored_unless_they_are_refused(tmp_path):
    opt, arrays = trained()
    opt.save(tmp_path / "whole", params=True)
    opt.save(tmp_path / "state")
    for options, restored in (({}, True), ({"params": True}, True), ({"params": False}, False)):
        twin, own = trained(1, 5.0)
        before = [a.tobytes() for a in own]
        twin.load(tmp_path / "whole", **options)
        assert [a.tobytes() for a in own] == ([a.tobytes() for a in arrays] if restored else before)
        assert told(twin, own)[1:] == told(opt, arrays)[1:]
    twin, own = trained(1, 5.0)
    twin.load(tmp_path / "state")
    assert own[0][0, 0] == 5.0
    refused(tmp_path / "state", "holds no parameters, and params=True asks for them", params=True)


def test_parameters_that_do_not_fit_can_be_left_out(saved):
    arrays = [np.ones((6, 4)), np.ones(3, np.float32)]
    opt = fastopt.SGD(arrays)
    opt.save(saved, params=True)
    for other in (np.ones((6, 4), np.float32), np.ones((6, 5))):
        twin = fastopt.SGD([other, arrays[1]])
        with pytest.raises(ValueError, match=r"holds params\[0\] with shape .*pass params=False"):
            twin.load(saved)
        twin.load(saved, params=False)


def test_a_schedule_is_not_lost_to_a_number(tmp_path):
    opt, _ = trained(lr=0.5)
    opt.save(tmp_path / "saved")
    schedule = 0.5 * cosine(10)
    for load in (
        lambda one, **options: one.load(tmp_path / "saved", **options),
        lambda one, **options: one.load_state_dict(opt.state_dict(), **options),
    ):
        twin, own = trained(1, lr=schedule)
        before = told(twin, own)
        with pytest.raises(
            ValueError, match=r"has lr 0\.5, and params has the schedule .*cosine.*options=False"
        ):
            load(twin)
        assert told(twin, own) == before
        load(twin, options=False)
        assert twin.param_groups[0]["lr"] is schedule
        assert told(twin, own)[1:3] == told(opt, own)[1:3]


def test_a_finished_schedule_is_made_longer(tmp_path):
    opt, _ = trained(lr=0.5 * cosine(2))
    opt.save(tmp_path / "saved")
    longer = 0.5 * cosine(20)
    for lr in (longer, 0.5 * exponential(0.5), 0.1):
        twin, own = trained(1, lr=lr)
        before = told(twin, own)
        with pytest.raises(ValueError, match=r"schedule .*cosine.* and params has .*options=False"):
            twin.load(tmp_path / "saved")
        assert told(twin, own) == before
        twin.load(tmp_path / "saved", options=False)
        assert twin.param_groups[0]["lr"] == lr
        assert twin.steps == 2
    twin, own = trained(0, lr=longer)
    twin.load(tmp_path / "saved", options=False)
    before = own[1].copy()
    twin.step([None, np.ones(3, np.float32)])
    assert (own[1] != before).all()  # the finished one has the rate 0
    twin.load_state_dict(opt.state_dict())  # a dict holds the schedule itself
    assert twin.param_groups[0]["lr"] is opt.param_groups[0]["lr"]


def test_a_function_of_another_name_is_another_schedule(tmp_path):
    def slow(step):
        return 0.1

    def fast(step):
        return 1.0

    trained(lr=slow)[0].save(tmp_path / "saved")
    trained(lr=slow)[0].load(tmp_path / "saved")
    for lr in (fast, lambda step: 0.1, cosine(3)):
        with pytest.raises(ValueError, match="build the optimizer with that schedule"):
            trained(lr=lr)[0].load(tmp_path / "saved")


def test_old_moments_are_tuned_with_own_options(saved):
    opt, _ = trained(1, lr=0.25, betas=(0.5, 0.75))
    assert opt.load(saved, options=False) == {"epoch": 3}
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["betas"]) == (0.25, (0.5, 0.75))
    opt.param_groups[0]["lr"] = 0.125  # not adopted yet
    opt.load_state_dict(trained()[0].state_dict(), options=False)
    assert opt.param_groups[0]["lr"] == 0.125
    opt.load(saved)
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["betas"]) == (0.001, (0.9, 0.999))


def test_rows_that_are_behind_keep_the_options_of_the_steps_they_missed(tmp_path):
    opt, arrays = trained(make=fastopt.AdamW, rows="dense", weight_decay=0.1)
    opt.save(tmp_path / "saved", params=True)
    twin, own = trained(0, make=fastopt.AdamW, rows="dense", weight_decay=0.5, lr=0.5)
    with pytest.raises(ValueError, match=r"rows that are behind.*options=True, then change param_groups"):
        twin.load(tmp_path / "saved", options=False)
    assert (own[0] == 1).all()
    twin.load(tmp_path / "saved")
    twin.param_groups[0].update(weight_decay=0.5, lr=0.5)
    opt.flush()
    twin.flush()
    assert told(twin, own)[:2] == told(opt, arrays)[:2]
    other, _ = trained(0, make=fastopt.AdamW, rows="dense", weight_decay=0.1, lr=0.5)
    opt, _ = trained(make=fastopt.AdamW, rows="dense", weight_decay=0.1)
    other.load_state_dict(opt.state_dict(), options=False)  # the rates of missed steps are stored
    assert other.param_groups[0]["lr"] == 0.5


# What does not fit


@pytest.mark.parametrize("make", [fastopt.SGD, fastopt.AdamW, fastopt.Lion])
def test_another_class_is_named_before_all_else(make, tmp_path):
    opt, _ = trained(make=make, lr=0.5 * cosine(3))
    opt.save(tmp_path / "saved")
    refused(tmp_path / "saved", f"is of the optimizer '{make.__name__}': expected 'Adam'")
    with pytest.raises(
        ValueError, match=f"state_dict is of the optimizer '{make.__name__}': expected 'Adam'"
    ):
        trained()[0].load_state_dict(opt.state_dict())


@pytest.mark.parametrize(
    ("option", "value"),
    [("rows", "dense"), ("step_per_row", True), ("state_dtype", "8bit"), ("master_weights", True)],
)
def test_options_that_the_state_depends_on_are_named(option, value, tmp_path):
    trained(**{option: value})[0].save(tmp_path / "saved")
    for options in (True, False):
        remedy = rf"has {option} {value!r}: expected .*build the optimizer with {option}={value!r}"
        refused(tmp_path / "saved", remedy, options=options)


def test_groups_and_parameters_that_differ_are_named(tmp_path):
    path = tmp_path / "saved"
    arrays = {"a": np.ones(3), "b": np.ones(3)}
    fastopt.SGD(arrays).save(path, params=True)
    for params, match in (
        ({"a": np.ones(3)}, r"\['params'\] is \['a', 'b'\]: expected \['a'\].*it has 'b'"),
        ({**arrays, "c": np.ones(3)}, "it lacks 'c'"),
        ({"a": np.ones(3), "d": np.ones(3)}, "it lacks 'd'; it has 'b'"),
        (list(arrays.values()), "it lacks 0; it has 'a'"),
        ([{"params": {"a": np.ones(3)}}, {"params": {"b": np.ones(3)}}], "has 1 entries: expected 2 groups"),
    ):
        with pytest.raises(ValueError, match=match) as caught:
            fastopt.SGD(params).load(path)
        assert str(path) in str(caught.value)


# Damage


def edited(path, change):
    """Write the header of the file anew, the tensors as they were."""
    raw = path.read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:size])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[size:])


def test_every_flipped_bit_is_seen(saved):
    raw = saved.read_bytes()
    right = told(*trained())
    seen = 0
    for i in range(0, len(raw), 3):
        damaged = bytearray(raw)
        damaged[i] ^= 1 << i % 8
        saved.write_bytes(damaged)
        opt, arrays = trained(0, 5.0)
        try:
            opt.load(saved)
        except ValueError as error:
            assert str(saved) in str(error)
            assert opt.steps == 0 and (arrays[0] == 5.0).all() and (arrays[1] == 5.0).all()
            seen += 1
        else:
            assert told(opt, arrays) == right
    assert seen > len(raw) / 3 - 20  # the blanks after the header may become other blanks


def test_damage_is_told_by_tensor(saved):
    raw = bytearray(saved.read_bytes())
    raw[-1] ^= 0x40
    saved.write_bytes(raw)
    refused(saved, "is damaged: the checksum of the tensor 'param.1' is")
    trained()[0].load(saved, params=False)  # which does not read it


def test_a_changed_digit_of_an_option_is_seen(saved):
    saved.write_bytes(saved.read_bytes().replace(b'lr\\": 0.001', b'lr\\": 0.009'))
    refused(saved, "is damaged: the checksum of its metadata is")


def test_files_cut_and_lengthened_are_refused(saved):
    raw = saved.read_bytes()
    for content in (raw[:-1], raw[: len(raw) // 2], raw + b"\0", raw + bytes(1000), raw[:9], raw[1:]):
        saved.write_bytes(content)
        refused(saved, "not a whole safetensors file")


def test_a_file_without_checksums_is_read_only_in_the_format_that_had_none(saved):
    with tensors.opened(saved) as file:
        header = json.loads(file.metadata["fastopt"])
    for version in (1, 2):
        text = json.dumps({**header, "format": version})

        def drop(header, text=text):
            header["__metadata__"] = {"fastopt": text}

        edited(saved, drop)
        if version == 1:
            opt, arrays = trained(0, 5.0)
            opt.load(saved)
            assert told(opt, arrays) == told(*trained())
    refused(saved, "has no checksums")


def deep(header):
    header["__metadata__"]["fastopt"] = "[" * 100_000 + "]" * 100_000


CRAFTED = [
    (lambda h: h["state.0.exp_avg"].update(dtype="I64"), "checksum of the tensor 'state.0.exp_avg'"),
    (lambda h: h["state.0.exp_avg"].update(dtype="F32"), "'state.0.exp_avg' has shape"),
    (lambda h: h["state.0.exp_avg"].update(dtype="F7"), "the header says of 'state.0.exp_avg'"),
    (lambda h: h["state.0.exp_avg"].update(shape=[24]), "checksum of the tensor"),
    (lambda h: h["state.0.exp_avg"].update(shape=[2**62, 2**62]), "has shape"),
    (lambda h: h["state.0.exp_avg"].update(shape=[-6, -4]), "the header says of"),
    (lambda h: h["state.0.exp_avg"].update(shape=[6.0, 4]), "the header says of"),
    (lambda h: h["state.0.exp_avg"].update(shape=[1] * 70 + [24]), "state.0.exp_avg"),
    (lambda h: h["state.0.exp_avg"].update(data_offsets=h["param.0"]["data_offsets"]), "begins at byte"),
    (lambda h: h["state.0.exp_avg"].update(data_offsets=[0, 2**70]), "has shape"),
    (lambda h: h["state.0.exp_avg"].update(data_offsets=["x", 3]), "the header says of"),
    (lambda h: {**h, "other": h["param.0"]}, "begins at byte"),
    (lambda h: h.update(__metadata__={"fastopt": 3}), "is not a dict of texts"),
    (lambda h: h.update(__metadata__=[]), "is not a dict of texts"),
    (lambda h: [h], "its header is no dict"),
    (lambda h: h["__metadata__"].update(crc32="{"), "checksums of other tensors"),
    (lambda h: h["__metadata__"].update(crc32="[" * 100_000), "checksums of other tensors"),
    (deep, "is damaged"),
]


@pytest.mark.parametrize("number", range(len(CRAFTED)))
def test_crafted_headers_are_refused(saved, number):
    change, match = CRAFTED[number]
    edited(saved, change)
    refused(saved, match)


@pytest.mark.parametrize(
    "header",
    [b"\xff\xfe{}", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"nul", b"3", b'{"a": 1e999}'],
)
def test_headers_that_are_no_json_are_refused(saved, header):
    saved.write_bytes(len(header).to_bytes(8, "little") + header)
    refused(saved, "not a whole safetensors file")


def group(**changes):
    return lambda h: h["param_groups"][0].update(changes)


def parameter(**changes):
    return lambda h: h["parameters"][0].update(changes)


VALUES = [
    *[
        (lambda h, bad=bad: h.update(steps=bad), "'steps'")
        for bad in (-5, 1e300, "x", float("nan"), True, None)
    ],
    *[(parameter(step=bad), "'step'") for bad in (-5, 1e300, "x", float("nan"), 2**60, [1])],
    *[(parameter(key=bad), "'key'|expected one entry") for bad in (1, "x", None, True, [0], {})],
    *[(parameter(slots=bad), "'slots'|lacks the tensor|has the tensor") for bad in (3, [3], [[]], [], ["x"])],
    *[
        (group(lr=bad), "lr of .*saved")
        for bad in (-1.0, float("nan"), float("inf"), "x", None, {"schedule": 3})
    ],
    *[(group(betas=bad), "betas of .*saved") for bad in ([0.9], [0.9, 1.5], 3, "ab", [[], []])],
    *[(group(rows=bad), "rows") for bad in ("x", [], None)],
    *[(group(seed=bad), "seed of") for bad in (-1, 1.5, 2**63)],
    *[(group(params=bad), "'params'") for bad in ([1, 0], [0], 3, "01", [[0], 1])],
    (group(unknown=1), "it has 'unknown'"),
    (lambda h: h["param_groups"][0].pop("eps"), "it lacks 'eps'"),
    (lambda h: h.update(param_groups=[3]), r"\['param_groups'\]\[0\] is 3"),
    (lambda h: h.update(parameters={}), "'parameters'.* is {}: expected list"),
    (lambda h: h.update(metadata=[]), "'metadata'"),
    (lambda h: h.update(optimizer=["Adam"]), "'optimizer'"),
    (lambda h: h.update(format="2"), "'format'"),
    (lambda h: h.update(format=-1), "has format -1"),
    (lambda h: h.update(params="yes"), "'params'"),
]


@pytest.mark.parametrize("number", range(len(VALUES)))
def test_values_are_checked_where_checksums_are_right(saved, number):
    change, match = VALUES[number]
    with tensors.opened(saved) as file:
        header = json.loads(file.metadata["fastopt"])
        arrays = {name: file.read(name) for name in file.names}
    change(header)
    tensors.write(saved, arrays, {"fastopt": json.dumps(header)})
    refused(saved, match)


def test_other_readers_read_the_file(saved):
    from safetensors.numpy import load_file

    opt, arrays = trained()
    read = load_file(saved)
    assert set(read) == {f"state.{i}.exp_avg{end}" for i in (0, 1) for end in ("", "_sq")} | {
        "param.0",
        "param.1",
    }
    for i, array in enumerate(arrays):
        np.testing.assert_array_equal(read[f"param.{i}"], array)
        np.testing.assert_array_equal(read[f"state.{i}.exp_avg"], opt.state_dict()["state"][i]["exp_avg"])


# Written whole or not at all


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_killed_saves_left_is_removed(tmp_path):
    path = tmp_path / "saved"
    opt, _ = trained()
    stale = [tmp_path / f".saved.{token}.tmp" for token in ("0123456789abcdef", "abc_1234")]
    for folder in stale:
        folder.mkdir()
        (folder / "saved").write_bytes(b"half of it")
    (tmp_path / ".saved.fedcba9876543210.tmp").mkdir()
    opt.save(path)
    assert names(tmp_path) == ["saved"]


def test_a_save_that_goes_on_elsewhere_is_left_alone(tmp_path):
    folder = tmp_path / ".saved.0123456789abcdef.tmp"
    folder.mkdir()
    opt, _ = trained()
    with open(folder / "saved.lock", "xb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        opt.save(tmp_path / "saved")
        assert names(tmp_path) == [folder.name, "saved"]
    opt.save(tmp_path / "saved")
    assert names(tmp_path) == ["saved"]


def test_a_save_holds_its_lock_while_it_writes(tmp_path, monkeypatch):
    opt, _ = trained()
    real = zlib.crc32
    tried = []

    def meanwhile(data, start=0):
        if not tried:
            tried.append(names(tmp_path))
            trained()[0].save(tmp_path / "saved")
            assert len(names(tmp_path)) == 2  # the one just written, and the folder of the other
        return real(data, start)

    monkeypatch.setattr("zlib.crc32", meanwhile)
    opt.save(tmp_path / "saved")
    assert tried
    assert names(tmp_path) == ["saved"]


def test_only_stale_folders_of_the_same_name_are_removed(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "saved").write_bytes(b"kept")
    (tmp_path / ".saved.0123456789abcdef.tmp").symlink_to(other)
    kept = [
        ".saved.x.0123456789abcdef.tmp",
        ".saved.tmp",
        ".other.0123456789abcdef.tmp",
        ".saved.aaaaaaaa.tmp",
    ]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".saved.aaaaaaaa.tmp" / "of somebody").write_bytes(b"kept")
    linked = tmp_path / ".saved.bbbbbbbb.tmp"
    linked.mkdir()
    (linked / "saved.lock").symlink_to(tmp_path / "made")
    trained()[0].save(tmp_path / "saved")
    assert names(other) == ["saved"]
    left = names(tmp_path)
    assert {*kept, ".saved.0123456789abcdef.tmp", "other", "saved"} <= set(left)
    assert "made" not in left


def test_what_a_killed_creation_of_a_table_left_is_removed(tmp_path):
    folder = tmp_path / ".table.0123456789abcdef.tmp"
    (folder / "table").mkdir(parents=True)
    (folder / "table" / "weights").write_bytes(b"half of it")
    fastopt.open_table(tmp_path / "table", 4, 2).close()
    assert names(tmp_path) == ["table"]


def test_a_full_disk_at_every_write_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "saved"
    opt = fastopt.Adam(np.ones(20_000))
    opt.save(path)
    before = path.read_bytes()
    opt.step(np.ones(20_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1, 100, 1_000, 5_000, 100_000, 160_000, 320_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # no file may grow beyond
        try:
            with pytest.raises(OSError) as caught:
                opt.save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(path) in str(caught.value) and ".tmp" not in str(caught.value)
        assert path.read_bytes() == before
        assert names(tmp_path) == ["saved"]


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        trained()[0].save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == ["pipe"]


class Interrupt(BaseException):
    pass


def interrupted(call, at, where):
    """Whether a call raised Interrupt at its line number ``at`` of those in ``where``."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if not any(part in frame.f_code.co_filename for part in where):
            return None
        if event == "line":
            count += 1
            if count == at:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupted_save_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "saved"
    old, new = trained(1), trained(2)
    old[0].save(path, params=True)
    first = path.read_bytes()
    new[0].save(path, params=True)
    second = path.read_bytes()
    at, found = 1, set()
    while True:
        path.write_bytes(first)
        if not interrupted(
            lambda: new[0].save(path, params=True), at, ["fastopt/checkpoint/", "_core/files"]
        ):
            break
        found.add(path.read_bytes())
        at += 1
    assert at > 50
    assert found == {first, second}
    new[0].save(path, params=True)
    assert names(tmp_path) == ["saved"]


def test_a_load_that_is_interrupted_before_it_takes_over_changes_nothing(saved):
    opt, arrays = trained(1, 5.0)
    before = told(opt, arrays)
    at = 1
    while interrupted(lambda: opt.load(saved), at, ["fastopt/checkpoint/"]):
        assert told(opt, arrays) == before
        at += 7
    assert at > 100
    assert told(opt, arrays) == told(*trained())
