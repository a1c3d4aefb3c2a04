# Everything is done by tools/bootstrap.py, which runs without make, too.
PYTHON ?= python3

TARGETS := quickstart test setup sglang-cpu gpu gpu-check test-fast unit lint locks clean
.PHONY: help $(TARGETS)
help:
	@"$(PYTHON)" tools/bootstrap.py --help

$(TARGETS):
	@"$(PYTHON)" tools/bootstrap.py $@
