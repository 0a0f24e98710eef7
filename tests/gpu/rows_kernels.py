"""The kernels of sparse updates: of every rule, and of each way that tables are stored."""

from collections.abc import Iterator

from fastopt.kernels import rules
from fastopt.kernels.cuda.launch import Kernel
from fastopt.kernels.cuda.row_sums import sum_slots
from fastopt.kernels.cuda.rows import update_rows
from fastopt.kernels.formats import PLAIN
from fastopt.kernels.rule import L2, RULES, Decoupled, Lazy, PerRow, Scaled
from gpu.dense_kernels import DOUBLE, SINGLE, STORED, code, moved


def rows_kernels() -> Iterator[tuple[str, str, Kernel]]:
    """Of each kernel a name, the bytes that it moves for an element, and the kernel."""
    decays = [L2, Scaled, Decoupled]
    own_rules = [
        rule
        for hyper, rule in RULES.items()
        if hyper.__module__.startswith("fastopt.kernels.rules.") and not rule.matrix_slots
    ]
    for i, rule in enumerate(own_rules):
        decay = Scaled if rule.own_decay else decays[i % 3]
        for name, parameter, _, signed, not_negative, compute in STORED:
            slots = (not_negative if slot in rule.not_negative else signed for slot in rule.state_slots)
            own = code(rule, decay, (parameter, PLAIN, *slots), compute)
            title = f"{rule.hyper.__name__.removesuffix('H')}, {name}"
            yield f"rows: {title}", moved(own, len(own.formats), 1), update_rows(own, Lazy, False)
    plain = code(rules.ADAM, L2, (PLAIN,) * 4, SINGLE)
    yield "rows: Adam, norms limited", moved(plain, 4, 1), update_rows(plain, Lazy, True)
    yield "rows: Adam, steps counted by row", moved(plain, 4, 1), update_rows(plain, PerRow, False)
    for compute in (SINGLE, DOUBLE):
        yield f"sums of slots: {compute}", f"{compute.itemsize}", sum_slots(compute)
