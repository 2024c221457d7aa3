"""A refit that rebuilds the whole model after every site, and what refits are made of."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrbo.allocation.allocate import Allocation
from lrbo.allocation.apply import store_
from lrbo.factorization.factors import LowRankFactors
from lrbo.layers.options import DENSE, Option
from lrbo.models.families import family_of
from lrbo.models.model_map import body_and_head, linear_bias, linear_weight, map_model
from lrbo.models.specs import LayerSpec, ModelMap
from lrbo.refit.sequential import Refit, RefitSettings
from tests.support import reference
from tests.support.allocations import decided
from tests.support.tiny import build, token_ids

RANK = 4
# Models are in float64 here. Factors are rounded to float32 once, at the end of each layer, and
# what is downstream of them amplifies that.
ROUNDED = {"rtol": 1e-4, "atol": 1e-4}
WINDOWS, WIDTH = 10, 12
HELD = (2, 7)  # a fifth of ten windows, spread over them


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost 12 ms per operation where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def double(case: str) -> tuple[PreTrainedModel, ModelMap]:
    model = build(case).double()
    return model, map_model(model)


def old_factors(
    model: PreTrainedModel, layers: ModelMap, *, centred: bool = False
) -> dict[str, LowRankFactors]:
    """Factor by plain SVD; ``centred`` adds means as Bolaco has them, of invented inputs."""
    factors_by_name = {}
    for index, spec in enumerate(layers.compressible):
        module = model.get_submodule(spec.name)
        weight, bias = linear_weight(module).double(), linear_bias(module)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        center = token_ids(1, spec.in_features, seed=index)[0].double() / 100 if centred else None
        if center is not None:
            bias = weight @ center if bias is None else weight @ center + bias.double()
        tail = torch.zeros(len(values) + 1, dtype=torch.float64)
        factors = LowRankFactors(left * values, right, tail, bias, center)
        factors_by_name[spec.name] = factors.to(dtype=torch.float32)
    return factors_by_name


def allocation(
    layers: ModelMap, dense: tuple[str, ...] = (), rank: int = RANK, form: str = "factored"
) -> Allocation:
    units = layers.compressible
    options = {u.name: DENSE if u.kind in dense else Option(form, (rank,)) for u in units}
    return decided(units, options)


def metrics_of(layers: ModelMap) -> dict[str, Tensor]:
    """Draw an output metric for every layer but the keys'."""
    metrics = {}
    for index, spec in enumerate(layers.compressible):
        generator = torch.Generator().manual_seed(index)
        root = torch.randn(spec.out_features, spec.out_features, generator=generator)
        if spec.kind != "k_proj":
            metrics[spec.name] = root @ root.T / spec.out_features + 0.1 * torch.eye(len(root))
    return metrics


def inputs_of(model: PreTrainedModel, name: str, windows: Tensor) -> np.ndarray:
    """Run the whole body and return what a module reads."""
    read: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: read.append(inputs[0].flatten(0, -2))
    )
    with torch.no_grad():
        body_and_head(model)[0](windows, use_cache=False)
    handle.remove()
    (inputs,) = read
    return reference.numpy_of(inputs)


# What reads the residual stream between attention and MLP; side by side there is nothing.
BETWEEN = {"llama": "post_attention_layernorm", "qwen2": "post_attention_layernorm", "gpt2": "ln_2"}


def stream_at(model: PreTrainedModel, name: str, windows: Tensor) -> np.ndarray | None:
    """Run the whole body and return the residual stream where a layer adds to it, if it does."""
    attention, mlp = family_of(model.config.model_type).writers
    if name.endswith(attention):
        return inputs_of(model, name.removesuffix(f".{attention}"), windows)
    if not name.endswith(mlp):
        return None
    block = name.removesuffix(f".{mlp}")
    if model.config.model_type in BETWEEN:
        return inputs_of(model, f"{block}.{BETWEEN[model.config.model_type]}", windows)
    return outputs_of(model, block, windows) - outputs_of(model, name, windows)


def outputs_of(model: PreTrainedModel, name: str, windows: Tensor) -> np.ndarray:
    """Run the whole body and return what a module answers."""
    outputs: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: outputs.append(
            output[0] if type(output) is tuple else output
        )
    )
    with torch.no_grad():
        body_and_head(model)[0](windows, use_cache=False)
    handle.remove()
    (tensor,) = outputs
    return reference.numpy_of(tensor.flatten(0, -2))


@dataclasses.dataclass
class Slow:
    """What the slow refit found for a layer."""

    layer: reference.Affine
    errors: tuple[float, float, float, float]
    taken: bool


