# Every target sets up what it needs: a machine with Python >= 3.11 and make is enough.

SHELL := /bin/sh
.DEFAULT_GOAL := help

PYTHONS := python3 python3.11 python3.12 python3.13 python3.14
PYTHON ?= $(shell for p in $(PYTHONS); do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := kvcapsule training eval checkpoints tests

# make test PYTEST_FLAGS="-x -k segment"; make demo TRAIN_FLAGS="--ratio 20" EVAL_FLAGS=""
PYTEST_FLAGS ?=
DEMO ?= runs/demo
TRAIN_FLAGS ?= --force true
EVAL_FLAGS ?=
VLM_FLAGS ?=
SUITE_FLAGS ?=

.PHONY: help venv test style format demo demo-vlm rate-distortion policies wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## create .venv with the pinned versions and the project, editable

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found (looked for: $(PYTHONS)). Name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

test: $(READY) ## run the tests (offline, CPU)
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest $(PYTEST_FLAGS)

style: $(READY) ## check lint, format and types
	$(BIN)/python -m ruff check $(SOURCES)
	$(BIN)/python -m ruff format --check $(SOURCES)
	$(BIN)/python -m mypy

format: $(READY) ## mend lint and format where a tool can
	$(BIN)/python -m ruff check --fix $(SOURCES)
	$(BIN)/python -m ruff format $(SOURCES)

demo: $(READY) ## train a capsule for the shipped demo VLM, then evaluate it
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule train --output $(DEMO) $(TRAIN_FLAGS)
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --capsule $(DEMO) --json $(DEMO).json --plot $(DEMO).png $(EVAL_FLAGS)

demo-vlm: $(READY) ## train the demo VLM itself; started again, it goes on where it stopped
	$(BIN)/python -m kvcapsule.training.demo_vlm.run --work runs/pages-vlm --output checkpoints/pages-vlm $(VLM_FLAGS)

rate-distortion: $(READY) ## compare codec families from 2.4x to 80x; trains the capsules that are missing in runs/
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite rate-distortion --json eval/results/rate-distortion.json \
		--plot eval/results/rate-distortion.png --report docs/results.md $(SUITE_FLAGS)

policies: $(READY) ## compare all policies at equal bytes with the shipped capsules
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite policies --json eval/results/policies.json \
		--plot eval/results/policies.png --report docs/policies.md $(SUITE_FLAGS)

wheel: $(READY) ## build the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove build outputs and caches (keeps .venv and runs)
	rm -rf build dist *.egg-info .ruff_cache .mypy_cache .pytest_cache lightning_logs
	find $(SOURCES) -type d -name __pycache__ -prune -exec rm -rf {} +
