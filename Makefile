# make test, make bench, make train, make gpu-check and make lint set up .venv by themselves.
#
#   PYTHON=python3.12   the Python that .venv is made of
#   VENV=/path/to/env   use an environment that has PyTorch already: only swinops goes into it, and nothing is downloaded
#   ARGS=...            passed on: make test ARGS="-k packaging", make bench ARGS=--full, make train ARGS="--epochs 8"

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS := $(shell nproc 2>/dev/null || echo 2)
INSTALLED := $(VENV)/.swinops-installed

.PHONY: test bench train gpu-check lint
.DELETE_ON_ERROR:

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $$(( $(JOBS) < 4 ? $(JOBS) : 4 )) --dist loadgroup $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m swinops bench $(ARGS)

train: $(INSTALLED)
	$(BIN)/python examples/train.py $(ARGS)

gpu-check: $(INSTALLED)
	$(BIN)/python -m swinops gpu-check $(ARGS)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/* csrc/*/*.cpp tests/emulator/*.h tests/emulator/*.c*)
	$(BIN)/python -m mypy

$(INSTALLED): pyproject.toml setup.py constraints.txt Makefile $(wildcard csrc/*)
ifeq ($(VENV),.venv)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch by itself first: asked for together with what depends on it, pip may download several versions of it
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .[bench,train,test,dev]
else
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
endif
	touch $@
