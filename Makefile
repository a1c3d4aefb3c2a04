# make quickstart   set up what is needed, then train the small MoE end to end
# make test         set up what is needed, then run every test that this machine can run
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu-py311.lock
STAMP := $(VENV)/.installed
SGLANG_VENV := .venv-sglang
SGLANG_LOCK := requirements/sglang-cpu-py311.lock
SGLANG_STAMP := $(SGLANG_VENV)/.installed
export OMP_NUM_THREADS := 1

.PHONY: help setup sglang-cpu quickstart test test-all lint clean
help:
	@sed -n 's/^# //p' Makefile
	@echo "make sglang-cpu   SGLang for a machine without a GPU, in $(SGLANG_VENV) (2.6 GB)"
	@echo "make test-all     the slow tests, too"
	@echo "make lint         ruff and mypy"
	@echo "make clean        remove the environment and what the quickstart made"

setup: $(STAMP)

# torch first and by its pin: a CPU build is taken where there is one. -e, so that an edit needs no new install.
$(STAMP): $(LOCK) setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -r $(LOCK)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

sglang-cpu: $(SGLANG_STAMP)

# SGLang and torchvision without their dependencies, which would bring another torch, and CUDA.
$(SGLANG_STAMP): $(SGLANG_LOCK)
	test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(SGLANG_VENV)/bin/pip install --quiet --disable-pip-version-check -r $(SGLANG_LOCK)
	$(SGLANG_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps sglang==0.5.23 torchvision==0.28.0
	touch $@

quickstart: setup
	$(BIN)/python tools/make_quickstart.py
	$(BIN)/drpo-megatron train examples/quickstart.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two files at a time: most of a test's time is the start of a process, which uses one core.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: lint sglang-cpu
	$(PYTEST) -m "not slow"

test-all: lint sglang-cpu
	$(PYTEST)

clean:
	rm -rf $(VENV) $(SGLANG_VENV) data runs build *.egg-info
