"""Schema of conf/: one dataclass per file and group, values only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

from lrbo.config import choices, options
from lrbo.config.options import ANY_COUNT, REPEATED, Rule, at_least, flatten, one_of, option
from lrbo.config.recovery import DenseConfig, RecoverySection, SearchRecovery
from lrbo.config.rules import (
    ALLOCATIONS,
    CONFIDENCE,
    DTYPE,
    FORMAT,
    HOSTS,
    INCLUDE,
    LENGTHS,
    LIMIT,
    NAME,
    OUTPUT,
    POINT,
    SEED,
    SIZE,
    STARTS,
    WINDOW,
)

# A required value; the string that OmegaConf's MISSING stands for.
MISSING: Any = "???"

# Keys whose values are paths, or the addresses of files, in which a leading ~ is a home folder.
PATHS = (
    "study", "studies", "out", "record", "text_folder", "task_folder", "checkpoint", "model.path",
    "model.base",
    "data.*.path", "protocols.*.path", "tracking.uri", "uri", "warm_start",
)  # fmt: skip


@dataclass
class ModelConfig:
    """conf/model."""

    name: str = MISSING
    source: str = option(MISSING, one_of(("packaged", "hf", "tiny")))
    path: str = MISSING
    revision: str | None = None
    base: str | None = None
    dtype: str = option("auto", DTYPE)
    device: str = "auto"


@dataclass
class RoleConfig:
    """The text of one role."""

    path: Any = None
    tokens: int | None = None
    format: str = option(choices.AUTO, FORMAT)
    column: str = "text"


@dataclass
class DataConfig:
    """conf/data."""

    name: str = MISSING
    source: str = option(MISSING, one_of(choices.SOURCES))
    window: int = option(512, WINDOW)
    max_windows: int | None = option(None, LIMIT)
    bos: bool | None = None
    calibration: RoleConfig = field(default_factory=RoleConfig)
    validation: RoleConfig = field(default_factory=RoleConfig)
    test: RoleConfig = field(default_factory=RoleConfig)


@dataclass
class SpaceConfig:
    """conf/space."""

    name: str = MISSING
    type: str = option("ratios", one_of(choices.RANGES))
    forms: list[str] = field(default_factory=lambda: ["pivoted"])
    granularity: str = "kind"
    depth_groups: int = 1
    groups: dict[str, list[str]] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    bounds: list[float] = field(default_factory=lambda: [0.2, 1.0])
    rank_multiple: int = option(8, ANY_COUNT)
    minimum_rank: int = 0
    knots: int = 3
    exponent: bool = True
    form_weights: bool = True
    start: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
    tied: list[list[str]] = option(list, Rule("lists of names or patterns of variables", all))


@dataclass
class BudgetConfig:
    """conf/budget."""

    keep_ratio: float = option(0.8, options.ABOVE_0_TO_1)
    bits_per_parameter: float | None = option(None, options.ABOVE_0.or_null())
    lowest: float | None = None
    measure: str = "parameters"
    include: list[str] = option(lambda: [choices.BLOCKS], INCLUDE)

    def kept(self, itemsize: int) -> float:
        """Return the share that is kept of parameters of so many bytes."""
        bits = self.bits_per_parameter
        return self.keep_ratio if bits is None else bits / (8 * itemsize)


@dataclass
class SearchSection:
    """How long to search, and for what."""

    trials: int = option(30, ANY_COUNT)
    initial: int = option(7, at_least(2, ": baseline and start"))
    kl_weight: float = option(0.0, options.FROM_0)
    racing: float | None = option(None, CONFIDENCE)
    size: str = option("keep_ratio", SIZE)
    thresholds: dict[str, float] = option(dict, replace(options.ABOVE_0, each=True))
    other_versions: bool = False


@dataclass
class CalibrationConfig:
    """How statistics are gathered."""

    groups: int = option(32, ANY_COUNT)
    batch_windows: int = option(4, ANY_COUNT)
    labels: str = option("sampled", one_of(("sampled", "data")))
    gradient_share: float = option(0.5, options.ABOVE_0_TO_1)
    memory_gib: float = option(2.0, options.FROM_0)


@dataclass
class BasesConfig:
    """How weights become integers, codebooks, a few entries, Kronecker sums or groups of rows."""

    method: str = "gptq"
    group_sizes: list[int] = field(default_factory=lambda: [64])
    percentages: list[int] = field(default_factory=lambda: [50])
    row_percentages: list[int] = field(default_factory=lambda: [5])
    blocks: list[list[int]] = field(default_factory=lambda: [[2, 1], [1, 2]])
    frequency_groups: list[int] = field(default_factory=lambda: [8])
    bands: list[list[int]] = field(default_factory=lambda: [[2, 32]])
    damping: float = 0.01
    sweeps: int = 0
    factor_bits: int = option(8, Rule("8 or 16", lambda v: v in (8, 16)))


@dataclass
class SensitivityConfig:
    """How loss curves are made."""

    enabled: bool = True
    layers_per_kind: int = option(3, at_least(0))
    ranks: int = option(3, ANY_COUNT)
    windows: int = option(4, ANY_COUNT)


@dataclass
class EvaluationConfig:
    """How trials are scored."""

    batch_windows: int = option(4, ANY_COUNT)
    chunk_tokens: int = option(256, ANY_COUNT)
    kl_top: int = option(128, ANY_COUNT)
    pool_tokens: int | None = None
    pool_allocations: int = option(8, ALLOCATIONS)


@dataclass
class LatencyConfig:
    """How long the compressed model takes beside the dense one."""

    enabled: bool = False
    tokens: int | None = None
    repeats: int = option(7, at_least(3, ", for a median", most=REPEATED))
    warmup: int = option(1, at_least(0, most=REPEATED))


@dataclass
class TrackingConfig:
    """Where MLflow is."""

    enabled: bool = True
    uri: str = f"{choices.SQLITE}${{studies}}/mlflow.db"
    experiment: str = option("lrbo", NAME)


@dataclass
class ExecutorConfig:
    """conf/executor."""

    name: str = option("inline", one_of(("inline", "ray")))
    address: str | None = None
    workers: int | None = option(1, LIMIT)
    devices: int | None = option(None, LIMIT)
    oversubscribe: bool = False


@dataclass
class SearchConfig:
    """conf/search.yaml."""

    task: str = "causal_lm"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: dict[str, Any] = field(default_factory=lambda: {"name": MISSING})  # and its options
    space: SpaceConfig = field(default_factory=SpaceConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    search: SearchSection = field(default_factory=SearchSection)
    warm_start: list[str] = option(lambda: ["uniform", "analytic", "start"], STARTS)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    bases: BasesConfig = field(default_factory=BasesConfig)
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    recover: SearchRecovery = field(default_factory=SearchRecovery)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    study: str = MISSING
    studies: str = choices.STUDIES
    seed: int = option(0, SEED)
    output: str = option("text", OUTPUT)


@dataclass
class ReportConfig:
    """conf/report.yaml."""

    study: Any = MISSING
    studies: str = choices.STUDIES
    sync: bool = False
    figures: bool = True
    format: str = option("text", one_of(("text", "html")))
    output: str = option("text", OUTPUT)


@dataclass
class RefitConfig:
    """How factors of the final ranks are solved again."""

    enabled: bool = True
    blend: float = option(0.5, options.FROM_0_TO_1)
    feedback: float = option(1.0, options.FROM_0)
    ridge: float = option(0.03, options.FROM_0)
    output_power: float = option(0.75, options.FROM_0_TO_1)
    held_back: float | None = option(None, options.BELOW_1.or_null())
    candidates: int = option(1, ANY_COUNT)


@dataclass
class RefinementConfig:
    """How bases of the final options are made again, and in turns the low ranks over them."""

    alternations: int = option(0, at_least(0, most=REPEATED))
    sweeps: int = option(0, at_least(0, most=REPEATED))


@dataclass
class CompressConfig:
    """conf/compress.yaml."""

    study: str = MISSING
    studies: str = choices.STUDIES
    point: str = option("best", POINT)
    out: str = MISSING
    format: str = option("lrbo", one_of(choices.FORMATS))
    vllm: bool = False
    register: str = option("link", one_of(("link", "copy", "none")))
    bases: RefinementConfig = field(default_factory=RefinementConfig)
    refit: RefitConfig = field(default_factory=RefitConfig)
    dtype: str = option("auto", DTYPE)
    output: str = option("text", OUTPUT)


@dataclass
class RecoverConfig:
    """conf/recover.yaml."""

    checkpoint: str = MISSING
    out: str = MISSING
    model: DenseConfig = field(default_factory=DenseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    recover: RecoverySection = field(default_factory=RecoverySection)
    allow_seen: bool = False
    register: str = option("link", one_of(("link", "copy", "none")))
    studies: str = choices.STUDIES
    seed: int = option(0, SEED)
    output: str = option("text", OUTPUT)


@dataclass
class ProtocolConfig:
    """conf/protocols: from which text, and how, the windows of a perplexity are cut."""

    hub: str = MISSING
    file: str = MISSING
    strip: bool = False
    documents: int | None = option(None, LIMIT)
    join: str = "\n\n"
    bos: str = option("start", one_of(choices.BOS))
    window: int = option(2048, WINDOW)
    max_windows: int | None = option(None, LIMIT)
    path: str | None = None
    format: str = "auto"
    column: str | None = None


@dataclass
class EvaluateConfig:
    """conf/evaluate.yaml."""

    task: str = "causal_lm"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    protocols: dict[str, ProtocolConfig] = field(default_factory=dict)
    text_folder: str | None = None
    tasks: list[str] = field(default_factory=list)
    task_folder: str | None = None
    limit: int | None = option(None, LIMIT)
    checkpoint: str | None = None
    allow_seen: bool = False
    seed: int = option(0, SEED)
    batch_windows: int = option(4, ANY_COUNT)
    batch_items: int = option(16, ANY_COUNT)
    chunk_tokens: int = option(256, ANY_COUNT)
    studies: str = choices.STUDIES
    record: str | None = "${studies}/evaluations.jsonl"
    output: str = option("text", OUTPUT)


@dataclass
class BenchmarkConfig:
    """conf/benchmark.yaml."""

    checkpoint: str = MISSING
    device: str = "auto"
    dtype: str = option("auto", DTYPE)
    prompts: list[int] = option(lambda: [128, 512], LENGTHS)
    batch: int = option(1, ANY_COUNT)
    steps: int = option(16, at_least(1, most=REPEATED))
    repeats: int = option(7, at_least(3, ", for a standard error", most=REPEATED))
    warmup: int = option(2, replace(options.WHOLE_FROM_0, most=REPEATED))
    threads: int | None = option(None, LIMIT)
    compile: bool = False
    memory: bool = True
    studies: str = choices.STUDIES
    record: str | None = "${studies}/benchmarks.jsonl"
    output: str = option("text", OUTPUT)


@dataclass
class DashboardConfig:
    """conf/dashboard.yaml."""

    studies: str = choices.STUDIES
    uri: str = f"{choices.SQLITE}${{studies}}/mlflow.db"
    host: str = option("127.0.0.1", Rule("a name or address of this machine", str.strip))
    port: int = 5000
    allowed_hosts: list[str] = option(list, HOSTS)


Config = (SearchConfig | ReportConfig | CompressConfig | RecoverConfig | EvaluateConfig) | (
    BenchmarkConfig | DashboardConfig
)
SCHEMAS: dict[str, type[Config]] = {  # by command
    schema.__name__.removesuffix("Config").lower(): schema for schema in get_args(Config)
}


def role_paths(role: RoleConfig) -> tuple[str, ...]:
    """Return the texts of a role: none, one, or several."""
    if role.path is None:
        return ()
    return tuple(map(str, role.path)) if isinstance(role.path, list) else (str(role.path),)


def windows_of(tokens: int, data: DataConfig) -> int:
    """Return the number of windows of a role that asks for so many tokens."""
    most = data.max_windows
    return tokens // data.window if most is None else min(tokens // data.window, most)


def flat(config: Config) -> dict[str, Any]:
    """Return the values by dotted key."""
    return flatten(asdict(config))
