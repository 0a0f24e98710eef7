"""The update rules and the sparse semantics as plain float64 NumPy, as naive as can be.

A rule is called as ``rule(p, g, state, step, **options)``: it changes the arrays in ``state`` and
returns the new parameter. ``step`` is 1 for a parameter's first update.
"""

import numpy as np


def prepared(p, g, *, lr, weight_decay=0.0, decoupled=False, maximize=False):
    """The parameter and the gradient after sign and weight decay."""
    if maximize:
        g = -g
    if decoupled:
        p = p - lr * weight_decay * p
    elif weight_decay:
        g = g + weight_decay * p
    return p, g


def lerp(start, end, weight):
    """torch.lerp."""
    if weight < 0.5:
        return start + weight * (end - start)
    return end - (end - start) * (1 - weight)


def sgd(p, g, state, step, *, lr, **common):
    p, g = prepared(p, g, lr=lr, **common)
    return p - lr * g


def momentum(p, g, state, step, *, lr, momentum, dampening=0.0, nesterov=False, **common):
    p, g = prepared(p, g, lr=lr, **common)
    if step == 1:
        b = momentum * state["momentum_buffer"] + g
    else:
        b = momentum * state["momentum_buffer"] + (1 - dampening) * g
    state["momentum_buffer"] = b
    if nesterov:
        return p - lr * (g + momentum * b)
    return p - lr * b


def adagrad(p, g, state, step, *, lr, lr_decay=0.0, eps=1e-10, initial_accumulator_value=0.0, **common):
    p, g = prepared(p, g, lr=lr, **common)
    state["sum"] = state["sum"] + g**2
    return p - lr / (1 + (step - 1) * lr_decay) * g / (np.sqrt(state["sum"]) + eps)


def rowwise_adagrad(
    p, g, state, step, *, lr, lr_decay=0.0, eps=1e-10, initial_accumulator_value=0.0, **common
):
    p, g = prepared(p, g, lr=lr, **common)
    if g.size == 0:
        return p
    table = g.reshape(state["sum"].size, -1)
    state["sum"] = state["sum"] + (table**2).mean(axis=1)
    update = table / (np.sqrt(state["sum"])[:, None] + eps)
    return p - lr / (1 + (step - 1) * lr_decay) * update.reshape(p.shape)


def rmsprop(p, g, state, step, *, lr, alpha=0.99, eps=1e-8, momentum=0.0, centered=False, **common):
    p, g = prepared(p, g, lr=lr, **common)
    v = state["square_avg"] = alpha * state["square_avg"] + (1 - alpha) * g**2
    if centered:
        m = state["grad_avg"] = lerp(state["grad_avg"], g, 1 - alpha)
        v = v - m**2
    u = g / (np.sqrt(v) + eps)
    if momentum:
        u = state["momentum_buffer"] = momentum * state["momentum_buffer"] + u
    return p - lr * u


def adam(p, g, state, step, *, lr, betas=(0.9, 0.999), eps=1e-8, amsgrad=False, **common):
    p, g = prepared(p, g, lr=lr, **common)
    beta1, beta2 = betas
    m = state["exp_avg"] = lerp(state["exp_avg"], g, 1 - beta1)
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    if amsgrad:
        v = state["max_exp_avg_sq"] = np.maximum(state["max_exp_avg_sq"], v)
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    return p - lr * m_hat / (np.sqrt(v_hat) + eps)


def sparse_adam(p, g, state, step, *, lr, betas=(0.9, 0.999), eps=1e-8, **common):
    p, g = prepared(p, g, lr=lr, **common)
    beta1, beta2 = betas
    m = state["exp_avg"] = lerp(state["exp_avg"], g, 1 - beta1)
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    return p - lr * np.sqrt(1 - beta2**step) / (1 - beta1**step) * m / (np.sqrt(v) + eps)


def rowwise_adam(p, g, state, step, *, lr, betas=(0.9, 0.999), eps=1e-8, **common):
    p, g = prepared(p, g, lr=lr, **common)
    if g.size == 0:
        return p
    beta1, beta2 = betas
    m = state["exp_avg"] = lerp(state["exp_avg"], g, 1 - beta1)
    mean = (g.reshape(state["exp_avg_sq"].size, -1) ** 2).mean(axis=1)
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * mean
    m_hat = m.reshape(v.size, -1) / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    return p - lr * (m_hat / (np.sqrt(v_hat)[:, None] + eps)).reshape(p.shape)


