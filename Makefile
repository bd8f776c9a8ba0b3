# Two commands matter: `make demo` and `make test`. Both make the environment first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# A user with a CPU-only wheel index takes torch from it: make demo TORCH_INDEX=<url>
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.headwater-env
# What the environment is made with: another PYTHON, TORCH or TORCH_INDEX makes it anew.
ASKED := $(VENV)/.headwater-asked

.PHONY: env demo test test-slow gates lint clean asked

env: $(STAMP)

# torch is installed alone and by its exact version first: an open range could pull a CUDA build of several gigabytes.
$(ASKED): asked
	@mkdir -p $(VENV)
	@echo '$(PYTHON) $(TORCH) $(TORCH_INDEX)' | cmp --silent - $@ || echo '$(PYTHON) $(TORCH) $(TORCH_INDEX)' > $@

$(STAMP): pyproject.toml constraints.txt $(ASKED)
	$(PYTHON) -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 13)) and "Headwater needs Python 3.11 to 3.13; set PYTHON=...")'
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: env
	$(BIN)/headwater run --preset demo

test: env
	$(BIN)/python -m pytest -m "not slow"

test-slow: env
	$(BIN)/python -m pytest

# The learning claims of the README over three seeds; about half an hour on two cores.
gates: env
	$(BIN)/headwater gates --preset demo --seeds 3

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
