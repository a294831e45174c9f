# Two commands are enough: `make demo` shows what cellweave does, `make test` checks that it works.
# Everything is installed in $(VENV), nowhere else. Needs GNU make, Python 3.11 or newer, and pip.

# python3.11 where it exists (the oldest supported version), otherwise the machine's python3.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# Installed first and pinned, so that every machine tests the same torch. On Linux the default wheel brings CUDA
# (gigabytes); for the small CPU build:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# Extras that `make test` installs, joined by a dash: `make test TEST_EXTRAS=test-eval`.
TEST_EXTRAS ?= test
# More words for pytest: `make test PYTEST_ARGS="-k stack -x"`.
PYTEST_ARGS ?=

BIN := $(VENV)/bin
comma := ,

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint docs clean distclean

help:
	@echo "make demo   train a small model on 700 blood cells and write figures to demo/"
	@echo "make test   run the tests"
	@echo "make lint   check style and types"
	@echo "make docs   build the documentation in docs/_build/html"
	@echo "make clean  remove what the commands above wrote (distclean: also $(VENV))"

# One thread: the model is small, and threads that wait for each other on busy cores make it slower.
demo: $(VENV)/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/cellweave demo --out demo

test: $(VENV)/.installed-$(TEST_EXTRAS)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf demo docs/_build docs/generated dist build htmlcov .coverage .coverage.* \
		.pytest_cache .ruff_cache .mypy_cache .hypothesis lightning_logs scvi_log
	find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# Stamp files: an environment is made once, and an install is repeated only when pyproject.toml has changed.
# The install is editable, so a change of the source needs no new install.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cellweave needs Python 3.11 or newer, " \
		"but $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -e .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -e ".[$(subst -,$(comma),$*)]"
	@touch $@
