# The whole interface. Every target sets itself up in .venv first, and again only when the lock or the packages change.
#
#   make up      start everything on this machine and open http://127.0.0.1:8000
#   make demo    the whole circle with simulated users, in about eight minutes
#   make test    unit, contract, integration (a real Kafka, Redis, Prometheus), end to end
#   make check   format, lint, strict types, import directions
#   make chaos   every crash point with every fault on a real Kafka, then a count (50 minutes)
#   make simulate   20,000 seeds of the simulation
#   make experiments   the trainer with simulated voters: tastes, mistakes, malice, a change of mind (hours)
#   make bench   every figure of the README, measured here (on a GPU: make bench-engine_gpu bench-trainer_gpu)
#   make test-vllm   the remote engine on a real vLLM, in an environment of its own (6 GB)

.PHONY: help setup up test test-vllm chaos simulate experiments demo check bench bench-serving pictures lock clean
.DEFAULT_GOAL := help

PYTHON := .venv/bin/python
READY := .venv/.ready-$(shell cat requirements.lock pyproject.toml | cksum | cut -d ' ' -f 1)
CONFIG ?= deploy/local.toml
# Where this is set, every process compiles torch and transformers anew: 18 s instead of 8 s.
unexport PYTHONDONTWRITEBYTECODE

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

# uv is taken where it is, else pip puts it into a folder of its own. The lock names every package with its
# hashes, so nothing is resolved here.
$(READY):
	@uv=$$(command -v uv || true); \
	if [ -z "$$uv" ] || ! "$$uv" --version >/dev/null 2>&1; then \
	  uv=.cache/uv/bin/uv; \
	  [ -x $$uv ] || { python3 -m venv .cache/uv && .cache/uv/bin/pip install -q uv; } || { \
	    echo "make: uv is not here and cannot be installed: install uv, or python3-venv for pip to do it" >&2; exit 1; }; \
	fi; \
	[ -x $(PYTHON) ] || "$$uv" venv -q --python '>=3.11,<3.13' .venv; \
	"$$uv" pip install -q --no-deps --python $(PYTHON) -r requirements.lock && \
	"$$uv" pip install -q --no-deps --no-build-isolation --python $(PYTHON) -e . && \
	rm -f .venv/.ready-* && touch $@

up: setup
	@exec .venv/bin/tiebreak up --config $(CONFIG)

demo: setup
	@exec .venv/bin/tiebreak demo

test: setup
	@exec $(PYTHON) -m tests.tiers

test-vllm: setup
	@$(PYTHON) -m tests.vllm.server
	@HF_HUB_OFFLINE=1 exec $(PYTHON) -m pytest -q -s --timeout 600 tests/vllm

chaos: setup
	$(PYTHON) -m tests.chaos.sweep --rounds 1 --kill-rounds 15

simulate: setup
	$(PYTHON) -m tests.simulation --seeds 20000

experiments: setup
	HF_HUB_OFFLINE=1 $(PYTHON) -m tests.experiments

check: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	$(PYTHON) -m pytest -q tests/unit/test_architecture.py

bench: setup
	@set -e; for bench in $(filter-out %_gpu.py,$(wildcard tests/bench/bench_*.py)); do \
	  name=$${bench##*/}; $(PYTHON) -m tests.bench.$${name%.py}; done
	$(PYTHON) -m tests.bench.record

bench-serving: bench-gateway bench-proxy bench-engine bench-swaps bench-overload

bench-%: setup
	$(PYTHON) -m tests.bench.bench_$*

# The README's pictures, by the commands themselves.
pictures: setup
	.venv/bin/tiebreak demo --out deploy/pictures/demo.png
	$(PYTHON) -m tests.bench.page_picture

# Pin everything anew. No registry host gets into the lock.
lock: setup
	@uv=$$(command -v uv || echo .cache/uv/bin/uv); \
	"$$uv" pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes --upgrade \
	  --no-emit-index-url --no-emit-find-links --no-header -q -o requirements.lock

# State, models and what other projects share are left alone: `tiebreak doctor` says where they are.
clean:
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache build out *.egg-info
