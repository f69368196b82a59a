# One command per intention. Each does its own set-up, and does nothing twice.

PYTHON ?= python3
VENV := .venv
MYPY := $(VENV)/bin/mypy --strict

export PYTHONPATH := tests

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-stop test check bench plot soak fuzz lock clean host engines venv

help:                 ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: host venv       ## a container, a running service, and one exec through each client
	@$(VENV)/bin/python scripts/demo.py start

demo-stop:            ## end what `make demo` started, and remove its files
	@if [ -e .demo ]; then $(VENV)/bin/python scripts/demo.py stop; fi

test: engines check   ## check, then the whole suite: with and without uvloop, and on a second Python
	@scripts/test

check: venv           ## ruff and mypy --strict
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --quiet --check .
	@$(MYPY) --package execgate
	@$(MYPY) --explicit-package-bases tests scripts

bench: engines venv      ## measure the service against the bare runtime and the engines of this machine
	@$(VENV)/bin/python -m bench

plot: .venv-plot/.ready  ## renew figures and plot of docs/benchmarks.md from what bench measured, JSON=build/bench.json
	@.venv-plot/bin/python -m bench.page $(or $(JSON),build/bench.json) docs/benchmarks.md
	@MPLCONFIGDIR=.venv-plot .venv-plot/bin/python -m bench.plot docs/benchmarks.json docs/benchmarks.svg

soak: engines venv      ## a random mix of everything with kills and reloads, SECONDS=600, SEED=
	@$(VENV)/bin/python -m soak --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED))

fuzz: .venv-fuzz/.ready  ## every parser on hostile input, guided by coverage, SECONDS=60 for each, TARGET=
	@PYTHONPATH=tests:service .venv-fuzz/bin/python -m fuzz --seconds $(or $(SECONDS),60) $(addprefix --target ,$(TARGET))

lock:                 ## write requirements/*.txt anew; UPGRADE=1 takes newer versions
	@scripts/lock $(if $(UPGRADE),--upgrade)

clean: demo-stop      ## remove what the other targets made
	@rm -rf .venv .venv-* .make .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

host:
	@scripts/setup-host

engines:
	@scripts/setup-host --engines

venv: $(VENV)/.ready

# What a bare machine lacks (python3-venv) comes before the first virtual environment.
$(VENV)/.ready: requirements/dev.txt pyproject.toml scripts/make-venv | host
	@scripts/make-venv $(PYTHON) $(VENV)

.venv-plot/.ready: requirements/plot.txt scripts/make-venv | host
	@scripts/make-venv $(PYTHON) $(@D) requirements/plot.txt

.venv-fuzz/.ready: requirements/fuzz.txt scripts/make-venv | host
	@scripts/make-venv $(PYTHON) $(@D) requirements/fuzz.txt

.venv-%/.ready: requirements/dev.txt pyproject.toml scripts/make-venv
	@scripts/make-venv $(VENV_PYTHON) $(@D)
