# Every target sets up what it needs: `make demo` and `make test` each work alone on a fresh machine.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
PORT ?= 8000
VLLM ?=
BIN := $(VENV)/bin
DOCS_VENV ?= .venv-docs

.PHONY: setup demo test soak lint seams bench docs clean

setup: $(VENV)/.ready  ## build the virtual environment

$(VENV)/.ready: pyproject.toml tools/setup.sh tools/repair_torchvision.sh tools/torchvision_without_operators.py
	PYTHON=$(PYTHON) VENV=$(VENV) bash tools/setup.sh

demo: setup  ## train two experts, serve them as one model, and chat
	$(BIN)/python -m decar.clients.demo --port $(PORT)

test: setup  ## unit tests and end-to-end tests on real engines
	$(BIN)/python -m pytest

soak: setup  ## what takes too long for every change: thousands of requests, faults under load
	$(BIN)/python -m pytest -m soak

lint: setup  ## formatting, style, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

seams: setup  ## names that decar relies on, in the installed vLLM's source or in another's: make seams VLLM=0.33.0
	$(BIN)/python tools/seams.py $(if $(VLLM),--version $(VLLM))

bench: setup  ## what an ensemble costs beside one expert: a two-minute measurement
	$(BIN)/decar bench serve --quick --output runs/bench

docs: $(DOCS_VENV)/.ready  ## the documentation as a site, in site/; every warning and dead link is an error
	$(DOCS_VENV)/bin/mkdocs build --strict

# An environment of its own: none of it is needed to run or to test decar, and nothing of decar's to build the site.
$(DOCS_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(DOCS_VENV)/bin/python -m pip install --quiet --group docs
	touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) build site runs
