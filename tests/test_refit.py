"""The sequential refit against one that rebuilds the whole model after every site."""

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrbo.allocation import Allocation, Budget
from lrbo.blockwise import BlockwiseBody
from lrbo.compression import compress_
from lrbo.errors import DataError, StatisticsError
from lrbo.linalg import JitterWarning
from lrbo.model import LayerSpec, ModelMap, body_and_head, linear_bias, linear_weight, map_model
from lrbo.nested import LowRankFactors
from lrbo.refit import FewTokensWarning, Refit, RefitSettings, refit
from tests import reference
from tests.tiny import CASES, build, token_ids

RANK = 4
# Models are in float64 here. Factors are rounded to float32 once, at the end of each layer, and
# what is downstream of them amplifies that.
ROUNDED = {"rtol": 1e-4, "atol": 1e-4}
WINDOWS, WIDTH = 10, 12
HELD = (2, 7)  # a fifth of ten windows, spread over them

families = pytest.mark.parametrize(
    ("case", "centred"),
    [
        ("llama_biased", False),
        ("llama_biased", True),
        ("gpt2", True),  # Conv1D
        ("qwen2", False),  # grouped queries, biases on q, k, v alone
        ("phi", False),  # attention and MLP read the same
        ("gpt_neox", False),
    ],
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
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
    found = {}
    for place, spec in enumerate(layers.compressible):
        module = model.get_submodule(spec.name)
        weight, bias = linear_weight(module).double(), linear_bias(module)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        center = token_ids(1, spec.in_features, seed=place)[0].double() / 100 if centred else None
        if center is not None:
            bias = weight @ center if bias is None else weight @ center + bias.double()
        tail = torch.zeros(len(values) + 1, dtype=torch.float64)
        factors = LowRankFactors(left * values, right, tail, bias, center)
        found[spec.name] = factors.to(dtype=torch.float32)
    return found


def allocation(layers: ModelMap, dense: tuple[str, ...] = (), rank: int = RANK) -> Allocation:
    ranks = {s.name: None if s.kind in dense else rank for s in layers.compressible}
    return Allocation(ranks, 0, Budget(0))


def metrics_of(layers: ModelMap) -> dict[str, Tensor]:
    """Draw an output metric for every layer but the keys'."""
    found = {}
    for place, spec in enumerate(layers.compressible):
        generator = torch.Generator().manual_seed(place)
        root = torch.randn(spec.out_features, spec.out_features, generator=generator)
        if spec.kind != "k_proj":
            found[spec.name] = root @ root.T / spec.out_features + 0.1 * torch.eye(len(root))
    return found


def inputs_of(model: PreTrainedModel, name: str, windows: Tensor) -> np.ndarray:
    """Run the whole body and return what a module reads."""
    read: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: read.append(inputs[0].flatten(0, 1))
    )
    with torch.no_grad():
        body_and_head(model)[0](windows, use_cache=False)
    handle.remove()
    (inputs,) = read
    return reference.numpy_of(inputs)


@dataclasses.dataclass
class Slow:
    """What the slow refit found for a layer."""

    layer: reference.Affine
    errors: tuple[float, float, float, float]
    taken: bool


def slow_refit(
    model: PreTrainedModel,
    layers: ModelMap,
    chosen: Allocation,
    old: Mapping[str, LowRankFactors],
    fitting: Tensor,
    judging: Tensor,
    settings: RefitSettings,
    metrics: Mapping[str, Tensor],
) -> dict[str, Slow]:
    """Rebuild the compressed model before every site; formulas on tokens, as printed."""
    now: dict[str, LowRankFactors] = dict(old)
    found: dict[str, Slow] = {}
    for site in layers.sites:
        rebuilt = copy.deepcopy(model)
        compress_(rebuilt, chosen, {k: v.to(dtype=torch.float64) for k, v in now.items()})
        rows = {
            key: (inputs_of(rebuilt, site, windows), inputs_of(model, site, windows))
            for key, windows in (("fit", fitting), ("judge", judging))
        }
        for spec in layers.compressible:
            if spec.site == site and chosen.ranks[spec.name] is not None:
                found[spec.name], now[spec.name] = slow_layer(
                    model, spec, chosen.ranks[spec.name], old[spec.name], rows, settings, metrics
                )
    return found


