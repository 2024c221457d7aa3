"""The values of a small search, and a reporter that notes what was said."""

from lrbo.config.compose import composed
from lrbo.config.schema import SearchConfig
from lrbo.progress import Reporter

SMALL = ["experiment=tiny", "search.trials=1", "search.initial=2", "tracking.enabled=false"]
SMALL += [f"data.{role}.tokens=512" for role in ("calibration", "validation", "test")]


class RecordingReporter(Reporter):
    """Notes what was said and which steps were done."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        """Note a line; what a step took is told as one too."""
        self.lines.append(message)

    @property
    def steps(self) -> list[str]:
        """Return which of the two expensive things were made."""
        titles = [line.partition(":")[0] for line in self.lines]
        return [name for name in ("Calibration", "Factorization") if name in titles]


def small_config(*overrides: str) -> SearchConfig:
    config = composed("search", [*SMALL, *overrides])
    assert isinstance(config, SearchConfig)
    return config
