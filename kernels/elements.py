"""What every kernel does to one element: find the rule, load and store its state.

Each function has two faces: the plain Python one runs in the CUDA simulator and without JIT,
the ``@overload`` is what compiled kernels on the CPU and the GPU get. Loops over the slots of a
state are unrolled into source text: a recursion over its tuple compiles several times slower.
"""

from collections.abc import Callable

from numba.extending import overload, register_jitable

from fastopt.kernels.rules import L2, RULES, Decoupled, Rule


def define(name: str, arguments: str, *lines: str, **names: object) -> Callable:
    """A function from source text, which sees ``names``."""
    exec(f"def {name}({arguments}):\n" + "".join(f"    {line}\n" for line in lines), names)
    return names[name]  # type: ignore[return-value]


def load(arrays, i):
    """Element ``i`` of each array of a tuple."""
    return tuple(array[i] for array in arrays)


@overload(load)
def _load(arrays, i):
    items = "".join(f"arrays[{k}][i], " for k in range(len(arrays)))
    return define("load", "arrays, i", f"return ({items})")


def store(arrays, i, values):
    """Set element ``i`` of each array of a tuple."""
    for array, value in zip(arrays, values, strict=True):
        array[i] = value


@overload(store)
def _store(arrays, i, values):
    lines = [f"arrays[{k}][i] = values[{k}]" for k in range(len(arrays))]
    return define("store", "arrays, i, values", *lines, "return None")


def _adapter(rule: Rule) -> Callable:
    """``rule.update`` on present slots alone: ``None`` goes in, and is dropped, for the others.

    In the adapter's source, because a tuple of state in a kernel can't hold a ``None``.
    """
    arguments: list[str] = []
    results: list[str] = []
    present = 0
    for slot in rule.slots:
        arguments.append("None" if slot is None else f"state[{present}]")
        results.append(f"slot{len(results)}")
        present += slot is not None
    arguments += [f"state[{present + k}]" for k in range(len(rule.row_slots))]
    kept = [result for result, slot in zip(results, rule.slots, strict=True) if slot is not None]
    return define(
        "adapter",
        "h, p, g, *state",
        f"{', '.join(['p', *results])}, = rule_update({', '.join(['h', 'p', 'g', *arguments])})",
        f"return {', '.join(['p', *kept])},",
        rule_update=register_jitable(rule.update),
    )


def update(h, p, g, *state):
    """The rule that belongs to ``type(h)``: the new ``(p, *slots)``."""
    return _adapter(RULES[type(h)])(h, p, g, *state)


@overload(update)
def _update(h, p, g, *state):
    return _adapter(RULES[h.instance_class])


def regularise(c, p, g):
    """The gradient as the rule sees it."""
    return c.scale * g + c.weight_decay * p if isinstance(c, L2) else c.scale * g


@overload(regularise)
def _regularise(c, p, g):
    if c.instance_class is L2:
        return lambda c, p, g: c.scale * g + c.weight_decay * p
    return lambda c, p, g: c.scale * g


def decayed(c, p):
    """The parameter as the rule sees it."""
    return c.keep * p if isinstance(c, Decoupled) else p


@overload(decayed)
def _decayed(c, p):
    if c.instance_class is Decoupled:
        return lambda c, p: c.keep * p
    return lambda c, p: p


@register_jitable
def update_element(h, c, p, g, *state):
    """Scale and weight decay, then the rule."""
    return update(h, decayed(c, p), regularise(c, p, g), *state)


@register_jitable
def mean_square(c, p, g, row):
    """Mean over a row of the squared gradient ``g`` (1-D) as the rule sees it.

    Four interleaved sums: a fixed order, in which the additions need not wait for each other.
    """
    dim = g.size
    zero = p.dtype.type(0)
    sums = zero, zero, zero, zero
    whole = dim - dim % 4
    for d in range(0, whole, 4):
        g0 = regularise(c, p[row, d], g[d])
        g1 = regularise(c, p[row, d + 1], g[d + 1])
        g2 = regularise(c, p[row, d + 2], g[d + 2])
        g3 = regularise(c, p[row, d + 3], g[d + 3])
        sums = sums[0] + g0 * g0, sums[1] + g1 * g1, sums[2] + g2 * g2, sums[3] + g3 * g3
    total = (sums[0] + sums[1]) + (sums[2] + sums[3])
    for d in range(whole, dim):
        g0 = regularise(c, p[row, d], g[d])
        total += g0 * g0
    return total / p.dtype.type(dim)


def begin_row(h, c, p, g, row, row_state):
    """Update a row's own state, of one element a row; returns it for the row's elements."""
    rule = RULES[type(h)]
    if rule.update_row is None:
        return ()
    new = rule.update_row(h, mean_square(c, p, g, row), *load(row_state, row))
    store(row_state, row, new)
    return new


@overload(begin_row)
def _begin_row(h, c, p, g, row, row_state):
    rule = RULES[h.instance_class]
    if rule.update_row is None:
        return lambda h, c, p, g, row, row_state: ()
    update_state = register_jitable(rule.update_row)

    def implementation(h, c, p, g, row, row_state):
        new = update_state(h, mean_square(c, p, g, row), *load(row_state, row))
        store(row_state, row, new)
        return new

    return implementation


@register_jitable
def update_row(h, c, p, g, row, state, row_state):
    """Update row ``row`` of the 2-D ``p`` and of its state with the row's whole gradient ``g``."""
    row_values = begin_row(h, c, p, g, row, row_state)
    for d in range(g.size):
        at = (row, d)
        new = update_element(h, c, p[at], g[d], *load(state, at), *row_values)
        p[at] = new[0]
        store(state, at, new[1:])
