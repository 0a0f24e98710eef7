"""What type checkers say of a program that uses the classes, under mypy's strict options."""

import inspect
import subprocess
import sys

import pytest
import torch

import fastopt.torch

PROGRAM = """
import torch
import fastopt.torch as optim

model = torch.nn.Linear(3, 2)
opts: list[torch.optim.Optimizer] = [
    optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True, foreach=None),
    optim.Adagrad(model.parameters(), 0.1, lr_decay=0.1, eps=1e-10, differentiable=False),
    optim.RMSprop(model.named_parameters(), lr=torch.tensor(0.1), alpha=0.9, centered=True),
    optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99), amsgrad=True, fused=True, seed=3),
    optim.AdamW([{"params": model.parameters(), "lr": 0.1}], weight_decay=0.1, master_weights=True),
    optim.SparseAdam(model.parameters(), betas=(0.9, 0.99), maximize=True),
    optim.RAdam(model.parameters(), decoupled_weight_decay=True, capturable=False),
    optim.NAdam(model.parameters(), momentum_decay=1e-3, rows="dense"),
    optim.Adafactor(model.parameters(), d=1.0, eps=(None, 1e-3)),
    optim.Lion(model.parameters(), betas=(0.9, 0.99), clip_row_norm=1.0),
    optim.LAMB(model.parameters(), lr=0.1, eps=1e-6, state_dtype=torch.bfloat16),
    optim.RowwiseAdagrad(model.parameters(), initial_accumulator_value=0.1),
    optim.RowwiseAdam(model.parameters(), step_per_row=True),
]
opt = optim.AdamW(model.parameters(), lr=0.1)
schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10)


def closure() -> torch.Tensor:
    opt.zero_grad()
    loss: torch.Tensor = model(torch.ones(1, 3)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


opt.step()
opt.step(clip_norm=1.0)
loss: torch.Tensor = opt.step(closure, clip_value=0.5)
number: float = opt.step(lambda: 1.0)
norm: float | None = opt.info.norm
schedule.step()
opt.flush()
opt.load_state_dict(opt.state_dict())
optim.Adam(model.parameters(), nonsense=True)
optim.Adam(model.parameters(), lr="fast")
"""


def test_a_program_passes_where_it_is_right(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    options = ["--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "program.py"], cwd=tmp_path, capture_output=True, text=True
    )
    last = PROGRAM.count("\n")
    wrong = [line for line in checked.stdout.splitlines() if ": error:" in line]
    assert [line.split(":")[1] for line in wrong] == [str(last - 1), str(last)], (
        checked.stdout + checked.stderr
    )


@pytest.mark.parametrize("name", ["Lion", "LAMB", "RowwiseAdagrad", "RowwiseAdam"])
def test_signatures_of_own_classes_have_the_shared_options(name):
    found = inspect.signature(getattr(fastopt.torch, name)).parameters
    assert all(own.kind is not inspect.Parameter.VAR_KEYWORD for own in found.values())
    assert {"params", "lr", "weight_decay", "maximize", "state_dtype", "seed"} <= set(found)


def test_signatures_of_users_classes_are_their_own():
    class Plain(fastopt.torch.Lion):
        pass

    class Own(fastopt.torch.Adam):
        def __init__(self, params, factor=2.0):
            super().__init__(params, lr=factor * 1e-3)

    assert inspect.signature(Plain) == inspect.signature(fastopt.torch.Lion)
    assert list(inspect.signature(Own).parameters) == ["params", "factor"]
    assert Own([torch.zeros(1)]).param_groups[0]["lr"] == 2e-3
