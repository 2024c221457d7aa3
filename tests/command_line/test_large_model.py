"""A model read block by block is the model read whole."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from experiments.large_model.lazy import LazyModel, compress_mapped
from lrbo.calibration.collect import Calibration, CalibrationSettings, calibrate
from lrbo.calibration.statistics import Statistic
from lrbo.checkpoints.export import WEIGHTS
from lrbo.factorization.cache import factor_model
from lrbo.factorization.registry import METHODS
from lrbo.models.blockwise import BlockwiseBody
from lrbo.models.headers import INDEX
from lrbo.models.model_map import body_and_head, map_model
from tests.checkpoints.test_export import Compressed, Forms, every_form
from tests.support.tiny import CASES, build, token_ids

# Same weights; where a file's tensors lie in memory decides how products are split and rounded.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}

every_family = pytest.mark.parametrize("case", CASES)


def saved(case: str, folder: Path, **options: object) -> Path:
    """Write a tiny model as a checkpoint."""
    build(case).save_pretrained(folder, **options)
    return folder


def on_meta(lazy: LazyModel) -> set[bool]:
    """Return whether parameters of blocks are on the meta device."""
    blocks = lazy.model.get_submodule(lazy._path)
    return {parameter.is_meta for parameter in blocks.parameters()}


@every_family
def test_blocks_opened_one_by_one_give_the_same_hidden_states(case: str, tmp_path: Path) -> None:
    lazy = LazyModel(saved(case, tmp_path / case))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / case)
    ids = token_ids(2, 9)
    body = BlockwiseBody(lazy.model, lazy.open_block)
    with torch.no_grad():
        hidden = body.embed(ids)
        for index in range(len(body)):
            assert on_meta(lazy) == {True}
            with body.open_block(index) as block:
                assert False in on_meta(lazy)
                hidden = body.run(block, index, hidden)
        finished = body.finish(hidden)
        expected = body_and_head(whole)[0](ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(finished, expected, **ROUNDING)
        logits = body_and_head(lazy.model)[1](finished)
        torch.testing.assert_close(logits, body_and_head(whole)[1](expected), **ROUNDING)
    assert on_meta(lazy) == {True}


@pytest.mark.parametrize("case", ["llama_tied", "gpt2", "qwen2"])
def test_statistics_and_factors_are_those_of_the_whole_model(case: str, tmp_path: Path) -> None:
    folder = saved(case, tmp_path / case, max_shard_size="4KB")
    assert (folder / INDEX).is_file()  # so there are shards
    lazy = LazyModel(folder)
    whole = build(case)
    layers = map_model(whole)
    assert map_model(lazy.model) == layers
    ids, settings = token_ids(12, 12), CalibrationSettings(groups=2)
    method = METHODS["loss_aware"]
    results = []
    for model, opener in ((whole, None), (lazy.model, lazy.open_block)):
        body = BlockwiseBody(model, opener)
        calibration = Calibration.gather(calibrate(body, layers, ids, set(Statistic), settings))
        parts = factor_model(model, layers, method, calibration, open_block=opener)
        results.append({name: f for part in parts for name, f in part.items()})
    one, two = results
    assert one.keys() == two.keys() == {spec.name for spec in layers.compressible}
    for name, factors in one.items():
        torch.testing.assert_close(factors.loss, two[name].loss, rtol=1e-3, atol=1e-6)
        rank = factors.max_rank  # as maps: directions of equal energy may turn
        product = factors.left @ factors.right
        torch.testing.assert_close(product, two[name].left @ two[name].right, rtol=0.0, atol=1e-4)
        assert two[name].max_rank == rank


def test_of_two_forms_in_a_folder_it_reads_the_one_that_transformers_reads(tmp_path: Path) -> None:
    """It took the index first, and wrote a checkpoint of other weights than were evaluated."""
    saved("llama_untied", tmp_path / "shards", max_shard_size="4KB")
    other = build("llama_untied")
    with torch.no_grad():
        other.model.norm.weight.fill_(0.5)
    other.save_pretrained(tmp_path / "both")
    for file in (tmp_path / "shards").glob("model*"):
        file.rename(tmp_path / "both" / file.name)
    assert (tmp_path / "both" / INDEX).is_file()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    lazy = LazyModel(tmp_path / "both")
    assert torch.equal(lazy.model.model.norm.weight, whole.model.norm.weight)


def test_a_block_is_gone_after_an_error_too(tmp_path: Path) -> None:
    lazy = LazyModel(saved("llama_untied", tmp_path / "model"))
    with pytest.raises(KeyboardInterrupt), lazy.open_block(1):
        raise KeyboardInterrupt
    assert on_meta(lazy) == {True}


def test_weights_come_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    lazy = LazyModel(saved("llama_untied", tmp_path / "model"), dtype=torch.bfloat16)
    with lazy.open_block(0) as block:
        assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}
    assert lazy.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert lazy.model.model.rotary_emb.inv_freq.dtype == torch.float32  # never rounded


@every_form
def test_a_mapped_checkpoint_is_the_one_of_the_whole_model(
    case: str, forms: Forms, tmp_path: Path
) -> None:
    saved(case, tmp_path / "dense")
    compressed = Compressed(case, forms=forms)
    compressed.save(tmp_path / "whole")
    lazy = LazyModel(tmp_path / "dense")
    compressed.model = compress_mapped(
        lazy, compressed.allocation, compressed.prepared, tmp_path / "layers"
    )
    compressed.save(tmp_path / "mapped")
    mine, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("mapped", "whole"))
    assert mine.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(mine[name], tensor), name
    assert (tmp_path / "mapped" / "config.json").read_bytes() == (
        tmp_path / "whole" / "config.json"
    ).read_bytes()
