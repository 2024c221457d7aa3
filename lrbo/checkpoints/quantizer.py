"""How transformers opens a checkpoint: the quantization config ``lrbo`` and its quantizer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from pydantic import ConfigDict, with_config
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import TypedDict

# Not its names: its import of transformers may be what imports this module.
from lrbo import model as maps
from lrbo import stored
from lrbo.accounting import Storage
from lrbo.errors import CheckpointError, ModelError
from lrbo.families import is_pointwise
from lrbo.layers import LowRankLinear, PivotedLinear, no_weight
from lrbo.parsing import ContentError, Count, checked
from lrbo.shell import command

METHOD = "lrbo"
FORMAT = 3
KINDS: Mapping[str, type[LowRankLinear] | type[PivotedLinear]] = {
    "factored": LowRankLinear,
    "pivoted": PivotedLinear,
}


@with_config(ConfigDict(extra="forbid"))
class _About(TypedDict):
    """The values of :class:`LowRankConfig` in ``config.json``."""

    quant_method: NotRequired[Literal["lrbo"]]
    format: Count
    storage: Storage
    parameters: Count
    ranks: dict[str, Count]
    added_biases: list[str]
    provenance: dict[str, Any]


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):
    """What ``config.json`` says of the low-rank layers, under ``quantization_config``.

    Attributes:
        quant_method: ``"lrbo"``.
        format: Version of what is written here.
        storage: The form of every low-rank layer, ``"factored"`` or ``"pivoted"``.
        parameters: Floating-point numbers in the files.
        ranks: By layer name; dense layers are left out.
        added_biases: Layers with a rank whose bias the dense layer does not have.
        provenance: How the model was made; for readers, not for loading.
    """

    def __init__(self, **values: Any) -> None:
        """Take the values of ``config.json``.

        Raises:
            CheckpointError: If they are of another format, or cannot be right.
        """
        _require_format(values.get("format"), values)
        try:
            about: _About = checked(values, _About, "the quantization_config of the checkpoint")
        except ContentError as error:
            raise CheckpointError(f"{error}; restore config.json.") from error
        if strangers := set(about["added_biases"]) - set(about["ranks"]):
            raise CheckpointError(
                f"the quantization_config of the checkpoint: added_biases has {min(strangers)}, "
                "expected layers with a rank; restore config.json."
            )
        self.quant_method = METHOD
        self.format = about["format"]
        self.storage: str = about["storage"]
        self.parameters = about["parameters"]
        self.ranks = about["ranks"]
        self.added_biases = about["added_biases"]
        self.provenance = about["provenance"]


def _require_format(found: object, about: Mapping[str, Any]) -> None:
    """Refuse a format that is not the present one, and say what to do.

    Raises:
        CheckpointError: If it is another one.
    """
    if type(found) is not int:
        todo = "restore config.json"
    elif found == FORMAT:
        return
    elif found > FORMAT:
        todo = "a newer lrbo wrote it: upgrade lrbo"
    else:
        todo = f"an older lrbo wrote it: {how_to_rewrite(about.get('provenance', {}))}"
    raise CheckpointError(
        f"the checkpoint has format {found!r}, this lrbo reads format {FORMAT}; {todo}."
    )


def how_to_rewrite(about: object) -> str:
    """Return how a checkpoint comes from its study again.

    Args:
        about: What is known of its making: ``study`` and ``trial``, perhaps.
    """
    known = about if isinstance(about, Mapping) else {}
    study, trial = known.get("study", "NAME"), known.get("trial", "best")
    return f"write it again with: {command('compress', study=study, point=trial, out='FOLDER')}"


@register_quantizer(METHOD)
class LowRankQuantizer(HfQuantizer):
    """Puts empty low-rank layers into a model before its weights are read, and checks the files.

    Nothing is quantized: it is the place where transformers lets layers of another kind in.
    """

    # Loading a dense model does not compress it; transformers then says so.
    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **options: Any
    ) -> PreTrainedModel:
        """Replace layers, and compare the files with what the model then wants.

        Raises:
            CheckpointError: If a layer or a tensor is not what it should be, naming it.
        """
        if model.get_output_embeddings() is None:
            raise CheckpointError(
                f"the checkpoint is a causal language model and {type(model).__name__} is none: "
                "open it with AutoModelForCausalLM, whose base_model is what lies below its head."
            )
        put_in(model, self.quantization_config)
        if (files := options.get("checkpoint_files")) is not None:
            paths = [Path(file) for file in files]
            _require_inside(paths, Path(model.config._name_or_path))
            check_files(model, paths, self.quantization_config.parameters)
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_options: Any
    ) -> PreTrainedModel:
        """Check the orders of outputs, which are numbers that decide where others go.

        Raises:
            CheckpointError: If one is no order, naming it.
        """
        # transformers refuses float() and half() of a quantized model, and to train it compiled.
        model.is_quantized = False
        for name, module in model.named_modules():
            if isinstance(module, LowRankLinear | PivotedLinear) and not module.weight.is_meta:
                # As read it begins in memory where the next tensor does, which torch.save refuses.
                module.weight = no_weight(module.weight)
            if isinstance(module, PivotedLinear) and not module.places.is_meta:
                places = module.places.cpu()
                if not torch.equal(places.sort().values, torch.arange(len(places)).int()):
                    raise CheckpointError(
                        f"{name}.places is no order of the layer's {len(places)} outputs; the "
                        "weights of the checkpoint are damaged: copy it again."
                    )
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Count what ``save_pretrained`` is about to write: the embedding may have other rows."""
        counted = sum(p.numel() for p in model.parameters())
        model.config.quantization_config.parameters = counted
        return None, {}

    def is_serializable(self) -> bool:
        """Return that ``save_pretrained`` writes what ``from_pretrained`` opens."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return that adapters can be trained on it."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Return that its weights can be trained: they are floating-point numbers."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Return that ``torch.compile`` takes it."""
        return True


