# Every target sets up what it needs: Python 3.11 to 3.13 and make suffice.
#
#   make demo                    the main job on the embedded data, on the CPU
#   make JAX_EXTRA=cuda12 demo   the same on an NVIDIA GPU (or tpu)
#   make PYTHON=python3.11 test  with a given interpreter

VENV := .venv
PARITY_VENV := .venv-parity
BROWSER_VENV := .venv-browser
AOT_VENV := .venv-aot
PY := $(VENV)/bin/python
PARITY_PY := $(PARITY_VENV)/bin/python
BROWSER_PY := $(BROWSER_VENV)/bin/python
AOT_PY := $(AOT_VENV)/bin/python

# Run each candidate: a version manager's stub may exist without a Python.
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for p in python3.12 python3.13 python3.11 python3; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
  && echo $$p && break; done)
endif

JAX_EXTRA ?=
# Files are spread over processes (tests/conftest.py): compiling uses one core.
# In the order of their names: by the number of tests, as else, dear files with
# few of them come last, and one process waits for the other.
WORKERS ?= -n auto --dist loadscope --no-loadscope-reorder
# Tests mostly wait for XLA, which compiles in a third of the time without LLVM's
# optimizations and without its emitters by MLIR. Those of the mark `optimized`,
# of bits or of much to compute, run as users' programs do.
QUICKLY := XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0 \
  --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
NO_OTHER_STAGE := not slow and not long and not parity and not browser and not aot
JAX := $(if $(JAX_EXTRA),'jax[$(JAX_EXTRA)]')
# Stamps are written last, so that a broken install is done again.
RUN_READY := $(VENV)/ready$(JAX_EXTRA:%=-%)
TEST_READY := $(RUN_READY)-test
PARITY_READY := $(PARITY_VENV)/ready
BROWSER_READY := $(BROWSER_VENV)/ready
AOT_READY := $(AOT_VENV)/ready

# Python compiles what it imports; of PyTorch's and JAX's thousands of files most
# are never imported.
PIP_INSTALL := -m pip install --quiet --no-compile --disable-pip-version-check

# The versions that the tests have run with; others are refused by name.
define CHECK_PYTHON
import sys
name, found = sys.argv[1], sys.version_info[:2]
if found < (3, 11) or found > (3, 13):
  sys.exit("%s is Python %d.%d, and 3.11 to 3.13 are known to work. Name "
           "another: make PYTHON=/path/to/python3.12 ..." % ((name,) + found))
endef
export CHECK_PYTHON

# create_venv(directory), with a message in place of a traceback.
define create_venv
@test -n '$(PYTHON)' || { echo 'No Python 3.11 to 3.13 was found.' \
  'Install one, or name it: make PYTHON=/path/to/python3.12 ...'; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
  echo '$(PYTHON) cannot create virtual environments: it does not run, or' \
  'lacks venv and ensurepip (Debian, Ubuntu: apt install python3-venv).'; \
  exit 1; }
@$(PYTHON) -c "$$CHECK_PYTHON" '$(PYTHON)'
@echo 'Installing into $(1) with $(PYTHON); the first time takes minutes.'
@$(PYTHON) -m venv $(1)
endef

.DEFAULT_GOAL := help
.PHONY: help setup environments demo table cifar10 costs test test-slow test-long \
  parity browser aot packed versus inception golden lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' \
	  $(firstword $(MAKEFILE_LIST))

setup: $(TEST_READY) ## create .venv with everything that demo and test need

# Of the targets that need more than `test` does.
environments: $(PARITY_READY) $(AOT_READY) $(BROWSER_READY) ## create those of parity, aot, browser

demo: $(RUN_READY) ## quantize, fine-tune and evaluate the embedded default
	$(PY) train.py --config=configs/digits.py:demo --workdir=runs/demo
	$(PY) eval.py --config=configs/digits.py:demo --workdir=runs/demo

table: $(RUN_READY) ## README's tables: 3 seeds, hours on a laptop
	$(PY) -m msfp_jax.run.study --config=configs/digits.py:table --workdir=runs/table

cifar10: $(RUN_READY) ## the ablation on CIFAR-10: 3 seeds, days on a laptop
	$(PY) -m msfp_jax.run.study --config=configs/cifar10.py:ablation --workdir=runs/cifar10-ablation

costs: $(RUN_READY) ## what quantization costs in time
	$(PY) -m benchmarks.costs

