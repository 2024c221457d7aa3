"""An empty folder for a study, and a study that was begun."""

from pathlib import Path

import pytest

from lrbo.study.journal import Study
from tests.support.small_study import ABOUT, CONFIG


@pytest.fixture
def none(tmp_path: Path) -> Study:
    return Study(tmp_path / "study")


@pytest.fixture
def study(none: Study) -> Study:
    none.begin(ABOUT, CONFIG)
    return none
