"""The same model in a random basis of its residual stream, whose weights lie on no grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM


def rotated_(model: LlamaForCausalLM, seed: int = 0) -> LlamaForCausalLM:
    """Multiply the residual stream by a random orthogonal matrix, in place.

    Scales of norms become part of the layers that read them, the head one of its own. Outputs are
    those of before, to the rounding of the model's dtype; weights that were rounded to integers
    once, as those of a GGUF are, are no longer.

    References:
        Ashkboos et al., *SliceGPT: Compress Large Language Models by Deleting Rows and Columns*,
        ICLR 2024, section 3.2, for the invariance.
    """
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(width, width, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(drawn)
    basis *= triangle.diagonal().sign()  # uniform over all orthogonal matrices
    head = model.lm_head.weight.detach().double()
    model.lm_head.weight = nn.Parameter(_read(head, model.model.norm.weight, basis, model.dtype))
    model.config.tie_word_embeddings = False
    _assign(model.model.embed_tokens, model.model.embed_tokens.weight.detach().double() @ basis)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for scale, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            for reader in readers:
                weight = reader.weight.detach().double()
                _assign(reader, _read(weight, scale.weight, basis, model.dtype))
            nn.init.ones_(scale.weight)
        for writer in (attention.o_proj, mlp.down_proj):
            _assign(writer, basis.T @ writer.weight.detach().double())
            if writer.bias is not None:
                writer.bias = nn.Parameter(
                    (basis.T @ writer.bias.detach().double()).to(model.dtype)
                )
    nn.init.ones_(model.model.norm.weight)
    return model


def _read(weight: Tensor, scale: Tensor, basis: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight that reads the stream in another basis, its scale included."""
    return (weight * scale.detach().double() @ basis).to(dtype)


def _assign(module: nn.Module, weight: Tensor) -> None:
    own = module.get_parameter("weight")
    module.weight = nn.Parameter(weight.to(own.dtype), requires_grad=own.requires_grad)
