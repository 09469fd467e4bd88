# Every target makes its own virtual environment once; nothing but make and, on Debian as root, apt is assumed.
# Arguments pass through: make bench ARGS="h1_c32 --rounds 3".
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
# A changed pyproject.toml gives another stamp, so the environment follows it.
STAMP := $(VENV)/.installed-$(shell sha256sum pyproject.toml | cut -c1-12)

.DEFAULT_GOAL := help
.PHONY: help demo test check bench fmt clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

demo: $(STAMP) ## a mesh of real processes on loopback, with its expectations checked
	$(BIN)/meshproxy demo $(ARGS)

test: check ## check, then all other tests
	-scripts/install-peers "make test"
	$(BIN)/python -m pytest -n 2 tests --ignore tests/unit --ignore tests/property --ignore tests/faults $(ARGS)
	$(BIN)/python -m pytest tests/faults $(ARGS)

check: $(STAMP) ## lint, types, import contracts and unit tests, in under a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict meshproxy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 tests/unit $(wildcard tests/property)

bench: $(STAMP) ## measure beside Envoy, HAProxy and no proxy
	scripts/install-peers
	$(BIN)/meshproxy bench $(ARGS)

fmt: $(STAMP) ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(STAMP):
	scripts/make-venv $(VENV) $(PYTHON)
	rm -f $(VENV)/.installed-*
	touch $@
