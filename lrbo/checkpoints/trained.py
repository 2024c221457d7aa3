"""Write a checkpoint again with other numbers: the same options, shapes, dtypes and bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrbo.checkpoints import export
from lrbo.checkpoints.calibration_text import save_seen
from lrbo.checkpoints.tensors import read_headers
from lrbo.data.windows import Role, TokenWindows
from lrbo.errors import CheckpointError, some
from lrbo.files.parsing import parse_json, without_infinity
from lrbo.files.rendering import markdown
from lrbo.models import headers
from lrbo.models.parameters import not_finite

SHOWN = 3  # tensors that a message names
# What names a folder in the code of a card, as JSON writes it.
OPENS = re.compile(r"(?<=from_pretrained\()\"(?:[^\"\\]|\\.)*\"")
COMMANDS = "\n## Make it again\n"
LOADING = "\n## Load\n"


def stored_in(folder: Path) -> dict[str, Tensor]:
    """Map the tensors in the files of a checkpoint, by name."""
    return read_headers(headers.weight_files(folder))


def round_(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> None:
    """Round the numbers of a model, in place, to the dtypes that a checkpoint has them in.

    Raises:
        CheckpointError: If other tensors are in the model than in the checkpoint, of other shapes
            or of another kind of numbers; or if one is not finite then.
    """
    held = export.stored_tensors(model)
    problems = [
        f"{name} is {_described(held.get(name))}, expected {_described(tensor)}"
        for name, tensor in stored.items()
        if name not in held
        or held[name].shape != tensor.shape
        or held[name].is_floating_point() != tensor.is_floating_point()
    ]
    if problems:
        raise CheckpointError(
            f"what was trained is not what the checkpoint has: {some(problems, SHOWN)}; nothing "
            "was written"
        )
    for name, tensor in stored.items():
        if held[name].dtype != tensor.dtype:
            _put(model, name, held[name].detach().to(tensor.dtype))
    if problem := not_finite(model):
        raise CheckpointError(f"as it is written, {problem} Begin again with a smaller lr")


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._parameters:
        module.get_parameter(own).data = tensor
    else:
        setattr(module, own, tensor)


def _described(tensor: Tensor | None) -> str:
    if tensor is None:
        return "not there"
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def save(
    folder: Path,
    source: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    describe: Callable[[Path], tuple[Mapping[str, Any], str]],
    *,
    windows: Mapping[Role, TokenWindows],
) -> int:
    """Write a model as the checkpoint that it was loaded from, with its present numbers.

    Args:
        folder: Must not exist.
        source: The checkpoint; what is written has its configuration.
        model: After :func:`round_`.
        tokenizer: Of the checkpoint.
        describe: Called with the folder once it opens as a checkpoint, to score what is written;
            returns what is added to what the checkpoint remembers, and the text of its card.
        windows: That it was trained and judged on, beside those of the source.

    Returns:
        Bytes of the tensors, which are those of the source.

    Raises:
        CheckpointError: If the folder exists, or a tensor is not as in the source.
    """
    stored, own = stored_in(source), export.stored_tensors(model)
    with export.checkpoint_folder(folder, model, tokenizer, None, None) as beside:
        files = export.write_tensors(beside, {name: own[name] for name in stored})
        written = read_headers(files)
        other = [
            f"{name} is {_described(written.get(name))}, expected {_described(tensor)}"
            for name, tensor in stored.items()
            if _described(written.get(name)) != _described(tensor)
        ]
        if other or written.keys() != stored.keys():
            raise CheckpointError(
                f"{folder}: {some(other, SHOWN, 'other tensors')} in {source}; nothing was written"
            )
        path = source / export.CONFIG
        values = parse_json(path.read_bytes(), str(path))
        (beside / export.CONFIG).write_text(json.dumps(values), encoding="utf-8")
        about, card = describe(beside)
        values["quantization_config"]["provenance"] |= without_infinity(about)
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (beside / export.CONFIG).write_text(text, encoding="utf-8")
        (beside / export.CARD).write_text(card, encoding="utf-8")
        save_seen(beside, windows, before=source)
    return sum(tensor.nbytes for tensor in written.values())


def with_section(card: str | None, name: str, section: str, command: str) -> str:
    """Return the card of a checkpoint that was trained further, made of that from before.

    Args:
        card: Of the checkpoint before; ``None`` if it has none.
        name: Of the new folder.
        section: Markdown about what was done, with its heading.
        command: The command line that did it, which is added to those that make it again.
    """
    if card is None:
        return f"# {markdown(name)}\n\n{section}\n{COMMANDS}\n```bash\n{command}\n```\n"
    lines = card.split("\n")
    title = next((at for at, line in enumerate(lines) if line.startswith("# ")), None)
    if title is not None:
        lines[title] = f"# {markdown(name)}"
    text = OPENS.sub(lambda _: json.dumps(name, ensure_ascii=False), "\n".join(lines))
    text = text.replace("\n| this model", "\n| before recovery")
    before, heading, after = text.partition(LOADING)
    text = f"{before}\n{section}\n{heading}{after}" if heading else f"{text}\n{section}\n"
    before, heading, after = text.rpartition(COMMANDS)
    fence = after.find("\n```\n", after.find("```") + 3)
    if heading and fence >= 0:
        after = f"{after[:fence]}\n{command}{after[fence:]}"
    return f"{before}{heading}{after}"
