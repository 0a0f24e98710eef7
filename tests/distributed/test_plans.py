"""Plans cover every table once, and even out memory, lookups and what is sent."""

import numpy as np
import pytest
import torch

import fastopt.distributed as fd
from fastopt.distributed.loads import MACHINE, over_mean, power_law
from fastopt.distributed.planner import plan_of_sizes

ROOM = 1.112  # over the mean: a tenth, and what places of bounds lie apart


def meta_tables(sizes, dim=16, **options):
    return {f"t{k}": torch.nn.EmbeddingBag(n, dim, device="meta", **options) for k, n in enumerate(sizes)}


def in_turns(sizes, ranks):
    return fd.Plan({name: fd.Whole(k % ranks) for k, name in enumerate(sizes)}, sizes, ranks)


def by_rows(sizes, ranks):
    return fd.Plan(dict.fromkeys(sizes, fd.ByRows()), sizes, ranks)


def held_and_slowest(plan):
    """The largest memory over the mean, and the seconds of the slowest rank."""
    loads = plan.loads()
    return over_mean(loads.held), loads.seconds(MACHINE).max()


def drawn_sizes(random):
    """Up to 30 tables, popular rows first, anywhere, or not known."""
    found = {}
    for k in range(random.integers(1, 30)):
        rows = int(10 ** random.uniform(0, 5))
        popularity = [None, power_law(rows, 1.05), power_law(rows, 1.2, scattered=False)][random.integers(3)]
        if popularity is not None and random.integers(2):
            popularity[1 + rows // 3 :] = 0
            popularity /= popularity.sum()
        features, columns = int(random.integers(1, 3)), int(random.integers(1, 100))
        mode = str(random.choice(["sum", "mean", "max"], p=[0.6, 0.3, 0.1]))
        lookups = float(random.choice([0, 0.5, 1, 3, 20]))
        found[f"t{k}"] = fd.Size(rows, columns, 4, lookups * features, features, mode, popularity=popularity)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_plans_of_drawn_tables(seed):
    random = np.random.default_rng(seed)
    sizes, ranks, columns = drawn_sizes(random), int(random.choice([1, 2, 3, 8, 20])), bool(seed % 2)
    plan = plan_of_sizes(sizes, ranks, columns=columns)
    for name, size in sizes.items():
        covered = np.zeros((size.rows, size.columns), np.int8)
        for part in plan.parts[name]:
            covered[part.first_row : part.last_row, part.first_column : part.last_column] += 1
        assert (covered == 1).all()
        assert columns or not isinstance(plan[name], fd.ByColumns)
        assert size.mode != "max" or not isinstance(plan[name], fd.ByRows)
    held, slowest = held_and_slowest(plan)
    for other in (in_turns(sizes, ranks), plan_of_sizes(sizes, ranks)):
        others_held, others_slowest = held_and_slowest(other)
        assert held <= max(others_held, ROOM)
        assert slowest <= others_slowest * 1.101 or others_held > ROOM


def test_a_plan_balances_memory_and_lookups():
    random = np.random.default_rng(0)
    sizes = (10 ** random.uniform(3, 7, 26)).astype(int)
    tables = meta_tables(sizes)
    lookups = {name: float(k % 5 + 1) for k, name in enumerate(tables)}
    for count in (4, 8):
        plan = fd.plan(tables, ranks=count, lookups=lookups)
        own, other = plan.loads(), in_turns(plan.sizes, count).loads()
        assert over_mean(own.held) < ROOM and over_mean(own.lookups) < 1.3
        assert over_mean(other.held) > 1.4
        assert own.seconds(MACHINE).max() < other.seconds(MACHINE).max()
        for loads in (own, other):
            assert loads.held.sum() == pytest.approx(sum(sizes) * 64)


def test_tables_of_long_bags_go_by_rows_only_where_they_have_to():
    """By rows, each row of a bag is sent: 26 tables, 20 indices a bag."""
    rows = np.geomspace(1e2, 1e6, 26).astype(int).tolist()
    sizes = {f"t{k}": fd.Size(n, 64, 4, 20, popularity=power_law(n, 1.05)) for k, n in enumerate(rows)}
    plan, columns = plan_of_sizes(sizes, 8), plan_of_sizes(sizes, 8, columns=True)
    sent = [own.loads().sent().max() for own in (by_rows(sizes, 8), plan, columns)]
    assert sent[1] < 0.5 * sent[0] and sent[2] < sent[1]
    room = 1.1 * sum(size.bytes for size in sizes.values()) / 8
    for name, placement in plan.items():
        assert isinstance(placement, fd.ByRows) == (sizes[name].bytes > room)
    assert fd.ByColumns in {type(own) for own in columns.values()}
    short = {name: size._replace(lookups=1) for name, size in sizes.items()}
    assert fd.ByRows in {type(own) for own in plan_of_sizes(short, 8).values()}


@pytest.mark.parametrize("lookups", [1, 20])
def test_hot_rows_are_evened_out(lookups):
    """Popular rows come first, all on one rank, where each has as many rows as any other."""
    sizes = {"hot": fd.Size(200_000, 16, 4, lookups, popularity=power_law(200_000, 1.05, scattered=False))}
    sizes |= {f"cold {k}": fd.Size(60_000, 16, 4, 0.1) for k in range(8)}
    plan = plan_of_sizes(sizes, 4)
    bounds = plan["hot"].bounds
    loads, before = plan.loads(), by_rows(sizes, 4).loads()
    assert over_mean(before.lookups) > 1.9
    assert over_mean(loads.lookups) < 1.35 and over_mean(loads.held) < ROOM
    assert bounds[1] < 20_000
    assert loads.seconds(MACHINE).max() < 0.8 * before.seconds(MACHINE).max()


def test_tables_that_nobody_looks_up():
    sizes = {name: fd.Size(rows, 4, 4, 0.0) for name, rows in {"a": 1000, "b": 100, "c": 0}.items()}
    assert over_mean(plan_of_sizes(sizes, 4).loads().held) < ROOM
    assert not plan_of_sizes({}, 2) and "0 tables" in str(plan_of_sizes({}, 2))


def test_popularity_is_that_of_counts():
    tables = meta_tables([1000, 10])
    counts = np.arange(1000)[::-1] ** 4
    plan = fd.plan(tables, {"t0": ["x", "y"]}, ranks=2, lookups={"x": 3.0}, popularity={"t0": counts})
    assert plan.sizes["t0"].popularity.sum() == pytest.approx(1)
    np.testing.assert_allclose(plan.sizes["t0"].popularity, counts / counts.sum())
    assert plan.sizes["t0"][3:5] == (4.0, 2) and plan.sizes["t1"].popularity is None


def test_a_plan_is_shown_as_a_table():
    tables = meta_tables([1000, 10, 10])
    plan = fd.plan(tables, ranks=2, lookups={"t0": 2.0})
    shown = str(
        fd.Plan(dict(plan) | {"t0": fd.ByRows(), "t2": fd.Whole(1), "t1": fd.Whole(0)}, plan.sizes, 2)
    )
    assert "3 tables on 2 ranks" in shown and "rows, on all ranks" in shown
    assert "largest over mean: memory 1.000, lookups 1.000" in shown
    assert "sends 0." in shown
    assert str(fd.ByColumns([0, 5, 16])) == "columns: 5, 11"
    assert str(fd.ByRows([0, 1, 3, 3, 9, 20, 25])) == "rows: 1 to 11 on 5 ranks"


def test_tables_with_maxima_are_not_planned_by_rows():
    assert isinstance(fd.plan(meta_tables([1000], mode="max"), ranks=2)["t0"], fd.Whole)
    own = fd.plan(meta_tables([1000], mode="max"), ranks=2, columns=True)["t0"]
    assert own == fd.ByColumns((0, 8, 16))


def test_plans_that_do_not_fit_are_refused():
    sizes = {"a": fd.Size(10, 4, 4, 1.0)}
    refused = {
        r"plan\['a'\] is ByRows.*3 numbers that do not fall, from 0 to 10": fd.ByRows([0, 11, 10]),
        r"columns of the table": fd.ByColumns([0, 4]),
        r"rank is 2: expected one from 0 to 1": fd.Whole(2),
        r"plan\['a'\] is 3: expected Whole, ByRows or ByColumns": 3,
        r"plan\['a'\] is Whole\(rank=0.5\): 'float' object": fd.Whole(0.5),
        r"plan\['a'\] is ByRows.*'float' object": fd.ByRows([0, 2.5, 10]),
        r"plan\['a'\] is ByRows.*'int' object is not iterable": fd.ByRows(5),
        r"plan\['a'\] is 3": 3,
    }
    for message, placement in refused.items():
        with pytest.raises(ValueError, match=message):
            fd.Plan({"a": placement}, sizes, 2)
    with pytest.raises(ValueError, match="expected \\['a'\\]"):
        fd.Plan({}, sizes, 2)
    with pytest.raises(ValueError, match="ranks is 0"):
        fd.plan(meta_tables([3]), ranks=0)
    with pytest.raises(ValueError, match="lookups names the feature 'x'"):
        fd.plan(meta_tables([3]), ranks=1, lookups={"x": 1.0})
    with pytest.raises(ValueError, match="popularity names the table 'x'"):
        fd.plan(meta_tables([3]), ranks=1, popularity={"x": [1.0]})
    for counts in ([1, 2], [1, -1, 2], [0, 0, 0], [1, np.nan, 1], [1, np.inf, 1]):
        with pytest.raises(ValueError, match=r"popularity\['t0'\]"):
            fd.plan(meta_tables([3]), ranks=1, popularity={"t0": counts})
    with pytest.raises(RuntimeError, match="no process group"):
        fd.ShardedEmbeddingBagCollection(meta_tables([3]))
