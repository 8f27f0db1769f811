# `make demo` and `make test` need Python 3.11 or later, and nothing else installed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := build/tiny-llama-w4

.PHONY: help demo test test-fast lint bench commands clean
.DELETE_ON_ERROR:

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## quantize the example model to 4 bits and print what it cost
	$(BIN)/qtool quantize examples/tiny-llama -o $(DEMO) --scheme w4a16 --method gptq \
	  --eval python-docs

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest -m 'not gpu and not peer'

test-fast: $(STAMP)  ## the tests that take seconds
	$(BIN)/python -m pytest -m 'not slow and not gpu and not peer'

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## the benchmarks behind the README's figures
	$(BIN)/python tests/benchmarks/perplexity.py
	$(BIN)/python tests/benchmarks/schemes.py
	$(BIN)/python tests/benchmarks/memory.py

commands: $(STAMP)  ## write examples/COMMANDS.md from the help texts
	$(BIN)/python -m qtool.cli.reference examples/COMMANDS.md

clean:  ## remove the environment and what was built
	rm -rf $(VENV) build
