# Everything runs in .venv, which the first target makes; PYTHON picks the interpreter it is made with.
PYTHON ?= python3
PIP_FLAGS ?= --disable-pip-version-check
PYTEST_FLAGS ?= -n auto --maxprocesses 4 --dist loadfile
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help install demo demo-study test test-fast check format bench soak clean

help: ## show this
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(INSTALLED) ## make .venv with everything that training, evaluation and tests need (a few minutes, 8 GB)

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (torch and faiss for CUDA: several GB, minutes on a fresh machine)"
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[test,dev]'
	@touch $@

demo: $(INSTALLED) ## post-train a small ViT on drawn scenes and show what it gained (2 to 4 minutes on 2 cores)
	$(BIN)/python -m neco task=train experiment=demo

demo-study: $(INSTALLED) ## the demo with 5 seeds and its controls (about an hour)
	$(BIN)/python scripts/demo_study.py

test: $(INSTALLED) ## all tests
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-fast: $(INSTALLED) ## all but the slow ones
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m 'not slow'

check: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## speed and memory of what this machine can do, beside the published way, into benchmarks/
	$(BIN)/python scripts/bench.py

soak: $(INSTALLED) ## kills, full disks, dying processes, damaged files: all of tests/soak, into docs/reliability.md
	$(BIN)/python scripts/soak.py

clean: ## remove what tests and builds left (never runs/ or data/)
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find neco scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
