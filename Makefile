# make demo     a small real model answers with a plain and with a compressed cache
# make test     everything CI checks: lint, format, types, layering, tests
# make test-all the same with the slow tests
# make bench    times of the cache and of its CPU kernels, beside the uncompressed ones,
#              with JSON and plots in .benchmarks
# make format   apply ruff's formatting and fixes
#
# PYTHON=python3.12 picks the interpreter of a new .venv, PIP_FLAGS=... goes to pip install,
# ARGS=... goes to the demo or to pytest.

PYTHON ?= python3
PIP_FLAGS ?=
ARGS ?=

# Spinning OpenMP threads crawl on cores that something else uses too.
export OMP_WAIT_POLICY ?= PASSIVE

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test test-all bench check format clean

install: $(STAMP)

# One resolution with torch pinned, then the package alone: pip has no reason to touch torch.
$(STAMP): requirements/dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: $(STAMP)
	$(BIN)/nexusquant demo $(ARGS)

bench: $(STAMP)
	mkdir -p .benchmarks
	$(BIN)/python -m benchmarks.speed kernels --json .benchmarks/kernels.json --plot .benchmarks/kernels.png
	$(BIN)/python -m benchmarks.speed model --json .benchmarks/model.json --plot .benchmarks/model.png

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: check
	$(BIN)/python -m pytest $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist
