# Two commands do all the set-up: `make train` and `make test`. Everything lives in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: train test install lint clean

install: $(VENV)/.installed

# torch first, by itself, so that a local CPU build wins over a CUDA one that another package might pull in.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'torch>=2.8,<2.14'
	$(BIN)/pip install --quiet --editable '.[experiments,dev]'
	touch $@

train: install
	$(BIN)/python train.py

test: install lint
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis outputs multirun lightning_logs
