"""How transformers opens a checkpoint: the quantization config ``lrbo`` and its quantizer."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import torch
from pydantic import ConfigDict, Field, with_config
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import TypedDict

from lrbo.checkpoints.tensors import (
    check_tensors,
    count_parameters,
    read_headers,
    require_inside,
)
from lrbo.config.shell import command
from lrbo.errors import CheckpointError, ModelError, reading
from lrbo.files.parsing import ContentError, Count, checked
from lrbo.layers.based import BasedLinear
from lrbo.layers.forms import FORMS, is_delta, is_joint
from lrbo.layers.frequency import GroupedLinear
from lrbo.layers.joint import empty_joint
from lrbo.layers.joint_form import WHOLE_PARTS, Neurons
from lrbo.layers.low_rank import no_weight
from lrbo.layers.modules import empty_module, low_rank_layers, replace_modules
from lrbo.layers.options import DENSE, Option
from lrbo.layers.pivoted import PivotedLinear
from lrbo.layers.tables import TiedHead, fix_size_

# Not its names: its import of transformers may be what imports this module.
from lrbo.models import model_map as maps
from lrbo.models.specs import LayerSpec, sharing

METHOD = "lrbo"
FORMAT = 4


@with_config(ConfigDict(extra="forbid"))
class BaseFields(TypedDict):
    """A base model that layers add to, as of :class:`lrbo.models.pairs.BaseModel`."""

    source: Literal["packaged", "hf", "tiny"]
    path: str
    revision: str | None
    fingerprint: str


@with_config(ConfigDict(extra="forbid"))
class _About(TypedDict):
    """The values of :class:`LowRankConfig` in ``config.json``."""

    quant_method: NotRequired[Literal["lrbo"]]
    format: Count
    auto_class: Annotated[str, Field(pattern=r"^AutoModel\w*$")]  # which opens the checkpoint
    parameters: Count  # of the model, in its files: floating-point numbers, and integers of bases
    units: dict[str, str]  # options by layer name, "pivoted 96"; dense layers are left out
    added_biases: list[str]  # of units, those whose bias the dense layer lacks
    base: NotRequired[BaseFields]  # whose numbers all are that the files lack
    provenance: dict[str, Any]  # how the model was made: for readers, not for loading


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint; CheckpointError for values that cannot be."""

    def __init__(self, **values: Any) -> None:
        _require_format(values)
        try:
            about: _About = checked(values, _About, "the quantization_config of the checkpoint")
        except ContentError as error:
            raise CheckpointError(f"{error}; restore config.json.") from error
        if unknown := set(about["added_biases"]) - set(about["units"]):
            raise CheckpointError(
                f"the quantization_config of the checkpoint: added_biases has {min(unknown)}, "
                "expected layers among its units; restore config.json."
            )
        self.__dict__.update(about, quant_method=METHOD)


def _require_format(values: Mapping[str, Any]) -> None:
    """Refuse a format that is not the present one, and say what to do."""
    version = values.get("format")
    if type(version) is not int:
        todo = "restore config.json"
    elif version == FORMAT:
        return
    elif version > FORMAT:
        todo = "a newer lrbo wrote it: upgrade lrbo"
    else:
        about = values.get("provenance")
        about = about if isinstance(about, Mapping) else {}
        study, trial = about.get("study", "NAME"), about.get("trial", "best")
        again = command("compress", study=study, point=trial, out="FOLDER")
        todo = f"an older lrbo wrote it: write it again with: {again}"
    raise CheckpointError(
        f"the checkpoint has format {version!r}, this lrbo reads format {FORMAT}; {todo}."
    )


