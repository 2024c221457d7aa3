"""`lrbo search | transfer | report | compress | recover | evaluate | benchmark | dashboard`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
import wrapt
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lrbo import __version__
from lrbo.config import compose
from lrbo.config.choices import STUDY
from lrbo.config.schema import SCHEMAS, DashboardConfig, SearchConfig
from lrbo.config.shell import joined, text
from lrbo.cores import prepare_torch
from lrbo.errors import ConfigError, LrboError
from lrbo.files.atomic import naming_system_errors
from lrbo.files.parsing import to_json
from lrbo.interrupts import listening, status_of
from lrbo.pipeline.feasibility import require_possible
from lrbo.pipeline.overrides import find_problems, spelled
from lrbo.progress import LineHandler, Reporter, imported

log = logging.getLogger(__name__)

USAGE = """\
lrbo: compress language models to a budget, with an option per layer (rank,
bits, sparsity and more) by Bayesian optimization.

  lrbo search      find the best model at a budget, or go on
  lrbo transfer    use what a study found for another model or budget
  lrbo report      what a study found: baseline, best, Pareto front, figures
  lrbo compress    write a model of a study as a checkpoint
  lrbo recover     train a little what was compressed, at the same size
  lrbo evaluate    perplexity by a named protocol, and accuracy on tasks
  lrbo benchmark   speed and memory of a checkpoint beside the dense model
  lrbo dashboard   review the trials of all studies in the MLflow UI

  lrbo COMMAND --help            what a command takes
  lrbo --completion bash         tab completion: eval it in your shell
  lrbo --version
"""
TRANSFER_HELP = """\
lrbo transfer: use what a study found for another model or another budget,
without a search.

  lrbo transfer donor=NAME model=hf model.path=ORGANISATION/MODEL
  lrbo transfer donor=NAME:7 budget.keep_ratio=0.7   trial 7 instead of the best

Begins a study on the model: the uniform baseline, the allocation of least
predicted loss, and what the donor's trial comes to there. Where both studies
have the same variables they are taken over, else the share that each kind of
layer keeps over relative depth. It is a search that only begins, so all keys
are those of lrbo search, and more trials continue it:

  lrbo search study=STUDY search.trials=30
"""
COMMANDS = tuple(SCHEMAS)
NAMES = ("search", "transfer", *COMMANDS[1:])  # a transfer runs as a search
COMPUTING = {
    "search",
    "compress",
    "recover",
    "evaluate",
}  # a benchmark times what other programs would run
# With these Hydra only shows something, even where required values are missing.
SHOWING = {"-h", "--help", "--hydra-help", "-c", "--cfg", "-i", "--info"}
SWEEPING = {"-m", "--multirun"}
OPTIONS = {*SHOWING, *SWEEPING, "--resolve", "-p", "--package"}
# What is left of the work of an interrupted command.
_TRIALS_LEFT = "Trials that ended are kept, and so are statistics and factors that were finished."
LEFT = {
    "search": _TRIALS_LEFT,
    "transfer": _TRIALS_LEFT,
    "report": "The journal is as it was; figures may be from before.",
    "compress": "A folder is written whole or not at all; statistics and factors are kept.",
    "recover": "Blocks and stages that were finished are kept, beside the folder to write.",
    "evaluate": "Nothing was recorded: that is done when everything is scored.",
    "benchmark": "Nothing was recorded: that is done when everything is timed.",
}
COMPLETION = """\
_lrbo_complete() {
  local choices
  choices=$(COMP_LINE="${COMP_LINE:0:$COMP_POINT}" "${COMP_WORDS[0]}" -sc query=bash 2>/dev/null)
  COMPREPLY=($(compgen -o nospace -W "$choices" -- "${COMP_WORDS[COMP_CWORD]}"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _lrbo_complete lrbo"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name, and leave with its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with listening():
        try:
            _dispatch(arguments)
        except KeyboardInterrupt as error:
            Reporter().console.show_cursor()  # it may have come while a bar was put away
            if arguments and arguments[0] in LEFT:
                again = joined(["lrbo", *arguments])
                Reporter().say(f"Stopped. {LEFT[arguments[0]]} Go on with:\n  {again}")
            raise SystemExit(status_of(error)) from None


def _dispatch(arguments: list[str]) -> None:
    if "COMP_LINE" in os.environ and arguments[:1] == ["-sc"]:
        complete(os.environ["COMP_LINE"])
        return
    if arguments[:1] == ["transfer"] and not {"-h", "--help"} & set(arguments):
        arguments = transfer_arguments(arguments[1:])
    match arguments or ["--help"]:
        case ["-h" | "--help", *_]:
            print(USAGE, end="")
        case ["--version", *_]:
            print(f"lrbo {__version__}")
        case ["--completion"] | ["--completion", "bash", *_]:
            print(COMPLETION)
        case ["--completion", shell, *_]:
            fail(ConfigError([f"tab completion is there for bash only, not for {shell!r}"]))
        case ["transfer", *_]:
            print(TRANSFER_HELP, end="")
        case [command, *rest] if command in COMMANDS:
            run(command, rest)
        case [command, *_]:
            fail(ConfigError([f"no command {command!r}; known: {', '.join(NAMES)}"]))


def transfer_arguments(typed: Sequence[str]) -> list[str]:
    """Return the arguments of the search that a transfer with these arguments stands for."""
    keys = [argument.partition("=")[0] for argument in typed]
    if keys.count("donor") != 1 or "warm_start" in keys:
        problem = (
            f"transfer {' '.join(typed)}: expected donor=NAME once, and no warm_start, which it "
            "sets; see lrbo transfer --help"
        )
        fail(ConfigError([problem]))
    value = typed[keys.index("donor")].partition("=")[2]
    donor = str(compose.read_value(spelled("search", f"study={value}").removeprefix("study=")))
    rest = [argument for argument in typed if not argument.startswith("donor=")]
    if "study" not in keys:
        source = text(Path(donor.partition(":")[0]).name)
        source = source[1:-1] if source.startswith("'") else source  # the name is in quotes below
        rest.append(
            "study='${model.name}_${method.name}_keep${lrbo.range:${budget.lowest},"
            f"${{budget.keep_ratio}}}}_seed${{seed}}_from_{source}'"
        )
    if "search.trials" not in keys:
        rest.append("search.trials=3")
    return ["search", f"warm_start=[uniform,analytic,{text(f'{STUDY}{donor}')}]", *rest]


def run(command: str, arguments: Sequence[str]) -> None:
    """Run one command as a Hydra application."""
    arguments = [spelled(command, argument) for argument in arguments]
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    options = {one: one.partition("=")[0] for one in arguments if one.startswith("-")}
    reporter, names = Reporter(), set(options.values())
    # Hydra would complete them: --experiment=tiny to one of its own.
    problems = [
        f"{one}: no such option; a key is typed without dashes, as seed=1, and -m before a sweep"
        for one, name in options.items()
        if name not in OPTIONS
    ]
    if not names & SHOWING:
        with reporter.waiting("Starting"):
            problems += find_problems(command, overrides, sweeps=bool(names & SWEEPING))
    if problems:
        fail(ConfigError(problems))
    # It takes no option between overrides.
    ordered = sorted(
        arguments, key=lambda one: one[:1] != "~" and (one[:1] == "-" or "=" not in one)
    )
    sys.argv = [f"lrbo {command}", *ordered]
    _application(command, reporter)()


def _application(command: str, reporter: Reporter) -> Callable[[], None]:
    """Return a command as a Hydra application, which reads ``sys.argv``."""

    def guarded(values: DictConfig) -> None:
        try:
            with reporter.waiting("Starting"):
                _set_up_logging(reporter)
            with naming_system_errors():
                _run(command, values, reporter)
        except LrboError as error:  # which a user can mend: without a traceback
            fail(error)
        except BrokenPipeError:  # the reader of our output left, as `head` does
            sys.stderr.close()

    compose.register()
    folder = str(compose.conf_folder())
    decorate = hydra.main(version_base="1.3", config_path=folder, config_name=command)
    application: Callable[[], None] = decorate(guarded)
    return application


def fail(error: LrboError) -> NoReturn:
    """Print what is wrong and leave with status 2."""
    Reporter().say(f"error: {error}")
    raise SystemExit(2)


def _set_up_logging(reporter: Reporter) -> None:
    """Send our own log to stderr, and keep the chatter of libraries down."""
    handler = LineHandler(reporter)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("lrbo").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Which line of ours it came from helps no user.
    warnings.showwarning = lambda message, *_, **__: log.warning("%s", message)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # it sets its own level on import
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for chatty in ("alembic", "mlflow", "ax", "httpx", "lm_eval", "urllib3"):
        _hush(chatty)
    # These take seconds to import, and set level and handler by themselves then.
    for chatty in ("transformers", "huggingface_hub"):
        wrapt.when_imported(f"{chatty}.utils.logging")(partial(_hush, chatty))


def _hush(name: str, settings: Any = None) -> None:
    """Let only errors of a library's logger through; ``settings`` is its module of them, if any."""
    if settings is not None:  # they set more when they are first asked
        settings.set_verbosity_error()
    logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger(name).handlers.clear()
    if hasattr(settings, "disable_progress_bar"):
        settings.disable_progress_bar()


def _run(command: str, values: DictConfig, reporter: Reporter) -> None:
    """Run a command on its values, and print what it returns where JSON is asked for."""
    config = compose.to_object(values)
    assert isinstance(config, SCHEMAS[command])
    is_search = isinstance(config, SearchConfig)
    typed = [list(HydraConfig.get().overrides.task)] if is_search else []
    require_possible(config, *typed)
    if command in COMPUTING:
        prepare_torch(reporter.say)
    with reporter.waiting("Starting"):  # torch and Ax take seconds: not for --help and TAB
        module = imported(f"lrbo.commands.{command}")
    result = module.run(config, *typed, reporter)
    if not isinstance(config, DashboardConfig) and config.output == "json":
        print(to_json(result), flush=True)


def complete(line: str) -> None:
    """Print what can follow a half-typed command line: Hydra completes keys and groups."""
    program, _, rest = line.partition(" ")
    command, typed, keys = rest.partition(" ")
    if not typed:
        print(" ".join(NAMES))
    elif command in NAMES:
        command = "search" if command == "transfer" else command  # which has its keys
        os.environ["COMP_LINE"] = f"{Path(program).name} {keys}"
        sys.argv = [Path(program).name, "-sc", "query=bash"]
        _application(command, Reporter())()
