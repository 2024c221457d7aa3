"""What tests share: a cache, a store and compositions of their own, one thread, tiny models."""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

# Before lrbo: what is first imported below jaxtyping's import hook is compiled anew.
import ax.api.client  # noqa: F401
import hydra
import matplotlib.figure  # noqa: F401
import pydantic  # noqa: F401
import pytest
import rich.console  # noqa: F401
import torch
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import (
    CachingConfigRepository,
    ConfigRepository,
    IConfigRepository,
)
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ResultDefault
from hydra.core.utils import JobRuntime
from hydra.plugins.config_source import ConfigResult
from hypothesis import settings
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lrbo.models.model_map import map_model
from lrbo.models.specs import ModelMap
from lrbo.models.tiny import byte_tokenizer, tiny_model
from lrbo.reports import page
from lrbo.study.study_record import StudyRecord
from lrbo.tracking import mlflow_store
from tests.support.tiny import CASES, build

# deadline=None: the machines that run this are shared. derandomize: a failure is the same for
# everybody who runs the same commit.
settings.register_profile("lrbo", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("lrbo")

# More take tiny tensors longer, and wait for each other where several processes share the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what the tests cache out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRBO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class _LoadedOnce(CachingConfigRepository):
    """Keeps files that were read for the next composition; Hydra copies sources and forgets."""

    _of_sources: ClassVar[dict[str, dict[str, ConfigResult | None]]] = {}

    def __init__(self, delegate: ConfigRepository) -> None:
        self.delegate = copy.copy(delegate)
        self.cache = self._of_sources.setdefault(_sources_of(delegate), {})

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        self.cache = self.cache.copy()  # what is read from now on has other sources
        super().initialize_sources(config_search_path)


def _sources_of(repository: IConfigRepository) -> str:
    return repr([(source.provider, source.path) for source in repository.get_sources()])


@pytest.fixture(scope="session", autouse=True)
def _composed_once() -> Iterator[None]:
    """Compose the same values once: Hydra takes a tenth of a second, and did a quarter of the time.

    Groups are put together once, whatever else is typed. Everybody gets a copy. What a composition
    depends on is in its key, and conf/ does not change.
    """
    load, put_together = (
        ConfigLoaderImpl.load_configuration,
        ConfigLoaderImpl._compose_config_from_defaults_list,
    )
    composed: dict[str, DictConfig] = {}

    def load_configuration(self: ConfigLoaderImpl, *args: Any, **options: Any) -> DictConfig:
        job = JobRuntime.instance().get("name")
        key = repr((args, options, _sources_of(self.repository), job, hydra.version.getbase()))
        if key not in composed:
            composed[key] = load(self, *args, **options)
        config = copy.deepcopy(composed[key])
        config.hydra.runtime.cwd = str(Path.cwd())
        return config

    def of_groups(
        self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: _LoadedOnce
    ) -> DictConfig:
        key = repr((defaults, _sources_of(repo), hydra.version.getbase()))
        if key not in composed:  # from files of its own: it does not copy what it takes from them
            composed[key] = put_together(self, defaults, CachingConfigRepository(repo.delegate))
        return copy.deepcopy(composed[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigLoaderImpl, "load_configuration", load_configuration)
        patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", of_groups)
        patch.setattr(config_loader_impl, "CachingConfigRepository", _LoadedOnce)
        yield


@pytest.fixture(scope="session", autouse=True)
def make_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], None]]:
    """Copy an empty MLflow store wherever a new one is made: its tables take a second each time.

    What would make it is given to a test that asks for it.
    """
    template = tmp_path_factory.mktemp("template") / "mlflow.db"
    make = mlflow_store.make_store

    def copied(database: Path) -> None:
        if not template.exists():
            make(template)
        beside = database.with_name(f".{database.name}.copy")
        shutil.copy(template, beside)
        beside.rename(database)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_store, "make_store", copied)
        yield make


@pytest.fixture(autouse=True)
def _no_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the page out of searches: it takes longer than most of the tiny ones.

    Studies that a module shares have theirs, and so has a test that asks for ``pages``.
    """

    def unchanged(study: StudyRecord) -> str:
        file = study.folder / "report.html"
        return file.read_text("utf-8") if file.is_file() else ""

    if "pages" not in request.fixturenames:
        monkeypatch.setattr(page, "study_page", unchanged)


@pytest.fixture
def pages() -> None:
    """Let searches of this test write their pages."""


@pytest.fixture
def family_model() -> Callable[[str], PreTrainedModel]:
    """Build a fresh tiny model of a case in ``tests.support.tiny.CASES``; a test may change it."""
    return build


@pytest.fixture
def model() -> PreTrainedModel:
    """Build a fresh tiny Llama model in float64, in evaluation mode."""
    return tiny_model().double().eval().requires_grad_(False)


@pytest.fixture
def one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a case of one block: compiling takes a second for each."""
    config = copy.deepcopy(CASES["llama_tied"])
    config.num_hidden_layers = 1
    monkeypatch.setitem(CASES, "one block", config)


@pytest.fixture
def layers(model: PreTrainedModel) -> ModelMap:
    """Map the tiny Llama model."""
    return map_model(model)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return the byte tokenizer."""
    return byte_tokenizer()


@pytest.fixture
def generator() -> torch.Generator:
    """Return a seeded generator."""
    return torch.Generator().manual_seed(20240915)


@pytest.fixture(scope="session")
def mlflow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the MLflow store."""
    return tmp_path_factory.mktemp("mlflow store")


@pytest.fixture
def store(mlflow_folder: Path) -> Any:
    """Return a study of its own in a store that all tests share: its tables take seconds."""
    from tests.support.mlflow_runs import (
        Store,  # which imports mlflow: two seconds for those who need it
    )

    return Store(mlflow_folder)
