# `make run` and `make test` set up everything they need in a virtual environment.
# Another interpreter: `PYTHON=python3.12 make test` (it gets an environment of its own).
PYTHON ?= python3
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKDIR ?= runs/dion
TESTS ?=
PYTEST := $(BIN)/python -m pytest --durations=15
# A worker that crashes ends the run: pytest-xdist can wait for its successor forever.
PARALLEL := -n 2 --dist loadgroup --max-worker-restart=0
# Annotated shapes and types are checked too: a tenth of the time of all tests.
TYPES := --jaxtyping-packages=jaxpapers,beartype.beartype
# What depends on the version of JAX: for a second Python.
ON_JAX := tests/test_contract.py tests/test_train.py tests/test_checkpoint.py \
	tests/optim/test_optimizer_contract.py jaxpapers

# Without bytecode, every worker rewrites and compiles all tests again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run test test-all test-ci test-slow test-other lint format bench docs notebooks release-check clean

help:
	@echo "make run        train the language model with Dion on this Python's sources"
	@echo "make test       run the tests (PYTHON=python3.12 for another interpreter)"
	@echo "make test-all   run the whole matrix of meshes, methods and dtypes too"
	@echo "make test-slow  run the learning tests (minutes)"
	@echo "make test-other run what depends on JAX on another supported Python, if there is one"
	@echo "make lint       ruff format --check, ruff check, pyrefly"
	@echo "make docs       build the site into build/site, strictly"
	@echo "make notebooks  run docs/notebooks and write their pages (NAMES=dion for one)"
	@echo "make release-check build wheel and sdist and try the wheel in an empty environment"
	@echo "make bench      measure again what fits two hours (installs PyTorch); benchmarks/ has more"

# Reinstalls only when the dependencies change, so a second run works offline.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"jaxpapers needs Python >= 3.11, $(PYTHON) is {v[0]}.{v[1]}; try: make PYTHON=python3.12 $(MAKECMDGOALS)" if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[plot,test]'
	@touch $@

run: $(READY)
	$(BIN)/jaxpapers run dion --workdir=$(WORKDIR)

test: $(READY)
	$(PYTEST) $(PARALLEL) -m "not slow and not matrix" $(TESTS)

test-all: $(READY)
	$(PYTEST) $(PARALLEL) $(TYPES) -m "not slow" $(TESTS)

# Each tracker by its own client, which nothing else needs.
test-slow: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[plot,test,tb,wandb,trackio]' 'tensorboard>=2.17'
	$(PYTEST) $(TYPES) -m slow $(TESTS)

# The default tests and the part of the matrix that this commit has: see .ci/matrix.
test-ci: $(READY)
	$(PYTEST) $(PARALLEL) $(TYPES) -m "not slow" $$(sh .ci/matrix)

test-other:
	@other="$$(sh .ci/other-python $(PYTHON))"; \
	if [ -z "$$other" ]; then echo "test-other: skipped, no other supported Python found"; \
	else echo "test-other: testing on $$other"; $(MAKE) test PYTHON="$$other" TESTS="$(ON_JAX)"; fi

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[plot,test,bench]'
	$(BIN)/python benchmarks/dion_vs_adamw_muon.py
	$(BIN)/python benchmarks/delayed_feedback.py
	$(BIN)/python benchmarks/ctr_step.py
	$(BIN)/python benchmarks/diffusion_rollout.py
	$(BIN)/python benchmarks/click_models.py

docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "wrote build/site/index.html"

notebooks: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs,plot]'
	.ci/notebooks $(BIN)/python $(NAMES)

release-check: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'build>=1.2' 'twine>=6'
	.ci/release-check $(BIN)/python

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .jax_cache
