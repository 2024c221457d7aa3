"""A model is looked for where it lies; the hub is asked once."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from lrbo.errors import ModelError
from lrbo.models import loading, sources
from lrbo.models.loading import load_model, load_skeleton, load_tokenizer
from lrbo.models.sources import ModelSource

CPU = torch.device("cpu")
TINY = ModelSource("tiny", "tiny")
LOADERS: dict[str, Callable[[ModelSource], object]] = {
    "model": partial(load_model, dtype=None, device=CPU),
    "skeleton": load_skeleton,
    "tokenizer": load_tokenizer,
}


@pytest.mark.parametrize("source", [TINY, ModelSource("hf", "some/model")])
def test_other_sources_need_no_package(source: ModelSource) -> None:
    assert source.missing_package() is None


@pytest.mark.parametrize("load", LOADERS)
def test_a_hub_that_does_not_answer_is_asked_once(
    load: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asked six times, with longer and longer waits, for every file."""
    urls = []

    def metadata(url: str) -> None:
        urls.append(url)
        raise OSError("no route to host.")

    monkeypatch.setattr(sources, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(loading, "AutoConfig", None)
    monkeypatch.setattr(loading, "AutoTokenizer", None)
    sources._ask_hub.cache_clear()
    with pytest.raises(
        ModelError, match=r"not answer: no route to host\. Give .* download no/such"
    ):
        LOADERS[load](ModelSource("hf", "no/such"))
    assert len(urls) == 1


def test_what_was_fetched_from_the_hub_before_is_opened_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "try_to_load_from_cache", lambda *_, **__: "config.json")
    monkeypatch.setattr(sources, "get_hf_file_metadata", lambda _: pytest.fail("asked the hub"))
    sources._ask_hub.cache_clear()
    assert ModelSource("hf", "was/fetched").folder_or_hub_id() == "was/fetched"


def test_what_is_asked_of_the_hub_is_said_once(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that does not answer is asked for a minute; a folder is never asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    caplog.set_level("INFO", logger="lrbo")
    sources._announce_hub.cache_clear()
    for path in ("no/such", "no/such", str(tmp_path)):
        for load in (load_tokenizer, load_skeleton):
            with pytest.raises(ModelError):
                load(ModelSource("hf", path))
    messages = [
        record.message for record in caplog.records if "asking the model hub" in record.message
    ]
    assert messages == ["no/such is no folder here; asking the model hub for it"]
