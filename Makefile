# make quickstart   set up what is needed, then train the small MoE end to end
# make test         set up what is needed, then run every test that this machine can run
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu-py311.lock
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS := 1

.PHONY: help setup quickstart test test-all lint clean
help:
	@sed -n 's/^# //p' Makefile
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

quickstart: setup
	$(BIN)/python tools/make_quickstart.py
	$(BIN)/drpo-megatron train examples/quickstart.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-all: lint
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) data runs build *.egg-info
