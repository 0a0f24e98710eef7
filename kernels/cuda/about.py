"""What CUDA offers on this machine."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from fastopt.kernels.cuda.driver import driver
from fastopt.kernels.cuda.errors import NoDriverError

PACKAGES = "numba-cuda", "cuda-core", "cuda-bindings", "nvidia-nvjitlink", "nvidia-nvjitlink-cu12"


def about() -> Iterator[tuple[str, str]]:
    """Lines for a person: what, and how it is here."""
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
    try:
        own = driver()
    except NoDriverError as error:
        yield "CUDA", str(error)
        return
    yield "CUDA driver", own.version()
    for device in range(own.count()):
        major, minor = own.compute_capability(device)
        yield (
            f"CUDA device {device}",
            f"{own.name(device)}, compute capability {major}.{minor}, {own.multiprocessors(device)} "
            "multiprocessors",
        )
