"""A base model and one that was fine-tuned from it, tiny and made in an instant."""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lrbo.models.loading import tiny_model
from lrbo.models.tiny import byte_tokenizer
from tests.support.tiny import token_ids

RATE, STEPS = 0.01, 6


def tuned(base: PreTrainedModel, *parts: str, vocabulary: int = 64) -> PreTrainedModel:
    """Train a few steps on random text: parameters whose name has one of the parts, or all."""
    model = copy.deepcopy(base).eval().requires_grad_(False)  # no dropout
    own = [p for n, p in model.named_parameters() if not parts or any(each in n for each in parts)]
    optimizer = torch.optim.Adam([each.requires_grad_() for each in own], lr=RATE)
    ids = token_ids(4, 24, seed=7, vocabulary=vocabulary)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


def write(folder: Path, model: PreTrainedModel) -> Path:
    """Write a model with a tokenizer; it is then known by the folder."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    model.name_or_path = str(folder)
    return folder


def written_pair(folder: Path, *parts: str) -> tuple[Path, Path]:
    """Write a base and what was fine-tuned from it: both folders."""
    base = tiny_model()
    model = tuned(base, *parts or ("_proj", "input_layernorm"))
    return write(folder / "base", base), write(folder / "tuned", model)
