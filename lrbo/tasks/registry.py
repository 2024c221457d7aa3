"""Name of a task -> its class."""

from collections.abc import Callable

from lrbo.tasks.causal_lm import CausalLM
from lrbo.tasks.model_task import ModelTask

TASKS: dict[str, Callable[..., ModelTask]] = {"causal_lm": CausalLM}
