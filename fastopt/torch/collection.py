"""Many embedding tables as one module: their lookups are one launch, their indices are sorted at once."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.modules import module as all_modules

from fastopt.torch import compiled
from fastopt.torch.calls import Together
from fastopt.torch.lookups import Call, look_up
from fastopt.torch.modules import EmbeddingBag

_HOOKS_OF_ALL = (  # of all modules
    all_modules._global_forward_hooks,
    all_modules._global_forward_pre_hooks,
    all_modules._global_backward_hooks,
    all_modules._global_backward_pre_hooks,
)

Bags = torch.Tensor | tuple[torch.Tensor | None, ...]  # the arguments of a lookup in a table


class _Feature(NamedTuple):
    """A feature, the name of its table, and the columns of results that it has."""

    name: str
    table: str
    first: int
    last: int


class EmbeddingBagCollection(torch.nn.Module):
    """Embedding tables that are looked up together, each by one feature or by several.

    Args:
        tables: modules ``torch.nn.EmbeddingBag``, of fastopt or of torch itself, by name. Each keeps its own
            options: ``mode``, ``padding_idx``, ``include_last_offset``, ``fused`` and others. All have one
            dtype and device.
        features: the names of the features that look each table up, by the name of the table; a table that
            is not named has one feature, of its own name.

    Attributes:
        tables: the modules, a ``ModuleDict``. features: the names of the features, in the order of columns.

    Raises:
        TypeError: a table is no ``EmbeddingBag``, or features are no list of names.
        ValueError: ``features`` has a name twice, or one of a table that there is not, or a table has none.

    Tables that do more than look up, by a ``forward`` of their own or by hooks (pruning, spectral norm), are
    called one by one, and so are the others of their collection.

    Example:
        >>> tables = {"item": EmbeddingBag(1000, 8, mode="sum"), "country": EmbeddingBag(200, 4, mode="sum")}
        >>> collection = EmbeddingBagCollection(tables, features={"item": ["shown", "bought"]})
        >>> ids, history = torch.tensor([[1], [2]]), (torch.tensor([7, 8, 9]), torch.tensor([0, 2]))
        >>> pooled = collection({"shown": ids, "bought": history, "country": ids})
        >>> pooled.shape, collection.split(pooled)["country"].shape
        (torch.Size([2, 20]), torch.Size([2, 4]))
    """

    def __init__(
        self,
        tables: Mapping[str, torch.nn.EmbeddingBag],
        features: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        if not tables:
            raise ValueError("tables is empty: expected at least one EmbeddingBag")
        for name, table in tables.items():
            if not isinstance(table, torch.nn.EmbeddingBag):
                raise TypeError(f"tables[{name!r}] is {type(table).__name__}: expected an EmbeddingBag")
        features = {} if features is None else features
        unknown = [name for name in features if name not in tables]
        if unknown:
            raise ValueError(f"features names the table {unknown[0]!r}: expected one of {[*tables]}")
        self.tables = torch.nn.ModuleDict(tables)
        self._features: list[_Feature] = []
        for name, table in tables.items():
            own = features.get(name, [name])
            if isinstance(own, str):
                raise TypeError(f"features[{name!r}] is {own!r}: expected a list of names, [{own!r}]")
            if not own:
                raise ValueError(f"features[{name!r}] is empty: expected at least one name")
            for feature in own:
                if feature in self.features:
                    raise ValueError(f"features has {feature!r} twice: expected different names")
                first = self._features[-1].last if self._features else 0
                self._features.append(_Feature(feature, name, first, first + table.embedding_dim))

    @property
    def features(self) -> list[str]:
        return [feature.name for feature in self._features]

    def forward(self, inputs: Mapping[str, Bags]) -> torch.Tensor:
        """The pooled rows of all features.

        Args:
            inputs: what each feature looks up, by name: ``indices`` of two dimensions, with a bag in each
                row, or a tuple of the arguments of ``EmbeddingBag``: ``(indices, offsets)`` or ``(indices,
                offsets, per_sample_weights)``. All have as many bags.

        Returns:
            A tensor of shape (bags, sum of the dims of all features), side by side in the order of
            ``features``; :meth:`split` gives each its own.

        Raises:
            ValueError: ``inputs`` has other features, or features have different numbers of bags.
        """
        return _looked_up(self, [*self.arguments(inputs).values()])

    def arguments(self, inputs: Mapping[str, Bags]) -> dict[str, tuple[Any, Any, Any]]:
        """The indices, offsets and weights of each feature, None of those not given.

        Raises:
            ValueError, TypeError: ``inputs`` has other features, or something else for one.
        """
        if inputs.keys() != set(self.features):
            raise ValueError(f"inputs has the features {sorted(inputs)}: expected {sorted(self.features)}")
        return {name: _arguments(inputs[name], name) for name in self.features}

    def split(self, pooled: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each feature has of the result: views of its columns, by name."""
        return {feature.name: pooled[..., feature.first : feature.last] for feature in self._features}

    def modules_of_features(self) -> list[torch.nn.EmbeddingBag]:
        """The table of each feature."""
        return [self.tables[feature.table] for feature in self._features]  # type: ignore[misc]


