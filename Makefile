# Two commands for a fresh machine with Python 3.11 or newer: `make quickstart` and `make test`.
# Each creates .venv and installs what it needs; later calls reuse it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests run on the CPU whatever the machine has; two workers match the smallest machine we support.
WORKERS ?= 2
ARGS ?=

.PHONY: quickstart test test-slow lint types notebooks clean

quickstart: $(VENV)/.installed
	$(BIN)/recscale sweep quickstart --out runs/quickstart $(ARGS)

test: $(VENV)/.installed-dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Types: not a gate yet, the stubs of pandas alone give some hundred findings.
types: $(VENV)/.installed-dev
	$(BIN)/pyright

# Re-executes the notebooks in place.
notebooks: $(VENV)/.installed-dev
	$(BIN)/python notebooks/execute.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "recscale needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.py pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,notebooks]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
