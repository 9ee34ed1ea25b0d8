# Everything happens in .venv; nothing is installed again unless pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install run test lint format

help: ## Show these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed-dev ## Install hushrec and the tools of its developers into .venv

run: $(VENV)/.installed ## Train and evaluate the quickstart experiment
	$(BIN)/hushrec run configs/quickstart.yaml

test: $(VENV)/.installed-dev ## Run the tests, two at a time
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder # a file's fixtures, such as a whole deployment, are made once

lint: $(VENV)/.installed-dev ## Check format, style, types and layers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## Format the code and mend what ruff can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hushrec needs Python 3.11 or newer; name one, for example: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; } >&2
	$(PYTHON) -m venv $(VENV)

# Order-only: the interpreter's own time of change must not set off an installation.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing hushrec into $(VENV); the first time takes a few minutes."
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	@touch $@
