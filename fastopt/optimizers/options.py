"""Types of the arguments of optimizers."""

from collections.abc import Callable, Mapping
from typing import Any

LearningRate = float | Callable[[int], float]  # a number, or a function of the optimizer's ``steps``
Options = Mapping[str, Any]  # the options of one parameter group, by name
