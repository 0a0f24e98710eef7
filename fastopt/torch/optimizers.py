"""The classes of torch.optim, and others in their manner, whose steps are done by fastopt's kernels.

Their constructors are torch's; what is said of those of torch's classes here is for type checkers.
"""

from typing import TYPE_CHECKING, Any, Unpack

import torch

import fastopt
from fastopt._core.options import SharedOptions
from fastopt.torch.arguments import Capturable, Decoupling, Fused, FusedCapturable, Params, Rate, Ways
from fastopt.torch.kernel_step import KernelStep
from fastopt.torch.nadam import NAdamOfTorch
from fastopt.torch.traits import Traits

_COMMON = "lr", "weight_decay", "maximize"
_ADAM = (*_COMMON, "betas", "eps")


class AdamOfTorch(fastopt.Adam):
    """Adam with torch's switch between its two kinds of weight decay."""

    def __init__(self, params: Any) -> None:
        fastopt.Optimizer.__init__(
            self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False,
            decoupled_weight_decay=False, maximize=False,
        )  # fmt: skip


class SGD(KernelStep, torch.optim.SGD):
    """``torch.optim.SGD`` by kernels (see :class:`fastopt.SGD`).

    With momentum, sparse gradients are made dense, since torch's momentum moves rows without a gradient, too;
    with ``rows="dense"`` those are moved when they are next needed, for which lookups have to be fastopt's.
    """

    traits = Traits(
        fastopt.SGD, (*_COMMON, "momentum", "dampening", "nesterov"), counts_as=None, moves_all=True
    )

    if TYPE_CHECKING:

        def __init__(
            self,
            params: Params,
            lr: Rate = 1e-3,
            momentum: float = 0,
            dampening: float = 0,
            weight_decay: Rate = 0,
            nesterov: bool = False,
            **options: Unpack[Fused],
        ) -> None: ...


class Adagrad(KernelStep, torch.optim.Adagrad):
    """``torch.optim.Adagrad`` by kernels (see :class:`fastopt.AdaGrad`)."""

    traits = Traits(fastopt.AdaGrad, (*_COMMON, "lr_decay", "initial_accumulator_value", "eps"))

    if TYPE_CHECKING:

        def __init__(
            self,
            params: Params,
            lr: Rate = 1e-2,
            lr_decay: float = 0,
            weight_decay: float = 0,
            initial_accumulator_value: float = 0,
            eps: float = 1e-10,
            **options: Unpack[Fused],
        ) -> None: ...


class RMSprop(KernelStep, torch.optim.RMSprop):
    """``torch.optim.RMSprop`` by kernels (see :class:`fastopt.RMSProp`)."""

    traits = Traits(fastopt.RMSProp, (*_COMMON, "alpha", "eps", "momentum", "centered"))

    if TYPE_CHECKING:

        def __init__(
            self,
            params: Params,
            lr: Rate = 1e-2,
            alpha: float = 0.99,
            eps: float = 1e-8,
            weight_decay: float = 0,
            momentum: float = 0,
            centered: bool = False,
            **options: Unpack[Capturable],
        ) -> None: ...


class Adam(KernelStep, torch.optim.Adam):
    """``torch.optim.Adam`` by kernels (see :class:`fastopt.Adam`). Sparse gradients, which torch's class
    refuses, update the rows that they name."""

    traits = Traits(AdamOfTorch, (*_ADAM, "amsgrad", "decoupled_weight_decay"))

    if TYPE_CHECKING:

        def __init__(
            self,
            params: Params,
            lr: Rate = 1e-3,
            betas: tuple[Rate, Rate] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0,
            amsgrad: bool = False,
            **options: Unpack[Decoupling],
        ) -> None: ...


class AdamW(KernelStep, torch.optim.AdamW):
    """``torch.optim.AdamW`` by kernels (see :class:`fastopt.AdamW`). Sparse gradients, which torch's class
    refuses, update the rows that they name."""

    traits = Traits(fastopt.AdamW, (*_ADAM, "amsgrad"))

    if TYPE_CHECKING:

        def __init__(
            self,
            params: Params,
            lr: Rate = 1e-3,
            betas: tuple[Rate, Rate] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 1e-2,
            amsgrad: bool = False,
            **options: Unpack[FusedCapturable],
        ) -> None: ...


