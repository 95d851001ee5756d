# Everything runs in .venv, which the targets make themselves. What is installed is
# remembered by stamp files inside it, so a second run starts at once.

PYTHON ?= python3
ARGS ?=
# A name with an underscore is a part of another script.
BENCHMARKS := $(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)))

BIN := .venv/bin
CORE := .venv/.stamp-core
DEV := .venv/.stamp-dev

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help:
	@echo "make demo    train small models on this machine, measure, write demo/report.html"
	@echo "make test    the tests (ARGS='-k report -x' reaches pytest)"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make bench   the scripts of benchmarks/ (ARGS reaches each)"
	@echo "make clean   remove what the targets made"

demo: $(CORE)
	$(BIN)/clvsmim demo --out=demo $(ARGS)

# Tests mostly compile. The cache gives the same program back, bit for bit.
test: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
test: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.3
test: $(DEV)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder \
	  $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(CORE)
	@test -n "$(BENCHMARKS)" || echo "benchmarks/ holds no script yet"
	@set -e; for script in $(BENCHMARKS); do \
	  echo "== $$script"; $(BIN)/python $$script $(ARGS); done

clean:
	rm -rf .venv .jax_cache .pytest_cache .ruff_cache .hypothesis build dist
	rm -rf *.egg-info demo

# pip is what venv writes last, so an interrupted one is made again.
$(BIN)/pip:
	$(PYTHON) -m venv .venv

$(CORE): setup.py | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# Includes the core, so its stamp is set as well.
$(DEV): setup.py | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(CORE)