@register_quantizer(METHOD)
class LowRankQuantizer(HfQuantizer):
    """Puts empty layers of the forms into a model before its weights are read; checks the files.

    It rounds nothing itself: this is how transformers lets layers of another kind in.
    """

    # Loading a dense model does not compress it; transformers then says so.
    requires_calibration = True
    _shared: frozenset[str] | set[str] = frozenset()  # parameters that the files lack

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **options: Any
    ) -> PreTrainedModel:
        """Replace layers, and compare the files with what the model then wants."""
        is_causal = self.quantization_config.auto_class == "AutoModelForCausalLM"
        if is_causal and model.get_output_embeddings() is None:
            raise CheckpointError(
                f"the checkpoint is a causal language model and {type(model).__name__} is none: "
                "open it with AutoModelForCausalLM, whose base_model is what lies below its head."
            )
        put_in(model, self.quantization_config)
        if (files := options.get("checkpoint_files")) is not None:
            paths = [Path(file) for file in files]
            require_inside(paths, Path(model.config._name_or_path))
            stored, folder = read_headers(paths), paths[0].parent
            check_tensors(model, stored, folder, adds=self._base is not None)
            if self._base is not None:
                _require_there(self._base)
                shared = dict(model.named_parameters()).keys() - stored.keys()
                self._shared = shared - _tied_to(model, stored)
                # Else transformers would report what it started at random, before it is filled.
                model._keys_to_ignore_on_load_missing = [re.escape(name) for name in self._shared]
            stated = self.quantization_config.parameters
            total = count_parameters(stored, self.quantization_config.units)
            if total != stated:
                raise CheckpointError(
                    f"{folder} holds {total:_} parameters, its config.json states "
                    f"{stated:_}; the weights or config.json were changed."
                )
        elif self._base is not None:
            raise CheckpointError("a model that adds to a base is opened from its folder alone")
        return model

    @property
    def _base(self) -> BaseFields | None:
        base: BaseFields | None = getattr(self.quantization_config, "base", None)
        return base

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_options: Any
    ) -> PreTrainedModel:
        """Check the orders of outputs, which are numbers that decide where others go."""
        # transformers refuses float() and half() of a quantized model, and to train it compiled.
        model.is_quantized = False
        if self._base is not None:
            add_base_(model, self._base, self._shared)
        for name, module in low_rank_layers(model).items():
            if not module.weight.is_meta:
                # As read it begins in memory where the next tensor does, which torch.save refuses.
                module.weight = no_weight(module.weight)
            if isinstance(module, PivotedLinear) and not module.index.is_meta:
                index = module.index.cpu()
                if not torch.equal(index.sort().values, torch.arange(len(index)).int()):
                    raise CheckpointError(
                        f"{name}.index is no order of the layer's {len(index)} outputs; the "
                        "weights of the checkpoint are damaged: copy it again."
                    )
            is_grouped = isinstance(module, GroupedLinear) and not module.index.is_meta
            if is_grouped and (problem := module.problem):
                raise CheckpointError(
                    f"{name}.{problem}; the weights of the checkpoint are damaged: copy it again."
                )
            if isinstance(module, BasedLinear) and "rows" in module.names:
                rows = module.get_buffer("rows")
                if not rows.is_meta and not _are_some_of(rows.cpu(), module.out_features):
                    raise CheckpointError(
                        f"{name}.rows are no rising numbers of the layer's {module.out_features} "
                        "outputs; the weights of the checkpoint are damaged: copy it again."
                    )
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Count what ``save_pretrained`` is about to write: the embedding may have other rows."""
        config = model.config.quantization_config
        own = {n: b for n, b in model.state_dict().items() if n.rpartition(".")[0] in config.units}
        tensors = dict(model.named_parameters()) | own
        config.parameters = count_parameters(tensors, config.units)
        return None, {}

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes what ``from_pretrained`` opens."""
        return True

    # Its weights and adapters on them can be trained, and torch.compile takes it.
    is_trainable = is_qat_trainable = is_compileable = True


def _require_there(base: BaseFields) -> None:
    """Refuse a base in a folder that is gone, before anything is read."""
    path = Path(base["path"])
    if base["source"] == "hf" and path.is_absolute() and not path.is_dir():
        raise CheckpointError(
            f"the base model {base['path']} of the checkpoint is not there; put it back, or say "
            "where it is: lrbo.load(FOLDER, base=PATH), or base.path in its config.json"
        )


