"""The parts of a model that a budget covers, and what to write where there is no such part."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrbo.errors import ModelError
from lrbo.models.model_map import is_tied, map_model
from tests.support.tiny import CASES, HIDDEN, build


@pytest.mark.parametrize("case", CASES)
def test_a_budget_covers_the_parts_that_it_includes(case: str) -> None:
    model = build(case)
    layers = map_model(model)
    assert {spec.part for spec in layers.compressible} == {"blocks"}
    covered = layers.covering(["blocks", "embedding"])
    assert {spec.part for spec in covered.compressible} == {"blocks", "embedding"}
    if is_tied(model):
        expected = "head of this model, lm_head, is tied .* write embedding, which is both"
        with pytest.raises(ModelError, match=expected):
            layers.covering(["blocks", "head"])
    else:
        both = layers.covering(["blocks", "embedding", "head"])
        assert both.compressible == layers.layers


def test_an_embedding_behind_a_projection_is_refused() -> None:
    config = copy.deepcopy(CASES["opt"])
    config.word_embed_proj_dim = HIDDEN // 2
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = map_model(model)
    with pytest.raises(ModelError, match="no table of rows of the 16 features that its"):
        layers.covering(["blocks", "embedding"])
