"""The average that moments are, exact where a weight is 0 or 1."""

from fastopt.kernels.linked import register_jitable


@register_jitable
def lerp(start, end, weight, complement):
    """``start + weight * (end - start)``, exact at both ends; complement is 1 - weight."""
    if weight < complement:
        return start + weight * (end - start)
    return end - complement * (end - start)
