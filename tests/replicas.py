"""What tests of dense parameters over several ranks run on each: our optimizers and torch's."""

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import fastopt.torch
from fastopt.distributed import clip_grad_norm_

STEPS = 3


def network():
    """Layers whose rows do not divide by the number of ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 41), nn.ReLU(), nn.Linear(41, 7))


def of_ddp():
    return DistributedDataParallel(network())


def of_fsdp():
    model = network()
    fully_shard(model[0])
    fully_shard(model)
    return model


def on_all(make, options, model):
    return make(model.parameters(), **options)


def on_some(make, options, model):
    """Each rank updates a share of the parameters."""
    return ZeroRedundancyOptimizer(model.parameters(), make, **options)


WAYS = {"ddp": (of_ddp, on_all), "zero": (of_ddp, on_some), "fsdp": (of_fsdp, on_all)}


def gradient(model, rank, step):
    random = torch.Generator().manual_seed(100 * step + rank)
    x, y = torch.randn(16, 33, generator=random), torch.randn(16, 7, generator=random)
    model.zero_grad()
    (model(x) - y).square().mean().backward()


def whole(tensor):
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach()


def trained(way, library, name, options, clip=None):
    """The parameters after some steps, and the norms of gradients."""
    build, optimizer = WAYS[way]
    model, norms = build(), []
    opt = optimizer(getattr(library, name), options, model)
    for step in range(STEPS):
        gradient(model, torch.distributed.get_rank(), step)
        if clip is not None:
            own = clip_grad_norm_ if library is fastopt.torch else _clip_by_torch
            norms.append(own(model, clip))
        opt.step()
    return [whole(p) for p in model.parameters()], norms


def _clip_by_torch(model, limit):
    return float(whole(nn.utils.clip_grad_norm_(model.parameters(), limit)))


def both(way, name, options, clip=None):
    """By fastopt and by torch."""
    return [trained(way, library, name, options, clip) for library in (fastopt.torch, torch.optim)]


def resumed(folder):
    """Parameters of FSDP that went on, and of those that went on from a checkpoint of before."""
    models = [of_fsdp(), of_fsdp()]
    first, other = [fastopt.torch.AdamW(own.parameters(), lr=0.01) for own in models]
    rank = torch.distributed.get_rank()
    for step in range(2 * STEPS):
        if step == STEPS:
            model, opt = get_state_dict(models[0], first)
            dcp.save({"model": model, "opt": opt}, checkpoint_id=folder)
            model, opt = get_state_dict(models[1], other)
            dcp.load({"model": model, "opt": opt}, checkpoint_id=folder)
            set_state_dict(models[1], other, model_state_dict=model, optim_state_dict=opt)
        gradient(models[0], rank, step)
        first.step()
        if step >= STEPS:
            gradient(models[1], rank, step)
            other.step()
    return [[whole(p) for p in own.parameters()] for own in models]
