# make help lists the targets. Environments: .venv (tests, checks, benchmarks) and .venv-demo (demo); neither needs the other.
SHELL := /bin/bash
PYTHON_TEST := .venv/bin/python
PYTHON_DEMO := .venv-demo/bin/python
TESTS ?= tests
CASE ?=
KILLS ?= 300
SEED ?= 1
SHARDS ?= 4

.DEFAULT_GOAL := help
.PHONY: help setup system demo stop test kill lint type arch bench bench-env bench-quick servers constraints clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## make or update the test environment in .venv
	@tools/bootstrap.sh test .venv

system:
	@tools/system_packages.sh
	@tools/kafka_jars.sh >/dev/null

# fetched before the tests, not within one: a slow network must not look like a test that hangs
servers: setup
	@tools/registry_app.sh >/dev/null
	@for name in mlserver triton; do tools/model_server_env.sh $$name $(PYTHON_TEST) >/dev/null || exit; done

demo: ## run the whole story on this machine: make the demo environment, start everything, show the pages
	@tools/bootstrap.sh demo .venv-demo
	@$(PYTHON_DEMO) -m demo

stop: ## end what make demo started
	@if [ -x $(PYTHON_DEMO) ]; then $(PYTHON_DEMO) -m demo stop; else echo "No demo environment: nothing runs."; fi

test: setup system servers ## run all tests, real servers included (TESTS=tests/core for a part)
	@$(PYTHON_TEST) -m pytest $(TESTS)

kill: setup system ## kill ingest's tasks 300 times on each kind of ledger, and the broker between; prove that nothing is lost (KILLS=, SEED=, SHARDS=1 for ingest in one task)
	@$(PYTHON_TEST) -m tests.kill --kills $(KILLS) --seed $(SEED) --shards $(SHARDS)

lint: setup ## ruff over everything
	@$(PYTHON_TEST) -m ruff check .
	@$(PYTHON_TEST) -m ruff format --check .

type: setup ## mypy --strict over src
	@$(PYTHON_TEST) -m mypy

arch: setup ## floors, doors and imports: who may import what
	@$(PYTHON_TEST) -m pytest -q tests/airflow/test_architecture.py

bench-env: system
	@tools/bootstrap.sh bench .venv

bench: bench-env ## all benchmarks at full size (CASE=K1 for one)
	@$(PYTHON_TEST) -m benchmarks $(CASE)

bench-quick: bench-env ## all benchmarks, small, in a few minutes (CASE=K1 for one)
	@$(PYTHON_TEST) -m benchmarks --quick $(CASE)

constraints: setup ## resolve all extras anew and write constraints.txt
	@tools/make_constraints.sh

clean: ## remove caches and build output (environments stay)
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	@find . -name __pycache__ -type d -not -path './.venv*' -not -path './.uv/*' -prune -exec rm -rf {} +
