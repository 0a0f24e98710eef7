"""The types of PTX, and what NumPy calls them."""

import numpy as np

KINDS = {
    "pred": np.dtype(np.bool_),
    **{f"{letter}{bits}": np.dtype(f"{name}{bits}") for bits in (8, 16, 32, 64) for letter, name in
       (("u", "uint"), ("s", "int"), ("b", "uint"))},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "bf16": np.dtype(np.uint16),  # NumPy knows no bfloat16; conversions work on the bits
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "b128": np.dtype("V16"),
}  # fmt: skip


def bits_of(kind: str) -> int:
    return 8 * KINDS[kind].itemsize


def is_float(kind: str) -> bool:
    return kind[0] == "f" or kind.startswith("bf")


def widened(kind: str, itemsize: int) -> np.dtype:
    """What a value of a type becomes in a register of ``itemsize`` bytes: only integers are extended."""
    dtype = KINDS[kind]
    if dtype.itemsize == itemsize:
        return dtype
    return np.dtype(f"{'int' if dtype.kind == 'i' else 'uint'}{8 * itemsize}")
