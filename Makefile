# Everything that a checkout needs, each target setting up what it misses.
#
#   make demo    a guided tour, under half a minute: make demo ENGINE=containers1 with a bus that labels
#   make test    all tests, then those on real buses
#   make tests   the first part of it, which needs no other program
#   make test-bare   demo and tests on a bare Debian, as root: make test-bare SUITE=trixie BARE=quick
#   make containers1-daemon   builds a dbus-daemon with Containers1 for them, in about two minutes
#   make check   linters and type checker
#   make fuzz    fuzzing, ten minutes: make fuzz ARGS="--seconds 60 --only header"
#   make mutants breaks the code on purpose: do the tests notice? make mutants ARGS="--count 20"
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
# So many at a time: most of a test of real programs is waiting.
JOBS ?= $(shell echo $$(( $$(nproc) + 1 )))

.PHONY: demo containers1-daemon apparmor-profiles proxy-suite test tests test-bare check fuzz bench mutants coverage setup supported clean

demo: setup $(if $(filter containers1,$(ENGINE)),containers1-daemon)
	$(PY) -m integration.demo.$(if $(filter containers1,$(ENGINE)),containers1,tour)

# A dbus-daemon with Containers1, from Debian's source: tests and demo use it if it is there.
containers1-daemon:
	@.ci/containers1-daemon

# Coverage is measured on the tests of single modules alone, and demanded where code is pure.
test: setup apparmor-profiles proxy-suite
	$(PY) -m pytest tests -n $(JOBS) --cov --cov-branch --cov-report=
	$(PY) -m coverage report --include='policy/*,broker/wire/*' --fail-under=95
	$(PY) -m pytest integration -n $(JOBS) --dist loadfile --no-loadscope-reorder

tests: setup
	$(PY) -m pytest tests -n $(JOBS)

test-bare:
	@.ci/bare

# Debian's AppArmor profiles and their parser, unpacked and not installed: a test compares with them.
apparmor-profiles: $(PACKAGES)
	@.ci/apparmor-profiles

# xdg-dbus-proxy's own tests, of Debian sid, unpacked and not installed: a test runs them on `buswarden proxy`.
proxy-suite: $(PACKAGES)
	@.ci/proxy-suite

# The second linter has rules for asynchronous code alone, so it reads the files that have such code.
check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	grep -rlZE --include='*.py' '\b(async|await|trio)\b' $(SOURCES) | xargs -0 -n 20 -P $(JOBS) \
	  $(VENV)/bin/flake8-async --enable=ASYNC --disable=ASYNC114,ASYNC910,ASYNC911

bench: setup
	$(PY) -m integration.bench $(ARGS)

# Not every machine has a build of atheris: without it the state machine alone is run, which says so.
fuzz: setup
	@$(PY) -c 'import atheris' 2>/dev/null \
	  || $(PIP) install --quiet --no-build-isolation -e '.[fuzz]' 2>.cache/atheris.log \
	  || echo "fuzz: atheris cannot be installed here, see .cache/atheris.log"
	$(PY) -m integration.fuzz $(ARGS)

# About a minute for each of a hundred mutants.
mutants: setup apparmor-profiles
	$(PY) -m integration.mutants $(ARGS)

coverage: setup
	$(PY) -m pytest tests --cov --cov-branch --cov-report=term --cov-report=html:.cache/coverage

setup: supported $(PACKAGES) $(INSTALLED)

# The same limits as in pyproject.toml: trio-asyncio does not work with a newer one yet.
supported:
	@"$$(test -x $(PY) && echo $(PY) || echo "$(PYTHON)")" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "buswarden needs Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python3" >&2; exit 1; }

$(PACKAGES): .ci/packages | supported
	.ci/packages
	@mkdir -p $(@D)
	@touch $@

# Not after the stamp of the packages by time, only by order: installing one package more is no reason
# to make the environment again.
$(INSTALLED): requirements.lock pyproject.toml | supported $(PACKAGES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f .coverage .coverage.*
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +
