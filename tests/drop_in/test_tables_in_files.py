"""Tables in files as weights of modules: the bits of the plain API, what is stored, and what is refused."""

import copy
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

import fastopt
import fastopt.torch as ft
from fastopt.tables.table import checksums

ROWS, DIM = 200, 8


def start(first, last):
    return np.random.default_rng(1).standard_normal((ROWS, DIM), dtype=np.float32)[first:last]


def opened(path, init=start, rows=ROWS):
    return fastopt.open_table(path, rows, DIM, init=init)


def indices(at):
    """The bags of step ``at``."""
    return torch.from_numpy(np.random.default_rng([2, at]).integers(0, ROWS, (10, 3)))


class Model(torch.nn.Module):
    """Two tables that are looked up together, and a layer."""

    def __init__(self, table, fused=False):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2 * DIM, 1)
        in_memory = ft.EmbeddingBag(50, DIM, mode="mean", fused=fused)
        if isinstance(table, np.ndarray):
            first = ft.EmbeddingBag.from_pretrained(torch.tensor(table), freeze=False, mode="sum")
            first.fused = fused
        else:
            first = ft.EmbeddingBag.from_table(table, mode="sum", fused=fused)
        self.tables = ft.EmbeddingBagCollection({"first": first, "second": in_memory})

    def forward(self, at):
        return self.layer(self.tables({"first": indices(at), "second": indices(at) % 50}))


def train(model, opt, steps, **clip):
    for at in steps:
        opt.zero_grad()
        model(at).square().mean().backward()
        opt.step(**clip)


def everything(model, opt):
    """All numbers of a model and its optimizer that do not lie in files."""
    own = [p.detach().clone() for p in model.parameters()]
    return own, [value for state in opt.state_dict()["state"].values() for value in state.values()]


def assert_same(one, other):
    for got, want in zip(one, other, strict=True):
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(want))


# Training

CLASSES = {"SGD": "SGD", "SparseAdam": "SparseAdam", "Adagrad": "AdaGrad", "RowwiseAdagrad": "RowwiseAdaGrad"}


@pytest.mark.parametrize("fused", [False, True], ids=["step", "fused"])
@pytest.mark.parametrize("name", CLASSES)
def test_training_has_the_bits_of_the_plain_api_and_either_goes_on(tmp_path, name, fused):
    plain_class = getattr(fastopt, CLASSES[name])
    for part in range(3):
        with opened(tmp_path / "t") as table, opened(tmp_path / "twin") as twin:
            plain = plain_class(twin, lr=0.1)
            bag = ft.EmbeddingBag.from_table(table, mode="sum", fused=fused)
            # In the second part the plain API goes on with what torch has left.
            opt = plain_class(table, lr=0.1) if part == 1 else getattr(ft, name)(bag.parameters(), lr=0.1)
            for at in range(3 * part, 3 * part + 3):
                out = bag(indices(at))
                pooled = fastopt.embedding_bag(twin, indices(at), mode="sum")
                assert torch.equal(out, torch.as_tensor(pooled))
                gradient = fastopt.BagGradient(indices(at), None, 2 * pooled, mode="sum")
                plain.step(gradient)
                if part == 1:
                    opt.step(gradient)
                else:
                    out.square().sum().backward()
                    assert fused == (bag.weight.grad is None)
                    opt.step()
                    opt.zero_grad()
                    assert opt.state[bag.weight] == {"step": at + 1}
                assert table.weights.tobytes() == twin.weights.tobytes()
    with opened(tmp_path / "t") as table, opened(tmp_path / "twin") as twin:
        one, other = (plain_class(own, lr=0.1) for own in (table, twin))
        assert table.weights.tobytes() == twin.weights.tobytes()
        assert one.step_counts.tolist() == other.step_counts.tolist() == [9]
        assert one.state[0].keys() == other.state[0].keys() == one.slots[0].keys()
        assert all(np.array_equal(one.state[0][slot], other.state[0][slot]) for slot in one.slots[0])


def test_rows_one_by_one(tmp_path):
    with opened(tmp_path / "t") as table:
        embedding = ft.Embedding.from_table(table, padding_idx=3)
        opt = ft.SGD(embedding.parameters(), lr=1.0)
        rows = embedding(torch.tensor([[3, 5], [5, 7]]))
        assert torch.equal(rows, torch.from_numpy(start(0, ROWS)[[[3, 5], [5, 7]]]))
        rows.sum().backward()
        opt.step()
        want = start(0, ROWS)
        want[[5, 7]] -= [[2], [1]]
        assert np.array_equal(table.weights, want)


@pytest.mark.parametrize("fused", [False, True], ids=["step", "fused"])
def test_a_table_in_files_and_others_train_as_all_in_memory(tmp_path, fused):
    clip = {} if fused else {"clip_norm": 0.5}
    with opened(tmp_path / "t") as table:
        models = Model(table, fused), Model(start(0, ROWS), fused)
        opts = [ft.RowwiseAdagrad(model.parameters(), lr=0.1) for model in models]
        for model, opt in zip(models, opts, strict=True):
            train(model, opt, range(3), **clip)
            opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
            train(model, opt, range(3, 5), **clip)
            opt.param_groups[0]["lr"] = 0.05
            train(model, opt, range(5, 7), **clip)
        assert_same(models[0].parameters(), models[1].parameters())
        assert [state["step"] for state in opts[0].state.values()] == [7] * 4
        assert table.progress is None  # nothing but a flush says what counts
        opts[0].flush()
        assert table.progress["step"] == 7
    with opened(tmp_path / "t") as table:  # which other parameters there were does not matter
        assert fastopt.RowwiseAdaGrad(table).step_counts.tolist() == [7]


def test_a_graph_learns_that_rows_have_changed(tmp_path):
    with opened(tmp_path / "t") as table:
        bag = ft.EmbeddingBag.from_table(table, mode="max")
        opt = ft.SGD(bag.parameters(), lr=1.0)
        late = bag(indices(0)).sum()
        bag(indices(0)).sum().backward()
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()


@pytest.mark.parametrize("fused", [False, True], ids=["step", "fused"])
def test_rows_that_can_not_be_logged_leave_everything_as_it_was(tmp_path, monkeypatch, fused):
    with opened(tmp_path / "t") as table:
        model = Model(table, fused)
        opt = ft.RowwiseAdagrad(model.parameters(), lr=0.1)
        train(model, opt, range(2))
        before, weights = everything(model, opt), table.weights.copy()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", failing)
            with pytest.raises(OSError, match="no room"):
                train(model, opt, range(2, 3))
        assert_same(before[0], model.parameters())
        assert np.array_equal(table.weights, weights)
        train(model, opt, range(2, 3))
        assert not np.array_equal(table.weights, weights)


def failing(*given):
    raise OSError("no room")


def test_rows_that_are_scaled_to_a_norm_are_undone(tmp_path):
    with pytest.raises(KeyError), opened(tmp_path / "t") as table:
        bag = ft.EmbeddingBag.from_table(table, mode="sum", max_norm=1e-3)
        version = bag.weight._version
        bag(indices(0))
        assert bag.weight._version > version  # graphs that saved the weights learn of it
        assert np.linalg.norm(table.weights[indices(0).flatten()], axis=1).max() <= 1.001e-3
        raise KeyError
    with opened(tmp_path / "t") as table:
        assert np.array_equal(table.weights, start(0, ROWS))


def test_training_needs_memory_for_the_rows_that_it_names_alone(tmp_path):
    def used():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) << 10

    def train(rows, path):
        with opened(path, None, rows) as table:
            bag = ft.EmbeddingBag.from_table(table, mode="sum")
            opt = ft.RowwiseAdagrad(bag.parameters(), lr=0.1)
            before = used()
            for _ in range(2):
                opt.zero_grad()
                bag(torch.tensor([[5, rows - 1]])).sum().backward()
                opt.step()
            opt.state_dict()
            return used() - before, bag(torch.tensor([[rows - 1]]))

    _, want = train(ROWS, tmp_path / "small")
    growth, got = train(2**33, tmp_path / "large")  # 256 GiB
    assert torch.equal(got, want) and want.all()
    assert growth < 2**26
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "large").iterdir()) < 2**22


# Checkpoints


@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoint_and_the_table_go_on_together(tmp_path, name):
    make = getattr(ft, name)

    def begin(table):
        model = Model(table)
        learning = model.tables if name == "SparseAdam" else model  # which takes no dense gradients
        return model, make(learning.parameters(), lr=0.1)

    with opened(tmp_path / "t") as table:
        model, opt = begin(table)
        train(model, opt, range(3))
        torch.save((model.state_dict(), opt.state_dict()), tmp_path / "checkpoint")
        train(model, opt, range(3, 6))
        # What a crash leaves now, and between the next state and the file that it is for
        shutil.copytree(table.path, tmp_path / "crashed")
        want = [*everything(model, opt), table.weights.copy()]
        opt.state_dict()
        shutil.copytree(table.path, tmp_path / "flushed")
        opt.flush()
        shutil.copytree(table.path, tmp_path / "later")
    for path in ("crashed", "flushed"):
        with opened(tmp_path / path) as table:
            model, opt = begin(table)
            states = torch.load(tmp_path / "checkpoint")
            assert not any("first" in key for key in states[0])
            model.load_state_dict(states[0])
            opt.load_state_dict(states[1])
            assert opt.state[model.tables.tables["first"].weight] == {"step": 3}
            train(model, opt, range(3, 6))
            found = [*everything(model, opt), table.weights.copy()]
            for got, own in zip(found, want, strict=True):
                assert_same(got, own)
            assert table.progress["step"] == 6
    with opened(tmp_path / "later") as table:
        model, opt = begin(table)
        with pytest.raises(ValueError, match=r"has step 3 for Table.*, which has made 6"):
            opt.load_state_dict(torch.load(tmp_path / "checkpoint")[1])
        train(model, opt, range(6, 7))
        assert opt.state[model.tables.tables["first"].weight] == {"step": 7}


def test_a_state_that_does_not_fit_leaves_the_table_with_its_optimizer(tmp_path):
    with opened(tmp_path / "t") as table:
        model = Model(table)
        opt = ft.RowwiseAdagrad(model.parameters(), lr=0.1)
        train(model, opt, range(2))
        state = copy.deepcopy(opt.state_dict())
        train(model, opt, range(2, 3))
        opt.flush()
        torn = copy.deepcopy(state)
        next(own for own in torn["state"].values() if "sum" in own).pop("sum")
        weights = table.weights.copy()
        with pytest.raises(ValueError, match="expected sum"):
            opt.load_state_dict(torn)
        assert np.array_equal(table.weights, weights)
        train(model, opt, range(3, 4))
        table.flush()
        assert table.progress["step"] == 4
        with pytest.raises(ValueError, match=r"has step 2 for Table.*, which has made 4"):
            opt.load_state_dict(state)


def test_a_state_of_another_run_with_as_many_steps_is_refused(tmp_path):
    states = []
    with opened(tmp_path / "t") as table:
        model = Model(table)
        opt = ft.RowwiseAdagrad(model.parameters(), lr=0.1)
        train(model, opt, range(2))
        begun = copy.deepcopy(opt.state_dict())
        # Two ways on from there, of as many steps: the second goes back first
        for way in (range(2, 4), range(4, 6)):
            opt.load_state_dict(begun)
            assert opt.state[model.tables.tables["first"].weight] == {"step": 2}
            train(model, opt, way)
            states.append(copy.deepcopy(opt.state_dict()))
        before = [*everything(model, opt), table.weights.copy()]
        with pytest.raises(
            ValueError, match=r"has step 4 for Table.* held other rows then: it is of another"
        ):
            opt.load_state_dict(states[0])
        for got, want in zip([*everything(model, opt), table.weights], before, strict=True):
            assert_same(got, want)
        opt.load_state_dict(states[1])
        saved = copy.deepcopy(states[0])
        saved["state"][2].pop("checksum")  # as of a table without checksums, which is known by its steps
        opt.load_state_dict(saved)
        opt.load_state_dict(states[1])
        train(model, opt, range(6, 7))
        opt.flush()
        with pytest.raises(
            ValueError, match=r"has step 4 for Table.* held other rows then: it is of another"
        ):
            opt.load_state_dict(states[0])
        opt.load_state_dict(states[1])  # goes back
        assert np.array_equal(table.weights, before[2])