test: $(TEST_READY) ## the test suite
	$(QUICKLY) $(PY) -m pytest $(WORKERS) -m 'not optimized and $(NO_OTHER_STAGE)'
	$(PY) -m pytest $(WORKERS) -m 'optimized and $(NO_OTHER_STAGE)'

test-slow: $(TEST_READY) ## the tests that take minutes
	$(QUICKLY) $(PY) -m pytest $(WORKERS) --durations=30 -m 'slow and not optimized and not parity and not aot'
	$(PY) -m pytest $(WORKERS) --durations=30 -m 'optimized and slow and not parity and not aot'

test-long: $(TEST_READY) ## the tests that CI has no time for
	$(QUICKLY) $(PY) -m pytest $(WORKERS) --durations=30 -m 'long and not optimized and not aot'
	$(PY) -m pytest $(WORKERS) --durations=30 -m 'optimized and long'
	$(MAKE) $(AOT_READY)
	JAX_PLATFORMS=cpu $(AOT_PY) -m pytest $(WORKERS) --durations=30 -m 'aot and long'

parity: $(PARITY_READY) ## live comparisons with PyTorch (its own environment)
	$(QUICKLY) $(PARITY_PY) -m pytest $(WORKERS) -m 'parity and not optimized'
	$(PARITY_PY) -m pytest -m 'optimized and parity'

browser: $(BROWSER_READY) ## the report in Chromium, which must be installed
	$(BROWSER_PY) -m pytest -m browser

# On the CPU alone, JAX's plugins do not look for drivers and cuDNN.
aot: $(AOT_READY) ## compile the kernels for TPUs and Hopper, without either
	JAX_PLATFORMS=cpu $(AOT_PY) -m pytest $(WORKERS) -m 'aot and not long'

packed: $(RUN_READY) ## speed and memory of packed models
	$(PY) -m benchmarks.packed

versus: $(PARITY_READY) ## sampling speed against PyTorch and diffusers
	$(PARITY_PY) -m benchmarks.versus_diffusers
	$(PARITY_PY) -m benchmarks.packed --layers=0

inception: $(PARITY_READY) ## speed of FID's features against torch-fidelity
	$(PARITY_PY) -m benchmarks.inception_speed

golden: $(PARITY_READY) ## rewrite tests/golden from PyTorch
	PYTHONPATH=. $(PARITY_PY) tests/make_golden.py

lint: $(TEST_READY) ## ruff
	$(PY) -m ruff check .

clean: ## remove the environments and caches; runs/ stays
	rm -rf $(VENV) $(PARITY_VENV) $(BROWSER_VENV) $(AOT_VENV) .pytest_cache \
	  .ruff_cache

$(RUN_READY): requirements.txt
	$(call create_venv,$(VENV))
	@$(PY) $(PIP_INSTALL) -r requirements.txt $(JAX)
	@touch $@

$(TEST_READY): tests/requirements.txt $(RUN_READY)
	@$(PY) $(PIP_INSTALL) -r tests/requirements.txt
	@touch $@

$(PARITY_READY): requirements.txt tests/requirements.txt \
    tests/parity-requirements.txt
	$(call create_venv,$(PARITY_VENV))
	@$(PARITY_PY) $(PIP_INSTALL) -r requirements.txt \
	  -r tests/requirements.txt -r tests/parity-requirements.txt
	@$(PARITY_PY) $(PIP_INSTALL) --no-deps 'torch-fidelity>=0.4,<0.5'
	@touch $@

$(BROWSER_READY): requirements.txt tests/requirements.txt \
    tests/browser-requirements.txt
	$(call create_venv,$(BROWSER_VENV))
	@$(BROWSER_PY) $(PIP_INSTALL) -r requirements.txt \
	  -r tests/requirements.txt -r tests/browser-requirements.txt
	@touch $@

# The GPU compiler's packages ask for all of CUDA, which compiling does not.
$(AOT_READY): requirements.txt tests/requirements.txt \
    tests/aot-requirements.txt
	$(call create_venv,$(AOT_VENV))
	@$(AOT_PY) $(PIP_INSTALL) -r requirements.txt -r tests/requirements.txt \
	  'jax[tpu]'
	@$(AOT_PY) -c 'import jax; print(f"jax-cuda12-plugin=={jax.__version__}\njax-cuda12-pjrt=={jax.__version__}")' > $(AOT_VENV)/jax.txt
	@$(AOT_PY) $(PIP_INSTALL) --no-deps -r $(AOT_VENV)/jax.txt \
	  -r tests/aot-requirements.txt
	@touch $@
