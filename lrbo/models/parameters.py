"""Checks of the parameters of a model against its configuration, and their digest."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from lrbo.errors import ModelError, reading, some
from lrbo.models.model_map import is_tied

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Tensors beside a computed one, by the end of their name, and what makes it a parameter again.
COMPUTED = {"_mask": "prune.remove", "_u": "remove_spectral_norm", "_g": "remove_weight_norm"}


def cast_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the parameters of a model as ``from_pretrained(dtype=...)`` does."""
    # Not model.to(dtype), which rounds the rotary frequencies too: in bfloat16 they are then wrong
    # by radians at a distance of 1,000 tokens.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def not_finite(model: PreTrainedModel) -> str | None:
    """Return the problem if weights are NaN or infinite: their count, and the first tensor."""
    problems = []
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if values.is_floating_point() and values.dtype not in PLAIN_DTYPES:
            values = values.float()  # eight bits, of a quantized model, which torch cannot add
        # Every value is finite if their sum is: a tenth of the time of testing each.
        if not torch.isfinite(values.sum()) and (count := int((~torch.isfinite(values)).sum())):
            problems.append(f"{count:,} of {values.numel():,} numbers of {name} are not finite")
    if not problems:
        return None
    more = f"; so are some of {len(problems) - 1} more tensors" if problems[1:] else ""
    return f"{problems[0]}, expected all{more}."


def require_as_configured(model: PreTrainedModel) -> None:
    """Refuse a model in memory whose parameters are not those that its configuration describes.

    Others would be lost where a checkpoint is opened. A head may be tied to the embedding or not.
    """
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = is_tied(model)
    kind = type(model)
    what = (
        f"this {kind.__name__} cannot be made of its configuration, as a checkpoint is opened; "
        "correct model.config, or give a model of a class of transformers"
    )
    with torch.device("meta"), reading(ModelError, what):
        shapes = {name: parameter.shape for name, parameter in kind(config).named_parameters()}
    held = dict(model.named_parameters())
    missing, added = sorted(shapes.keys() - held), sorted(held.keys() - shapes)
    reshaped = sorted(name for name in shapes.keys() & held if shapes[name] != held[name].shape)
    if missing or added or reshaped:
        raise ModelError(
            f"this {kind.__name__} is not what its configuration describes: missing or shared "
            f"{some(missing, 1)}, added {some(added, 1)}, of another shape {some(reshaped, 1)}. "
            "Merge adapters with merge_and_unload(), else save and load it or correct model.config."
        )
    for name, parameter in held.items():
        if parameter.dtype not in PLAIN_DTYPES:
            raise ModelError(
                f"{name} of this {kind.__name__} is {parameter.dtype}, expected float32, bfloat16 "
                "or float16; load it without quantization."
            )
    require_in_memory(model)


def require_in_memory(model: PreTrainedModel) -> None:
    """Refuse a model of which parameters are on the meta device."""
    if empty := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ModelError(
            f"{len(empty)} parameters of this {type(model).__name__} are not in memory "
            f"({empty[0]} first), expected all; load it without a device_map that offloads."
        )


def require_stored_weights(model: PreTrainedModel) -> None:
    """Refuse tensors that pruning or a normalization computes from others before each pass."""
    for layer, module in model.named_modules():
        for name, call in _computed(module):
            raise ModelError(
                f"{layer}.{name} of this {type(model).__name__} is computed before each pass, "
                "expected a parameter; make it one with "
                f"{call}(model.get_submodule({layer!r}), {name!r})."
            )


def _computed(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the tensors of a module that are computed from others, and the call that ends it."""
    if parametrize.is_parametrized(module):
        # Of tensors without gradients, torch would make no parameter.
        frozen = not any(parameter.requires_grad for parameter in module.parameters())
        before = "model.requires_grad_(True); " if frozen else ""
        for name, _ in module.get_submodule("parametrizations").named_children():
            yield name, f"{before}torch.nn.utils.parametrize.remove_parametrizations"
    held = module._parameters.keys() | module._buffers.keys()
    for name in [name for name, value in vars(module).items() if isinstance(value, Tensor)]:
        for end, call in COMPUTED.items():
            if f"{name}{end}" in held:
                yield name, f"torch.nn.utils.{call}"


def fingerprint(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """Return a short digest of the configuration and of each parameter's name, shape and sample.

    The sample, rounded to ``dtype``, is of at most 4,096 values: any training changes it.
    """
    ignored = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    config = {k: v for k, v in model.config.to_dict().items() if k not in ignored}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    _add_weights(digest, model, dtype)
    return digest.hexdigest()[:16]


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Return a digest as :func:`fingerprint` does, of the parameters alone.

    It stays the same where another release of transformers adds a key to the configuration.
    """
    digest = hashlib.sha256()
    _add_weights(digest, model, None)
    return digest.hexdigest()[:16]


def _add_weights(digest: Any, model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    for name, parameter in model.named_parameters():
        sample = _sample(parameter).to(dtype).float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())


def weight_samples(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the values that :func:`fingerprint` hashes of each parameter, on the CPU, by name."""
    return {name: _sample(parameter).cpu() for name, parameter in model.named_parameters()}


def first_other(samples: Mapping[str, Tensor], model: PreTrainedModel) -> str | None:
    """Name the first parameter that differs from :func:`weight_samples` by more than rounding."""
    others = weight_samples(model)
    for name, sample in samples.items():
        other = others.get(name, sample[:0])
        dtypes = {sample.dtype, other.dtype}
        limits = [torch.finfo(dtype) for dtype in dtypes] if len(dtypes) > 1 else []
        rounding = sum(limit.eps / 2 for limit in limits)
        least = sum(limit.eps / 2 * limit.smallest_normal for limit in limits)
        if sample.shape != other.shape or not torch.allclose(
            sample.double(), other.double(), rtol=rounding, atol=least
        ):
            return name
    return None


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    count = min(flat.numel(), 4096)
    indices = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
    return flat[indices]
