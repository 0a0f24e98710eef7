"""The streams that other libraries work on now."""

import sys

LEGACY, PER_THREAD = 1, 2  # handles of the default streams


def current_stream(device: int) -> int:
    """The handle of the stream that libraries which are loaded work on now: torch's, else CuPy's, else the
    default stream."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.current_stream(device).cuda_stream or LEGACY
    cupy = sys.modules.get("cupy")
    if cupy is not None:
        return cupy.cuda.get_current_stream(device).ptr or LEGACY
    return LEGACY