class SparseAdam(KernelStep, torch.optim.SparseAdam):
    """``torch.optim.SparseAdam`` by kernels, operation by operation (see :class:`fastopt.SparseAdam`): in
    float32 the bits differ where MKL does not round torch's root to the nearest."""

    traits = Traits(fastopt.SparseAdam, ("lr", "betas", "eps", "maximize"), counts_as=int, sparse_alone=True)

    if TYPE_CHECKING:

        def __init__(
            self,
            params: Params,
            lr: Rate = 1e-3,
            betas: tuple[Rate, Rate] = (0.9, 0.999),
            eps: float = 1e-8,
            maximize: bool = False,
            **options: Unpack[SharedOptions],
        ) -> None: ...


class RAdam(KernelStep, torch.optim.RAdam):
    """``torch.optim.RAdam`` by kernels (see :class:`fastopt.RAdam`)."""

    traits = Traits(fastopt.RAdam, (*_ADAM, "decoupled_weight_decay"))

    if TYPE_CHECKING:

        def __init__(
            self,
            params: Params,
            lr: Rate = 1e-3,
            betas: tuple[Rate, Rate] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0,
            decoupled_weight_decay: bool = False,
            **options: Unpack[Capturable],
        ) -> None: ...


class NAdam(KernelStep, torch.optim.NAdam):
    """``torch.optim.NAdam`` by kernels (see :class:`fastopt.NAdam`), with the product of momenta as torch
    keeps it, whatever the betas have been."""

    traits = Traits(NAdamOfTorch, (*_ADAM, "momentum_decay", "decoupled_weight_decay"), has_product=True)

    if TYPE_CHECKING:

        def __init__(
            self,
            params: Params,
            lr: Rate = 2e-3,
            betas: tuple[Rate, Rate] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0,
            momentum_decay: float = 4e-3,
            decoupled_weight_decay: bool = False,
            **options: Unpack[Capturable],
        ) -> None: ...


class Adafactor(KernelStep, torch.optim.Adafactor):
    """``torch.optim.Adafactor`` by kernels (see :class:`fastopt.Adafactor`)."""

    traits = Traits(
        fastopt.Adafactor,
        (*_COMMON, "beta2_decay", "eps", "d"),
        dense_alone=True,
        by_rows=True,
        by_tables=True,
    )

    if TYPE_CHECKING:

        def __init__(
            self,
            params: Params,
            lr: Rate = 1e-2,
            beta2_decay: float = -0.8,
            eps: tuple[float | None, float] = (None, 1e-3),
            d: float = 1.0,
            weight_decay: float = 0.0,
            **options: Unpack[Ways],
        ) -> None: ...


class Lion(KernelStep):
    """Lion as a torch optimizer (see :class:`fastopt.Lion`, also for the arguments)."""

    traits = Traits(fastopt.Lion, (*_COMMON, "betas"), in_torch=False)

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **shared)


class LAMB(KernelStep):
    """LAMB as a torch optimizer (see :class:`fastopt.LAMB`, also for the arguments)."""

    traits = Traits(fastopt.LAMB, _ADAM, by_rows=True, in_torch=False)

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **shared)


class RowwiseAdagrad(KernelStep):
    """AdaGrad with one sum a row as a torch optimizer (see :class:`fastopt.RowwiseAdaGrad`, also for the
    arguments)."""

    traits = Traits(
        fastopt.RowwiseAdaGrad,
        (*_COMMON, "lr_decay", "initial_accumulator_value", "eps", "decoupled_weight_decay"),
        by_rows=True,
        in_torch=False,
    )

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **shared)


class RowwiseAdam(KernelStep):
    """Adam with one second moment a row as a torch optimizer (see :class:`fastopt.RowwiseAdam`, also for the
    arguments)."""

    traits = Traits(fastopt.RowwiseAdam, (*_ADAM, "decoupled_weight_decay"), by_rows=True, in_torch=False)

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **shared)
