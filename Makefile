# Every target sets up what it needs: `make demo` and `make test` each work alone on a fresh machine.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
PORT ?= 8000
VLLM ?=
RENEW ?=
BIN := $(VENV)/bin
DOCS_VENV ?= .venv-docs

.PHONY: setup dev browser demo test test-clients soak lint seams bench check-deploy docs lock clean

setup: $(VENV)/.ready  ## build the virtual environment

$(VENV)/.ready: pyproject.toml constraints.txt tools/setup.sh tools/repair_torchvision.sh tools/torchvision_without_operators.py
	PYTHON=$(PYTHON) VENV=$(VENV) bash tools/setup.sh

dev: $(VENV)/.dev  ## what tests and checks need besides

$(VENV)/.dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

browser: dev  ## Chromium for the playground's tests, where none is there
	VENV=$(VENV) bash tools/setup_browser.sh

demo: setup  ## train two experts, serve them as one model, and chat
	$(BIN)/python -m decar.clients.demo --port $(PORT)

test: browser  ## unit tests and end-to-end tests on real engines
	$(BIN)/python -m pytest

test-clients: dev  ## others' clients against a running ensemble, each in its own environment; writes docs/clients.md
	$(BIN)/python -m tests.compat

soak: dev  ## what takes too long for every change: thousands of requests, faults under load
	$(BIN)/python -m pytest -m soak
	DECAR_RANKS=2 $(BIN)/python -m pytest $(addprefix tests/e2e/test_,exact.py active.py prompts.py seeds.py)
	DECAR_NODES=3 $(BIN)/python -m pytest -m "soak or not soak" tests/e2e/test_ray.py
	DECAR_HOSTS=2 $(BIN)/python -m pytest $(addprefix tests/e2e/test_,exact.py active.py prompts.py seeds.py load.py loss.py)

lint: dev  ## formatting, style, types, the Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

seams: setup  ## names that decar relies on, in the installed vLLM's source or in another's: make seams VLLM=0.33.0
	$(BIN)/python tools/seams.py $(if $(VLLM),--version $(VLLM))

bench: setup  ## what an ensemble costs beside one expert: a two-minute measurement
	$(BIN)/decar bench serve --quick --output runs/bench

check-deploy:  ## alerts in deploy/prometheus, by promtool (Debian, Ubuntu: apt install prometheus)
	promtool check rules deploy/prometheus/alerts.yaml
	promtool test rules deploy/prometheus/alerts.test.yaml

lock: dev  ## renew constraints.txt, which setup and the image install under; RENEW=1: with the newest of everything
	VENV=$(VENV) RENEW=$(RENEW) bash tools/lock.sh

docs: $(DOCS_VENV)/.ready  ## the documentation as a site, in site/; every warning and dead link is an error
	$(DOCS_VENV)/bin/mkdocs build --strict

# An environment of its own: none of it is needed to run or to test decar, and nothing of decar's to build the site.
$(DOCS_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(DOCS_VENV)/bin/python -m pip install --quiet --group docs
	touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) .venv-clients build site runs