def radam(p, g, state, step, *, lr, betas=(0.9, 0.999), eps=1e-8, **common):
    p, g = prepared(p, g, lr=lr, **common)
    beta1, beta2 = betas
    m = state["exp_avg"] = lerp(state["exp_avg"], g, 1 - beta1)
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**step)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / (1 - beta2**step)
    if rho <= 5:
        return p - lr * m_hat
    r = np.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
    adaptive = np.sqrt(1 - beta2**step) / (np.sqrt(v) + eps)
    return p - lr * m_hat * r * adaptive


def nadam(p, g, state, step, *, lr, betas=(0.9, 0.999), eps=1e-8, momentum_decay=4e-3, **common):
    p, g = prepared(p, g, lr=lr, **common)
    beta1, beta2 = betas
    m = state["exp_avg"] = lerp(state["exp_avg"], g, 1 - beta1)
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    mu = beta1 * (1 - 0.5 * 0.96 ** (np.arange(1, step + 2) * momentum_decay))
    product, product_next = np.prod(mu[:-1]), np.prod(mu)
    m_hat = mu[-1] / (1 - product_next) * m + (1 - mu[-2]) / (1 - product) * g
    return p - lr * m_hat / (np.sqrt(v / (1 - beta2**step)) + eps)


def signum(p, g, state, step, *, lr, beta=0.9, **common):
    """Bernstein et al. 2018, Algorithm 2."""
    p, g = prepared(p, g, lr=lr, **common)
    state["exp_avg"] = beta * state["exp_avg"] + (1 - beta) * g
    return p - lr * np.sign(state["exp_avg"])


def lamb(p, g, state, step, *, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, maximize=False):
    """Of one layer."""
    if maximize:
        g = -g
    beta1, beta2 = betas
    m = state["exp_avg"] = lerp(state["exp_avg"], g, 1 - beta1)
    v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    u = m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p
    p_norm, u_norm = np.sqrt((p**2).sum()), np.sqrt((u**2).sum())
    ratio = p_norm / u_norm if p_norm > 0 and u_norm > 0 else 1
    return p - lr * ratio * u


def adafactor(p, g, state, step, *, lr=1e-2, beta2_decay=-0.8, eps=(2.0**-23, 1e-3), d=1.0,
              weight_decay=0.0, maximize=False):  # fmt: skip
    if p.size == 0:
        return p
    if maximize:
        g = -g
    weight = step**beta2_decay
    alpha = max(eps[1], np.sqrt((p**2).mean())) * min(lr, 1 / np.sqrt(step))
    if p.ndim > 1:
        r = state["row_var"] = lerp(state["row_var"], (g**2).mean(axis=-1, keepdims=True), weight)
        c = state["col_var"] = lerp(state["col_var"], (g**2).mean(axis=-2, keepdims=True), weight)
        v = r * c / np.maximum(r.mean(axis=-2, keepdims=True), eps[0])
    else:
        v = state["variance"] = lerp(state["variance"], g**2, weight)
    u = g / np.maximum(np.sqrt(v), eps[0])
    return p - lr * weight_decay * p - alpha / max(1, np.sqrt((u**2).mean()) / d) * u


def lion(p, g, state, step, *, lr, betas=(0.9, 0.99), **common):
    p, g = prepared(p, g, lr=lr, **common)
    beta1, beta2 = betas
    update = np.sign(beta1 * state["exp_avg"] + (1 - beta1) * g)
    state["exp_avg"] = beta2 * state["exp_avg"] + (1 - beta2) * g
    return p - lr * update


def slots(rule, options):
    """Names of the state arrays."""
    if rule is momentum:
        return ["momentum_buffer"]
    if rule in (adagrad, rowwise_adagrad):
        return ["sum"]
    if rule is rmsprop:
        wanted = {"square_avg": True, "grad_avg": options.get("centered"),
                  "momentum_buffer": options.get("momentum")}  # fmt: skip
        return [name for name, present in wanted.items() if present]
    if rule is adam:
        return ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * options.get("amsgrad", False)
    if rule in (sparse_adam, radam, rowwise_adam, nadam, lamb):
        return ["exp_avg", "exp_avg_sq"]
    return ["exp_avg"] if rule in (lion, signum) else []


