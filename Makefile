# What a person does with a checkout. `tools/setup` installs what a target needs and is instant after that.

.DEFAULT_GOAL := help
.PHONY: help demo setup check test soak bench lock clean

BIN := .venv/bin
# HAProxy and nginx are in /usr/sbin, which is not on everybody's PATH; Pebble is in a folder of ours.
export PATH := $(CURDIR)/.tools/bin:$(PATH):/usr/sbin
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-annotate --no-header --no-emit-index-url pyproject.toml

help: ## show this
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

demo: ## the main job on Pebble and HAProxy on this machine; KEEP=1 leaves it running
	@tools/setup demo
	@$(BIN)/certworker demo $(if $(filter 1,$(KEEP)),--keep)

setup: ## install everything that the demo, the checks and the tests need
	@tools/setup test

check: setup ## style, types, import rules, and what can be checked without running a proxy or a CA
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -m check

test: setup ## every test, on real PostgreSQL, Pebble, HAProxy and nginx; ARGS="-k name" for some
	$(BIN)/pytest -n 3 $(ARGS)

soak: setup ## workers, faults and renewals for MINUTES=10; ARGS="--help" says what else there is
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),10) $(ARGS)

bench: setup ## certworker beside its peers, and with a million certificates; ARGS="race certworker:1000" for some
	@tools/install-peers
	$(BIN)/python -m tests.bench $(ARGS)

lock: setup ## make the lock files anew, for the newest versions that pyproject.toml allows
	$(COMPILE) --upgrade --group build --output-file requirements.lock
	$(COMPILE) --upgrade --group dev --output-file requirements-dev.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
		--no-emit-index-url --upgrade --group bench --output-file requirements-bench.lock
	@! grep -n '://' requirements*.lock

clean: ## remove what the other targets made
	rm -rf .venv .tools .bench .certworker build dist .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
