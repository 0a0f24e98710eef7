"""The update rules and the kernels that run them; imported as ``fastopt.kernels``."""

if __name__ != "fastopt.kernels":
    raise ImportError(
        f"this package was imported as {__name__!r}: import it as fastopt.kernels "
        "(run Python from outside the repository's root, or install with pip install -e .)"
    )

from fastopt.kernels import forks

forks.hold_numbas()