def slow_layer(
    model: PreTrainedModel,
    spec: LayerSpec,
    rank: int,
    old: LowRankFactors,
    rows: Mapping[str, tuple[np.ndarray, np.ndarray]],
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
        x, dense = rows[part]
        return (settings.blend * dense + (1 - settings.blend) * x) @ weight.T + shift

    x, y = rows["fit"][0], target("fit") - shift
    restores = settings.centred and old.center is not None
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
        miss = target(part) - rows[part][0] @ layer[0].T - layer[1]
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


@families
def test_each_site_reads_what_the_model_refit_so_far_gives_it(case: str, centred: bool) -> None:
    model, layers = double(case)
    before = snapshot(model)
    old = old_factors(model, layers, centred=centred)
    chosen = allocation(layers, dense=("k_proj", "c_fc"))
    windows, metrics = token_ids(WINDOWS, WIDTH), metrics_of(layers)
    settings = RefitSettings(blend=0.75, ridge=1e-2, held_back=0.2, batch_windows=3)
    named: list[str] = []
    found = refit(
        model, layers, chosen, old, windows, settings, metrics=metrics, on_layer=named.append
    )
    rest = [i for i in range(WINDOWS) if i not in HELD]
    slow = slow_refit(
        model, layers, chosen, old, windows[rest], windows[list(HELD)], settings, metrics
    )
    assert list(found.factors) == named == [row.name for row in found.report] == list(slow)
    assert len(slow) >= 6
    for row in found.report:
        expected, factors = slow[row.name], found.factors[row.name]
        assert (row.rank, row.taken) == (RANK, expected.taken)
        got = (row.fitted_before, row.fitted_after, row.held_back_before, row.held_back_after)
        assert got == pytest.approx(expected.errors, rel=1e-3, abs=1e-9)
        for mine, theirs in zip(affine(factors), expected.layer, strict=True):
            np.testing.assert_allclose(mine, theirs, **ROUNDED)
        assert factors.max_rank == RANK
        assert factors.left.dtype == factors.right.dtype == torch.float32
        has_bias = layers.by_name[row.name].has_bias or centred
        assert (factors.offset is not None, factors.center is not None) == (has_bias, centred)
    assert {row.taken for row in found.report} >= {True}
    assert_untouched(model, before)


def test_with_everything_upstream_dense_it_is_the_whitened_svd() -> None:
    model, layers = double("llama_untied")
    windows = token_ids(WINDOWS, WIDTH)
    settings = RefitSettings(ridge=0.0, held_back=0.0, blend=1.0)
    site = layers.sites[0]
    found = refit(model, layers, allocation(layers), old_factors(model, layers), windows, settings)
    x = inputs_of(model, site, windows)
    members = [spec for spec in layers.compressible if spec.site == site]
    assert len(members) == 3
    for spec in members:
        weight = reference.numpy_of(linear_weight(model.get_submodule(spec.name)))
        expected = reference.whitened_svd(weight, x.T @ x / len(x), RANK)
        np.testing.assert_allclose(affine(found.factors[spec.name])[0], expected, **ROUNDED)


def test_behind_a_compressed_layer_the_full_rank_answer_is_least_squares() -> None:
    """Of the layers behind them only the compressed values are not as in the dense model."""
    model, layers = double("gpt2")
    ranks = {spec.name: None for spec in layers.compressible}
    first, second = (f"transformer.h.0.attn.{kind}" for kind in ("c_attn", "c_proj"))
    ranks |= {first: RANK, second: 16}
    windows = token_ids(WINDOWS, WIDTH)
    settings = RefitSettings(ridge=0.0, held_back=0.0, blend=1.0)
    found = refit(
        model,
        layers,
        Allocation(ranks, 0, Budget(0)),
        old_factors(model, layers),
        windows,
        settings,
    )
    assert set(found.factors) == {first, second}
    dense = inputs_of(model, second, windows)
    wide = {name: factors.to(dtype=torch.float64) for name, factors in found.factors.items()}
    compress_(model, Allocation(ranks, 0, Budget(0)), wide)
    x = inputs_of(model, second, windows)
    weight = reference.numpy_of(linear_weight(build("gpt2").get_submodule(second)))
    expected = np.linalg.lstsq(x, dense @ weight.T, rcond=None)[0].T
    assert np.abs(expected - weight).max() > 0.1  # there is something to mend
    np.testing.assert_allclose(affine(found.factors[second])[0], expected, **ROUNDED)


def test_with_few_tokens_some_layers_keep_what_they_had() -> None:
    model, layers = double("llama_untied")
    old = old_factors(model, layers)
    with pytest.warns(FewTokensWarning) as caught, pytest.warns(JitterWarning):
        found = refit(
            model, layers, allocation(layers), old, token_ids(3, 5), RefitSettings(ridge=0.0)
        )
    kinds = [str(w.message) for w in caught if w.category is FewTokensWarning]
    assert len(kinds) == 4  # once per site, however many blocks
    assert "10 tokens for the 16 features that q_proj reads" in kinds[0]
    assert {row.taken for row in found.report} == {True, False}
    for row in found.report:
        assert row.held_back_before is not None
        assert row.held_back_after is not None
        assert row.taken == (row.held_back_after < row.held_back_before)
        if not row.taken:
            assert torch.equal(found.factors[row.name].left, old[row.name].left[:, :RANK])
            assert torch.equal(found.factors[row.name].right, old[row.name].right[:RANK])


def test_without_windows_held_back_every_layer_is_taken() -> None:
    model, layers = double("llama_untied")
    settings = RefitSettings(held_back=0.0)
    old = old_factors(model, layers)
    found = refit(model, layers, allocation(layers), old, token_ids(6, 12), settings)
    assert len(found.report) == len(layers.compressible)
    for row in found.report:
        assert row.taken
        assert row.held_back_before is row.held_back_after is None
        assert row.fitted_after < row.fitted_before


def test_windows_to_judge_by_may_be_given() -> None:
    model, layers = build("qwen2"), map_model(build("qwen2"))
    given = (model, layers, allocation(layers), old_factors(model, layers))
    windows = token_ids(WINDOWS, WIDTH)
    rest = [place for place in range(WINDOWS) if place not in HELD]
    settings = RefitSettings(held_back=0.2)
    first = refit(*given, windows, settings)
    assert same_bits(first, refit(*given, windows[rest], settings, judging=windows[list(HELD)]))
    with pytest.raises(DataError, match=r"windows of 12 tokens to solve from and of 7 to judge"):
        refit(*given, windows, judging=windows[:, :7])


def test_batches_and_files_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, layers = build("qwen2"), map_model(build("qwen2"))
    given = (model, layers, allocation(layers), old_factors(model, layers), token_ids(9, WIDTH))
    first = refit(*given, RefitSettings())
    used: list[list[Path]] = []
    second = refit(
        *given,
        RefitSettings(memory_bytes=10_000),
        on_layer=lambda name: used.append(list(tmp_path.rglob("*"))),
    )
    assert same_bits(first, second)
    assert len(used[0]) >= 2  # a folder with something in it
    assert not list(tmp_path.iterdir())
    for batch_windows in (1, 100):
        other = refit(*given, RefitSettings(batch_windows=batch_windows))
        for row, same in zip(first.report, other.report, strict=True):
            assert row.fitted_after == pytest.approx(same.fitted_after, rel=1e-3)


def test_the_same_call_gives_the_same_bits() -> None:
    model, layers = build("llama_biased"), map_model(build("llama_biased"))
    old = old_factors(model, layers, centred=True)
    given = (model, layers, allocation(layers), old, token_ids(9, WIDTH))
    assert same_bits(refit(*given), refit(*given))


def test_an_interrupted_refit_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, layers = build("llama_untied"), map_model(build("llama_untied"))
    before, modules = snapshot(model), list(model.modules())
    stop_at = layers.compressible[9].name  # in the middle of the second block

    def stop(name: str) -> None:
        if name == stop_at:
            raise KeyboardInterrupt

    settings = RefitSettings(memory_bytes=0)
    old = old_factors(model, layers)
    with pytest.raises(KeyboardInterrupt):
        refit(model, layers, allocation(layers), old, token_ids(9, 12), settings, on_layer=stop)
    assert_untouched(model, before)
    assert all(was is now for was, now in zip(modules, model.modules(), strict=True))
    assert not list(tmp_path.iterdir())


def test_one_block_of_weights_at_a_time_is_enough() -> None:
    whole = build("llama_untied")
    layers, model = map_model(whole), build("llama_untied")
    old, windows = old_factors(whole, layers), token_ids(9, WIDTH)
    blocks = model.model.layers

    @contextmanager
    def open_block(index: int) -> Iterator[nn.Module]:
        blocks[index].load_state_dict(whole.model.layers[index].state_dict(), assign=True)
        yield blocks[index]
        blocks[index].to("meta")

    blocks.to("meta")
    body = BlockwiseBody(model, open_block)
    found = refit(model, layers, allocation(layers), old, windows, body=body)
    assert same_bits(found, refit(whole, layers, allocation(layers), old, windows))


@pytest.mark.parametrize("case", CASES)
def test_every_family_is_refit_in_half_precision(case: str) -> None:
    model = build(case).bfloat16()
    layers = map_model(model)
    old = old_factors(model, layers)
    found = refit(model, layers, allocation(layers), old, token_ids(9, WIDTH))
    assert set(found.factors) == {spec.name for spec in layers.compressible}
    assert all(f.left.dtype == torch.float32 for f in found.factors.values())
    assert sum(row.taken for row in found.report) >= len(found.report) // 2
    assert next(model.parameters()).dtype == torch.bfloat16


def test_nothing_compressed_is_nothing_to_do() -> None:
    model, layers = build("opt"), map_model(build("opt"))
    dense = Allocation({spec.name: None for spec in layers.compressible}, 0, Budget(0))
    assert refit(model, layers, dense, {}, token_ids(1, 4)) == Refit({}, ())


def test_what_cannot_be_refit_is_refused() -> None:
    model, layers = build("llama_untied"), map_model(build("llama_untied"))
    old, windows = old_factors(model, layers), token_ids(9, WIDTH)
    chosen = allocation(layers)
    name = layers.compressible[0].name
    with pytest.raises(KeyError, match=r"1 of 14 layers with a rank have no factors: .*q_proj"):
        refit(model, layers, chosen, {k: v for k, v in old.items() if k != name}, windows)
    other = Allocation({"lm_head": 3}, 0, Budget(0))
    with pytest.raises(KeyError, match=r"are in no block of the model: lm_head"):
        refit(model, layers, other, old, windows)
    with pytest.raises(ValueError, match=r"k_proj: rank 12 is chosen and its factors end at 8"):
        refit(model, layers, allocation(layers, rank=12), old, windows)
    with pytest.raises(DataError, match=r"has 1 windows and holds 1 back"):
        refit(model, layers, chosen, old, windows[:1])


def test_an_overflow_names_the_site() -> None:
    model, layers = build("llama_untied"), map_model(build("llama_untied"))
    before = snapshot(model)
    old = old_factors(model, layers)
    name = "model.layers.1.mlp.gate_proj"
    old[name].left[3, 2] = torch.inf
    with pytest.raises(StatisticsError, match=r"block 1: input of mlp.down_proj and its drift"):
        refit(model, layers, allocation(layers, dense=("up_proj",)), old, token_ids(9, WIDTH))
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blend": 1.5}, r"blend=1.5 is outside \[0, 1\]"),
        ({"ridge": -1.0}, r"ridge=-1.0 is negative"),
        ({"held_back": 1.0}, r"held_back=1.0 is outside \[0, 1\)"),
        ({"batch_windows": 0}, r"batch_windows=0 is below 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RefitSettings(**settings)
