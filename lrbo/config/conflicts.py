"""Values that cannot work: by the rules of their keys, or beside other values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from lrbo.config import choices, options, schema
from lrbo.config.options import Rule, at_least, is_number, mismatch, one_of, rules_of
from lrbo.config.recovery import STUDY_TEXT, stage_problems
from lrbo.errors import cut

DIGITS = 40  # characters of a number in a message


def _are_ratios(start: Any) -> bool:
    ratios = start if isinstance(start, list | tuple) else [start]
    return len(ratios) > 0 and all(is_number(ratio) and 0 < ratio <= 1 for ratio in ratios)


def _variables(least: float, most: float) -> Rule:
    def holds(value: Any) -> bool:
        ends = value if isinstance(value, list | tuple) else [value]
        if not all(is_number(end) and least <= end <= most for end in ends):
            return False
        return len(ends) == 1 or (len(ends) == 2 and ends[0] < ends[1])

    expected = f"a number, or [low, high] with low < high, from {least:g} to {most:g}"
    return Rule(expected, holds, each=True)


# Of the keys of a space that its type decides about.
SPACES: Mapping[str, Mapping[str, Rule]] = {
    "ratios": {
        "granularity": one_of(("kind", "depth", "layer")),
        "depth_groups": options.ANY_COUNT,
        "bounds": Rule(
            "[low, high] with 0 < low < high <= 1", lambda v: len(v) == 2 and 0 < v[0] < v[1] <= 1
        ),
        "minimum_rank": Rule("0: only space.type=weights has one", lambda v: v == 0),
        "start": Rule("a ratio in (0, 1], or a list of them", _are_ratios, each=True),
        "variables": _variables(*choices.RANGES["ratios"]),
    },
    "weights": {
        "bounds": Rule(
            "[-width, width] with 0 < width <= 5, in natural logarithms",
            lambda v: len(v) == 2 and 0 < v[1] == -v[0] <= 5,
        ),
        "minimum_rank": at_least(0),
        "knots": Rule("0, or at least 2", lambda v: v == 0 or v >= 2, most=options.REPEATED),
        "start": Rule("nothing: weights start at 0", lambda v: not v),
        "variables": _variables(*choices.RANGES["weights"]),
    },
    "thresholds": {
        "bounds": Rule(
            "[low, high] with 0 < low < high <= 1", lambda v: len(v) == 2 and 0 < v[0] < v[1] <= 1
        ),
        "minimum_rank": at_least(0),
        "start": Rule("nothing: thresholds start where budgets are met", lambda v: not v),
        "variables": Rule("nothing: space.bounds are those of the threshold", lambda v: not v),
    },
}


def _ruled(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Rule]]:
    """Yield key, value and rule of all that has one, also in the entries of mappings."""
    rules = dict(rules_of(node)) if is_dataclass(node) else {}
    if isinstance(node, schema.SpaceConfig):
        rules |= SPACES.get(node.type, {})
    for name, value in (node if isinstance(node, Mapping) else vars(node)).items():
        if name in rules:
            yield f"{prefix}{name}", value, rules[name]
        elif is_dataclass(value) or isinstance(value, Mapping):
            yield from _ruled(value, f"{prefix}{name}.")


def check_numbers(config: schema.Config) -> dict[str, str]:
    """Find problems by key: numbers, also in lists, that are too large or not finite."""
    largest = {key: rule.most for key, _, rule in _ruled(config)}
    problems = {}
    for key, value in schema.flat(config).items():
        most = largest.get(key, options.COUNT)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                problems[key] = mismatch(key, value, "a finite number")
            elif isinstance(number, int) and abs(number) > most:
                shown = cut(str(number), DIGITS)
                problems[key] = f"{key}={shown}: expected a whole number up to {most:,}"
    return problems


def check_values(config: schema.Config) -> list[str]:
    """Find every problem that the values of a configuration show by themselves."""
    numbers = check_numbers(config)
    others = [
        problem for key, value, rule in _ruled(config) for problem in rule.problems(key, value)
    ]
    if isinstance(config, schema.SearchConfig):
        for check in (
            _texts, _front, _thresholds, _latency, _pool, _curves, _sweeps, _executor, _recovery,
        ):  # fmt: skip
            others += check(config)
    elif isinstance(config, schema.CompressConfig):
        others += [*_candidates(config), *_serving(config)]
    elif isinstance(config, schema.RecoverConfig):
        others += [*_texts(config), *stage_problems(config.recover)]
    elif isinstance(config, schema.EvaluateConfig):
        others += [*_texts(config), *_protocols_and_tasks(config)]
    return [*numbers.values(), *(p for p in others if p.partition("=")[0] not in numbers)]


def _texts(
    config: schema.SearchConfig | schema.EvaluateConfig | schema.RecoverConfig,
) -> Iterator[str]:
    """Check the texts: an evaluation needs only that of the test."""
    data = config.data
    if data.name == STUDY_TEXT:
        default = asdict(schema.DataConfig(name=STUDY_TEXT, source="files"))
        for key, value in options.flatten(asdict(data), "data.").items():
            if options.flatten(default, "data.")[key] != value:
                yield (
                    f"{key}={value!r}: the text is that of the study, as it is; choose another "
                    "with data=NAME, or leave it out"
                )
        return
    roles = choices.ROLES[-1:] if isinstance(config, schema.EvaluateConfig) else choices.ROLES
    for index, role in enumerate(roles):
        text: schema.RoleConfig = getattr(data, role)
        paths = schema.role_paths(text)
        if not paths:
            yield mismatch(f"data.{role}.path", text.path, "a text or a list of texts")
        yield from _format(data, role, roles[:index])
        if text.tokens is not None and text.tokens < data.window * max(len(paths), 1):
            expected = f"at least one window of {data.window} tokens per text"
            yield mismatch(f"data.{role}.tokens", text.tokens, expected)


def _format(data: schema.DataConfig, role: str, earlier: Sequence[str]) -> Iterator[str]:
    """Check how the files of a role are read; roles that name one text divide it."""
    text: schema.RoleConfig = getattr(data, role)
    is_known = text.format in choices.FILE_FORMATS  # what is none has a problem of its own
    if data.source != "files":
        for name in ("format", "column"):
            value = getattr(text, name)
            if value != getattr(schema.RoleConfig, name) and (is_known or name == "column"):
                yield (
                    f"data.{role}.{name}={value!r}: only files have one (data=files); leave it "
                    "out. The column of a hub text stands in its path"
                )
        return
    for other in earlier if is_known else ():
        same: schema.RoleConfig = getattr(data, other)
        differs = (text.format, text.column) != (same.format, same.column)
        for path in schema.role_paths(text):
            if differs and same.format in choices.FILE_FORMATS and path in schema.role_paths(same):
                yield (
                    f"data.{role}: {path} is read as format={text.format} column={text.column}, "
                    f"but data.{other} reads it as format={same.format} column={same.column}; "
                    "give both the same"
                )


def _front(config: schema.SearchConfig) -> Iterator[str]:
    search, keep, lowest = config.search, config.budget.keep_ratio, config.budget.lowest
    if (bits := config.budget.bits_per_parameter) is not None:
        if config.budget.measure != "bytes":
            expected = "null, or budget.measure=bytes with it"
            yield mismatch("budget.bits_per_parameter", bits, expected)
        if lowest is not None:
            expected = "null where budget.lowest and budget.keep_ratio are the ends of a front"
            yield mismatch("budget.bits_per_parameter", bits, expected)
    for name, value in search.thresholds.items():
        if name not in (choices.LOSS, search.size):
            expected = f"a threshold of what is minimised: {choices.LOSS} or {search.size}"
            yield mismatch(f"search.thresholds.{name}", value, expected)
    if lowest is None:
        if search.size in (*choices.SIZES[1:], *choices.LATENCIES):
            yield (
                f"search.size={search.size!r} is minimised where a front is searched; give "
                "budget.lowest, or leave it out"
            )
        if search.thresholds:
            yield (
                "search.thresholds are for a front; give budget.lowest, or none of them for one "
                "budget"
            )
        return
    if not 0 < lowest < keep:
        expected = f"a number above 0 and below budget.keep_ratio={keep:g}, or null for one budget"
        yield mismatch("budget.lowest", lowest, expected)
    if search.racing is not None:
        yield (
            f"search.racing={search.racing!r}: trials of a front have no single best to race "
            "against; set it to null, or give one budget"
        )
    bounds = list(config.space.bounds)
    if config.space.type == "ratios" and not max(bounds, default=1) >= keep:
        yield mismatch(
            "space.bounds",
            bounds,
            f"an upper bound of at least budget.keep_ratio={keep:g}, so that every budget of the "
            "front can be used up",
        )
    ceiling = search.thresholds.get(choices.KEEP_RATIO)
    if ceiling is not None and ceiling <= lowest:
        expected = f"a number above budget.lowest={lowest:g}, for no trial is smaller"
        yield mismatch("search.thresholds.keep_ratio", ceiling, expected)


def _latency(config: schema.SearchConfig) -> Iterator[str]:
    size, latency, window = config.search.size, config.latency, config.data.window
    if size in choices.LATENCIES and not latency.enabled:
        yield (
            f"search.size={size!r} is measured only with latency.enabled=true; add it, or take "
            f"{' or '.join(choices.SIZES)}"
        )
    tokens = window if latency.tokens is None else latency.tokens
    if (latency.enabled or latency.tokens is not None) and not choices.STEPS < tokens <= window:
        yield mismatch(
            "latency.tokens",
            latency.tokens,
            f"more than the {choices.STEPS} decoding steps and at most data.window={window}, which "
            "null stands for",
        )


def _pool(config: schema.SearchConfig) -> Iterator[str]:
    data, pool = config.data, config.evaluation.pool_tokens
    wanted = data.validation.tokens
    if pool is None or data.window < 2:
        return
    if wanted is None:
        yield (
            f"evaluation.pool_tokens={pool!r}: data.validation.tokens=null takes all text, and "
            "there is nothing to choose; say how many tokens are wanted, or set the pool to null"
        )
    elif schema.windows_of(pool, data) <= (windows := schema.windows_of(wanted, data)):
        most = data.max_windows
        limit = "" if most is None else f", with at most data.max_windows={most}"
        yield mismatch(
            "evaluation.pool_tokens",
            pool,
            f"more windows of data.window={data.window} than the {windows} that "
            f"data.validation.tokens={wanted} asks for{limit}, or null",
        )


def _thresholds(config: schema.SearchConfig) -> Iterator[str]:
    if config.space.type != "thresholds":
        return
    if config.budget.lowest is None:
        expected = "the smallest keep ratio of the sizes that thresholds give, as budget=front"
        yield mismatch("budget.lowest", None, expected)
    if config.space.tied:
        yield mismatch("space.tied", config.space.tied, "nothing: there is one variable")
    include = list(config.budget.include)
    if include != [choices.BLOCKS]:
        expected = f"[{choices.BLOCKS}]: the output error of a table is not worked out"
        yield mismatch("budget.include", include, expected)


def _curves(config: schema.SearchConfig) -> Iterator[str]:
    if config.space.type == "weights" and not config.sensitivity.enabled:
        yield (
            "sensitivity.enabled=False: space.type='weights' multiplies loss curves; enable them, "
            "or choose a space of ratios"
        )


def _sweeps(config: schema.SearchConfig) -> Iterator[str]:
    if config.bases.sweeps and config.bases.method == "nearest":
        yield mismatch("bases.sweeps", config.bases.sweeps, choices.NO_SWEEPS)


def _executor(config: schema.SearchConfig) -> Iterator[str]:
    """Refuse to this process what only a cluster has."""
    executor = config.executor
    shared = {
        "workers": (executor.workers or 1) > 1,
        "address": executor.address is not None,
        "devices": (executor.devices or 0) > 0,
        "oversubscribe": executor.oversubscribe,
    }
    settings = [f"executor.{key}={getattr(executor, key)!r}" for key in shared if shared[key]]
    if executor.name == "inline" and settings:
        yield (
            f"{' and '.join(settings)}: the inline executor runs one trial at a time in this "
            "process; choose executor=ray"
        )


def _recovery(config: schema.SearchConfig) -> Iterator[str]:
    recover, trials = config.recover, config.search.trials
    yield from stage_problems(recover)
    if not recover.enabled:
        return
    if recover.candidates > trials:
        yield mismatch("recover.candidates", recover.candidates, f"at most search.trials={trials}")
    if config.budget.lowest is not None:
        yield (
            "recover.enabled=True: trials of a front have different sizes, of which the largest "
            "would be the best; expected one budget. Of a front, write the points that you want "
            "with lrbo compress point=keep=RATIO, and train each with lrbo recover"
        )
    if config.model.dtype not in ("auto", "float32", "bfloat16"):
        expected = "auto, float32 or bfloat16 with recover.enabled=true, which trains in it"
        yield mismatch("model.dtype", config.model.dtype, expected)


def _candidates(config: schema.CompressConfig) -> Iterator[str]:
    count, is_trial = config.refit.candidates, str(config.point).isdecimal()
    if count > 1 and (is_trial or not config.refit.enabled):
        reason = f"point={config.point}, which names one trial" if is_trial else "no refit"
        yield mismatch("refit.candidates", count, f"1 with {reason}")


def _serving(config: schema.CompressConfig) -> Iterator[str]:
    if config.vllm and config.format != "adapter":
        yield mismatch("vllm", config.vllm, f"false with format={config.format}")


def _protocols_and_tasks(config: schema.EvaluateConfig) -> Iterator[str]:
    for key, user in (("text_folder", "protocols"), ("task_folder", "tasks"), ("limit", "tasks")):
        if getattr(config, key) is not None and not getattr(config, user):
            yield f"{key} is for {user}; give {user}=[NAME], or leave it out"
