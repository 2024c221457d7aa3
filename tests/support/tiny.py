"""Tiny random models of each family, made from configurations."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

VOCABULARY = 64
BLOCKS = 2
HIDDEN, INNER, HEADS, KV_HEADS = 16, 24, 4, 2

_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_LLAMA_LIKE, "num_key_value_heads": KV_HEADS}

CASES: dict[str, PretrainedConfig] = {
    "llama_untied": LlamaConfig(**_GROUPED, tie_word_embeddings=False),
    "llama_tied": LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "llama_biased": LlamaConfig(
        **_GROUPED, tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
    "mistral": MistralConfig(**_GROUPED, tie_word_embeddings=False, sliding_window=None),
    "qwen2": Qwen2Config(**_GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=8, tie_word_embeddings=False),
    "smollm3": SmolLM3Config(**_GROUPED, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_inner=INNER,
        n_layer=BLOCKS,
        n_head=HEADS,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        ffn_dim=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        word_embed_proj_dim=HIDDEN,
    ),
    "gpt_neox": GPTNeoXConfig(**_LLAMA_LIKE, tie_word_embeddings=False, use_parallel_residual=True),
    "phi": PhiConfig(**_LLAMA_LIKE, tie_word_embeddings=False),
    "phi3": Phi3Config(**_GROUPED, tie_word_embeddings=False, sliding_window=None),
}


def build(case: str) -> PreTrainedModel:
    """Build a model in float32 whose every number is random: biases and norms too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = copy.deepcopy(CASES[case])  # a model keeps its configuration, a test may change it
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.3)
    return model.eval().requires_grad_(False)


def build_on_meta(case: str) -> PreTrainedModel:
    """Build the shapes of a model without its numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CASES[case])


def token_ids(windows: int, tokens: int, seed: int = 0, vocabulary: int = VOCABULARY):
    """Draw random token ids ``(windows, tokens)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (windows, tokens), generator=generator)
