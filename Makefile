# Two commands do all the set-up: `make demo` and `make test`. They need Python 3.11,
# make and a package index within reach; a second run finds everything in place.

PYTHON ?= python3.11
ENGINE ?= vllm
VLLM_ENV := .venv/vllm
VLLM_PYTHON := $(VLLM_ENV)/bin/python
MUTMUT_SEES_VLLM := .venv/mutants/lib/python3.11/site-packages/vllm.pth
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo examples test check lint bench chaos-gate chaos-update liveness soak families mutants next-release \
  fmt setup setup-vllm \
  setup-sglang setup-megatron setup-trainers no-such-engine clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(if $(filter vllm sglang,$(ENGINE)),setup-$(ENGINE),no-such-engine) ## train a tiny model and update a live server with it (ENGINE=sglang: SGLang's)
	.venv/$(ENGINE)/bin/python examples/live_update_demo.py --engine $(ENGINE) $(ARGS)

examples: setup setup-trainers setup-megatron ## real trainers, three steps each, into live servers in bfloat16 (ARGS="--only fsdp2")
	$(VLLM_PYTHON) examples/run_trainers.py --engine vllm $(ARGS)
	.venv/sglang/bin/python examples/run_trainers.py --engine sglang $(ARGS)

test: setup ## all tests, on both engines side by side (ARGS="-k name" narrows them)
	$(PYTHON) scripts/run_tests.py $(ARGS)

check: setup-vllm ## the quick loop: lint, types, import contracts, unit tests without engines
	$(PYTHON) scripts/check.py $(ARGS)

lint: setup-vllm ## ruff, mypy and the import contracts
	$(VLLM_ENV)/bin/ruff check .
	$(VLLM_ENV)/bin/ruff format --check .
	$(VLLM_ENV)/bin/mypy
	$(VLLM_ENV)/bin/lint-imports

bench: setup setup-megatron ## benchmark tables: the wire, an update by phase, Megatron to HF, memory
	$(VLLM_PYTHON) tests/benchmarks/run.py $(ARGS)

chaos-gate: setup ## thousands of hostile requests against engines that may not grow (ARGS="--requests 100")
	$(VLLM_PYTHON) -m tests.support.chaos_run $(ARGS)

chaos-update: setup ## weight updates under load and faults, every token judged (ARGS="--part 1/4")
	$(VLLM_PYTHON) -m tests.chaos_update $(ARGS)

liveness: setup ## stuck states made on real engines, and how each of them ends (ARGS="--engine vllm --part 1/4")
	$(VLLM_PYTHON) -m tests.liveness $(ARGS)

soak: setup ## what 300 updates and 100 sleeps under load leave behind (ARGS="--engine sglang --updates 100")
	$(VLLM_PYTHON) -m tests.soak $(ARGS)

families: setup ## tiny models of 70 families, updated on each engine and held against fresh loads (ARGS="--engine vllm --part 1/2")
	$(VLLM_PYTHON) -m tests.families.run $(ARGS)

next-release: setup-vllm ## what the next vLLM release changes of all that we rely on, read in its wheel
	$(VLLM_PYTHON) -m pytest tests/unit/vllm_ext/test_next_release.py -m wheel -s $(ARGS)

mutants: $(MUTMUT_SEES_VLLM) ## how many mutants of the most delicate files the unit tests kill
	.venv/mutants/bin/python scripts/mutants.py $(ARGS)

$(MUTMUT_SEES_VLLM): requirements/mutants.txt | setup-vllm
	$(PYTHON) -m venv --clear --without-pip .venv/mutants
	$(VLLM_PYTHON) -m pip --python .venv/mutants/bin/python install -qq --no-deps -r $<
	echo "$(CURDIR)/$(VLLM_ENV)/lib/python3.11/site-packages" > $@

fmt: setup-vllm ## format, and fix what ruff can fix by itself
	$(VLLM_ENV)/bin/ruff check --fix .
	$(VLLM_ENV)/bin/ruff format .

setup: setup-vllm setup-sglang ## install every engine environment

setup-vllm setup-sglang setup-megatron setup-trainers: setup-%: ## install one environment, .venv/vllm or .venv/sglang
	@command -v $(PYTHON) >/dev/null || { \
	  echo "setup: error: $(PYTHON) not found; install Python 3.11 or run make PYTHON=/path/to/python3.11 ..." >&2; \
	  exit 1; }
	@$(PYTHON) scripts/setup_env.py $*

no-such-engine:
	@echo "make: error: there is no engine '$(ENGINE)'; choose ENGINE=vllm or ENGINE=sglang" >&2
	@exit 1

clean: ## remove the environments, caches and builds
	rm -rf .venv build dist mutants .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
