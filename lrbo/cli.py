"""`lrbo search | transfer | report | compress | evaluate | benchmark | dashboard`."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import hydra
import wrapt
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lrbo import __version__, config
from lrbo.commands.asked import require_possible
from lrbo.errors import ConfigError, LrboError
from lrbo.interrupts import listening, status_of
from lrbo.options import STUDY
from lrbo.overrides import find_problems, spelled
from lrbo.progress import LineHandler, Reporter, imported
from lrbo.schema import SCHEMAS, DashboardConfig, SearchConfig
from lrbo.shell import text
from lrbo.storage import naming_full_disk, naming_paths
from lrbo.strict_json import to_json

log = logging.getLogger(__name__)

USAGE = """\
lrbo: compress language models by low-rank factorization, with ranks chosen by
Bayesian optimization.

  lrbo search      find the best low-rank model at a parameter budget, or go on
  lrbo transfer    use what a study found for another model or budget
  lrbo report      what a study found: baseline, best, Pareto front, figures
  lrbo compress    write a model of a study as a checkpoint
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
# With these Hydra only shows something, also where required values are missing.
SHOWING = {"-h", "--help", "--hydra-help", "-c", "--cfg", "-i", "--info"}
SWEEPING = {"-m", "--multirun"}
OPTIONS = {*SHOWING, *SWEEPING, "--resolve", "-p", "--package"}
# What is said of a command that was stopped, before how to go on.
KEPT = {
    "search": "Trials that ended are kept, and so are statistics and factors that were finished.",
    "report": "The journal is as it was; figures may be from before.",
    "compress": "A folder is written whole or not at all; statistics and factors are kept.",
    "evaluate": "Nothing was recorded: that is done when everything is scored.",
    "benchmark": "Nothing was recorded: that is done when everything is timed.",
}
KEPT["transfer"] = KEPT["search"]
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
            if arguments and arguments[0] in KEPT:
                again = shlex.join(["lrbo", *arguments])
                _say(f"Stopped. {KEPT[arguments[0]]} Go on with:\n  {again}")
            raise SystemExit(status_of(error)) from None


def _dispatch(arguments: list[str]) -> None:
    """Run what the arguments name."""
    if "COMP_LINE" in os.environ and arguments[:1] == ["-sc"]:
        complete(os.environ["COMP_LINE"])
        return
    command = arguments[0] if arguments else "--help"
    if command == "transfer" and not {"-h", "--help"} & set(arguments):
        arguments = transfer_arguments(arguments[1:])
        command = arguments[0]
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "--version":
        print(f"lrbo {__version__}")
    elif command == "--completion":
        print_completion(arguments[1] if len(arguments) > 1 else "bash")
    elif command == "transfer":
        print(TRANSFER_HELP, end="")
    elif command in COMMANDS:
        run(command, arguments[1:])
    else:
        fail(ConfigError([f"no command {command!r}; known: {', '.join(NAMES)}"]))


def transfer_arguments(typed: Sequence[str]) -> list[str]:
    """Return the search that a transfer is.

    Args:
        typed: What follows ``transfer``.

    Raises:
        SystemExit: If no donor is named, or one of the keys is that of the transfer itself.
    """
    keys = [argument.partition("=")[0] for argument in typed]
    if keys.count("donor") != 1 or "warm_start" in keys:
        fail(
            ConfigError(
                [
                    f"transfer {' '.join(typed)}: expected donor=NAME once, and no warm_start, "
                    "which it sets; see lrbo transfer --help"
                ]
            )
        )
    donor = str(config.read_value(spelled("search", f"study={_value(typed, 'donor')}")[6:]))
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


def _value(typed: Sequence[str], key: str) -> str:
    """Return what is typed behind a key."""
    return next(one.partition("=")[2] for one in typed if one.partition("=")[0] == key)


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
    config.register()
    decorate = hydra.main(
        version_base="1.3", config_path=str(config.conf_folder()), config_name=command
    )
    application: Callable[[], None] = decorate(_guarded(command, reporter))
    return application