def test_a_state_after_a_change_of_groups_is_that_of_a_flush(tmp_path):
    with opened(tmp_path / "t") as table:
        model = Model(table)
        opt = ft.RowwiseAdagrad(model.parameters(), lr=0.1)
        train(model, opt, range(2))
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        state = opt.state_dict()["state"][2]
        assert not table.changed and state == {"step": 2, "checksum": checksums(table)[0]}


def test_state_of_a_table_in_memory_is_refused(tmp_path):
    in_memory = ft.EmbeddingBag.from_pretrained(torch.tensor(start(0, ROWS)), freeze=False, mode="sum")
    before = ft.RowwiseAdagrad(in_memory.parameters(), lr=0.1)
    in_memory(indices(0)).sum().backward()
    before.step()
    with opened(tmp_path / "t") as table:
        bag = ft.EmbeddingBag.from_table(table, mode="sum")
        opt = ft.RowwiseAdagrad(bag.parameters(), lr=0.1)
        bag(indices(0)).sum().backward()
        opt.step()
        with pytest.raises(ValueError, match=r"'sum' for Table.*: expected its step alone"):
            opt.load_state_dict(before.state_dict())
        assert opt.state[bag.weight] == {"step": 1}


# What stays where it is


def test_a_table_stays_in_its_files(tmp_path):
    with opened(tmp_path / "t") as table:
        model = Model(table)
        bag = model.tables.tables["first"]
        model.double()
        model.to("meta")
        assert bag.weight.dtype == torch.float32 and bag.weight.device.type == "cpu"
        assert bag.weight.data_ptr() == table.weights.ctypes.data
        assert model.layer.weight.dtype == torch.float64 and model.layer.weight.is_meta
        assert [*model.state_dict()] == ["layer.weight", "layer.bias", "tables.tables.second.weight"]
        assert not bag.load_state_dict({}).missing_keys
        with pytest.raises(RuntimeError, match="Unexpected key"):
            bag.load_state_dict({"weight": torch.zeros(ROWS, DIM)})
        assert [*model.parameters()][2] is bag.weight and bag.weight.requires_grad
        assert not ft.Embedding.from_table(table, _freeze=True).weight.requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused(tmp_path, copied):
    with opened(tmp_path / "t") as table:
        bag = ft.EmbeddingBag.from_table(table)
        for own in (bag, bag.weight, ft.SGD(bag.parameters())):
            with pytest.raises(TypeError, match="can't be copied or pickled: open it where it is needed"):
                copied(own)


def test_a_closed_table_is_refused(tmp_path):
    with opened(tmp_path / "t") as table:
        bag = ft.EmbeddingBag.from_table(table, mode="sum")
        opt = ft.RowwiseAdagrad(bag.parameters(), lr=0.1)
        bag(indices(0)).sum().backward()
        opt.step()
        bag(indices(0)).sum().backward()
    before = table.progress
    for call in (lambda: bag(indices(0)), opt.step, opt.flush, lambda: ft.EmbeddingBag.from_table(table)):
        with pytest.raises(ValueError, match="is closed"):
            call()
    # Of the last flush, which leaving the block made
    assert opt.state_dict()["state"] == {0: {"step": 1, "checksum": checksums(table)[0]}}
    with opened(tmp_path / "t") as table:
        assert table.progress == before and before["step"] == 1