def new_state(rule, p, options):
    """State before the first update."""
    if rule is adafactor:
        if p.ndim < 2:
            return {"variance": np.zeros(p.shape)}
        return {"row_var": np.zeros((*p.shape[:-1], 1)), "col_var": np.zeros((*p.shape[:-2], 1, p.shape[-1]))}
    by_row = {rowwise_adagrad: ["sum"], rowwise_adam: ["exp_avg_sq"]}.get(rule, [])
    return {name: np.full((p.shape[:1] or (1,)) if name in by_row else p.shape,
                          options.get("initial_accumulator_value", 0.0))
            for name in slots(rule, options)}  # fmt: skip


def coalesce(indices, values):
    """Distinct rows and the sums of their values."""
    flat = np.asarray(indices).reshape(-1)
    table = np.asarray(values, np.float64).reshape(flat.size, np.shape(values)[-1])
    rows = np.unique(flat)
    sums = np.zeros((rows.size, table.shape[1]))
    np.add.at(sums, np.searchsorted(rows, flat), table)
    return rows, sums


def update_rows(rule, p, indices, values, state, step, options):
    """Update the rows that ``indices`` name, each once, and no others."""
    rows, sums = coalesce(indices, values)
    own = {name: array[rows] for name, array in state.items()}
    p = p.copy()
    if rule is lamb:  # each row is a layer
        for k, row in enumerate(rows):
            single = {name: array[k] for name, array in own.items()}
            p[row] = rule(p[row], sums[k], single, step, **options)
            for name, array in single.items():
                own[name][k] = array
    else:
        p[rows] = rule(p[rows], sums, own, step, **options)
    for name, array in own.items():
        state[name] = state[name].copy()
        state[name][rows] = array
    return p


class Tracked:
    """A parameter under the reference, with the magnitudes that its rounding errors scale with."""

    def __init__(self, rule, p, options):
        self.rule, self.options = rule, options
        self.p = np.array(p, np.float64)
        self.state = new_state(rule, self.p, options)
        self.steps = 0
        self.scale = peak(self.p)
        self.state_scale = {name: peak(array) for name, array in self.state.items()}

    def step(self, g, **changed):
        """One update with the dense ``g``, with ``(indices, values)``, or none for ``None``."""
        if g is None:
            return
        self.steps += 1
        options = {**self.options, **changed}
        before = self.p
        if isinstance(g, tuple):
            self.p = update_rows(self.rule, before, *g, self.state, self.steps, options)
        else:
            self.p = self.rule(before, np.asarray(g, np.float64), self.state, self.steps, **options)
        self.scale += peak(self.p - before)
        for name, array in self.state.items():
            self.state_scale[name] = max(self.state_scale[name], peak(array))


def peak(array):
    return float(np.max(np.abs(array), initial=0.0))


def code_levels(signed):
    """What 8-bit codes without a sign stand for, for the scale 1, as the docstring of
    fastopt.kernels.formats describes them: roots of numbers where there is no sign."""
    fractions = 8 if signed else 16
    codes = np.arange(128 if signed else 256)
    logarithm = 2.0 ** (codes // fractions - 16) * (1 + codes % fractions / fractions)
    return (logarithm - 2.0**-16) / ((logarithm[-1] - 2.0**-16) * (1 - 2.0**-20))


def code_error(x, largest, signed):
    """The distance of neighbouring codes at ``x``, or at its root, in a block with this largest, a little
    more for the rounding of float32."""
    share, last = (1 / 8, 1 - 2.0**-4) if signed else (1 / 16, 1 - 2.0**-5)
    span = (last - 2.0**-16) * (1 - 2.0**-20)
    return share * (np.abs(x) + largest * 2.0**-16 / span) * (1 + 2.0**-18)


def spread_scales(scales, shape):
    """The scale of each element, of blocks of 256 that end with rows if ``scales`` is 2-D."""
    scales = np.asarray(scales, np.float64)
    if scales.ndim == 2:
        return np.repeat(scales, 256, axis=1)[:, : shape[1]].reshape(shape)
    return np.repeat(scales, 256)[: int(np.prod(shape))].reshape(shape)


def decoded(codes, scales, signed):
    """The float64 numbers that 8-bit codes stand for."""
    scale = spread_scales(scales, codes.shape)
    if signed:
        return np.where(codes & 128, -1, 1) * code_levels(True)[codes & 127] * scale
    return code_levels(False)[codes] ** 2 * scale
