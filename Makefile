# Cloister. `make help` lists what can be made; everything lives in .venv and nothing is installed outside it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHORT ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-long lint format serve bench clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

install: $(VENV)/installed ## Install Cloister and its tools into .venv, at the pinned versions

# CrypTen's metadata requires a dead package, so it is installed without its dependencies, which are pinned beside it.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) examples/preflight.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable ".[cli,server,postgres,hsm,aws,vault,mpc,keras,onnx]"
	$(BIN)/python -m pip install --quiet --no-deps crypten==0.4.1
	@touch $@

demo: install ## Start a server, train privately on real data, predict, be refused, verify: the main job, end to end
	@$(BIN)/python examples/demo.py

# OAuth clients of others; the tests that need them skip, and say so, where there is no npm.
NODE := tests/security/node
$(NODE)/node_modules/.package-lock.json: $(NODE)/package-lock.json
	-npm ci --prefix $(NODE) --silent --no-audit --no-fund

test: install $(NODE)/node_modules/.package-lock.json ## Run the tests (SQLite and a real PostgreSQL from pip; no service needed)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# TensorFlow pins packages of its own, so it is kept apart; the tests skip what needs it where it cannot be had.
$(VENV)-tensorflow/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-tensorflow
	-$(VENV)-tensorflow/bin/python -m pip install --quiet tensorflow-cpu==2.21.0 keras==3.15.0 torch==2.13.0 httpx2 pydantic cryptography safetensors && \
	$(VENV)-tensorflow/bin/python -m pip install --quiet --no-deps --editable . && touch $@

test-long: install $(VENV)-tensorflow/installed ## Run the long tests too: every kill, Fashion-MNIST (SHORT=1: a shortened run for CI)
	SHORT=$(SHORT) $(if $(SHORT),OMP_NUM_THREADS=1) $(BIN)/python -m pytest -m long $(if $(SHORT),-n 2 --dist loadgroup)

lint: install ## Check style, types and import directions
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## Format the code
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

serve: install ## Serve on SQLite in ~/.local/share/cloister (run `.venv/bin/cloister-admin init` once before)
	$(BIN)/cloister-server serve

bench: install ## Run one benchmark beside its peers: make bench NAME=import
	@test -f "benchmarks/$(NAME).py" || { echo "make bench NAME=...; there are: $(basename $(notdir $(wildcard benchmarks/*.py)))"; exit 2; }
	@$(BIN)/python benchmarks/$(NAME).py $(ARGS)

clean: ## Remove .venv and caches
	rm -rf $(VENV) $(VENV)-tensorflow .venv-bench-* $(NODE)/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