def test_a_forked_child_reads_and_does_not_write(tmp_path):
    with opened(tmp_path / "t") as table:
        bag = ft.EmbeddingBag.from_table(table, mode="sum")
        opt = ft.SGD(bag.parameters(), lr=0.1)
        want = bag(indices(0))
        want.sum().backward()
        child = os.fork()
        if not child:
            same = torch.equal(bag(indices(0)), want)
            try:
                opt.step()
            except RuntimeError:
                os._exit(7 if same else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        opt.step()


# What is refused

REFUSED = {
    "momentum": (lambda p: ft.SGD(p, momentum=0.9), "moves every row"),
    "Adafactor": (ft.Adafactor, "dense gradients alone"),
    "NAdam": (ft.NAdam, "products of NAdam's momenta"),
    "rows": (lambda p: ft.SGD([*p, {"params": torch.ones(2, 2), "rows": "dense"}]), "'lazy' in all"),
    "capturable": (lambda p: ft.Adam(p, capturable=True), "expected capturable=False"),
    "differentiable": (lambda p: ft.Adam(p, differentiable=True), "expected differentiable=False"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_optimizers_that_would_touch_every_row_are_refused(tmp_path, make, message):
    with opened(tmp_path / "t") as table:
        bag = ft.EmbeddingBag.from_table(table)
        with pytest.raises(ValueError, match=message):
            make([{"params": [bag.weight]}])
        assert table.owner is None and not (tmp_path / "t" / "state-sum").exists()


def test_the_last_optimizer_made_has_the_table(tmp_path):
    with opened(tmp_path / "t") as table:
        bag = ft.EmbeddingBag.from_table(table, mode="sum")
        before, opt = (ft.RowwiseAdagrad(bag.parameters(), lr=0.1) for _ in range(2))
        bag(indices(0)).sum().backward()
        weights = table.weights.copy()
        with pytest.raises(ValueError, match="now belongs to another optimizer"):
            before.step()
        assert np.array_equal(table.weights, weights)
        opt.step()
        for make in (lambda: ft.RowwiseAdagrad(bag.parameters()), lambda: fastopt.RowwiseAdaGrad(table)):
            with pytest.raises(ValueError, match="changed by another optimizer since its last flush"):
                make()
        table.flush()
        assert table.progress["step"] == 1


def test_two_weights_of_a_table_are_refused(tmp_path):
    with opened(tmp_path / "t") as table:
        one, other = (ft.EmbeddingBag.from_table(table) for _ in range(2))
        for make, cause in (ft.SGD, "but so is another weight of it"), (ft.RowwiseAdagrad, "shares memory"):
            with pytest.raises(ValueError, match=cause):
                make([one.weight, other.weight])
        other.weight = one.weight
        (one(indices(0)) + other(indices(1))).sum().backward()
        ft.SGD({*one.parameters(), *other.parameters()}).step()


def filled(weight):
    with torch.no_grad():
        weight[3] = 0


def stepped(make, **options):
    def step(bag):
        bag.weight.grad = torch.ones(ROWS, DIM)
        make(bag.parameters(), lr=0.1, **options).step()

    return step


WRITES = {
    "reset_parameters": lambda bag: bag.reset_parameters(),
    "apply": lambda bag: bag.apply(lambda own: torch.nn.init.zeros_(own.weight)),
    "setitem": lambda bag: filled(bag.weight),
    "data": lambda bag: bag.weight.data.mul_(2),
    "new data": lambda bag: setattr(bag.weight, "data", torch.ones(ROWS, DIM)),
    "row": lambda bag: bag.weight.detach()[3].zero_(),
    "transposed": lambda bag: bag.weight.data.t().copy_(torch.ones(DIM, ROWS)),
    "parts": lambda bag: bag.weight.detach().split(10)[1].view(torch.int32).zero_(),
    "out": lambda bag: torch.add(torch.ones(ROWS, DIM), 1, out=bag.weight.detach()),
    "foreach": lambda bag: torch._foreach_mul_([torch.ones(3), bag.weight.detach()], 2.0),
    "inference": torch.inference_mode()(lambda bag: bag.weight.reshape(-1).zero_()),
    "max_norm": lambda bag: torch.nn.functional.embedding(indices(0), bag.weight.detach(), max_norm=1e-3),
    "SGD": stepped(torch.optim.SGD),
    "Adam": stepped(torch.optim.Adam, foreach=True),
    "AdamW": stepped(torch.optim.AdamW, fused=True),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_torch_writes_beside_the_undo_log_is_refused(tmp_path, write):
    with opened(tmp_path / "t", rows=ROWS) as table:
        bag = ft.EmbeddingBag.from_table(table, mode="sum")
        with pytest.raises(
            RuntimeError, match=r"would write to the weights of Table.* beside their undo log"
        ):
            write(bag)
        assert np.array_equal(table.weights, start(0, ROWS)) and not table.changed
        assert bag.weight.data_ptr() == table.weights.ctypes.data


def test_torch_reads_the_weights_and_copies_are_its_own(tmp_path):
    with opened(tmp_path / "t") as table:
        weight = ft.EmbeddingBag.from_table(table, mode="sum").weight
        want = torch.from_numpy(start(0, ROWS))
        assert torch.equal(weight, want) and weight.tolist() == want.tolist()
        assert torch.equal(weight @ weight[3], want @ want[3])
        assert "TableWeight" in repr(weight)
        for copied in (weight.detach().clone(), weight.data.double(), weight.detach()[[1, 2]]):
            copied.zero_()
        with torch.inference_mode():
            weight.to(torch.float64).zero_()
        array = weight.detach()[3:5].numpy()
        assert np.array_equal(array, start(3, 5)) and not array.flags.writeable
        with pytest.raises(RuntimeError, match="requires grad"):
            weight.numpy()
        for of in (weight, weight.detach()):  # to an optimizer without torch, which would log nothing
            with pytest.raises(ValueError, match="read-only"):
                fastopt.SGD([of])
        assert np.array_equal(table.weights, start(0, ROWS))


def test_dense_gradients_without_lookups_update_all_rows_through_the_log(tmp_path):
    with opened(tmp_path / "t") as table:
        in_memory = torch.nn.Parameter(torch.tensor(start(0, ROWS)))
        weight = ft.EmbeddingBag.from_table(table, mode="sum").weight
        for p in (weight, in_memory):
            (p**2).sum().backward()
            ft.Adam([p], lr=0.1).step()
        assert torch.equal(weight, in_memory) and table.changed
        table.close()
    with opened(tmp_path / "t") as table:
        assert np.array_equal(table.weights, start(0, ROWS))


def test_gradients_are_not_made_dense(tmp_path):
    with opened(tmp_path / "t") as table:
        bag = ft.EmbeddingBag.from_table(table)
        bag(indices(0)).sum().backward()
        for call in (
            lambda: torch.nn.utils.clip_grad_norm_(bag.parameters(), 1.0),
            bag.weight.grad.dense,
            (bag(indices(0)) @ bag.weight.t()).sum().backward,
        ):
            with pytest.raises(
                RuntimeError, match=r"of lookups in Table.* is not made dense.* weight\.t\(\)"
            ):
                call()
        with pytest.raises(RuntimeError, match="beside their undo log"):
            torch.optim.SGD(bag.parameters()).step()
        given = torch.func.functional_call(bag, {"weight": torch.zeros(5, DIM)}, indices(0) % 5)
        assert not given.any()
        for wrong in (indices(0).float(), indices(0).to("meta")):
            with pytest.raises(TypeError, match="can't be looked up by these arguments"):
                bag(wrong)
        with pytest.raises(TypeError, match="can't be looked up by these arguments"):
            torch.func.vmap(bag)(indices(0)[:, None])
        with pytest.raises(ValueError, match="indices holds 200"):
            bag(torch.tensor([[200]]))
        with pytest.raises(TypeError, match=r"expected one of fastopt\.open_table"):
            ft.EmbeddingBag.from_table(tmp_path / "t")
