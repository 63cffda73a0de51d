# Needs Python 3.11 or newer, with pip and venv; every target sets up .venv by itself when it is missing or stale.
# Another interpreter: make test PYTHON=python3.13
.PHONY: help demo test test-soak faults check coverage fix bench setup clean

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PURE := */broker/answers.py,*/broker/books.py,*/broker/bounds.py,*/broker/carrying.py,*/broker/catalogue.py,*/broker/causes.py,*/broker/chains.py,*/broker/crash_files.py,*/broker/crash_shelf.py,*/broker/contract_log.py,*/broker/deaths.py,*/broker/dispatcher.py,*/broker/handover.py,*/broker/model.py,*/broker/outputs.py,*/broker/quarantine.py,*/broker/queues.py,*/broker/recycling.py,*/broker/registry.py,*/broker/seats.py,*/broker/snapshot.py,*/broker/starts.py,*/broker/timers.py,*/broker/windows.py,*/broker/workforce.py,*/cli/restarts.py,*/client/description.py,*/client/proxy.py,*/client/typed/*,*/protocol/api/*,*/protocol/codec.py,*/protocol/confinement.py,*/protocol/endpoints.py,*/protocol/errors.py,*/protocol/fields.py,*/protocol/headers.py,*/protocol/identity.py,*/protocol/messages.py,*/protocol/paths.py,*/protocol/slots.py,*/protocol/zmtp.py,*/worker/binding.py,*/worker/raw_binding.py,*/worker/sandbox/bpf.py,*/worker/sandbox/calls.py,*/worker/sandbox/memory.py

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

demo: .venv/.runtime  ## a short tour: contracts that crash, hang and eat memory, and a host that goes on
	@$(BIN)/luacell demo

test: .venv/.dev  ## run the tests
	$(BIN)/python -m pytest

test-soak: .venv/.dev  ## run the long tests, half an hour at most; some of them: make test-soak SOAK="kills --seed 7"
	$(BIN)/python -m tests.soak $(SOAK)

faults: .venv/.dev  ## run the fault catalogue and write its results into docs/faults.md
	$(BIN)/python -m tests.faults.document

# What the tests' child processes run is not measured here: it would cost the tests half their time again, and the pure
# modules, which must be covered wholly, are covered by tests in the process that is measured.
check: .venv/.dev  ## what CI runs: format, lint, types, imports, compose file, tests, coverage of the pure modules
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --include='$(PURE)' --fail-under=100

coverage: .venv/.dev  ## run the tests, and show what neither they nor their child processes run
	$(BIN)/coverage erase
	COVERAGE_PROCESS_START='$(CURDIR)/pyproject.toml' COVERAGE_FILE='$(CURDIR)/.coverage' $(BIN)/python -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

fix: .venv/.dev  ## format, and mend what ruff can mend
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format

bench: .venv/.dev  ## run the benchmarks (ARGS="--only sizes --profile": docs/performance.md)
	$(BIN)/python -m benchmarks $(ARGS)

setup: .venv/.dev  ## set up .venv with everything that the other targets need

clean:  ## remove .venv and whatever the tools leave behind
	rm -rf .venv dist .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are inside .venv and written last, so one that was only half made is made again. The demo does without the
# development tools: a first look should not wait for them.
.venv/.runtime: pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
	  "luacell needs Python 3.11 or newer with pip and venv: '$(PYTHON)' is missing, is older, or lacks them (on Debian" \
	  "and Ubuntu: apt-get install python3-venv). To use another one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Installing luacell into .venv"
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) --editable .
	@touch $@

.venv/.dev: .venv/.runtime
	@echo "Installing the development tools into .venv"
	@$(PIP) --upgrade 'pip>=25.1'  # the first that knows --group
	@$(PIP) --group dev
	@touch $@
