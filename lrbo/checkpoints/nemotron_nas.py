"""A Llama whose blocks differ, as a plain checkpoint: the layout of Nemotron-NAS (DeciLM)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lrbo.checkpoints import configuration_decilm
from lrbo.checkpoints.export import CONFIG, checkpoint_folder, write_tensors
from lrbo.checkpoints.merged import merged_model
from lrbo.checkpoints.structure import Structure
from lrbo.data.windows import Role, TokenWindows
from lrbo.layers.joint import SkippedLinear, ThinLinear
from lrbo.models.devices import dtype_name

FAMILIES = ("llama", "mistral")  # whose blocks are those of the layout
ARCHITECTURE, MODEL_TYPE = "DeciLMForCausalLM", "nemotron-nas"
MULTIPLE = 256  # readers round the neurons of an MLP up to it
CODE, CODE_CLASS = "configuration_decilm.py", "DeciLMConfig"
# What the layout takes over from the configuration of the dense model.
SAME = (
    *("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters"),
)
# Of a block: its parts with their norms, layers, and the layer that ends each.
PARTS = {
    "self_attn": ("input_layernorm", ("q_proj", "k_proj", "v_proj", "o_proj")),
    "mlp": ("post_attention_layernorm", ("gate_proj", "up_proj", "down_proj")),
}


def unfit(config: PretrainedConfig) -> str | None:
    """Say why the layout cannot hold the models of a configuration; ``None`` where it can."""
    if config.model_type not in FAMILIES:
        return f"it holds models of {' and '.join(FAMILIES)}, not of {config.model_type}"
    wide = config.num_attention_heads * config.head_dim
    if wide != config.hidden_size:
        return f"its heads are {config.hidden_size} wide together, not {wide}"
    if config.hidden_act != "silu":
        return f"its MLPs have silu, not {config.hidden_act}"
    if getattr(config, "sliding_window", None) is not None:
        return f"its attentions see all tokens, not sliding_window={config.sliding_window}"
    return None


def multiplier(width: int, hidden: int) -> float:
    """Return the ``ffn_mult`` of an MLP of so many neurons, a multiple of 256.

    Readers have ``int(2 * ffn_mult * hidden / 3)`` neurons, rounded up to a multiple of 256, and
    some round it to six digits before.
    """
    assert width % MULTIPLE == 0
    return round(3 * width / (2 * hidden), 6)


@dataclass(frozen=True)
class NemotronNas:
    """A model in the layout.

    Attributes:
        config: The values of ``config.json``.
        tensors: Weights by name.
        widths: Neurons of every MLP that is run, as stored.
        zeros: Neurons among them that only fill up the multiples.
        no_ops: Attentions and MLPs that are left out, those of blocks that are gone among them.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    widths: tuple[int, ...]
    zeros: int
    no_ops: tuple[int, int]

    @classmethod
    def of(cls, model: PreTrainedModel) -> NemotronNas:
        """Convert a compressed model, of which :func:`unfit` finds no fault; it stays as it is.

        Products are multiplied out, as of :func:`lrbo.checkpoints.merged.save_merged`. MLPs keep
        their own neurons. Parts that are skipped are left out, and what they added on average joins
        the bias of the layer that wrote to the residual stream last: nothing reads it between. Only
        the attention of the first block has none before it and stays, with weights of zeros.

        Raises:
            CheckpointError: If the architecture has no parameter for a bias that is needed.
        """
        structure, dense = Structure.of(model), merged_model(model)
        state = {name: tensor.detach() for name, tensor in dense.state_dict().items()}
        if dense.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        blocks, added, last = list[dict[str, Any]](), dict[str, Tensor](), ""
        widths, zeros, left_out = list[int](), 0, dict.fromkeys(PARTS, 0)
        group = dense.config.num_attention_heads // dense.config.num_key_value_heads
        for new, old in enumerate(structure.kept):
            runs = dict.fromkeys(PARTS, True)
            width = dense.config.intermediate_size
            for part, (norm, layers) in PARTS.items():
                path = f"{structure.blocks}.{new}.{part}"
                end = model.get_submodule(f"{structure.blocks}.{old}.{part}.{layers[-1]}")
                if isinstance(end, SkippedLinear) and last:
                    runs[part] = False
                    bias = state[f"{path}.{layers[-1]}.bias"].double()
                    added[last] = added.get(last, torch.zeros_like(bias)) + bias
                    names = [f"{path}.", f"{structure.blocks}.{new}.{norm}."]
                    state = {n: t for n, t in state.items() if not n.startswith(tuple(names))}
                    left_out[part] += 1
                    continue
                last = f"{path}.{layers[-1]}"
                if isinstance(end, ThinLinear):
                    width = end.in_features
            stored = -(-width // MULTIPLE) * MULTIPLE if runs["mlp"] else 0
            if stored:
                widths.append(stored)
                zeros += stored - width
                _resize_(state, f"{structure.blocks}.{new}.mlp", width, stored)
            blocks.append(
                {
                    "attention": _attention(group if runs["self_attn"] else None),
                    "ffn": _ffn(multiplier(stored, dense.config.hidden_size) if stored else None),
                }
            )
        for name, constant in added.items():
            bias = state.get(f"{name}.bias")
            total = constant if bias is None else constant + bias.double()
            state[f"{name}.bias"] = total.to(model.dtype)
        gone = len(list(model.get_submodule(structure.blocks).children())) - len(structure.kept)
        biases = {part: _even_biases_(state, part) for part in PARTS}
        config = _config(dense, blocks, widths, biases)
        attentions, mlps = (left_out[part] + gone for part in PARTS)
        return cls(config, state, tuple(widths), zeros, (attentions, mlps))

    @property
    def parameters(self) -> int:
        """Of the files."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def summary(self) -> str:
        """What the blocks are, in a few words."""
        ends = sorted({min(self.widths), max(self.widths)}) if self.widths else [0]
        filled = (
            f", {self.zeros:,} of them zeros up to multiples of {MULTIPLE}" if self.zeros else ""
        )
        return (
            f"MLPs of {' to '.join(f'{width:,}' for width in ends)} neurons{filled}; "
            f"{self.no_ops[0]} attentions and {self.no_ops[1]} MLPs are left out"
        )

    def save(
        self,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        card: str | None = None,
        windows: Mapping[Role, TokenWindows] | None = None,
    ) -> None:
        """Write a folder; the arguments are as of :func:`lrbo.checkpoints.export.save`.

        Raises:
            CheckpointError: If the folder exists or cannot be written.
        """
        with checkpoint_folder(folder, model, tokenizer, card, windows) as beside:
            write_tensors(beside, self.tensors)
            text = json.dumps(self.config, indent=2) + "\n"
            (beside / CONFIG).write_text(text, encoding="utf-8")
            code = inspect.getsource(configuration_decilm)
            (beside / CODE).write_text(code, encoding="utf-8")


def _resize_(state: dict[str, Tensor], mlp: str, width: int, stored: int) -> None:
    """Give an MLP its own neurons, and zeros up to a number of them."""
    for layer in ("gate_proj", "up_proj", "down_proj"):
        for own in ("weight", "bias"):
            name = f"{mlp}.{layer}.{own}"
            if name not in state or (layer, own) == ("down_proj", "bias"):
                continue
            missing = stored - width
            if layer == "down_proj":
                state[name] = functional.pad(state[name][:, :width], (0, missing))
            else:
                rows = state[name][:width]
                pad = (0, missing) if own == "bias" else (0, 0, 0, missing)
                state[name] = functional.pad(rows, pad)


def _even_biases_(state: dict[str, Tensor], part: str) -> bool:
    """Give all layers of a kind of part a bias, or none of them; return which.

    There is one switch for each. Biases of zeros are none.
    """
    inside = f".{part}."
    own = {n: t for n, t in state.items() if inside in n and n.endswith(".bias")}
    needed = any(bool(tensor.any()) for tensor in own.values())
    for name in [n for n in state if inside in n and n.endswith(".weight")]:
        bias = f"{name.removesuffix('weight')}bias"
        if not needed:
            state.pop(bias, None)
        elif bias not in state:
            state[bias] = state[name].new_zeros(len(state[name]))
    return needed


def _attention(group: int | None) -> dict[str, Any]:
    return {
        "n_heads_in_group": group,  # queries that share keys and values
        "no_op": group is None,
        "num_sink_tokens": None,
        "replace_with_linear": False,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }


def _ffn(mult: float | None) -> dict[str, Any]:
    return {
        "ffn_mult": mult,
        "no_op": mult is None,
        "replace_with_linear": False,
        "sparsify": None,
    }


def _config(
    dense: PreTrainedModel,
    blocks: list[dict[str, Any]],
    widths: list[int],
    biases: Mapping[str, bool],
) -> dict[str, Any]:
    """Return the values of ``config.json``, the rotation as old and as new readers ask for it."""
    values = dense.config.to_dict()
    rope = values["rope_parameters"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    dtype = dtype_name(dense.dtype)
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": {"AutoConfig": f"{Path(CODE).stem}.{CODE_CLASS}"},
        "model_type": MODEL_TYPE,
        **{key: values[key] for key in SAME if key in values},
        "num_hidden_layers": len(blocks),
        "intermediate_size": max(widths, default=MULTIPLE),  # of the widest: blocks have their own
        "attention_bias": biases["self_attn"],
        "mlp_bias": biases["mlp"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling.get("rope_type") == "default" else scaling,
        "dtype": dtype,
        "torch_dtype": dtype,
        "block_configs": blocks,
    }