def _arguments(given: Bags, name: str) -> tuple[Any, Any, Any]:
    """The indices, offsets and weights of a feature."""
    own = given if isinstance(given, tuple) else (given,)
    if not 1 <= len(own) <= 3 or not isinstance(own[0], torch.Tensor):
        raise TypeError(
            f"inputs[{name!r}] is {type(given).__name__}: expected indices, (indices, offsets) or (indices, "
            "offsets, per_sample_weights)"
        )
    indices, offsets, weights = (*own, None, None)[:3]
    return indices, offsets, weights


def _looked_up(collection: EmbeddingBagCollection, given: Sequence[tuple]) -> torch.Tensor:
    """The lookups of all features; table by table, by torch, where some are not fastopt's."""
    modules = collection.modules_of_features()
    in_graph = torch.compiler.is_compiling() and all(map(compiled.has_op, modules))
    if torch.compiler.is_dynamo_compiling() and not in_graph:
        return _out_of_graphs(collection, given)
    alone = not any(_HOOKS_OF_ALL) and all(map(looks_up_alone, modules))
    if in_graph:
        asked = [
            compiled.Asked(module, module.weight, *own) for module, own in zip(modules, given, strict=True)
        ]
        if alone and all(map(compiled.takes, asked)):
            return compiled.look_up(asked)
        return torch.cat([module(*own) for module, own in zip(modules, given, strict=True)], 1)
    calls = _calls(collection, modules, given) if alone else [None]
    if any(call is None for call in calls):
        results = _by_feature(operator.call, collection.features, modules, given)
        check_bags(collection.features, [len(own) for own in results])
        return torch.cat(results, 1)
    known: list[Call] = [call for call in calls if call is not None]
    check_bags(collection.features, [call.rows for call in known])
    check_alike(call.table for call in known)
    return look_up(known)


def _calls(
    collection: EmbeddingBagCollection, modules: Sequence[torch.nn.EmbeddingBag], given: Sequence[tuple]
) -> list[Call | None]:
    tables = [module.weight for module in modules]
    together = Together(tables, [indices for indices, _, _ in given])
    arguments = [(table, *own) for table, own in zip(tables, given, strict=True)]
    return _by_feature(together.call_of, collection.features, modules, arguments)


def looks_up_alone(module: torch.nn.EmbeddingBag) -> bool:
    """Whether a call of a module is its lookup and nothing else, but for hooks of all modules."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return (
        type(module).forward in (EmbeddingBag.forward, torch.nn.EmbeddingBag.forward)
        and "forward" not in vars(module)
        and not any(hooks)
    )


def _by_feature(
    function: Callable[..., Any],
    names: Sequence[str],
    modules: Sequence[torch.nn.EmbeddingBag],
    given: Sequence[tuple],
) -> list[Any]:
    """``function(module, *arguments)`` of each feature; its errors tell which."""
    found = []
    for name, module, own in zip(names, modules, given, strict=True):
        try:
            found.append(function(module, *own))
        except Exception as error:
            error.add_note(f"in inputs[{name!r}] of an EmbeddingBagCollection")
            raise
    return found


_out_of_graphs = torch.compiler.disable(_looked_up)


def check_bags(features: Sequence[str], counts: Sequence[int]) -> None:
    """Refuse features with different numbers of bags."""
    if len(set(counts)) > 1:
        own = dict(zip(features, counts, strict=True))
        raise ValueError(f"inputs have these numbers of bags: {own}; expected the same number of all")


def check_alike(tables: Iterable[torch.Tensor]) -> None:
    """Refuse tables of different dtypes or devices."""
    kinds = {(table.dtype, table.device) for table in tables}
    if len(kinds) > 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"tables are of {found}: expected the same of all")
