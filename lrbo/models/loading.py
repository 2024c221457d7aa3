"""Load a model and its tokenizer; refuse files that do not hold what `config.json` describes."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from lrbo.errors import ModelError, reading
from lrbo.models import headers
from lrbo.models.families import MODEL_TYPES, family_of
from lrbo.models.model_map import is_tied
from lrbo.models.parameters import cast_, not_finite
from lrbo.models.sources import ModelSource
from lrbo.models.tiny import byte_tokenizer, tiny_config, tiny_model

# What old checkpoints hold beside weights: constants that models now make by themselves.
CONSTANTS = re.compile(r"\.(attn|attention)\.masked_bias$|\brotary_emb\.\w+$")


def load_model(
    source: ModelSource, *, dtype: torch.dtype | None, device: torch.device
) -> PreTrainedModel:
    """Load a causal language model for inference; ``dtype=None`` is that of the checkpoint.

    ModelError if files are missing, damaged, adapted or not as configured, or not finite.
    """
    config = load_config(source)
    # A quantizer makes other tensors than those of config.json.
    is_exact = getattr(config, "quantization_config", None) is None
    if is_exact:
        _skeleton(source, config)  # compares the files with it before weights are read
    model = _read(source, dtype, is_exact=is_exact)
    if not is_tied(model):  # so that a checkpoint of it is read without a tie
        model.config.tie_word_embeddings = False
    if problem := not_finite(model):
        # The largest number of float16 is 65,504.
        if model.dtype == torch.float16 and not not_finite(_read(source, torch.float32)):
            raise ModelError(
                f"model {source.label} in float16: {problem} They are in float32: take bfloat16 "
                "or float32."
            )
        raise ModelError(
            f"model {source.label}: {problem} It is damaged, or its training diverged: take "
            "another copy."
        )
    return model.to(device).eval().requires_grad_(False)


def _read(
    source: ModelSource, dtype: torch.dtype | None, *, is_exact: bool = False
) -> PreTrainedModel:
    """Read a model from its files, which may hold more tensors unless ``is_exact``."""
    if source.source == "tiny":
        model: PreTrainedModel = tiny_model()
        cast_(model, dtype or model.dtype)
        return model
    with reading(ModelError, f"cannot load model {source.label}"):
        model, info = AutoModelForCausalLM.from_pretrained(
            str(source.folder_or_hub_id()),
            revision=source.revision,
            dtype=dtype or "auto",
            trust_remote_code=False,
            output_loading_info=True,
        )
        if hasattr(model, "ct_decompress_hook"):
            # compressed-tensors unpacks weights before a call of the whole model, and only then.
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.long))
    _require_filled(info if is_exact else {"missing_keys": info["missing_keys"]}, source.label)
    return model


def _require_filled(info: Mapping[str, Any], label: str) -> None:
    """Refuse files that do not hold what ``config.json`` describes, by transformers' report."""
    problems = []  # for it starts a missing tensor at random, and ignores others
    if missing := sorted(info.get("missing_keys", ())):
        problems.append(
            f"lacks {len(missing)} of the tensors that its config.json wants ({missing[0]} first); "
            "copy it whole"
        )
    unexpected = sorted(k for k in info.get("unexpected_keys", ()) if not CONSTANTS.search(k))
    if unexpected:
        problems.append(
            f"holds {len(unexpected)} tensors that its config.json does not describe "
            f"({unexpected[0]} first); restore config.json, or open and save it with transformers"
        )
    if differing := sorted(info.get("mismatched_keys", ())):
        name, stored, wanted = differing[0]
        problems.append(
            f"holds {len(differing)} tensors of another shape than its config.json wants ({name} "
            f"is {tuple(stored)}, not {tuple(wanted)}); restore config.json"
        )
    if problems:
        raise ModelError(f"model {label} {'. It '.join(problems)}.")


def load_config(source: ModelSource) -> PretrainedConfig:
    """Read the configuration of a model, compressed ones included; ModelError if there is none."""
    if source.source == "tiny":
        return tiny_config()
    folder = source.folder_or_hub_id()
    with reading(ModelError, f"cannot load model {source.label}"):
        values = (
            PretrainedConfig.get_config_dict(str(folder))[0] if isinstance(folder, Path) else {}
        )
        if "auto_map" in values and values.get("model_type") not in CONFIG_MAPPING:
            raise ModelError(
                f"model {source.label} is of type {values.get('model_type')!r}, for which "
                "transformers has no class, and lrbo runs no code that lies beside weights "
                "(auto_map in its config.json). Give the model that it was made from; of a study, "
                "write it with lrbo compress format=lrbo."
            )
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(folder), revision=source.revision, trust_remote_code=False
        )
        # Second, since from_pretrained says more of a hub that does not answer.
        if isinstance(folder, str) and find_adapter_config_file(folder, revision=source.revision):
            raise headers.adapter_error(source.label, headers.ADAPTER_CONFIG)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"model {source.label} is of type {config.model_type!r}, which is no causal language "
            f"model of transformers; lrbo compresses the types {', '.join(MODEL_TYPES)}."
        )
    return config


def load_skeleton(source: ModelSource) -> PreTrainedModel:
    """Build the model on the meta device; the files of a folder decide whether its head is tied.

    A model that is not dense, not of a known family, or not as configured, is a ModelError.
    """
    config = load_config(source)
    for key in ("quantization_config", "lrbo"):  # the latter with a modelling file beside
        if getattr(config, key, None) is not None:
            raise ModelError(
                f"model {source.path!r} is quantized or compressed already ({key} in its "
                "config.json), expected a dense one: give the model that it was made from."
            )
    family_of(config.model_type)
    return _skeleton(source, config)


def _skeleton(source: ModelSource, config: PretrainedConfig) -> PreTrainedModel:
    """Build a model on the meta device as the files of a folder, if there is one, fill it."""
    label = source.label
    with torch.device("meta"), reading(ModelError, f"cannot load model {label}"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if source.source == "tiny" or not isinstance(folder := source.folder_or_hub_id(), Path):
        return skeleton
    tensors = headers.tensors_of(folder, label, getattr(config, "transformers_weights", None))
    if headers.stores_own_head(skeleton, tensors):
        config.tie_word_embeddings = False
    empty = {name: torch.empty(each.shape, device="meta") for name, each in tensors.items()}
    logger = logging.getLogger("transformers")
    with reading(ModelError, f"cannot load model {label}"), ExitStack() as restored:
        restored.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)  # it would print what an error is about to say
        filled: PreTrainedModel
        filled, info = type(skeleton).from_pretrained(
            None,
            config=config,
            state_dict=empty,
            device_map="meta",
            ignore_mismatched_sizes=True,  # the check below names them
            output_loading_info=True,
        )
    _require_filled(info, label)
    filled.tie_weights()  # which is not done where both tensors are on the meta device
    for name, _ in filled.named_parameters():
        keys = headers.stored_names(filled, name, tensors)
        if keys[1:]:
            raise ModelError(
                f"model {label} holds {name} {len(keys)} times, as {' and '.join(keys)}, expected "
                "it once: it is not clear which of them is meant. Copy it whole."
            )
        if not all(tensors[key].is_floating_point() for key in keys):
            raise ModelError(
                f"model {label}: {keys[0]} holds integers, expected floating-point numbers, and "
                "config.json has no quantization_config for them. Take the dense model."
            )
    return filled


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to the model; ModelError if there is none."""
    if source.source == "tiny":
        return byte_tokenizer()
    name = str(source.folder_or_hub_id())
    try:
        with reading(ModelError, f"cannot load the tokenizer of {source.label}"):
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=source.revision, trust_remote_code=False
            )
    except ModelError as error:
        folder = Path(source.path)
        if folder.is_dir() and not [*folder.glob("*token*"), *folder.glob("vocab*")]:
            raise ModelError(
                f"cannot load the tokenizer of {source.path!r}: the folder has none; write the "
                f"model's there with tokenizer.save_pretrained({source.path!r})"
            ) from error
        raise
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
