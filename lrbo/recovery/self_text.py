"""Text that the dense model writes itself, to be trained on."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.progress import Reporter


def sampled_windows(
    dense: PreTrainedModel,
    windows: Int[Tensor, "windows tokens"],
    *,
    seed: int,
    batch_windows: int,
    reporter: Reporter,
) -> Int[Tensor, "windows tokens"]:
    """Sample windows of the same length that begin with the same token.

    Sampling is from the whole distribution, and does not end at an end of text: texts follow each
    other as they do in windows (Liu et al., *LLM-QAT*, 2023, section 3.1).
    """
    count, width = windows.shape
    config = copy.deepcopy(dense.generation_config)
    config.update(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_beams=1, eos_token_id=None,
        max_length=None, max_new_tokens=width - 1, min_new_tokens=None, use_cache=True,
        pad_token_id=0,
    )  # fmt: skip
    parts = []
    with (
        torch.random.fork_rng(),
        reporter.step("Text of the dense model", count * width, "tokens") as advance,
    ):
        torch.manual_seed(seed)
        for batch in torch.split(windows[:, :1], batch_windows):
            prompt = batch.to(dense.device)
            mask = torch.ones_like(prompt)
            sampled = dense.generate(prompt, generation_config=config, attention_mask=mask)
            parts.append(sampled.cpu())
            advance(sampled.numel())
    return torch.cat(parts)
