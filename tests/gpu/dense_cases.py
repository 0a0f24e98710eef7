"""Dense updates on two backends, of the same numbers: the CPU's and that of a device."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from devices import bits

from fastopt.kernels.cpu import backend as cpu
from fastopt.kernels.cuda.array import empty, upload
from fastopt.kernels.cuda.backend import Cuda
from fastopt.kernels.formats import BLOCK, Format
from fastopt.kernels.rule import L2, Decoupled, Rule, Scaled
from fastopt.kernels.work import ArrayWork, Spec

LR, LIMIT, SCALE = 0.03, 0.7, 0.5
OPTIONS = {
    "lr": LR,
    "momentum": 0.8,
    "dampening": 0.3,
    "lr_decay": 0.1,
    "momentum_decay": 0.2,
    "alpha": 0.9,
    "betas": (0.8, 0.95),
    "beta": 0.8,
    "beta2_decay": -0.8,
    "d": 0.5,
    "weight_decay": 0.125,
}
KEYS = [123456789012345, -987654321987, 1 << 62]


class Case(NamedTuple):
    """A rule with weight decay and formats, computed with a dtype."""

    rule: Rule
    decay: type
    formats: tuple[Format, ...]
    compute: Any = np.float32

    def __str__(self) -> str:
        formats = "-".join(kind.name for kind in self.formats)
        return f"{self.rule.hyper.__name__}-{self.decay.__name__}-{formats}-{np.dtype(self.compute)}"

    def numbers(self, step: int, scale: float = SCALE) -> tuple:
        """h and c of a step, every third with Nesterov's momentum."""
        eps = (1e-4, 1e-3) if self.rule.matrix_slots else 1e-3
        options = {**OPTIONS, "eps": eps, "nesterov": step % 3 == 0}
        own = {Scaled: (), L2: (0.1,), Decoupled: (1.0 - LR * 0.1,)}[self.decay]
        return self.rule.fold(step, options, np.dtype(self.compute)), self.decay(scale, LIMIT, *own)

    def spec(self) -> Spec:
        return Spec(*self.numbers(1), np.dtype(self.compute), self.formats)

    def stored(self, k: int, size: int, rng: np.random.Generator) -> list[np.ndarray | None]:
        """What array ``k`` (0 the parameter, 1 the gradient, else a slot) has at its two addresses: elements
        and, or None, a master or scales. Slots are not negative, which suits any rule."""
        kind, x = self.formats[k], rng.standard_normal(size).astype(self.compute)
        x = np.abs(x) if k > 1 else x
        if kind.coded:
            scales = np.abs(rng.standard_normal(-(-size // BLOCK))) + 0.1
            return [rng.integers(0, 256, size).astype(np.uint8), scales.astype(np.float32)]
        if kind.stored is None:
            return [x, None]
        if kind.dtype.itemsize == 2 and kind.dtype.kind != "i":
            held = x.astype(kind.dtype).view(np.uint16)
        else:
            held = (x * 16 if kind.dtype.kind == "i" else x).astype(kind.dtype)
        return [held, x if kind.master else None]


class OnCpu:
    """The host's backend."""

    backend = cpu

    @staticmethod
    def put(array: np.ndarray, offset: int) -> np.ndarray:
        return array.copy()

    @staticmethod
    def get(array: np.ndarray) -> np.ndarray:
        return array.copy()


class OnDevice:
    """That of the first CUDA device; arrays begin ``offset`` elements after memory that is aligned."""

    backend = Cuda(0, cpu)

    @staticmethod
    def put(array: np.ndarray, offset: int) -> Any:
        target = empty(0, array.size + offset, array.dtype)[offset:]
        target[...] = array.reshape(-1)
        return target if array.ndim == 1 else target.reshape(array.shape)

    @staticmethod
    def get(array: Any) -> np.ndarray:
        return array.copy_to_host()


class Arrays:
    """Arrays of these shapes, with a launch over them: the arrays ``t`` with hyperparameters ``t % classes``.

    Args:
        on: :class:`OnCpu` or :class:`OnDevice`. offsets: by array (see :meth:`Case.stored`), elements that
        the memory of the first shape begins later.
    """

    def __init__(
        self,
        on: Any,
        case: Case,
        shapes: Sequence[tuple[int, ...]],
        classes: int = 1,
        offsets: Sequence[int] = (),
        position: int = 0,
        adjust: Callable[[list], None] = lambda places: None,
    ) -> None:
        self.on, self.case, self.places = on, case, []
        backend = on.backend
        works = []
        for t, shape in enumerate(shapes):
            size, own_offsets = math.prod(shape), offsets if t == 0 else ()
            rng = np.random.default_rng(size)
            source = [case.stored(k, size, rng) for k in range(len(case.formats))]
            adjust(source)
            shift = [*own_offsets, *[0] * len(source)]
            places = [
                [None if array is None else on.put(array, shift[k]) for array in pair]
                for k, pair in enumerate(source)
            ]
            self.places.append(places)
            state = tuple((codes, scales) for codes, scales in places[2:])
            works.append(ArrayWork(t % classes, position + 1000 * t, shape, places[0][1], state))
        if case.rule.matrix_slots and len(shapes[0]) > 1:
            [work] = works
            of_rows, of_columns = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
            var = [np.abs(rng.standard_normal(own)).astype(case.compute) for own in (of_rows, of_columns)]
            self.places[0] += [[on.put(own, 0), None] for own in var]
            work = work._replace(state=tuple((own, None) for own, _ in self.places[0][2:]))
            self.launch = backend.MatrixLaunch(case.spec(), work)
        else:
            self.launch = backend.ArraysLaunch(case.spec(), works, classes)
        self.launch.set_keys(KEYS[:classes])

    def prepare(self, step: int, zero_grads: bool = False, scale: float = SCALE, factor: Any = None) -> Any:
        """The calls of a step; each class is another step on."""
        address = self.on.backend.address
        addresses = (np.array([address(own[k][0]) for own in self.places]) for k in (0, 1))
        self.launch.place(*addresses)
        self.set_numbers(step, scale)
        return self.launch.prepare(zero_grads) if factor is None else self.launch.prepare(zero_grads, factor)

    def set_numbers(self, step: int, scale: float = SCALE) -> None:
        for row in range(len(self.launch.numbers)):
            h, c = self.case.numbers(step + row, scale)
            self.launch.numbers[row] = *h, *c

    def run(self, *given: Any, **options: Any) -> None:
        self.on.backend.run(self.prepare(*given, **options))

    def got(self) -> list[list[np.ndarray]]:
        """The contents of each array: parameter, gradient, and state, each with what else belongs to it."""
        return [
            [self.on.get(array) for pair in places for array in pair if array is not None]
            for places in self.places
        ]

    def gradients(self) -> list[np.ndarray]:
        return [self.on.get(gradient) for _, (gradient, _), *_ in self.places]


def factor(value: float) -> Any:
    """A factor on the scale of gradients, on the device."""
    return upload(0, np.array([value]))


def assert_same_bits(got: list[list[np.ndarray]], want: list[list[np.ndarray]]) -> None:
    for one, other in zip(got, want, strict=True):
        for x, y in zip(one, other, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
            np.testing.assert_array_equal(bits(x), bits(y))
