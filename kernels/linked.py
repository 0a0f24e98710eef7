"""How Numba is to compile the functions that kernels call.

By itself it optimises each function together with all that the function calls, and makes machine code of
that, at each level anew: the innermost loop of a kernel goes through that half a dozen times. Here the code
of a helper is only linked into what calls it. It is optimised and becomes machine code there, in the kernel.

So a helper has no machine code of its own, and no environment, which is what Numba's code needs to work with
Python's objects.
"""

from collections.abc import Callable
from typing import Any

from numba import extending
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler


class _NoEnvironments:
    def set_env(self, name: str, environment: Any) -> None:
        """Nothing: the variable that would point to it is in no machine code."""


class _Linked(JITCodeLibrary):
    """The code of a helper."""

    @property
    def codegen(self) -> Any:
        return _NoEnvironments()

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    def _optimize_functions(self, module: Any) -> None:
        """Nothing, which is left to the kernel."""
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        """Nothing, which is left to the kernel."""

    def _finalize_final_module(self) -> None:
        """Only what is to be known for linking."""
        self._finalize_dynamic_globals()
        self._finalized = True


class _LinkedOptimised(_Linked):
    """The code of a helper that has been optimised before it is linked."""

    _optimize_final_module = JITCodeLibrary._optimize_final_module


class Helper(Compiler):
    """Compiles a helper."""

    library = _Linked

    def define_pipelines(self) -> Any:
        state = self.state
        state.library = self.library(state.targetctx.codegen(), state.func_id.func_qualname)
        return super().define_pipelines()


class OptimisedHelper(Helper):
    """Compiles a helper that is optimised by itself first."""

    library = _LinkedOptimised


class RestrictedHelper(OptimisedHelper):
    """Compiles a helper whose array arguments never overlap: its loops are vectorised while that is known, in
    it and not in its callers."""

    def define_pipelines(self) -> Any:
        self.state.flags.noalias = True
        return super().define_pipelines()


OF_HELPERS: Any = {  # options of numba.njit, whose type leaves out some
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "pipeline_class": Helper,
}


def register_jitable(function: Callable) -> Callable:
    """Decorate a function that kernels of any device call: on the CPU it is a helper. A GPU's compiler leaves
    the options alone."""
    return extending.register_jitable(**OF_HELPERS)(function)


def overload(function: Callable) -> Callable[[Callable], Callable]:
    """Decorate what chooses, by the types of its arguments, the function that kernels call in place of
    ``function``; which is compiled as by :func:`register_jitable`."""
    return extending.overload(function, jit_options=OF_HELPERS)
