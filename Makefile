# Everything starts here. `make demo` and `make test` set up what they need by themselves.
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH ?= .venv-torch
PACKAGES := hwlicense simulators examples $(wildcard benchmarks)
export PATH := $(abspath $(BIN)):$(PATH)
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help setup demo clinic test test-quick test-torch lint format types bench lock build clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## install system packages (root, or asks; INSTALL=yes) and the virtual environment

$(READY): requirements/build.txt requirements/dev.txt pyproject.toml simulators/pyproject.toml scripts/environment scripts/system-packages
	scripts/system-packages
	scripts/environment $(VENV)
	@touch $@

demo: $(READY) ## the whole story on a simulated TPM: pack, issue, install, run, and what is refused
	python examples/label_reader/story.py

clinic: $(READY) ## limits of use: a clinic's day passes, a labelling run does not; a revision loosens them
	python examples/clinic/clinic_story.py

test: $(READY) ## every test
	python -m pytest -n auto --dist worksteal $(ARGS)

test-quick: $(READY) ## unit tests and format vectors, under a minute
	python -m pytest -n auto --dist worksteal $(wildcard tests/unit tests/vectors) $(ARGS)

$(TORCH)/.ready: $(READY) requirements/torch.txt scripts/environment-torch
	scripts/environment-torch $(VENV) $(TORCH)
	@touch $@

test-torch: $(TORCH)/.ready ## tests with torch, transformers and peft, which take 3 GB to download
	$(TORCH)/bin/python -m pytest tests/torch $(ARGS)

lint: $(READY) ## style, formatting and who imports whom
	ruff check
	ruff format --check
	lint-imports --no-logo

format: $(READY) ## mend what can be mended by itself
	ruff check --fix-only
	ruff format

types: $(READY) ## mypy, strict
	mypy $(PACKAGES) tests

bench: $(READY) $(TORCH)/.ready ## every measured figure, with tables and plots, half an hour; ARGS="cold sizes" for parts
	scripts/system-packages bench
	scripts/peers
	python -m benchmarks --figures docs/figures $(ARGS)

lock: $(READY) ## resolve requirements/*.txt anew; ARGS=--upgrade for newer releases
	scripts/lock $(ARGS)

build: $(READY) ## source archive and wheel in dist/, of the product alone
	rm -rf dist build
	python -m build --no-isolation --outdir dist
	@if { python -m zipfile -l dist/*.whl; tar -tf dist/*.tar.gz; } | grep -E '(^|/)(hwlicense_)?simulators/|(^|/)tests/'; then \
		echo 'error: what is not the product got into dist/' >&2; exit 1; fi

clean: ## remove what was made, the virtual environment too
	rm -rf $(VENV) $(TORCH) build dist simulators/build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name '*.egg-info' -prune -exec rm -rf {} +
	find hwlicense simulators tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