def _guarded(command: str, reporter: Reporter) -> Callable[[DictConfig], None]:
    """Turn errors that a user can mend into messages without a traceback."""

    def guarded(values: DictConfig) -> None:
        try:
            with reporter.waiting("Starting"):
                _set_up_logging(reporter)
            with naming_paths(), naming_full_disk():
                _run(command, values, reporter)
        except LrboError as error:
            fail(error)
        except BrokenPipeError:  # the reader of our output left, as `head` does
            sys.stderr.close()

    return guarded


def fail(error: LrboError) -> None:
    """Print an error and leave with status 2."""
    _say(f"error: {error}")
    raise SystemExit(2)


def _say(message: str) -> None:
    """Write to stderr, also where nothing is set up."""
    Reporter().say(message)


def _set_up_logging(reporter: Reporter) -> None:
    """Send our own log to stderr, and keep the chatter of libraries down."""
    handler = LineHandler(reporter)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("lrbo").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = cast(Any, _log_warning)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # it sets its own level on import
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for chatty in ("alembic", "mlflow", "ax", "httpx", "lm_eval", "urllib3"):
        _hush(chatty)
    # These take seconds to import, and set level and handler by themselves then.
    for chatty in ("transformers", "huggingface_hub"):
        wrapt.when_imported(f"{chatty}.utils.logging")(partial(_hush, chatty))


def _hush(name: str, settings: Any = None) -> None:
    """Keep what a library logs down to errors, which our own handler shows.

    Args:
        name: Of its logger.
        settings: Its module of settings, if it has one, which sets more when it is first asked.
    """
    if settings is not None:
        settings.set_verbosity_error()
    logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger(name).handlers.clear()
    if hasattr(settings, "disable_progress_bar"):
        settings.disable_progress_bar()


def _log_warning(message: Warning | str, *_: Any) -> None:
    """Show a warning as its message; which line of ours it came from helps no user."""
    log.warning("%s", message)


def _run(command: str, values: DictConfig, reporter: Reporter) -> None:
    """Do what a command is asked for, and print the machine-readable last line if it has one."""
    chosen = config.to_object(values)
    assert isinstance(chosen, SCHEMAS[command])
    is_search = isinstance(chosen, SearchConfig)
    typed = [list(HydraConfig.get().overrides.task)] if is_search else []
    require_possible(chosen, *typed)
    result = _command(command, reporter).run(chosen, *typed, reporter)
    if not isinstance(chosen, DashboardConfig) and chosen.output == "json":
        print(to_json(result), flush=True)


COMMANDS = tuple(SCHEMAS)
NAMES = ("search", "transfer", *COMMANDS[1:])  # a transfer is run as the search that it is


def _command(name: str, reporter: Reporter) -> Any:
    """Import what does the work: torch and Ax take seconds that --help and TAB must not cost."""
    with reporter.waiting("Starting"):
        return imported(f"lrbo.commands.{name}")


def complete(line: str) -> None:
    """Print what can follow a half-typed command line, for the shell's tab completion.

    Hydra completes the keys and groups of one application; the command in front of them is
    taken off the line first.

    Args:
        line: As typed, from the name of the program up to the cursor.
    """
    program, _, rest = line.partition(" ")
    command, typed, keys = rest.partition(" ")
    if not typed:
        print(" ".join(NAMES))
    elif command in NAMES:
        command = "search" if command == "transfer" else command  # which has its keys
        os.environ["COMP_LINE"] = f"{Path(program).name} {keys}"
        sys.argv = [Path(program).name, "-sc", "query=bash"]
        _application(command, Reporter())()


def print_completion(shell: str) -> None:
    """Print the shell code that switches tab completion on.

    Raises:
        SystemExit: If the shell is not known.
    """
    if shell != "bash":
        fail(ConfigError([f"tab completion is there for bash only, not for {shell!r}"]))
    print(COMPLETION)
