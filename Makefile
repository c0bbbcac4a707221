# make quickstart | test | test-all | style | quality
# Every target makes .venv first; it is rebuilt whenever setup.cfg changes.
PYTHON ?= $(shell for p in python3.11 python3; do command -v $$p; done 2>/dev/null | head -1)
BIN := .venv/bin
CODE := run_dpo.py dpo_trainer.py mdpo scripts benchmarks tests

.PHONY: help venv model quickstart test test-slow test-all style quality clean
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

model: .venv/.complete
	$(BIN)/python scripts/prepare_quickstart.py

quickstart: model
	$(BIN)/python run_dpo.py recipes/smollm2-135m/dpo/config_quickstart.yaml

test: model
	$(BIN)/python -m pytest tests -q -m "not slow"

test-slow: model
	$(BIN)/python -m pytest tests -q -m slow

test-all: test test-slow

style: .venv/.complete
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

quality: .venv/.complete
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)

clean:
	rm -rf .venv outputs models
