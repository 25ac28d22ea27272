# Two commands for a fresh machine with Python 3.11 or newer: `make quickstart` and `make test`.
# Each creates .venv and installs what it needs; later calls reuse it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests run on the CPU whatever the machine has; two workers match the smallest machine we support.
WORKERS ?= 2
ARGS ?=
# Every process that is started reads compiled sources instead of compiling them, whatever the shell says: it is seconds of
# each, and tests and sweeps start many.
export PYTHONDONTWRITEBYTECODE :=
# Compilers of the accelerators, each in an environment of its own: their runtimes do not belong in the main one. The
# version of jax decides the compiler (libtpu, the CUDA plugin), so it is fixed: what compiles today compiles tomorrow.
# It is the first of AOT_JAX; with the others, which need Python 3.12, kernels are tested and lowered (make newer-jax).
VENV_TPU ?= .venv-tpu
VENV_GPU ?= .venv-gpu
VENV_RAY ?= .venv-ray
AOT_JAX ?= 0.10.2 0.11.2 newest
NEWER_JAX := $(wordlist 2,$(words $(AOT_JAX)),$(AOT_JAX))

.PHONY: quickstart test test-slow mutants lint figures notebooks aot-tpu aot-gpu newer-jax newer-jax-installed clean

quickstart: $(VENV)/.installed
	$(BIN)/recscale sweep quickstart --out runs/quickstart $(ARGS)

test: $(VENV)/.installed-dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(ARGS)

# Which one-line faults the fast tests notice, on a random sample: tests/mutants.py says how. Takes hours, decides nothing.
mutants: $(VENV)/.installed-dev
	$(BIN)/python tests/mutants.py $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Draws every picture of the README and of the notes again from the committed tables.
figures: $(VENV)/.installed-dev
	$(BIN)/python notebooks/draw.py

# The same, and re-executes the notebooks in place.
notebooks: figures
	$(BIN)/python notebooks/execute.py

# Compiles kernels and training steps for TPUs (GPUs) on a machine without one; without ARGS all kernels and one step per
# family. For one of them: make aot-tpu ARGS="--target tpu-v5e --model tokenmixer_large_7b --mesh 16x16"
aot-tpu: $(VENV_TPU)/.installed
	$(VENV_TPU)/bin/recscale aot $(or $(ARGS),--target tpu-v5e --target tpu-v5p --target tpu-v6e --target tpu-7x)

aot-gpu: $(VENV_GPU)/.installed
	$(VENV_GPU)/bin/recscale aot $(or $(ARGS),--target h100 --target h200)

# By newer versions of jax, without the laboratory's packages: every kernel for Hopper up to where its compiler begins;
# the fast kernel tests by the newest one; by the other a part of what a device is given, on the CPU.
newer-jax: newer-jax-installed
	@set -e; for venv in $(NEWER_JAX:%=.venv-jax-%); do \
	  echo "jax $$($$venv/bin/python -c 'import jax; print(jax.__version__)')"; \
	  $$venv/bin/recscale models > /dev/null; \
	  $$venv/bin/recscale aot --lower-only --target h100 --target h200; \
	done
	JAX_PLATFORMS=cpu .venv-jax-$(lastword $(NEWER_JAX))/bin/python -m pytest -q -n $(WORKERS) --dist worksteal \
	  -m "not slow" tests/pallas_kernels $(ARGS)
	rm -rf .venv-jax-$(firstword $(NEWER_JAX))/device
	.venv-jax-$(firstword $(NEWER_JAX))/bin/recscale bench device --cpu --stage check --stage train \
	  --operation w8a16_matmul --operation sparse_gather --out .venv-jax-$(firstword $(NEWER_JAX))/device

newer-jax-installed: $(NEWER_JAX:%=.venv-jax-%/.installed)

.venv-jax-%/.installed: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "newer versions of jax need Python 3.12; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 newer-jax"; exit 1; }
	$(PYTHON) -m venv .venv-jax-$*
	.venv-jax-$*/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e ".[tests]" \
	  jax$(if $(filter newest,$*),,==$*)
	@touch $@

$(VENV_TPU)/.installed: EXTRA := tpu
$(VENV_GPU)/.installed: EXTRA := cuda
$(VENV_TPU)/.installed $(VENV_GPU)/.installed: %/.installed: %/bin/python setup.py pyproject.toml
	$*/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRA)]" jax==$(firstword $(AOT_JAX))
	@touch $@

$(VENV_RAY)/.installed: $(VENV_RAY)/bin/python setup.py pyproject.toml
	$(VENV_RAY)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[ray]"
	@touch $@

$(VENV)/bin/python $(VENV_TPU)/bin/python $(VENV_GPU)/bin/python $(VENV_RAY)/bin/python: %/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "recscale needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $*

$(VENV)/.installed: $(VENV)/bin/python setup.py pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[lab]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,notebooks]"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_TPU) $(VENV_GPU) $(VENV_RAY) .venv-jax-* build *.egg-info
