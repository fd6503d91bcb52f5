# Everything runs in .venv, which `make venv` builds with the versions of constraints.txt.
PYTHON_VENV := .venv/bin/python
export PYTHON
# Compiled modules are kept: thousands of programs load them.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help system venv demo demo-cluster test check bench soak mutants hostile fuzz backups claims cluster order load protocol format clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

system:  ## Install the programs that tests need, from Debian's packages: chromium, nginx, caddy, systemd-analyze, rsync, vim, ed, bubblewrap
	@scripts/system.sh

venv:  ## Create .venv with pinned versions; does nothing if it is up to date
	@scripts/bootstrap.sh

demo-cluster: venv  ## Run three NATS servers and three nodes, and kill the owner
	@$(PYTHON_VENV) examples/cluster_demo.py

demo: venv  ## Run a server and two machines: share, lose the connection, converge
	@$(PYTHON_VENV) examples/demo.py

# Two more than there are processors: the tests wait for other processes half of their time.
WORKERS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 2)))

test: venv  ## Run every test; the last line names those skipped for a missing program of `make system`
	@$(PYTHON_VENV) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: venv  ## Format, lint, strict types, import layering; protocol/ and openapi.json agree with the code
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@$(PYTHON_VENV) scripts/protocol_files.py --check

bench: venv  ## Measure against local lattice, side by side
	@$(PYTHON_VENV) benchmarks/bench.py $(ARGS)

SEEDS ?= 10
FIRST ?= 1
COMMANDS ?= 25
JOBS ?= 1
EVERY ?= 6

soak: venv  ## Random commands and faults, seed after seed (SEEDS=100 JOBS=2)
	@$(PYTHON_VENV) tests/soak.py --seeds $(SEEDS) --first $(FIRST) --commands $(COMMANDS) --jobs $(JOBS) --every $(EVERY) $(if $(ONLY),--only "$(ONLY)")

SECONDS ?= 600
COUNT ?= 1000

mutants: venv  ## Change the guarding modules at random, one change at a time: the nearest tests must fail (SEED=1 SECONDS=600 COUNT=1000)
	@$(PYTHON_VENV) tests/mutants.py --seed $(SEED) --seconds $(SECONDS) --count $(COUNT) $(if $(ONLY),--only "$(ONLY)")

ROUNDS ?= 200

claims: venv  ## Let 32 processes race for one task, round after round: one winner each (ROUNDS=200)
	@$(PYTHON_VENV) tests/claims.py --rounds $(ROUNDS)

cluster: venv  ## Kill, pause and stop the nodes of a cluster and its engine beside writers (SEEDS=20); then partitions, lost leases, large contents, edits, restarts
	@$(PYTHON_VENV) tests/cluster_soak.py --seeds $(SEEDS) --first $(FIRST)
	@$(PYTHON_VENV) tests/cluster_faults.py

order: venv  ## Kill, pause and cut off the cluster's engine and its nodes, seed after seed (SEEDS=200)
	@$(PYTHON_VENV) tests/cluster_order.py --seeds $(SEEDS) --first $(FIRST)

load: venv  ## Measure dozens of projects, the fan-out to 1,000 clients, then with hundreds of clients, stalled ones, concurrent writers, a restart, 10,000 tasks
	@$(PYTHON_VENV) benchmarks/load.py $(ARGS)

COPIES ?= 50

backups: venv  ## Copy a live server with rsync under load: each copy must be whole (COPIES=50)
	@$(PYTHON_VENV) tests/backups.py --copies $(COPIES)

LINES ?= 5000
SEED ?= 1

fuzz: venv  ## Run hostile command lines (LINES=50000 SEED=1; UNGUARDED=1: without the policy)
	@$(PYTHON_VENV) tests/hostile/fuzz.py --lines $(LINES) --seed $(SEED) $(if $(UNGUARDED),--unguarded)

EXAMPLES ?= 2000

hostile: venv  ## Send hostile requests, frames and floods to a running server (EXAMPLES=2000)
	@HOSTILE_EXAMPLES=$(EXAMPLES) $(PYTHON_VENV) -m pytest -s tests/hostile/test_http.py tests/hostile/test_http_with_token.py tests/hostile/test_frames.py tests/hostile/test_floods.py tests/hostile/test_rest.py $(ARGS)

protocol: venv  ## Write protocol/schema.json, protocol/vectors/ and openapi.json from the code
	@$(PYTHON_VENV) scripts/protocol_files.py

format: venv  ## Format the code and fix what can be fixed
	@.venv/bin/ruff format .
	@.venv/bin/ruff check --fix .

clean:  ## Remove .venv and every cache
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests examples benchmarks scripts -name __pycache__ -type d -exec rm -rf {} +
