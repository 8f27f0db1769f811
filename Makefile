# `make demo` and `make test` need Python 3.11 or later, and nothing else installed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := build/tiny-llama-w4
# `make test-consumers`: what it installs, in an environment of its own
CONSUMERS := build/consumers
WHEELS := build/wheels
LLAMA_CPP := llama-cpp-python==0.3.36
GPTQMODEL := torchao==0.18.0 defuser==0.0.28 gptqmodel==7.7.0
GPTQMODEL_NEEDS := device-smi logbar maturin ninja optimum==2.3.0 pillow protobuf pypcre requests threadpoolctl tokenicer

.PHONY: help demo test test-fast test-consumers lint bench commands clean
.DELETE_ON_ERROR:

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## quantize the example model to 4 bits and print what it cost
	$(BIN)/qtool quantize examples/tiny-llama -o $(DEMO) --scheme w4a16 --method gptq \
	  --eval python-docs

test: $(STAMP)  ## all tests, on all cores
	$(BIN)/python -m pytest -q -n auto -m 'not gpu and not peer'

test-fast: $(STAMP)  ## the tests that take seconds
	$(BIN)/python -m pytest -q -n auto -m 'not slow and not gpu and not peer'

$(CONSUMERS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CONSUMERS)
	$(CONSUMERS)/bin/pip install --quiet -c constraints.txt torch
	$(CONSUMERS)/bin/pip install --quiet -c constraints.txt -e '.[dev]'
	$(CONSUMERS)/bin/pip wheel --no-deps -f $(WHEELS) -w $(WHEELS) $(LLAMA_CPP)
	$(CONSUMERS)/bin/pip install --quiet -c constraints.txt -f $(WHEELS) $(LLAMA_CPP) $(GPTQMODEL_NEEDS)
	$(CONSUMERS)/bin/pip install --quiet --no-deps $(GPTQMODEL)
	@touch $@

test-consumers: $(CONSUMERS)/.installed  ## the tests that need other programs: installs them, which takes ten minutes once
	$(CONSUMERS)/bin/python -m pytest -m 'not gpu' tests/test_llamacpp.py tests/test_gguf_*.py tests/test_mixes.py \
	  tests/test_format_gptq_awq.py

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
