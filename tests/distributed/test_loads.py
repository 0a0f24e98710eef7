"""What is said of the bytes of a step, against what process groups are given, and by hand."""

import numpy as np
import pytest
import torch
import traffic_of_ranks

from fastopt.cli import main
from fastopt.distributed import ByRows, Plan, Size, Whole
from fastopt.distributed.loads import Loads, Machine, Step, over_mean, power_law, times


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("plan", ["given", "planner"])
@pytest.mark.parametrize("count", [2, 4])
def test_bytes_sent_are_those_expected(ranks, count, plan, wire_dtype):
    for sent, expected in ranks.run(traffic_of_ranks.sent_by_each, count, plan, wire_dtype)[:count]:
        assert abs(sent / expected - 1) < 0.05


def test_a_table_on_one_rank_by_hand():
    """Two features of 3 indices, 10 bags on each of 4 ranks, rows of 8 float32."""
    own = Plan({"a": Whole(2)}, {"a": Size(100, 8, 4, 6, features=2)}, 4).loads(Step(bags=10))
    np.testing.assert_allclose(own.held, [0, 0, 4 * 800, 0])
    np.testing.assert_allclose(own.requests, [0, 0, 4 * 20 + 4 * 60, 0])
    np.testing.assert_allclose(own.results, [0, 0, 4 * 20 * 8, 0])
    np.testing.assert_allclose(own.gradients, own.results)
    np.testing.assert_allclose(own.lookups, [0, 0, 240, 0])
    asked, answered = 320 + 640, 640
    np.testing.assert_allclose(own.sent(), [asked, asked, 3 * answered, asked])
    np.testing.assert_allclose(own.received(), [answered, answered, 3 * asked, answered])
    distinct = 100 * (1 - 0.99**240)
    np.testing.assert_allclose(own.memory[2], 4 * 8 * (4 * 60 + 4 * 20 + 4 * 60 + 2 * 3 * distinct))
    machine = Machine(network=100.0, memory=1e3)
    np.testing.assert_allclose(own.seconds(machine)[2], 3 * asked / 100 + own.memory[2] / 1e3)


@pytest.mark.parametrize("weights, mode, factors", [(False, "sum", 0), (True, "sum", 1), (False, "mean", 1)])
def test_rows_by_hand(weights, mode, factors):
    """Of a table with one row that is always looked up, its rank has all."""
    size = Size(4, 2, 4, 1, 1, mode, weights, np.array([1.0, 0, 0, 0]))
    own = Plan({"a": ByRows()}, {"a": size}, 2).loads(Step(bags=5, state=0))
    np.testing.assert_allclose(own.requests, [4 * (1 + 5 + 5 + 5 * factors), 0])
    np.testing.assert_allclose(own.results, [4 * 2, 0])
    np.testing.assert_allclose(own.gradients, [4 * 2 * 5, 0])
    np.testing.assert_allclose(own.held, [16, 16])
    assert over_mean(own.lookups) == 2


def test_power_laws():
    found = power_law(1000, 1.2, scattered=False)
    np.testing.assert_allclose(found.sum(), 1)
    np.testing.assert_allclose(found[0] / found[9], 10**1.2)
    scattered = power_law(1000, 1.2)
    assert not np.array_equal(scattered, found)
    np.testing.assert_array_equal(np.sort(scattered), np.sort(found))


def test_times_are_those_of_the_slowest_rank():
    own = Loads(*np.array([[0, 0], [0, 1e9], [0, 2e9], [0, 1e9], [0, 0], [1e9, 3e9]]))
    assert times(own, Machine(network=2e9, memory=1e9, message=1e-6)) == (1.0, 3.0, 4e-6)


def shown(monkeypatch, capsys, *arguments):
    """What the command prints, and its exit status."""
    monkeypatch.setattr("sys.argv", ["fastopt", "loads", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return capsys.readouterr(), ended.value.code


@pytest.mark.parametrize("placement", ["planner", "planner-columns", "round-robin", "rows", "columns"])
def test_the_command_prints_a_line_for_each_number_of_ranks(monkeypatch, capsys, placement):
    given = "--ranks", "1,3,8", "--tables", "5", "--largest", "2000", "--bags", "64", "--placement", placement
    printed, code = shown(monkeypatch, capsys, *given)
    lines = [line.split() for line in printed.out.splitlines() if line.startswith("\u2502")]
    assert not code
    assert [line[1] for line in lines] == ["1", "3", "8"]
    assert float(lines[0][7]) == 0 < float(lines[1][7]) < float(lines[2][7])  # MB sent


def test_the_command_puts_placements_side_by_side(monkeypatch, capsys):
    printed, code = shown(monkeypatch, capsys, "--ranks", "2,4", "--tables", "3", "--largest", "2000")
    lines = [line.split() for line in printed.out.splitlines() if line.startswith("\u2502")]
    assert not code
    own = [(line[1], line[-2]) for line in lines]
    assert own == [(ranks, how) for ranks in "24" for how in ("planner", "round-robin")]


def test_the_command_takes_recorded_ids(monkeypatch, capsys, tmp_path):
    np.savez(tmp_path / "ids.npz", a=np.array([[0, 7], [7, 7]]), b=np.array([3, 1]))
    printed, code = shown(monkeypatch, capsys, "--ids", str(tmp_path / "ids.npz"), "--ranks", "2")
    assert not code and "2 tables, 12 rows" in printed.out
    np.savez(tmp_path / "ids.npz", a=np.array([0.5]))
    printed, code = shown(monkeypatch, capsys, "--ids", str(tmp_path / "ids.npz"))
    assert code == 2 and "'a' has dtype float64" in printed.err
    printed, code = shown(monkeypatch, capsys, "--ranks", "2,x")
    assert code == 2 and "expected whole numbers from 1 on" in printed.err


def test_the_command_refuses_files_without_arrays_and_machines_without_speed(monkeypatch, capsys, tmp_path):
    (tmp_path / "text.npz").write_text("ids")
    np.savez(tmp_path / "none.npz")
    np.save(tmp_path / "one.npy", np.arange(3))
    refused = {"text.npz": "can't be read", "none.npz": "no named arrays", "one.npy": "no named arrays"}
    for name, message in refused.items():
        printed, code = shown(monkeypatch, capsys, "--ids", str(tmp_path / name))
        assert code == 2 and message in " ".join(printed.err.split())
    printed, code = shown(monkeypatch, capsys, "--ranks", "2", "--network", "0")
    assert code == 2 and "--network" in printed.err
