# Everything that a checkout needs, each target setting up what it misses.
#
#   make demo    a guided tour, under half a minute
#   make test    all tests, then those on real buses
#   make check   linters and type checker
#   make bench   measurements: make bench ARGS="--only roundtrip --json out.json"

SHELL := /bin/bash
.DEFAULT_GOAL := test
.DELETE_ON_ERROR:

export PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Stamps: of the Debian packages, and of what the virtual environment was made from.
PACKAGES := .cache/packages.stamp
INSTALLED := $(VENV)/installed.stamp
SOURCES := broker policy tests integration

.PHONY: demo test check bench coverage setup clean

demo: setup
	$(PY) -m integration.demo

# Coverage is measured on the tests of single modules alone, and demanded where code is pure.
test: setup
	$(PY) -m pytest tests --cov --cov-branch --cov-report=
	$(PY) -m coverage report --include='policy/*,broker/wire/*' --fail-under=95
	$(PY) -m pytest integration

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/flake8-async --enable=ASYNC --disable=ASYNC114,ASYNC910,ASYNC911 \
	  $$(find $(SOURCES) -name '*.py')

bench: setup
	$(PY) -m integration.bench $(ARGS)

coverage: setup
	$(PY) -m pytest tests --cov --cov-branch --cov-report=term --cov-report=html:.cache/coverage

setup: $(PACKAGES) $(INSTALLED)

$(PACKAGES): .ci/packages
	.ci/packages
	@mkdir -p $(@D)
	@touch $@

# Not after the stamp of the packages by time, only by order: installing one package more is no reason
# to make the environment again.
$(INSTALLED): requirements.lock pyproject.toml | $(PACKAGES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "buswarden needs Python 3.11 or later: make PYTHON=/path/to/python3"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f .coverage .coverage.*
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +
