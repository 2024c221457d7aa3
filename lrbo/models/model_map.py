"""The map of a model: layers, kinds, shared inputs, ties, parameter counts."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lrbo.errors import ModelError, reading
from lrbo.families import family_of
from lrbo.specs import LayerSpec, ModelMap

LINEAR_HEAD = (
    "expected a linear one, as causal language models have it; load it with "
    "AutoModelForCausalLM, without adapters."
)
PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Tensors beside a computed one, by the end of their name, and what makes it a parameter again.
COMPUTED = {"_mask": "prune.remove", "_u": "remove_spectral_norm", "_g": "remove_weight_norm"}


def map_model(model: PreTrainedModel) -> ModelMap:
    """Map a causal language model; works on the meta device, so no weights are needed.

    Args:
        model: One of the families in :mod:`lrbo.families`.

    Raises:
        ModelError: If the family is unknown, a layer that the family promises is missing, a
            matrix inside a block is not mapped, or there is no linear head; the message names it.
    """
    family = family_of(model.config.model_type)
    try:
        blocks = model.get_submodule(family.blocks)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__} has no blocks at {family.blocks!r}, where models of type "
            f"{model.config.model_type!r} keep them."
        ) from error
    if not isinstance(blocks, nn.ModuleList):
        raise ModelError(
            f"{type(model).__name__} has a {type(blocks).__name__} at {family.blocks!r}, expected "
            "a ModuleList of blocks, as transformers makes it; load the model anew."
        )
    layers: list[LayerSpec] = []
    for index, block in enumerate(blocks):
        prefix = f"{family.blocks}.{index}"
        found = {path: module for path, module in block.named_modules() if is_linear(module)}
        missing = sorted(set(family.kinds) - set(found))
        strange = sorted(
            path
            for path, module in block.named_modules()
            if path not in family.kinds and _holds_matrix(module)
        )
        if missing or strange:
            raise ModelError(
                f"{prefix} of {type(model).__name__} does not look like a "
                f"{model.config.model_type!r} block: missing {missing or 'nothing'}, "
                f"not mapped {[f'{prefix}.{path}' for path in strange] or 'nothing'}. "
                "Describe the layer in lrbo/families.py, or load the model without "
                "quantization and adapters."
            )
        for site in family.sites:
            layers.extend(
                _spec(found[path], f"{prefix}.{path}", family.kinds[path], index, site[0], prefix)
                for path in site
            )
    head = require_head(model)
    if not is_linear(head):
        raise ModelError(
            f"{type(model).__name__} has a head of type {type(head).__name__}, {LINEAR_HEAD}"
        )
    layers.append(_head_spec(model, head))
    return ModelMap(tuple(layers), sum(p.numel() for p in model.parameters()), len(blocks))


def require_head(model: PreTrainedModel) -> nn.Module:
    """Take the head of a model, or refuse a body without one and a classifier.

    Raises:
        ModelError: If there is none.
    """
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no head, {LINEAR_HEAD}")
    return head


def is_linear(module: nn.Module) -> bool:
    """Return whether ``module`` is exactly ``nn.Linear`` or GPT-2's ``Conv1D``, with its weight.

    Subclasses are refused: quantized and adapted layers do not hold a plain weight.
    """
    plain = type(module) in (nn.Linear, Conv1D)
    return plain and isinstance(module.weight, nn.Parameter)


def linear_weight(module: nn.Module) -> Float[Tensor, "out in"]:
    """Return the weight of a dense layer as ``(out, in)``; a view, detached."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight


def is_transposed(module: nn.Module) -> bool:
    """Return whether the layer stores its weight as ``(in, out)``, as GPT-2 does."""
    return type(module) is Conv1D


def linear_bias(module: nn.Module) -> Float[Tensor, " out"] | None:
    """Return the bias of a dense layer, detached, or ``None``."""
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()


def _holds_matrix(module: nn.Module) -> bool:
    """Return whether ``module`` itself owns a matrix: something that someone might compress."""
    return any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))


def _spec(module: nn.Module, name: str, kind: str, block: int, site: str, prefix: str) -> LayerSpec:
    """Describe one layer of a block."""
    out_features, in_features = linear_weight(module).shape
    has_bias = linear_bias(module) is not None
    return LayerSpec(
        name, kind, block, out_features, in_features, has_bias, site=f"{prefix}.{site}"
    )


def _head_spec(model: PreTrainedModel, head: nn.Module) -> LayerSpec:
    """Describe the head, with the embedding that it is tied to."""
    name = next(path for path, module in model.named_modules() if module is head)
    out_features, in_features = linear_weight(head).shape
    embedding = model.get_input_embeddings()
    tied_to = next(path for path, module in model.named_modules() if module is embedding)
    return LayerSpec(
        name,
        name.rpartition(".")[2],
        None,
        out_features,
        in_features,
        linear_bias(head) is not None,
        site=name,
        tied_to=f"{tied_to}.weight" if is_tied(model) else None,
    )


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the head is the embedding: what the tensors say, not the configuration."""
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is embedding.weight


def cast_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the parameters of a model as ``from_pretrained(dtype=...)`` does.

    Not model.to(dtype): it rounds the rotary frequencies too, and in bfloat16 they are then wrong
    by radians at a distance of 1,000 tokens.

    Args:
        model: Changed; tied parameters stay so.
        dtype: Of the parameters afterwards.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype as configurations have it: ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def not_finite(model: PreTrainedModel) -> str | None:
    """Count NaNs and infinities among the weights of a model: the problem, if there are any.

    Args:
        model: On any device but meta.
    """
    bad = {
        name: (int((~torch.isfinite(parameter)).sum()), parameter.numel())
        for name, parameter in ((n, _summable(p)) for n, p in model.named_parameters())
        # Every number is finite if their sum is: a tenth of the time of asking each.
        if not bool(torch.isfinite(parameter.sum()))
    }
    bad = {name: counts for name, counts in bad.items() if counts[0]}
    if not bad:
        return None
    name, (count, of) = next(iter(bad.items()))
    more = f"; so are some of {len(bad) - 1} more tensors" if bad.keys() - {name} else ""
    return f"{count:,} of {of:,} numbers of {name} are not finite, expected all{more}."


def _summable(parameter: Tensor) -> Tensor:
    """Return numbers that torch adds up: those of eight bits, of quantized models, as float32."""
    numbers = parameter.detach()
    is_narrow = numbers.is_floating_point() and numbers.dtype not in PLAIN_DTYPES
    return numbers.float() if is_narrow else numbers


def require_as_configured(model: PreTrainedModel) -> None:
    """Refuse a model in memory whose parameters are not those that its configuration describes.

    A checkpoint is opened by its configuration: what was added, taken out or shared since the
    model was made (an adapter, a block, a tie of two layers) would not be there again. A head
    may be tied to the embedding or not.

    Raises:
        ModelError: Naming the first parameters that differ.
    """
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = is_tied(model)
    what = (
        f"this {type(model).__name__} cannot be made anew of its configuration, as a checkpoint "
        "is opened; correct model.config, or give a model of a class of transformers"
    )
    with torch.device("meta"), reading(ModelError, what):
        described = {name: p.shape for name, p in type(model)(config).named_parameters()}
    held = dict(model.named_parameters())
    missing, strange = sorted(described.keys() - held), sorted(held.keys() - described)
    other = sorted(n for n in described.keys() & held if described[n] != held[n].shape)
    if missing or strange or other:
        raise ModelError(
            f"this {type(model).__name__} is not what its configuration describes: missing or "
            f"shared {_first(missing)}, added {_first(strange)}, of another shape "
            f"{_first(other)}. Merge adapters with merge_and_unload() first; else save and "
            "load it, or correct model.config."
        )
    if odd := [name for name, p in held.items() if p.dtype not in PLAIN_DTYPES]:
        raise ModelError(
            f"{len(odd)} parameters of this {type(model).__name__} are not plain numbers ({odd[0]} "
            f"is {held[odd[0]].dtype}), expected float32, bfloat16 or float16; load it without "
            "quantization."
        )
    require_in_memory(model)


def require_in_memory(model: PreTrainedModel) -> None:
    """Refuse a model of which parameters are on the meta device.

    Raises:
        ModelError: Naming the first of them.
    """
    if empty := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ModelError(
            f"{len(empty)} parameters of this {type(model).__name__} are not in memory "
            f"({empty[0]} first), expected all; load it without a device_map that offloads."
        )


def require_stored_weights(model: PreTrainedModel) -> None:
    """Refuse tensors that are computed from others before each pass: masks of pruning, and norms.

    Raises:
        ModelError: Naming the first of them, and what makes it a plain weight.
    """
    for layer, module in model.named_modules():
        if computed := _computed(module):
            name, mend = computed
            raise ModelError(
                f"{layer}.{name} of this {type(model).__name__} is computed before each pass, by "
                "pruning or a normalization of weights, expected a parameter; make it one with "
                f"{mend}(model.get_submodule({layer!r}), {name!r})."
            )


def _computed(module: nn.Module) -> tuple[str, str] | None:
    """Name the first tensor of a module that is computed from others, and the call that ends it."""
    if parametrize.is_parametrized(module):
        # Of tensors without gradients, torch would make no parameter.
        frozen = not any(parameter.requires_grad for parameter in module.parameters())
        first = "model.requires_grad_(True); " if frozen else ""
        name = next(n for n, _ in module.get_submodule("parametrizations").named_children())
        return name, f"{first}torch.nn.utils.parametrize.remove_parametrizations"
    held = module._parameters.keys() | module._buffers.keys()
    for name in [name for name, value in vars(module).items() if isinstance(value, Tensor)]:
        for end, mend in COMPUTED.items():
            if f"{name}{end}" in held:
                return name, f"torch.nn.utils.{mend}"
    return None


def _first(names: list[str]) -> str:
    """Return the first name of a list and how many there are, for a message."""
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return f"{names[0]}{more}" if names else "nothing"


def body_and_head(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """Split a causal language model into hidden states and the map to logits.

    Returns:
        The body, whose output has ``last_hidden_state``, and the head, so that
        ``head(body(x).last_hidden_state)`` are the logits (a test holds this per family).
    """
    return model.base_model, require_head(model)


def fingerprint(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """Return a short digest of architecture and weights.

    Hashes the configuration and, for each parameter, its name, shape and at most 4,096 evenly
    spaced values: milliseconds where a full hash of a 7B model takes a minute, and any training,
    merging or requantization changes it. The compute dtype does not enter except through the
    values that it rounds.

    Args:
        model: On any device but meta.
        dtype: What to round the values to first: the digest that the model has in that dtype.
    """
    ignored = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    config = {k: v for k, v in model.config.to_dict().items() if k not in ignored}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        sample = _sample(parameter).to(dtype).float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def weight_samples(model: PreTrainedModel) -> dict[str, Tensor]:
    """Take the values that :func:`fingerprint` hashes of each parameter, on the CPU, by name."""
    return {name: _sample(parameter).cpu() for name, parameter in model.named_parameters()}


def first_other(samples: Mapping[str, Tensor], model: PreTrainedModel) -> str | None:
    """Name the first parameter of a model that is not the one that samples were taken of.

    Samples in another dtype are the same where rounding explains the difference.

    Args:
        samples: Of :func:`weight_samples`, of all parameters or some.
        model: On any device but meta.
    """
    held = dict(model.named_parameters())
    for name, sample in samples.items():
        if name not in held:
            return name
        other = _sample(held[name]).cpu()
        dtypes = {sample.dtype, other.dtype}
        limits = [torch.finfo(dtype) for dtype in dtypes] if len(dtypes) > 1 else []
        rounded = sum(limit.eps / 2 for limit in limits)
        least = sum(limit.eps / 2 * limit.smallest_normal for limit in limits)
        if sample.shape != other.shape or not torch.allclose(
            sample.double(), other.double(), rtol=rounded, atol=least
        ):
            return name
    return None


def _sample(parameter: Tensor) -> Tensor:
    """Take at most 4,096 values, spread from the first to the last."""
    flat = parameter.detach().reshape(-1)
    count = min(flat.numel(), 4096)
    places = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
    return flat[places]
