"""The digest of a model changes with any of its parameters, and with nothing else."""

import pytest
import torch

from lrbo.models.parameters import fingerprint
from lrbo.models.tiny import tiny_model
from tests.support.tiny import build


@pytest.mark.parametrize("index", [0, -1])
def test_fingerprint_changes_with_any_one_tensor(index: int) -> None:
    model = tiny_model()  # its embedding is larger than the sample that is hashed
    assert max(parameter.numel() for parameter in model.parameters()) > 2 * 4096
    whole = fingerprint(model)
    assert fingerprint(tiny_model()) == whole
    fingerprints = {whole}
    for parameter in model.parameters():
        flat = parameter.detach().view(-1)
        original = flat[index].item()
        flat[index] += 1.0
        fingerprints.add(fingerprint(model))
        flat[index] = original
    assert len(fingerprints) == 1 + len(list(model.parameters()))
    assert fingerprint(model) == whole


def test_fingerprint_sees_a_change_anywhere_in_a_large_tensor() -> None:
    model = tiny_model()
    whole = fingerprint(model)
    flat = model.lm_head.weight.detach().view(-1)
    for start in range(0, flat.numel() - 64, 64):  # 1/129 of it, as a fine-tuned row would be
        flat[start : start + 64] += 1.0
        assert fingerprint(model) != whole, start
        flat[start : start + 64] -= 1.0


def test_fingerprint_does_not_know_the_name_of_a_dtype() -> None:
    rounded = build("qwen2").to(torch.bfloat16)
    in_bfloat16 = fingerprint(rounded)
    rounded.config.dtype = "bfloat16"
    rounded.config._name_or_path = "elsewhere"
    assert fingerprint(rounded) == in_bfloat16
    assert fingerprint(rounded.float()) == in_bfloat16  # the same values in float32
    assert fingerprint(build("qwen2")) != in_bfloat16  # values that rounding changed


def test_fingerprint_knows_the_architecture() -> None:
    one, other = build("llama_untied"), build("llama_untied")
    other.config.rms_norm_eps *= 2
    assert fingerprint(one) != fingerprint(other)
