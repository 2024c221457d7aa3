"""Schema of conf/: one dataclass per file and group, values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lrbo.options import SQLITE, STUDIES

# A required value; the string that OmegaConf's MISSING stands for.
MISSING: Any = "???"
# Keys whose values are paths, or the addresses of files, in which a leading ~ is a home folder.
PATHS = (
    "study", "studies", "out", "record", "text_folder", "task_folder", "checkpoint", "model.path",
    "data.*.path", "protocols.*.path", "tracking.uri", "uri", "warm_start",
)  # fmt: skip


@dataclass
class ModelConfig:
    """conf/model."""

    name: str = MISSING
    source: str = MISSING
    path: str = MISSING
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"


@dataclass
class RoleConfig:
    """The text of one role."""

    path: Any = None
    tokens: int | None = None
    format: str = "auto"
    column: str = "text"


@dataclass
class DataConfig:
    """conf/data."""

    name: str = MISSING
    source: str = MISSING
    window: int = 512
    max_windows: int | None = None
    bos: bool | None = None
    calibration: RoleConfig = field(default_factory=RoleConfig)
    validation: RoleConfig = field(default_factory=RoleConfig)
    test: RoleConfig = field(default_factory=RoleConfig)


@dataclass
class MethodConfig:
    """conf/method; an option that the method does not have must stay null."""

    name: str = MISSING
    alpha: float | None = None
    input_shrinkage: float | None = None
    output_shrinkage: float | None = None
    output_power: float | None = None
    centred: bool | None = None
    one_sided: list[str] | None = None


@dataclass
class SpaceConfig:
    """conf/space."""

    name: str = MISSING
    type: str = "ratios"
    granularity: str = "kind"
    depth_groups: int = 1
    groups: dict[str, list[str]] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    bounds: list[float] = field(default_factory=lambda: [0.2, 1.0])
    rank_multiple: int = 8
    minimum_rank: int = 0
    knots: int = 3
    exponent: bool = True
    start: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
    tied: list[list[str]] = field(default_factory=list)


@dataclass
class BudgetConfig:
    """conf/budget."""

    keep_ratio: float = 0.8
    lowest: float | None = None
    storage: str = "pivoted"


@dataclass
class SearchSection:
    """How long to search, and for what."""

    trials: int = 30
    initial: int = 7
    kl_weight: float = 0.0
    racing: float | None = None
    size: str = "keep_ratio"
    thresholds: dict[str, float] = field(default_factory=dict)
    other_versions: bool = False


@dataclass
class CalibrationConfig:
    """How statistics are gathered."""

    groups: int = 32
    batch_windows: int = 4
    labels: str = "sampled"
    gradient_share: float = 0.5
    memory_gib: float = 2.0


@dataclass
class SensitivityConfig:
    """How loss curves are made."""

    enabled: bool = True
    layers_per_kind: int = 3
    ranks: int = 3
    windows: int = 4
    apply: bool = False


@dataclass
class EvaluationConfig:
    """How trials are scored."""

    batch_windows: int = 4
    chunk_tokens: int = 256
    kl_top: int = 128
    pool_tokens: int | None = None
    pool_allocations: int = 8


@dataclass
class LatencyConfig:
    """How long the compressed model takes beside the dense one."""

    enabled: bool = False
    tokens: int | None = None
    repeats: int = 7
    warmup: int = 1


@dataclass
class TrackingConfig:
    """Where MLflow is."""

    enabled: bool = True
    uri: str = f"{SQLITE}${{studies}}/mlflow.db"
    experiment: str = "lrbo"


@dataclass
class ExecutorConfig:
    """conf/executor."""

    name: str = "inline"
    address: str | None = None
    workers: int | None = 1
    devices: int | None = None
    oversubscribe: bool = False


@dataclass
class SearchConfig:
    """conf/search.yaml."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    space: SpaceConfig = field(default_factory=SpaceConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    search: SearchSection = field(default_factory=SearchSection)
    warm_start: list[str] = field(default_factory=lambda: ["uniform", "analytic", "start"])
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    study: str = MISSING
    studies: str = STUDIES
    seed: int = 0
    output: str = "text"


@dataclass
class ReportConfig:
    """conf/report.yaml."""

    study: Any = MISSING
    studies: str = STUDIES
    sync: bool = False
    figures: bool = True
    format: str = "text"
    output: str = "text"


@dataclass
class RefitConfig:
    """How chosen ranks are solved again."""

    enabled: bool = True
    blend: float = 0.5
    feedback: float = 1.0
    ridge: float = 0.03
    output_power: float = 0.75
    held_back: float | None = None
    candidates: int = 1


@dataclass
class CompressConfig:
    """conf/compress.yaml."""

    study: str = MISSING
    studies: str = STUDIES
    point: str = "best"
    out: str = MISSING
    format: str = "lrbo"
    register: str = "link"
    refit: RefitConfig = field(default_factory=RefitConfig)
    dtype: str = "auto"
    output: str = "text"


@dataclass
class ProtocolConfig:
    """conf/protocols: from which text, and how, the windows of a perplexity are cut."""

    hub: str = MISSING
    file: str = MISSING
    strip: bool = False
    documents: int | None = None
    join: str = "\n\n"
    bos: str = "start"
    window: int = 2048
    max_windows: int | None = None
    path: str | None = None
    format: str = "auto"
    column: str | None = None


@dataclass
class EvaluateConfig:
    """conf/evaluate.yaml."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    protocols: dict[str, ProtocolConfig] = field(default_factory=dict)
    text_folder: str | None = None
    tasks: list[str] = field(default_factory=list)
    task_folder: str | None = None
    limit: int | None = None
    checkpoint: str | None = None
    allow_seen: bool = False
    seed: int = 0
    batch_windows: int = 4
    batch_items: int = 16
    chunk_tokens: int = 256
    studies: str = STUDIES
    record: str | None = "${studies}/evaluations.jsonl"
    output: str = "text"


@dataclass
class BenchmarkConfig:
    """conf/benchmark.yaml."""

    checkpoint: str = MISSING
    device: str = "auto"
    dtype: str = "auto"
    prompts: list[int] = field(default_factory=lambda: [128, 512])
    batch: int = 1
    steps: int = 16
    repeats: int = 7
    warmup: int = 2
    threads: int | None = None
    compile: bool = False
    memory: bool = True
    studies: str = STUDIES
    record: str | None = "${studies}/benchmarks.jsonl"
    output: str = "text"


@dataclass
class DashboardConfig:
    """conf/dashboard.yaml."""

    studies: str = STUDIES
    uri: str = f"{SQLITE}${{studies}}/mlflow.db"
    host: str = "127.0.0.1"
    port: int = 5000
    allowed_hosts: list[str] = field(default_factory=list)


Config = (
    SearchConfig
    | ReportConfig
    | CompressConfig
    | EvaluateConfig
    | BenchmarkConfig
    | DashboardConfig
)
SCHEMAS: dict[str, type[Config]] = {
    "search": SearchConfig,
    "report": ReportConfig,
    "compress": CompressConfig,
    "evaluate": EvaluateConfig,
    "benchmark": BenchmarkConfig,
    "dashboard": DashboardConfig,
}
