# `make explain` and `make test` are all that a fresh clone needs: everything they use they set up themselves.
#
# Override on the command line: make test PYTHON=python3.12 VENV=/tmp/venv
PYTHON ?= python3
VENV ?= .venv
OUT ?= out
# the photo that `make explain` explains, and further options for it: ARGS="--target 285"
PHOTO ?= pysal/data/photos/egyptian_cat.jpg
ARGS ?=
# what `make bench` times, and with how many threads per process
METHOD ?=
NETWORK ?=
THREADS ?= 1
# what `make test` hands to pytest: TESTS=tests/ops ARGS="-x -k blur"
TESTS ?= tests
comma := ,
# A process per processor, at most eight; ARGS=-n0 runs in one, as a debugger needs it.
parallel := -n auto --maxprocesses 8 --dist loadgroup --no-loadscope-reorder

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check --quiet
sources := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
version := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
cxx_files := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' 2>/dev/null)
# Threads that wait for others sleep: spinning ones make small models many times slower on a machine that is busy elsewhere.
export OMP_WAIT_POLICY ?= PASSIVE
# Kept for the next run: what pytest makes of the assertions of the tests that it reads.
unexport PYTHONDONTWRITEBYTECODE
# The tools of the virtual environment come first, so that cmake, ninja and clang-format are the pinned ones.
export PATH := $(abspath $(VENV))/bin:$(PATH)

SHELL := bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup explain quick test test-all lint lint-cxx format test-emu ptx sanitize attack cuda-check cuda-table mutate gpu gpu-pack bench docs evidence gallery recipes figures cross wheel clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "  make %-12s %s\n", $$1, $$2 }'

# ---- set-up: each stamp is newer than what it was made from, so a second call does nothing

$(VENV)/stamp-created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"pysal needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/stamp-run: requirements/run.txt $(VENV)/stamp-created
	$(pip) install -r $<
	@touch $@

$(VENV)/stamp-dev: requirements/dev.txt requirements/audit.txt requirements/demo.txt requirements/docs.txt requirements/models.txt $(VENV)/stamp-run
	$(pip) install -r $<
	@touch $@

# What asks for another torch than the one that is there.
$(VENV)/stamp-no-deps: requirements/no-deps.txt $(VENV)/stamp-dev
	$(pip) install --no-deps -r $<
	@touch $@

# Tests also want the CUDA kernels compiled for their emulation on the CPU; `make explain` does without.
# On macOS, where the switching of stacks that it stands on is not to be had, there is none.
macos := $(filter Darwin,$(shell uname))
EMU ?= $(if $(macos)$(filter explain,$(MAKECMDGOALS)),OFF,ON)
backends := cpu$(if $(macos),,$(comma)emulated)
# The libraries lie beside the Python sources; should they be gone, or built without emulation, the stamp is worth nothing.
ifeq ($(and $(wildcard pysal/_C.*.so),$(wildcard pysal/_C_cpu.so),$(or $(filter OFF,$(EMU)),$(wildcard pysal/_C_emu.so))),)
.PHONY: $(VENV)/stamp-built
endif
# pip compiles in a temporary folder, from nothing; once it has installed, changed sources alone are compiled again.
$(VENV)/stamp-built: export PYSAL_CMAKE_ARGS := -DCMAKE_COMPILE_WARNING_AS_ERROR=ON -DPYSAL_EMU=$(EMU) $(PYSAL_CMAKE_ARGS)
$(VENV)/stamp-built: $(sources) $(VENV)/stamp-run
	@if [ $(VENV)/stamp-installed -nt pyproject.toml ] && [ $(VENV)/stamp-installed -nt $(VENV)/stamp-run ]; then \
	  set -x; $(python) setup.py --quiet build_ext --inplace; \
	else \
	  set -x; $(pip) install --no-build-isolation --no-deps --editable . && touch $(VENV)/stamp-installed; \
	fi
	@touch $@

setup: $(VENV)/stamp-built $(VENV)/stamp-dev $(VENV)/stamp-no-deps ## virtual environment, pinned requirements, native build

# ---- what people want

explain: $(VENV)/stamp-built ## explain a photo in seven ways: a picture and a table in out/
	@mkdir -p $(OUT)
	$(VENV)/bin/pysal explain $(PHOTO) --out $(OUT) $(ARGS) | tee $(OUT)/table.txt

quick: setup ## the core's tests, in two minutes
	PYSAL_REQUIRE=$(backends) $(python) -m pytest $(parallel) -m core $(TESTS) $(ARGS)

test: setup ## all tests, the core's first
	PYSAL_REQUIRE=$(backends) $(python) -m pytest $(parallel) $(TESTS) $(ARGS)

test-all: setup ## all tests, every combination of what make test tries in pairs
	PYSAL_REQUIRE=$(backends) $(python) -m pytest $(parallel) --whole $(TESTS) $(ARGS)

