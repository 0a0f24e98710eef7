"""Texts of PTX for the interpreter's own tests."""

import itertools

import numpy as np

from .kinds import KINDS, bits_of
from .machine import Module, Statistics, launch
from .memory import Memory

HEAD = ".version 9.0\n.target sm_90\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<10>;
    .reg .b16 %rs<10>;
    .reg .b32 %r<30>;
    .reg .f32 %f<10>;
    .reg .b64 %rd<30>;
    .reg .f64 %fd<10>;
"""


def kernel(body: str, params: int = 1, outside: str = "", variables: str = "") -> str:
    """A kernel of ``params`` addresses or numbers, which %rd20, %rd21 and so on hold; %r20 is the thread."""
    names = ", ".join(f".param .u64 param_{k}" for k in range(params))
    loads = "\n".join(f"    ld.param.u64 %rd{20 + k}, [param_{k}];" for k in range(params))
    return (
        f"{HEAD}{outside}\n.visible .entry kernel({names})\n{{{REGISTERS}{variables}\n{loads}\n"
        f"    mov.u32 %r20, %tid.x;\n{body}\n    ret;\n}}\n"
    )


def memory_of(*arrays: np.ndarray) -> Memory:
    memory = Memory()
    for array in arrays:
        memory.add(array.ctypes.data, array.nbytes, array.flags.writeable)
    return memory


def run(
    text: str, *arrays: np.ndarray, grid: int = 1, block: int = 32, dynamic_shared: int = 0
) -> Statistics:
    """Run a kernel whose parameters are the addresses of arrays."""
    addresses = [array.ctypes.data for array in arrays]
    return launch(Module(text), memory_of(*arrays), grid, block, addresses, dynamic_shared)


def compute(body: str, out: str, *inputs: tuple[str, np.ndarray]) -> np.ndarray:
    """%y, of type ``out``, as instructions make it of %x0, %x1 and so on: types and columns."""
    count = len(inputs[0][1])
    lines, registers = [], []
    for k, (kind, _) in enumerate(inputs):
        size = KINDS[kind].itemsize
        registers.append(f"    .reg .b{max(16, 8 * size)} %x{k};")
        lines.append(f"    mad.wide.u32 %rd{k}, %r2, {size}, %rd{21 + k};")
        lines.append(
            f"    ld.global.{'s' if kind[0] == 's' and size == 1 else 'b'}{8 * size} %x{k}, [%rd{k}];"
        )
    size = KINDS[out].itemsize
    registers.append(f"    .reg .b{max(16, 8 * size)} %y;")
    text = kernel(
        "    mov.u32 %r0, %ctaid.x;\n    mov.u32 %r1, %ntid.x;\n    mad.lo.u32 %r2, %r0, %r1, %r20;\n"
        f"    setp.ge.u32 %p9, %r2, {count};\n    @%p9 bra DONE;\n"
        + "\n".join(lines)
        + f"\n{body}\n    mad.wide.u32 %rd10, %r2, {size}, %rd20;\n"
        f"    st.global.b{8 * size} [%rd10], %y;\nDONE:",
        1 + len(inputs),
        variables="\n".join(registers),
    )
    result = np.zeros(count, KINDS[out])
    columns = [np.ascontiguousarray(column, KINDS[kind]) for kind, column in inputs]
    run(text, result, *columns, grid=-(-count // 256), block=256)
    return result


def extremes(kind: str) -> np.ndarray:
    """The numbers of a type at which arithmetic goes wrong, and some others."""
    dtype, rng = KINDS[kind], np.random.default_rng(bits_of(kind))
    if dtype.kind == "f":
        info = np.finfo(dtype)
        special = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, -2.5, np.inf, -np.inf, np.nan, info.max, info.min,
                   info.eps, info.smallest_normal, info.smallest_subnormal,
                   -info.smallest_subnormal, 3.14159]  # fmt: skip
        bits = rng.integers(0, (1 << bits_of(kind)) - 1, 20, np.uint64, endpoint=True)
        plain = rng.standard_normal(12)
        known = np.array([*special, *plain]).astype(dtype)
        return np.concatenate([known, bits.astype(f"u{dtype.itemsize}").view(dtype)])
    info = np.iinfo(dtype)
    special = [
        0,
        1,
        2,
        3,
        7,
        31,
        32,
        33,
        63,
        64,
        100,
        info.max,
        info.max - 1,
        info.max // 2,
        info.min,
        info.min + 1,
    ]
    if dtype.kind == "i":
        special += [-1, -2, -7, -33]
    return np.concatenate(
        [np.array(special, dtype), rng.integers(info.min, info.max, 14, dtype, endpoint=True)]
    )


def combinations(*kinds: str) -> list[tuple[str, np.ndarray]]:
    """Columns of all combinations of extremes, at most some thousand of them."""
    rows = [*itertools.product(*(range(len(extremes(kind))) for kind in kinds))]
    if len(rows) > 3000:
        rows = [rows[k] for k in np.random.default_rng(0).choice(len(rows), 3000, replace=False)]
    return [(kind, extremes(kind)[[row[k] for row in rows]]) for k, kind in enumerate(kinds)]


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits, but that any NaN is as good as another."""
    assert got.dtype == expected.dtype
    if got.dtype.kind == "f":
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(got), nan)
        got, expected = got[~nan], expected[~nan]
    np.testing.assert_array_equal(got.view(f"u{got.itemsize}"), expected.view(f"u{got.itemsize}"))
