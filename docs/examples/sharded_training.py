"""A model with sharded tables that goes on from its last checkpoint when a process dies.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --standalone --nproc-per-node=2 --max-restarts=3 docs/examples/sharded_training.py

Kill one of its processes (``kill -9``): the others end with an error as soon as they wait for it, torchrun
starts all again, and training goes on from the last checkpoint that is whole, to the same numbers: batches
are a function of the step, and a checkpoint has all else. ``--nproc-per-node`` may be another the next time.
Without the variable, torchrun of torch 2.13 keeps one store over restarts, in which processes that are
started again find addresses of dead ones.
"""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import typer
from torch.nn.parallel import DistributedDataParallel

from fastopt.distributed import ShardedEmbeddingBagCollection, TrainingState, latest, plan
from fastopt.torch import Adam, EmbeddingBag, RowwiseAdagrad

ROWS, DIM, BAGS, SHOWN = {"user": 20_000, "item": 5_000, "country": 100}, 16, 64, 4


def make_batch(step, bags):
    """The bags of a step from the first to the last of these: ids, and clicks that depend on them."""
    random = torch.Generator().manual_seed(step)
    first, last = bags
    inputs = {
        name: torch.randint(rows, (last, SHOWN), generator=random)[first:] for name, rows in ROWS.items()
    }
    return inputs, sum(own.sum(1, keepdim=True) % 2 for own in inputs.values()).float() / len(ROWS)


def own_bags(count):
    """The first and the last of a batch's bags that are this rank's."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return count * rank // ranks, count * (rank + 1) // ranks


def make_model():
    """The model, and the optimizers of its tables and of its dense part."""
    torch.manual_seed(0)
    tables = {name: EmbeddingBag(rows, DIM, mode="sum") for name, rows in ROWS.items()}
    own = plan(tables, ranks=dist.get_world_size(), lookups=dict.fromkeys(ROWS, SHOWN))
    if dist.get_rank() == 0:
        print(own)
    dense = torch.nn.Sequential(torch.nn.Linear(DIM * len(ROWS), 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    model = torch.nn.ModuleDict(
        {"tables": ShardedEmbeddingBagCollection(tables, plan=own), "dense": DistributedDataParallel(dense)}
    )
    return model, RowwiseAdagrad(model["tables"].parameters(), lr=0.1), Adam(dense.parameters(), lr=1e-3)


def train(folder, steps, every, before_step=lambda step: None):
    """Go on from the last checkpoint in a folder to so many steps; returns the model."""
    model, *optimizers = make_model()
    state, last, saving = TrainingState(model, *optimizers), latest(folder), None
    first = state.load(last) if last else 0
    if last and dist.get_rank() == 0:
        print(f"going on from {last}, step {first}", flush=True)
    for step in range(first, steps):
        before_step(step)
        inputs, clicks = make_batch(step, own_bags(BAGS))
        loss = (model["dense"](model["tables"](inputs)) - clicks).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % every == 0:
            if saving is not None:
                saving.result()
            saving = state.async_save(Path(folder) / f"{step + 1:08}", progress=step + 1)
    if saving is not None:
        saving.result()
    return model


def main(folder: Path = Path("sharded-checkpoints"), steps: int = 1_000, every: int = 100, timeout: int = 60):
    """Train; TIMEOUT: after how many seconds a process gives up waiting for another."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    train(folder, steps, every)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
