"""What is said where a device can't be used."""

EXTRA = 'pip install "fastopt[cuda13]" (or "fastopt[cuda12]" for a driver of CUDA 12)'


class NoDriverError(RuntimeError):
    """There is no CUDA driver, or a package is missing that it takes to use it."""
