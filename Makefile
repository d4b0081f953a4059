PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
EVAL := .venv-eval

.DEFAULT_GOAL := help
.PHONY: help install demo test test-eval bench parity lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## *(.*)/  \1\t\2/'

install: $(STAMP)  ## make .venv with the package and everything needed to work on it

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## answer questions about an image at several budgets
	$(BIN)/adallava demo

# One thread per worker: with more, the workers slow each other down.
test: $(STAMP)  ## run the tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m "not gpu and not lmms"

# What other libraries bring stays out of .venv: torchao, once installed, has a say in every start of transformers, and
# lmms-eval brings a torchvision, which only works beside the very torch that it was built for and is not needed.
$(EVAL)/.installed: pyproject.toml constraints.txt
	test -x $(EVAL)/bin/python || $(PYTHON) -m venv $(EVAL)
	$(EVAL)/bin/pip install -c constraints.txt -e '.[eval,serve,quantized]' pytest
	$(EVAL)/bin/pip uninstall -y torchvision
	touch $@

test-eval: $(EVAL)/.installed  ## run the tests that need lmms-eval or quantised weights, in an environment of their own
	OMP_NUM_THREADS=1 $(EVAL)/bin/pytest -q tests/test_lmms*.py tests/test_quantized.py

# Ten minutes on two idle cores; the last line is one JSON object.
bench: $(STAMP)  ## measure whether milliseconds follow FLOPs
	$(BIN)/adallava bench speed --rounds 5 --json

# The recordings that come with the tests, unless DIR names others.
DIR ?= tests/golden
parity: $(STAMP)  ## replay recordings of the released code (DIR=folder)
	$(BIN)/adallava parity $(DIR)

lint: $(STAMP)  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the code in the house style
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:  ## remove caches and build output; .venv stays
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