lint: setup ## ruff, mypy --strict, codespell, clang-format
	ruff check .
	ruff format --check .
	mypy
	codespell
	$(MAKE) lint-cxx

lint-cxx: setup
	$(if $(cxx_files),clang-format --dry-run -Werror $(cxx_files))

format: setup ## let ruff and clang-format rewrite the sources
	ruff check --fix .
	ruff format .
	$(if $(cxx_files),clang-format -i $(cxx_files))

test-emu: setup ## the CUDA kernels on the CPU: plain, shuffled, ASan + UBSan, TSan
	PYTHON=$(python) bash tests/emu/run.sh

sanitize: setup ## the CPU kernels under ASan + UBSan
	PYTHON=$(python) bash tests/sanitize.sh $(ARGS)

# of which GPUs the code is run on the CPU
ARCHS ?= 75 80 90
ptx: setup ## what nvcc makes of the CUDA kernels, run on the CPU: their cases, under ASan, and the ops' tests; needs nvcc
	for arch in $(ARCHS); do ARCH=$$arch PYTHON=$(python) bash tests/emu/run.sh ptx || exit; done
	PYTHON=$(python) bash tests/emu/run.sh ptx-address
	PYTHON=$(abspath $(python)) bash tests/ptx/ops.sh

cuda-check: setup ## compile the CUDA kernels for every architecture; warnings and spills are errors
	PYTHON=$(python) bash tests/cuda_check.sh

cuda-table: setup ## write the registers and shared memory of each CUDA kernel into docs/cuda_kernels.md
	PYTHON=$(python) bash tests/cuda_check.sh --write

# SEED=n is another run
SEED ?= 1
attack: setup ## what tests/security attacks, for longer (30 minutes): every place of an interrupt, thousands of calls of each op
	PYSAL_ATTACK=$(SEED) PYSAL_REQUIRE=$(backends) $(python) -m pytest tests/security $(ARGS)

mutate: setup ## put faults into the CUDA kernels and write into docs/mutations.md which tests find them (an hour on two cores)
	$(python) tests/emu/mutate.py $(ARGS)

# one stage, or several: make gpu ARGS="build device graphs methods"
gpu: setup ## everything that needs a GPU: tests, sanitizers, graphs, streams, benchmarks
	PYTHON=$(abspath $(python)) bash tests/gpu.sh $(ARGS)

gpu-pack: setup ## gpu-run.tar.gz, for eight minutes on a machine with a GPU and without a network: tests/short_gpu_run.sh
	PYTHON=$(abspath $(python)) bash tests/short_gpu_run.sh pack

docs: setup ## the documentation as a site, in docs/_build/html; warnings are errors
	$(python) -m sphinx --nitpicky --fail-on-warning --keep-going --quiet -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

figures: setup ## draw the documentation's pictures anew: docs/figures, docs/pictures (5 minutes)
	$(python) docs/draw_figures.py $(ARGS)

recipes: setup ## draw the pictures of docs/recipes anew, of small networks that are trained for them (10 minutes)
	$(python) docs/recipes/draw.py $(ARGS)

gallery: setup ## the pictures of docs/gallery.md, from the photos of examples/photos (5 minutes)
	$(python) docs/gallery/make.py $(ARGS)

# ARGS="--stamps DIR --foolbox DIR --mobilenet FILE": docs/evidence.md says where they come from; without them less is measured
evidence: setup ## measure which methods to trust on real networks: docs/evidence.json and docs/evidence.md (20 minutes)
	$(python) docs/make_evidence.py $(ARGS)

# one method, one network: make bench METHOD=integrated_gradients NETWORK=resnet50; the other rows stay
bench: setup ## time ops and methods against their peers, into benchmarks/results/ and README.md (20 minutes)
	$(python) -m benchmarks --threads $(THREADS) $(if $(NETWORK),--network $(NETWORK)) $(if $(METHOD),--method $(METHOD)) \
	  --results benchmarks/results/$(version) $(ARGS)
	$(python) -m benchmarks.tables

cross: setup ## the sources with clang, and for 64-bit ARM; needs Debian's clang, g++-aarch64-linux-gnu and qemu-user
	PYTHON=$(python) bash tests/cross.sh $(ARGS)

# folders with the headers of Pythons that are not installed: make wheel HEADERS=FOLDER, which has python3.14/Python.h
HEADERS ?=
# what each wheel is tried with, as pip takes it
TORCHES ?= "torch==2.11.*" torch
wheel: setup ## what a release uploads, into dist/: wheels for Linux, one without libraries, the sources; each wheel tried
	$(python) wheels/build.py --headers $(HEADERS)
	$(python) wheels/try_each.py --torch $(TORCHES)
	$(python) -m build --no-isolation --sdist --outdir dist

clean: ## remove what was built
	rm -rf build dist *.egg-info pysal/_C*.so $(VENV)/stamp-built $(VENV)/stamp-installed $(OUT) docs/_build
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment too
	rm -rf $(VENV)
