"""What do the GPU kernels take of a multiprocessor? ``python bench/registers.py``, which needs no GPU.

Each is compiled for CAPABILITIES and assembled by ptxas. Occupancy: the share of a multiprocessor's threads
that its registers have room for. Prints a table for the console and one for docs/gpu.md.
"""

import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpu.kernels import every_kernel
from rich.console import Console
from rich.table import Table

from fastopt.kernels.cuda.launch import Kernel

CAPABILITIES = (7, 5), (8, 0), (9, 0), (10, 0)
REGISTERS, UNIT = 65_536, 256  # of a multiprocessor; that a warp takes at a time
THREADS = {(7, 5): 1024, (8, 0): 2048, (9, 0): 2048, (10, 0): 2048}  # that a multiprocessor has room for
PTXAS = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "ptxas")


def assembled(kernel: Kernel, text: str, cc: tuple[int, int]) -> str:
    """What ptxas says of a kernel, the PTX of which is ``text``.

    Raises:
        RuntimeError: it refuses it.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(text)
        limit = [] if kernel.most_registers is None else [f"-maxrregcount={kernel.most_registers}"]
        command = [PTXAS, "-v", f"-arch=sm_{cc[0]}{cc[1]}", *limit, "-o", Path(folder, "cubin"), source]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stderr


def registers(report: str) -> int:
    return int(re.search(r"Used (\d+) registers", report)[1])  # type: ignore[index]


def occupancy(own: int, threads: int, cc: tuple[int, int]) -> float:
    """Of blocks of so many threads that take so many registers each."""
    of_warp = -(-own * 32 // UNIT) * UNIT
    warps = -(-threads // 32)
    blocks = min(REGISTERS // (of_warp * warps), THREADS[cc] // threads)
    return blocks * threads / THREADS[cc]


def lines() -> Iterator[list[str]]:
    for name, bytes_an_element, kernel in every_kernel():
        cells, (texts, _) = [], kernel.code(*CAPABILITIES)
        for cc, text in zip(CAPABILITIES, texts, strict=True):
            own = registers(assembled(kernel, text, cc))
            cells.append(f"{own} ({occupancy(own, kernel.threads, cc):.0%})")
        yield [name, bytes_an_element, *cells]


def main() -> None:
    heading = ["kernel", "bytes moved", *(f"sm_{a}{b}" for a, b in CAPABILITIES)]
    table = Table(*heading, title="registers of a thread (occupancy)")
    rows = list(lines())
    for row in rows:
        table.add_row(*row)
    Console(width=130).print(table)
    for row in (heading, ["---"] * len(heading), *rows):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
