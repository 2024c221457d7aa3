"""What is lost of a fine-tuning at equal bytes of its change: rank, bands of bits, signs.

    python experiments/delta/run.py [--model NAME_OR_FOLDER]

Makes a pair: a small Llama over bytes that is trained on web text from scratch, or any model, and
the same after 200 steps on Wikipedia, of which the linear layers of the blocks are trained. Then it
compresses the change, and scores the results on Wikipedia that was not trained on.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import lrbo
from lrbo.data.documents import documents
from lrbo.factorization.options import BaseOptions
from lrbo.models.loading import load_model, load_tokenizer
from lrbo.models.model_map import map_model
from lrbo.models.pairs import base_source
from lrbo.models.tiny import byte_tokenizer

SMOKE = bool(os.environ.get("LRBO_SMOKE"))
SOURCE = "generated" if SMOKE else "packaged"
WINDOW, BATCH = (32, 4) if SMOKE else (128, 8)
TRAINING, TUNING = (4, 3) if SMOKE else (600, 200)  # steps
CALIBRATION, TEST = (8, 4) if SMOKE else (256, 128)  # windows
KEPT = (1 / 8, 1 / 16, 1 / 32)
BANDS = BaseOptions(bands=((2, 32), (8, 64), (0, 0)))
COME = (2, 32)  # Delta-CoMe's bands
METHODS = ("svd", "loss_aware")
RATE = 1e-3


def windows_of(name: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return a text as windows of tokens."""
    most = (TRAINING * BATCH + TEST + CALIBRATION) * WINDOW
    ids: list[int] = []
    for document in documents(SOURCE, name):
        ids += tokenizer(document, add_special_tokens=False).input_ids
        if len(ids) > most:
            break
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


def train_(model: PreTrainedModel, ids: Tensor, steps: int, rate: float) -> None:
    """Train what has gradients on windows in turn."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(ids)
        optimizer.zero_grad()
        model(ids[rows], labels=ids[rows]).loss.backward()
        optimizer.step()


def pair(name: str | None) -> tuple[PreTrainedModel, PreTrainedModel, Tensor, Tensor]:
    """Return base, fine-tuned model, and windows that it was trained on and was not."""
    torch.manual_seed(0)
    if name is None:
        size = 32 if SMOKE else 128
        config = LlamaConfig(
            vocab_size=258, hidden_size=size, intermediate_size=2 * size, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=WINDOW,
            bos_token_id=256, eos_token_id=257,
        )  # fmt: skip
        base, tokenizer = LlamaForCausalLM(config), byte_tokenizer()
        train_(base, windows_of("c4", tokenizer), TRAINING, RATE)
    else:
        source = base_source(name)
        base = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
        tokenizer = load_tokenizer(source)
    ids = windows_of("wiki", tokenizer)
    model = copy.deepcopy(base).requires_grad_(False)
    for spec in map_model(model).compressible:
        model.get_submodule(spec.name).weight.requires_grad_()
    train_(model, ids[TEST:], TUNING, RATE if name is None else RATE / 10)
    base, model = (each.to(torch.bfloat16).eval().requires_grad_(False) for each in (base, model))
    return base, model, ids[TEST:], ids[:TEST]


def signs(base: PreTrainedModel, model: PreTrainedModel) -> tuple[PreTrainedModel, int]:
    """Return the base with the sign of every change times its mean size, and bytes of that.

    Liu et al., *BitDelta*, NeurIPS 2024, before the scales are trained.
    """
    result, size = copy.deepcopy(base), 0
    for spec in map_model(model).compressible:
        own, other = (each.get_submodule(spec.name).weight for each in (result, model))
        change = other.float() - own.float()
        own.copy_(own.float() + change.abs().mean() * change.sign())
        size += change.numel() // 8 + 2
    return result, size


def compressed(
    base: PreTrainedModel, model: PreTrainedModel, ids: Tensor
) -> Iterator[tuple[str, lrbo.Factorization, tuple[str, ...], bool]]:
    """Yield what is compared: a name, factors, forms, and whether layers get the least loss."""
    calibration = lrbo.calibrate(model, ids, METHODS, progress=False)
    forms = ("delta", "delta_int8", "delta_bands")
    made = {
        method: lrbo.factorize(
            model, calibration, method, forms=forms, bases=BANDS, base=base, progress=False
        )
        for method in METHODS
    }
    for method, factors in made.items():
        yield f"rank in 16 bit, {method}", factors, ("delta",), False
    for method, factors in made.items():
        come = replace(factors, bases=replace(BANDS, bands=(COME,)))
        yield f"bands of 8, 3, 2 bit, {method}", come, ("delta_bands",), False
    for method, factors in made.items():
        come = replace(factors, bases=replace(BANDS, bands=(COME,)))
        yield f"the same by predicted loss, {method}", come, ("delta_bands",), True
    for method, factors in made.items():
        yield f"all forms by predicted loss, {method}", factors, forms, True


def main() -> None:
    """Make the pair, compress it and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a packaged model, folder or hub id, instead of training")
    base, model, ids, test = pair(parser.parse_args().model)
    start, end = (lrbo.score(each, test).mean for each in (base, model))
    dense = 2 * sum(spec.parameters for spec in map_model(model).compressible)
    print("| what | kept | bytes | test nll | share of the gain |")
    print("|---|---:|---:|---:|---:|")

    def row(what: str, size: int, nll: float) -> None:
        share = (start - nll) / (start - end)
        print(f"| {what} | {size / dense:.4f} | {size:,} | {nll:.4f} | {share:.1%} |", flush=True)

    row("base", 0, start)
    row("fine-tuned", dense, end)
    bit, size = signs(base, model)
    row("signs and a scale", size, lrbo.score(bit, test).mean)
    chosen = [*compressed(base, model, ids[: len(ids) // 2][:CALIBRATION])]
    for keep in KEPT:
        for what, factors, forms, by_loss in chosen:
            own = replace(factors, forms=forms)
            allocate = own.least_loss if by_loss else own.uniform
            allocation = allocate(keep, measure="bytes")
            with own.compressed(model, allocation, tokens=test.numel()):
                row(what, allocation.cost.bytes, lrbo.score(model, test).mean)


if __name__ == "__main__":
    main()
