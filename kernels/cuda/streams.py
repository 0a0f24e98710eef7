"""The streams that other libraries work on now."""

from typing import Any, NamedTuple

from fastopt.kernels.loaded import loaded

LEGACY, PER_THREAD = 1, 2  # handles of the default streams


class Current(NamedTuple):
    """A stream by its handle. While ``owner`` lives, the handle is that of this stream."""

    handle: int
    owner: Any


def current(device: int) -> Current:
    """The stream that libraries which are loaded work on now: torch's, else CuPy's, else the default
    stream."""
    torch = loaded("torch")
    if torch is not None and torch.cuda.is_initialized():
        stream = torch.cuda.current_stream(device)
        return Current(stream.cuda_stream or LEGACY, stream)
    cupy = loaded("cupy")
    if cupy is not None:
        stream = cupy.cuda.get_current_stream(device)
        # That of each thread and the default stream wait for each other.
        return Current(LEGACY if stream.ptr in (0, PER_THREAD) else stream.ptr, stream)
    return Current(LEGACY, None)


def current_stream(device: int) -> int:
    """The handle of :func:`current`."""
    return current(device).handle