def slow_refit(
    model: PreTrainedModel,
    layers: ModelMap,
    selection: Allocation,
    old: Mapping[str, LowRankFactors],
    fitting: Tensor,
    judging: Tensor,
    settings: RefitSettings,
    metrics: Mapping[str, Tensor],
) -> dict[str, Slow]:
    """Rebuild the compressed model before every site; formulas on tokens, as printed."""
    now: dict[str, LowRankFactors] = dict(old)
    results: dict[str, Slow] = {}
    for site in layers.sites:
        rebuilt = copy.deepcopy(model)
        store_(rebuilt, selection, {k: v.to(dtype=torch.float64) for k, v in now.items()})
        rows = {
            key: tuple(
                (inputs_of(each, site, windows), stream_at(each, site, windows))
                for each in (rebuilt, model)
            )
            for key, windows in (("fit", fitting), ("judge", judging))
        }
        for spec in layers.compressible:
            if spec.site == site and spec.name in selection.compressed:
                (rank,) = selection.options[spec.name].level
                results[spec.name], now[spec.name] = slow_layer(
                    model, spec, rank, old[spec.name], rows, settings, metrics
                )
    return results


def slow_layer(
    model: PreTrainedModel,
    spec: LayerSpec,
    rank: int,
    old: LowRankFactors,
    rows: Mapping[str, tuple[tuple[np.ndarray, np.ndarray | None], ...]],
    settings: RefitSettings,
    metrics: Mapping[str, Tensor],
) -> tuple[Slow, LowRankFactors]:
    """Solve one layer with full singular value decompositions, and measure it on tokens."""
    module = model.get_submodule(spec.name)
    weight = reference.numpy_of(linear_weight(module))
    bias = linear_bias(module)
    shift = np.zeros(spec.out_features) if bias is None else reference.numpy_of(bias)
    metric = np.eye(spec.out_features)
    if spec.name in metrics:
        metric = reference.numpy_of(metrics[spec.name])

    def target(part: str) -> np.ndarray:
        (x, here), (dense, there) = rows[part]
        values = (settings.blend * dense + (1 - settings.blend) * x) @ weight.T + shift
        if here is None or there is None:
            return values
        return values + settings.feedback * (there - here)

    x, y = rows["fit"][0][0], target("fit") - shift
    restores = old.center is not None
    middle = (x.mean(0), y.mean(0)) if restores else (0 * x[0], 0 * y[0])
    x, y = x - middle[0], y - middle[1]
    second, cross = x.T @ x / len(x), y.T @ x / len(x)
    lam = settings.ridge * np.trace(second) / len(second)
    lifted = second + lam * np.eye(len(second))
    best = (cross + lam * weight) @ np.linalg.inv(lifted)
    left = np.linalg.cholesky(metric).T
    right = np.linalg.cholesky(lifted)
    solved = np.linalg.inv(left) @ reference.truncated_svd(left @ best @ right, rank)
    solved = solved @ np.linalg.inv(right)
    new = (solved, shift + middle[1] - solved @ middle[0])
    before = reference.affine_of(old.to(dtype=torch.float64).at_rank(rank), spec.in_features)

    def error(layer: reference.Affine, part: str) -> float:
        miss = target(part) - rows[part][0][0] @ layer[0].T - layer[1]
        scale = np.einsum("ti,ij,tj", target(part), metric, target(part))
        return float(np.einsum("ti,ij,tj", miss, metric, miss) / scale)

    errors = (error(before, "fit"), error(new, "fit"), error(before, "judge"), error(new, "judge"))
    taken = errors[3] < errors[2]
    slow = Slow(new if taken else before, errors, taken)
    if not taken:
        return slow, old
    u, s, vt = np.linalg.svd(new[0])
    factors = LowRankFactors(
        torch.from_numpy(u[:, :rank] * s[:rank]),
        torch.from_numpy(vt[:rank]),
        torch.zeros(rank + 1, dtype=torch.float64),
        torch.from_numpy(new[1]) if restores or bias is not None else None,
    )
    return slow, factors


def affine(factors: LowRankFactors) -> reference.Affine:
    return reference.affine_of(
        factors.to(dtype=torch.float64).at_rank(factors.max_rank), factors.right.shape[1]
    )


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not model.training


def same_bits(first: Refit, second: Refit) -> bool:
    assert first.factors.keys() == second.factors.keys()
    return first.report == second.report and all(
        torch.equal(getattr(first.factors[name], part), getattr(second.factors[name], part))
        for name in first.factors
        for part in ("left", "right", "tail")
    )
