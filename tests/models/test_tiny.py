"""The tiny model follows from its seed, and its tokenizer takes every byte."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lrbo.models.loading import load_model, load_skeleton, load_tokenizer
from lrbo.models.sources import ModelSource
from lrbo.models.tiny import byte_tokenizer, tiny_model

CPU = torch.device("cpu")
TINY = ModelSource("tiny", "tiny")
BYTES = byte_tokenizer()


def test_the_tiny_model_follows_from_its_seed() -> None:
    one, two, other = tiny_model(), tiny_model(), tiny_model(seed=1)
    pairs = list(zip(one.parameters(), two.parameters(), strict=True))
    assert len(pairs) > 10
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_making_the_tiny_model_leaves_the_random_state_as_it_was() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    tiny_model(seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_tiny_model_is_ready_for_inference() -> None:
    model = load_model(TINY, dtype=torch.bfloat16, device=CPU)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert load_model(TINY, dtype=None, device=CPU).dtype == torch.float32


@given(st.text())
def test_any_text_is_one_token_per_byte_and_comes_back(text: str) -> None:
    ids = BYTES(text, add_special_tokens=False).input_ids
    assert BYTES.decode(ids, clean_up_tokenization_spaces=False) == text
    if "<s>" not in text and "</s>" not in text:
        assert len(ids) == len(text.encode())


def test_every_byte_has_its_own_token() -> None:
    text = "".join(chr(code) for code in range(0x800))  # their UTF-8 has every lead byte of two
    tokens = set(BYTES(text, add_special_tokens=False).input_ids)
    tokens |= set(BYTES("\U0010ffff \U00040000 \uffff\u0800", add_special_tokens=False).input_ids)
    assert tokens <= set(range(256))
    assert len(tokens) > 190
    assert len(BYTES) == 258
    assert (BYTES.bos_token_id, BYTES.eos_token_id) == (256, 257)


def test_the_tokenizer_of_the_tiny_model_fits_its_vocabulary() -> None:
    tokenizer = load_tokenizer(TINY)
    model = load_skeleton(TINY)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id