def _tied_to(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> set[str]:
    """Return the parameters that are tied to one that is stored."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {name for pair in tied.items() if stored.keys() & set(pair) for name in pair}


def add_base_(model: PreTrainedModel, fields: BaseFields, shared: Collection[str]) -> None:
    """Fill the parameters that a checkpoint shares with its base, and put it under its layers.

    Raises:
        CheckpointError: If the base is missing, damaged or another one.
    """
    # Not at the top: what imports transformers may be what imports this module.
    pairs = importlib.import_module("lrbo.models.pairs")
    source = pairs.ModelSource(fields["source"], fields["path"], fields["revision"])
    with reading(CheckpointError, "the base of the checkpoint cannot be added", own=ModelError):
        base = pairs.BaseModel(source, fields["fingerprint"]).load()
    given = dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in shared and not parameter.is_meta:
                parameter.copy_(given[name])
    for name, layer in low_rank_layers(model).items():
        if not isinstance(layer, BasedLinear) or layer.weight.is_meta:
            continue
        if is_delta(layer.form.name):
            layer.share_(maps.linear_weight(base.get_submodule(name)).to(layer.weight))


def _are_some_of(numbers: Tensor, count: int) -> bool:
    """Whether integers rise, from 0 on and below a count."""
    within = int(numbers[0]) >= 0 and int(numbers[-1]) < count
    return within and bool((numbers.diff() > 0).all())


def put_in(model: PreTrainedModel, config: LowRankConfig) -> None:
    """Replace the layers that are not dense by empty ones of their options, on the meta device."""
    modules, layers = dict(model.named_modules()), dict[str, nn.Module]()
    specs, head_of_dense = _joint_specs(model, config.units), model.get_output_embeddings()
    for name, text in config.units.items():
        dense = modules.get(name, nn.Identity())
        if not (maps.is_linear(dense) or maps.is_table(dense)):
            raise CheckpointError(
                f"{name} in the units of the checkpoint is no linear layer or embedding of "
                f"{type(model).__name__}; config.json was changed, or is of another model."
            )
        rows, columns = maps.linear_weight(dense).shape
        try:
            option = Option.parse(text)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}; restore config.json.") from error
        problem = FORMS[option.form].problem(rows, columns, option.level)
        if option == DENSE or problem:
            raise CheckpointError(
                f"{name} cannot be {text!r}: the layer is {rows} by {columns}"
                f"{f', and {problem}' if problem else ''}; restore config.json."
            )
        if name in specs:
            bias = specs[name].is_biased(name in config.added_biases)
            layers[name] = empty_joint(specs[name], option, bias=bias)
            continue
        heads = _untied_(model, name) if maps.is_table(dense) else []
        biased = [maps.linear_bias(modules[each]) is not None for each in (name, *heads)]
        bias = any(biased) or name in config.added_biases
        layer = empty_module(name, option, rows, columns, bias=bias)
        layers |= {name: layer, **{head: TiedHead(layer) for head in heads}}
        if maps.is_table(dense) or dense is head_of_dense:
            fix_size_(model)
    replace_modules(model, layers)


def _untied_(model: PreTrainedModel, name: str) -> list[str]:
    """Name the heads that are tied to an embedding, whose weights are no longer tied."""
    tied: dict[str, str] = model.all_tied_weights_keys
    heads = [target for target, source in tied.items() if source == f"{name}.weight"]
    for head in heads:
        del tied[head]
    return [head.removesuffix(".weight") for head in heads]


def _joint_specs(model: nn.Module, units: Mapping[str, str]) -> dict[str, LayerSpec]:
    """Map the layers with joint options, which all layers of a part must have."""
    forms = {name: text.partition(" ")[0] for name, text in units.items()}
    joint = {name: units[name] for name, form in forms.items() if form in FORMS and is_joint(form)}
    if not joint:
        return {}
    with reading(CheckpointError, "restore config.json", own=ModelError):
        specs = maps.map_model(model).by_name
    group_of = {spec.name: group for group in sharing(specs.values()) for spec in group}
    for name, text in joint.items():
        if forms[name] not in WHOLE_PARTS:
            group = group_of.get(name)
            if group is None:
                raise CheckpointError(
                    f"{name} cannot be {text!r}: it shares its input with no other layer; restore "
                    "config.json."
                )
            _require_together(name, text, [spec.name for spec in group], units)
            continue
        part = specs[name].closing if name in specs else None
        if part is None:
            raise CheckpointError(
                f"{name} cannot be {text!r}: it is of no attention or MLP; restore config.json."
            )
        if forms[name] == Neurons.name and not specs[name].neurons:
            raise CheckpointError(
                f"{name} cannot be {text!r}: an attention has no neurons; restore config.json."
            )
        others = [other for other, spec in specs.items() if spec.closing == part]
        _require_together(name, text, others, units)
    return {name: specs[name] for name in joint}


def _require_together(
    name: str, text: str, others: Iterable[str], units: Mapping[str, str]
) -> None:
    """Refuse a joint option of a layer that not all others of its part have."""
    for other in others:
        if units.get(other) != text:
            which = (
                "of an attention or MLP" if text.split(" ")[0] in WHOLE_PARTS else "with one input"
            )
            raise CheckpointError(
                f"{name} is {text!r} and {other} is {units.get(other, 'dense')!r}: all layers "
                f"{which} take this option together; restore config.json."
            )