def put_in(model: nn.Module, config: LowRankConfig) -> None:
    """Replace the layers that have a rank by empty ones of that rank, on the meta device.

    Args:
        model: Changed.
        config: What ``config.json`` says.

    Raises:
        CheckpointError: If there is no such layer, or it cannot have the rank.
    """
    kind = KINDS[config.storage]
    for name, rank in config.ranks.items():
        try:
            dense = model.get_submodule(name)
        except AttributeError:
            dense = nn.Identity()
        if not maps.is_linear(dense):
            raise CheckpointError(
                f"{name} in the ranks of the checkpoint is no linear layer of "
                f"{type(model).__name__}; config.json was changed, or is of another model."
            )
        rows, columns = maps.linear_weight(dense).shape
        if rank > min(rows, columns):
            raise CheckpointError(
                f"{name} cannot have rank {rank}: the layer is {rows} by {columns}; restore "
                "config.json."
            )
        bias = maps.linear_bias(dense) is not None or name in config.added_biases
        layer = kind.empty(rows, columns, rank, bias=bias).train(dense.training)
        if isinstance(layer, PivotedLinear):
            layer.take_pointwise(is_pointwise(name))
        model.set_submodule(name, layer)


def check_files(model: PreTrainedModel, files: Iterable[Path], parameters: int) -> None:
    """Compare names, shapes and count of the stored tensors with the model; reads headers only.

    transformers starts a missing tensor at random and passes over one too many.

    Args:
        model: With its low-rank layers in place, perhaps on the meta device.
        files: All files of weights.
        parameters: Floating-point numbers that they should hold.

    Raises:
        CheckpointError: If they differ, naming the file and up to three tensors.
    """
    files = list(files)
    where = files[0].parent
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, tensor in stored_tensors(file).items():
            if name in shapes:
                raise CheckpointError(f"{file} holds {name}, and so does another file of {where}.")
            shapes[name] = tensor.shape
    total = sum(map(count_parameters, files))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    excused = {name for pair in tied.items() if set(pair) & set(shapes) for name in pair}
    missing = sorted(set(wanted) - set(shapes) - excused)
    strange = sorted(set(shapes) - set(wanted))
    if missing or strange:
        raise CheckpointError(
            f"the files of weights in {where} do not fit its config.json: missing "
            f"{_some(missing)}, not expected {_some(strange)}; copy the folder whole."
        )
    for name, shape in shapes.items():
        if shape != wanted[name]:
            raise CheckpointError(
                f"{name} in {where} has shape {shape}, config.json wants {wanted[name]}; the "
                "weights or config.json were changed."
            )
    if total != parameters:
        raise CheckpointError(
            f"{where} holds {total:_} parameters, its config.json states {parameters:_}; the "
            "weights or config.json were changed."
        )


def _require_inside(files: Iterable[Path], folder: Path) -> None:
    """Refuse files of weights elsewhere, which an index may name; a link in the folder is fine.

    Raises:
        CheckpointError: Naming the first.
    """
    home = folder.absolute()
    for file in files if folder.is_dir() else []:  # in the hub's cache its client sees to it
        if not Path(os.path.normpath(file.absolute())).is_relative_to(os.path.normpath(home)):
            raise CheckpointError(
                f"the index of {folder} names the file {file}, expected one in the folder; copy "
                "the folder again."
            )


def _some(names: list[str]) -> str:
    """Return the first names of a list, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "") or "nothing"


def stored_tensors(file: Path) -> dict[str, stored.StoredTensor]:
    """Return what a file of weights holds by name; reads the header only.

    Raises:
        CheckpointError: If it is no whole safetensors file; others are not opened, because to
            open a pickle may be to run what it says.
    """
    if file.suffix != ".safetensors":
        raise CheckpointError(
            f"{file} is no safetensors file, and lrbo opens no other: a pickle could run code."
        )
    try:
        return stored.tensors_in(file)
    except ModelError as error:
        raise CheckpointError(f"{error}; copy the checkpoint again.") from error


def count_parameters(file: Path) -> int:
    """Return the floating-point numbers in a safetensors file; reads its header only.

    Raises:
        CheckpointError: If it is no whole safetensors file.
    """
    return sum(math.prod(t.shape) for t in stored_tensors(file).values() if t.is_floating_point)
