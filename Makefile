# What a person types. Everything runs in .venv, which `setup` makes; nothing outside this folder is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
LOG := $(VENV)/setup.log
CONSTRAINTS := config/constraints.txt
PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest -q
PARALLEL := -n $(PROCESSES) -p tests.acceptance.scheduling

.DEFAULT_GOAL := help
.PHONY: help setup demo run test test-all fault fault-part simulate lint format types bench soak docs check constraints clean

help: ## This list
	@echo "agentq, a durable message queue for LLM agents. Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with everything in tested versions; the command is then .venv/bin/agentq

# Done again when what it installs has changed. Needs Python, its venv module and a package index; no uv, no root.
$(STAMP): pyproject.toml $(CONSTRAINTS) Makefile bin/agentq
	@bin/setup "$(PYTHON)" "$(VENV)" "$(CONSTRAINTS)" "$(LOG)"
	@touch $@

demo: setup ## Start everything, let the support desk answer its requests, check the audit, stop
	@$(BIN)/agentq demo

run: setup ## Start everything and keep it running; Ctrl-C stops it
	@$(BIN)/agentq up

test: setup ## The tests: unit, simulation, integration, acceptance and packaging, on real servers
	@echo "test: everything but tests/fault, $(PROCESSES) processes"
	@$(PYTEST) $(PARALLEL) --ignore tests/fault

test-all: setup ## All tests, one after the other, with branch coverage and the crash tests
	@echo "test-all: all of tests/, with coverage"
	@$(PYTEST) --cov --cov-report=term:skip-covered

fault: setup ## Kill workers, scheduler, Redis, RabbitMQ and MongoDB at named points and check every promise
	@echo "fault: the scenarios, $(PROCESSES) at a time, about five minutes"
	@$(PYTEST) -n $(PROCESSES) tests/fault
	@echo "fault: a chaos campaign on each broker, about three minutes each; the results go into docs/reliability.md"
	@$(BIN)/python -m tests.fault.campaign --broker redis --write-docs
	@$(BIN)/python -m tests.fault.campaign --broker rabbitmq --replica-set --write-docs

fault-part: setup ## The part of 'fault' that CI runs: every server and role, one crash point, short campaigns
	@echo "fault-part: servers, roles and one crash point"
	@$(PYTEST) -n $(PROCESSES) tests/fault/test_crashes.py tests/fault/test_proxy.py tests/fault/test_primitives.py \
		-k "proxy or primitives or specialist or broker or mongod or scheduler or after_effect"
	@echo "fault-part: a batch of 300 lines; submitter, workers, broker and MongoDB are killed"
	@FAULT_LINES=300 $(PYTEST) tests/fault/test_batch_kills.py
	@echo "fault-part: a chaos campaign of half a minute on each broker"
	@$(BIN)/python -m tests.fault.campaign --broker redis --runs 200 --seconds 30
	@$(BIN)/python -m tests.fault.campaign --broker rabbitmq --runs 200 --seconds 30

simulate: setup ## Play 100,000 seeded schedules of crashes and lost messages (COUNT=...)
	@echo "simulate: the real engine and runtime under a seeded scheduler"
	@$(BIN)/python -m tests.simulation --count $(or $(COUNT),100000)

lint: setup ## Style, complexity, formatting, import layers
	@echo "lint: ruff, ruff format, import-linter"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "lint: not formatted: run 'make format'"; exit 1; }
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }

format: setup ## Format the code and sort its imports
	@$(BIN)/ruff check --quiet --fix --select I .
	@$(BIN)/ruff format --quiet .

types: setup ## mypy, strict
	@echo "types: mypy"
	@$(BIN)/mypy

bench: setup ## What a run costs in CPU and time, by process (BENCH="--quick" for a short one)
	@echo "bench: python -m bench $(BENCH)"
	@$(BIN)/python -m bench $(BENCH)

soak: setup ## One hour at half load: does memory, do keys, connections or open files grow? (MINUTES=...)
	@echo "soak: python -m bench.soak"
	@$(BIN)/python -m bench.soak --minutes $(or $(MINUTES),60)

docs: setup ## Check that every link between the pages of the documentation leads somewhere
	@echo "docs: links"
	@$(PYTEST) tests/packaging/test_docs.py

check: lint types test ## What CI runs
	@echo "check: all good"

constraints: ## Renew config/constraints.txt with the newest versions that pyproject.toml accepts
	@bin/renew-constraints "$(PYTHON)" "$(CONSTRAINTS)"

clean: ## Remove what the targets above made; the data of 'make run' and 'make demo' stays in .agentq
	@echo "clean: .venv and caches"
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage* dist build
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
