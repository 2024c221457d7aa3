"""A rotated model gives the same outputs from other weights."""

import torch

from lrbo.models.rotation import rotated_
from tests.support.tiny import build


def test_outputs_are_those_of_before() -> None:
    model = build("llama_tied").double()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        before = model(ids).logits
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        scales = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
        for scale in scales:  # all ones in a fresh model
            scale.weight.copy_(torch.rand_like(scale.weight) + 0.5)
        before = model(ids).logits
        after = rotated_(model)(ids).logits
    assert float((after - before).abs().max()) < 1e-5 * float(
        before.abs().max()
    )  # of norms, in float32
    assert not model.config.tie_word_embeddings
    changed = [n for n, p in model.named_parameters() if n in weights and p.dim() == 2]
    assert changed
    assert not any(torch.allclose(model.get_parameter(n), weights[n]) for n in changed)
    assert all(bool((scale.weight == 1).all()) for scale in scales)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_the_basis_is_that_of_the_seed() -> None:
    one, same, other = (rotated_(build("llama_tied"), seed) for seed in (0, 0, 1))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(one.get_parameter(name), same.get_parameter(name))
    assert not torch.allclose(one.get_parameter(name), other.get_parameter(name))
