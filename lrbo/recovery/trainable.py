"""The layers of a compressed model as trainable ones of the same function, and back as stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lrbo.errors import ModelError, some
from lrbo.layers.based import BasedLinear
from lrbo.layers.forms import is_delta
from lrbo.layers.frequency import GroupedLinear
from lrbo.layers.joint import SkippedLinear, ThinLinear
from lrbo.layers.kronecker import KroneckerLinear
from lrbo.layers.low_rank import LowRankLinear
from lrbo.layers.modules import compressed_layers, replace_module
from lrbo.layers.pivoted import PivotedLinear
from lrbo.layers.pivoted import Product as Rows
from lrbo.layers.shared import SharedLinear
from lrbo.layers.tables import TiedHead, is_table
from lrbo.recovery.trainable_base import TrainableBase
from lrbo.recovery.trainable_module import MATRIX, Direct, Product, Stored, TrainableModule, wide

SHOWN = 5  # names in a message
DIRECT = (KroneckerLinear, GroupedLinear, ThinLinear, SkippedLinear)


class _Rounded(nn.Module):
    """Gives a parameter to its module in the dtype that the module computes in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, values: Tensor) -> Tensor:
        return values.to(self.dtype)


class Trainables:
    """The trainable parameters of a compressed model, by name.

    Attributes:
        modules: By the name of the layer.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, TrainableModule],
        vectors: Mapping[str, Tensor],
    ) -> None:
        """Take modules that are in the model, and norms and biases by name as they are stored."""
        self.model, self.modules = model, dict(modules)
        self._vectors = dict(vectors)
        self._parameters = {
            f"{name}.{own}": parameter
            for name, module in modules.items()
            for own, parameter in module.named_parameters()
        }
        self._parameters |= {name: self._vector(name) for name in vectors}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every trainable tensor once: float32, or wider if the model is."""
        yield from self._parameters.items()

    def names_of(self, prefix: str) -> list[str]:
        """List the parameters below a module, such as a block."""
        return [name for name in self._parameters if name.startswith(f"{prefix}.")]

    @property
    def matrices(self) -> frozenset[str]:
        """The names of the parameters that multiply features: factors, and thin layers.

        Tables are none, of which a step reaches few rows; nor are numbers that lie in a rectangle.
        """
        return frozenset(
            f"{name}.{own}"
            for name, module in self.modules.items()
            if not is_table(self.model, name)
            for own in module.matrices
        )

    def state(self) -> dict[str, Tensor]:
        """Copy all parameters to the CPU."""
        return {n: p.detach().to("cpu", copy=True) for n, p in self._parameters.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take parameters of :meth:`state`, of all modules or of some.

        Raises:
            ModelError: If names or shapes are not those of this model; nothing is then changed.
        """
        problems = [
            f"{name}: {_shape_of(tensor)}, expected {_shape_of(self._parameters.get(name))}"
            for name, tensor in state.items()
            if _shape_of(tensor) != _shape_of(self._parameters.get(name))
        ]
        if problems:
            raise ModelError(
                f"the state is not that of this model: {some(problems, SHOWN)}; continue with the "
                "checkpoint that it was made from"
            )
        with torch.no_grad():
            for name, tensor in state.items():
                self._parameters[name].copy_(tensor)

    def store_(self) -> None:
        """Put the stored layers back, with what was trained: the same options, shapes and dtypes.

        A layer none of whose parameters has changed is left as it was, to the last bit.

        Raises:
            StatisticsError: If a parameter is not finite, naming the layer.
        """
        stored = {name: module.stored_again() for name, module in self.modules.items()}
        for name, layer in stored.items():
            replace_module(self.model, name, layer)
        _tie(self.model, {id(self.modules[name]): layer for name, layer in stored.items()})
        for name, before in self._vectors.items():
            module, own = _owner(self.model, name)
            trained = self._vector(name).detach()
            if parametrize.is_parametrized(module, own):
                parametrize.remove_parametrizations(module, own, leave_parametrized=False)
            setattr(module, own, nn.Parameter(trained.to(before.dtype), requires_grad=False))
        self.model.requires_grad_(False)

    def _vector(self, name: str) -> nn.Parameter:
        module, own = _owner(self.model, name)
        if parametrize.is_parametrized(module, own):
            return module.get_parameter(f"parametrizations.{own}.original")
        return module.get_parameter(own)


def make_trainable(model: nn.Module, *, bases: bool = True) -> Trainables:
    """Replace the layers that are not dense by trainable ones of the same function, in place.

    Trained are all small floats: factors, Kronecker terms, scales, tables, sparse values, means,
    thin layers; and norms and biases, which in half precision are trained in float32 too. Integers
    of bases, positions, embeddings, heads and layers that are dense are not. Where layers add to a
    base model nothing else is: its checkpoint has no other numbers.

    Args:
        model: Compressed, in memory on its device; changed until :meth:`Trainables.store_`.
        bases: Whether scales, tables and values of bases are trained; without it a base is
            unpacked once and held.

    Raises:
        ModelError: If the model has no such layer, or a layer cannot be trained; names all.
    """
    layers = compressed_layers(model)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no compressed layer, expected a model as lrbo compress "
            "writes it"
        )
    if problems := [f"{n}, a {type(m).__name__}" for n, m in layers.items() if not _is_known(m)]:
        raise ModelError(
            f"{len(problems)} layers cannot be trained: {some(problems, SHOWN)}; expected layers "
            "as a checkpoint of lrbo has them, without adapters"
        )
    modules = {name: _trainable(name, module, bases) for name, module in layers.items()}
    for trainable in modules.values():
        trainable.remember()
    _link(modules)
    model.requires_grad_(False)
    inside = tuple(f"{name}." for name in layers)
    is_change = any(isinstance(m, BasedLinear) and is_delta(m.form.name) for m in layers.values())
    vectors = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.dim() <= 1 and not name.startswith(inside) and not is_change
    }
    for name, trainable in modules.items():
        replace_module(model, name, trainable)
    _tie(model, {id(layers[name]): trainable for name, trainable in modules.items()})
    for name in vectors:
        _train_vector(*_owner(model, name))
    return Trainables(model, modules, vectors)


def matrix_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the shapes of :attr:`Trainables.matrices` of a model, which may be on the meta device.

    A pivoted layer counts as the product that it is trained as.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in compressed_layers(model).items():
        if is_table(model, name):
            continue
        if type(layer) is ThinLinear:
            shapes[f"{name}.{MATRIX}"] = layer.out_features, layer.in_features
        elif isinstance(layer, LowRankLinear | SharedLinear | PivotedLinear | BasedLinear):
            if isinstance(layer, BasedLinear) and layer.factors is None:
                continue
            shapes[f"{name}.left"] = layer.out_features, layer.rank
            if not isinstance(layer, SharedLinear) or layer.right is not None:
                shapes[f"{name}.right"] = layer.rank, layer.in_features
    return shapes


def _is_known(module: nn.Module) -> bool:
    """Whether a layer can be trained: its parts are as they were stored."""
    if isinstance(module, LowRankLinear | SharedLinear):
        return all(part is None or type(part) is nn.Linear for part in (module.left, module.right))
    if isinstance(module, PivotedLinear):
        return type(module.rows) is type(module.coefficients) is Rows
    return type(module) in (BasedLinear, *DIRECT)


def _trainable(name: str, module: Stored, bases: bool) -> TrainableModule:
    if isinstance(module, BasedLinear):
        return TrainableBase(name, module, bases=bases)
    if isinstance(module, LowRankLinear | SharedLinear | PivotedLinear):
        return Product(name, module)
    return Direct(name, module)


def _link(modules: Mapping[str, TrainableModule]) -> None:
    """Let layers that share a factor know the one that holds it, and that one them."""
    for module in modules.values():
        if isinstance(module, Product) and module.right is None:
            stored = module.stored
            assert isinstance(stored, SharedLinear)
            first = modules[stored.site]
            assert isinstance(first, Product)
            module.peers, first.peers = (first,), (*first.peers, module)


def _tie(model: nn.Module, instead: Mapping[int, nn.Module]) -> None:
    """Tie heads to the tables that stand in place of those that they were tied to."""
    for module in model.modules():
        if isinstance(module, TiedHead) and id(module.tied[0]) in instead:
            vars(module)["tied"] = (instead[id(module.tied[0])],)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def _train_vector(module: nn.Module, own: str) -> None:
    """Train a norm or bias, in float32 at least."""
    before = module.get_parameter(own)
    setattr(module, own, nn.Parameter(wide(before)))
    if before.dtype != module.get_parameter(own).dtype:
        parametrize.register_parametrization(module, own, _Rounded(before.dtype), unsafe=True)


def _shape_of(tensor: Tensor | None) -> str:
    return "no such parameter" if tensor is None else f"shape {tuple(tensor.shape)}"
