"""Calibration for gradients leaves the model alone, copies little and refuses what is broken."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from lrbo.calibration.moments import GradientMoments
from lrbo.calibration.statistics import GRADIENT_STATISTICS, Statistic
from lrbo.errors import StatisticsError
from lrbo.models.specs import LayerSpec, ModelMap
from tests.calibration.test_gradients import gathered, same_bits
from tests.support.tiny import HIDDEN, VOCABULARY, build, token_ids

pytestmark = pytest.mark.filterwarnings("ignore::lrbo.calibration.collect.CalibrationWarning")


@pytest.mark.parametrize("case", ["llama_tied", "gpt2"])
def test_no_gradient_of_a_parameter_is_formed(case: str) -> None:
    frozen, free = build(case), build(case)
    formed: list[str] = []
    for name, parameter in free.named_parameters():
        parameter.requires_grad_()
        parameter.register_hook(lambda g, name=name: formed.append(name))
    one, other = (gathered(model, token_ids(7, 9)) for model in (frozen, free))
    assert same_bits(one, other)
    assert formed == []
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in free.parameters())
    assert all(p.grad is None for model in (frozen, free) for p in model.parameters())


def test_the_callers_gradient_mode_does_not_matter() -> None:
    model, windows = build("gpt2"), token_ids(7, 9)
    expected = gathered(model, windows)
    with torch.no_grad():
        assert same_bits(gathered(model, windows), expected)


def test_gradients_that_are_not_finite_are_refused_naming_layer_and_count() -> None:
    model, windows = build("gpt2").double(), token_ids(6, 9)
    name = "transformer.h.0.attn.c_attn"

    def spoil(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda g: g.index_fill(-1, torch.tensor([3]), torch.nan))

    model.get_submodule(name).register_forward_hook(spoil)
    message = rf"^{name}: its output_gradient holds 95 non-finite values out of 2304 after 54 tok"
    with pytest.raises(StatisticsError, match=rf"{message}.*model\.dtype"):
        gathered(model, windows)


def test_moments_of_half_precision_gradients_are_summed_in_more() -> None:
    rows, slopes = torch.full((4096, 2), 3.0), torch.full((4096, 2), 300.0)
    spec = LayerSpec("layer", "kind", 0, 2, 2, has_bias=False, site="layer")
    moments = GradientMoments(GRADIENT_STATISTICS, spec, torch.device("cpu"))
    rows, slopes = rows.unflatten(0, (8, 512)), slopes.unflatten(0, (8, 512))
    for part in range(4):
        half = slice(part * 2, (part + 1) * 2)
        moments.update(rows[half].half(), slopes[half].half())
    actual = moments.statistics("layer", 4096, 4096)
    assert actual[Statistic.OUTPUT_GRADIENT].tolist() == [[90_000.0] * 2] * 2
    assert actual[Statistic.INPUT_IMPORTANCE].tolist() == [180_000.0 * 9] * 2
    assert actual[Statistic.WEIGHT_GRADIENT].tolist() == [[900.0] * 2] * 2


def test_layers_of_the_map_are_those_that_get_gradients(
    model: PreTrainedModel, layers: ModelMap
) -> None:
    actual = gathered(model, token_ids(6, 12))
    assert set(actual) == {spec.name for spec in layers.compressible}


class Copies(TorchDispatchMode):
    """Writes down the size of the largest tensor that an operation makes room for."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [*args, *(kwargs or {}).values()]
        given = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
        # What `empty` makes is not counted here: `Scratch` does, and keeps to its limit.
        made = isinstance(result, Tensor) and func is not torch.ops.aten.empty.memory_format
        if made and result.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("labels", ["data", "sampled"])
def test_hidden_states_are_copied_a_batch_at_a_time(labels: str) -> None:
    model, windows = build("gpt2"), token_ids(20, 24)
    with Copies() as copies:
        gathered(model, windows, labels=labels, batch_windows=1, gradient_share=0.5)
    batch, selected = 24, 10 * 24
    assert batch * VOCABULARY <= copies.largest < selected * HIDDEN


def test_windows_without_a_next_token_are_refused_and_may_have_sampled_labels() -> None:
    model, windows = build("gpt2"), token_ids(5, 1)
    with pytest.raises(StatisticsError, match=r"^5 windows of 1 tokens .*labels=sampled"):
        gathered(model, windows, labels="data")
    assert gathered(model, windows, labels="sampled")
