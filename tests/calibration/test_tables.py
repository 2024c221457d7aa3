"""What is gathered of embedding and head equals counting, autograd and the labels' variance."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from lrbo.calibration.collect import Calibration, CalibrationSettings, calibrate
from lrbo.calibration.moments import TokenCounts
from lrbo.calibration.statistics import HEAD_STATISTICS, LOOKUP_STATISTICS, Statistic
from lrbo.factorization.tables import TableMetric
from lrbo.models.blockwise import BlockwiseBody
from lrbo.models.model_map import map_model
from lrbo.models.specs import LayerSpec
from tests.support.tiny import VOCABULARY, build, token_ids

pytestmark = pytest.mark.filterwarnings("ignore::lrbo.calibration.collect.CalibrationWarning")
WINDOWS = token_ids(6, 9)
NEEDS = LOOKUP_STATISTICS | HEAD_STATISTICS
SETTINGS = CalibrationSettings(gradient_share=1.0, labels="data", batch_windows=4)


def gathered(
    model: PreTrainedModel, windows: Tensor, settings: CalibrationSettings = SETTINGS
) -> tuple[list[LayerSpec], Calibration]:
    layers = map_model(model)
    layers = layers.covering(list(dict.fromkeys(spec.part for spec in layers.layers)))
    parts = calibrate(BlockwiseBody(model), layers, windows, NEEDS, settings)
    return [s for s in layers.layers if s.block is None], Calibration.gather(parts)


@pytest.mark.parametrize("case", ["llama_tied", "llama_untied", "gpt2", "opt", "phi"])
def test_statistics_are_those_of_the_whole_model(case: str) -> None:
    model = build(case).double()
    ends, calibration = gathered(model, WINDOWS)
    kept: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        value.retain_grad()
        kept[name] = value

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.requires_grad_(True)
    hooks = [
        embedding.register_forward_hook(lambda *a: keep("rows", a[-1])),
        head.register_forward_hook(lambda *a: keep("hidden", a[1][0])),
    ]
    logits = model(WINDOWS).logits
    functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten(), reduction="sum"
    ).backward()
    for hook in hooks:
        hook.remove()
    count, scored = WINDOWS.numel(), WINDOWS[:, 1:].numel()
    gradient = kept["rows"].grad.flatten(0, 1)
    hidden = kept["hidden"].detach().flatten(0, 1)
    shares = logits.detach().flatten(0, 1).softmax(-1)
    lookup, last = calibration.of(ends[0]), calibration.of(ends[-1])
    expected = {
        Statistic.ROW_GRADIENT: gradient.T @ gradient / scored,
        Statistic.INPUT_MEAN: hidden.mean(0),
        Statistic.INPUT_COVARIANCE: torch.cov(hidden.T, correction=0),
        Statistic.LABEL_VARIANCE: (shares - shares.square()).mean(0),
    }
    for statistic, value in expected.items():
        actual = (lookup if statistic is Statistic.ROW_GRADIENT else last)[statistic]
        assert float((actual - value).abs().max()) <= 1e-5 * float(value.abs().max()), statistic
    counts = torch.bincount(WINDOWS.flatten(), minlength=VOCABULARY)
    seen = lookup[Statistic.TOKEN_FREQUENCY]
    assert torch.equal(last[Statistic.TOKEN_FREQUENCY], seen)  # labels are tokens
    assert float(seen.sum()) == pytest.approx(1.0)
    windows = torch.stack([torch.bincount(w, minlength=VOCABULARY) > 0 for w in WINDOWS]).sum(0)
    once = int(counts[windows == 1].sum()) / count
    torch.testing.assert_close(seen, (1 - once) * counts.double() / count + once / VOCABULARY)


@pytest.mark.parametrize(
    ("windows", "alone"),
    [([[0, 0, 0, 1, 1], [1, 2, 2, 3, 3]], 7 / 10), ([[0, 1, 1]], 1 / 3)],
)
def test_unseen_tokens_have_the_share_of_those_in_one_window(
    windows: list[list[int]], alone: float
) -> None:
    """Where there is but one window, of those that it has once."""
    counts, ids = TokenCounts(8), torch.tensor(windows)
    for batch in ids.split(1):
        counts.update(batch)
    shares = counts.statistics("embedding", ids.numel())[Statistic.TOKEN_FREQUENCY]
    assert float(shares.sum()) == pytest.approx(1.0)
    flat = ids.flatten().tolist()
    expected = [(1 - alone) * flat.count(token) / len(flat) + alone / 8 for token in range(8)]
    assert shares.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("role", ["lookup", "head"])
def test_a_small_change_costs_what_is_predicted(role: str) -> None:
    """In divergence from the dense model, on average over changes like those of rounding."""
    model, step = build("llama_untied").double(), 1e-3
    windows = token_ids(40, 16)
    settings = CalibrationSettings(gradient_share=1.0)
    ends, calibration = gathered(model, windows, settings)
    spec = ends[0] if role == "lookup" else ends[-1]
    metric = TableMetric.of(spec, calibration.of(spec), torch.device("cpu"))
    module: nn.Module = model.get_submodule(spec.name)
    dense = module.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    predicted = measured = 0.0
    with torch.no_grad():
        before = model(windows).logits.log_softmax(-1)
        for _ in range(4):
            change = step * torch.randn(dense.shape, generator=generator, dtype=torch.float64)
            predicted += float(metric.factor(change, None, 1).loss[0])
            module.weight.copy_(dense + change)
            after = model(windows).logits.log_softmax(-1)
            measured += float((before.exp() * (before - after)).sum(-1).mean())
    assert measured == pytest.approx(predicted, rel=0.25)
