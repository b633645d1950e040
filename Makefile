# `make demo`: train, measure and show a tiny model.   `make test`: every check.   Both make .venv and install what they need, once.
# `make demo PYTHON=python3.12` builds .venv with another Python.
SHELL := /bin/bash
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH PYTHONHOME
# Many container images forbid to keep compiled modules; every process of its own would compile torch again, 8 s of its 15.
unexport PYTHONDONTWRITEBYTECODE

# pip's hundreds of lines, cut down to those which tell that something large is under way; its errors are not touched.
# What is imported is compiled then: most of what is installed never is, and compiling it all takes a minute.
install = set -o pipefail; pip install --no-compile --progress-bar off -e $(1) | awk '\
	/\([0-9][0-9][0-9]+\.[0-9] MB\)| GB\)/ {print; fflush()} \
	/^Installing collected/ {print "  Unpacking ..."; fflush()}'

.PHONY: help demo test lab export docs
help:
	@echo "make demo    install, make phantom pairs, pre-train, probe; prints a table and the path of a page"
	@echo "make test    install the development tools too, and run every check"
	@echo "make lab     JupyterLab on the notebooks, with nbdev's hooks, which keep them clean"
	@echo "make docs    the site, from the notebooks: _docs/html/index.html"
	@echo "make export  notebooks -> medvis/, its docstrings, and README.md; cleans the notebooks"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "medvis needs Python 3.11 or newer, this is " + sys.version + "; name another: make PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/.demo: settings.ini setup.py pyproject.toml | .venv/bin/python
	@echo "Installing medvis and what it needs into .venv. The first time this fetches PyTorch (on Linux several GB): a few minutes."
	@$(call install,.)
	@touch $@

.venv/.dev: settings.ini setup.py pyproject.toml | .venv/bin/python
	@echo "Installing medvis, what it needs and the development tools into .venv. The first time this fetches PyTorch (on Linux several GB): a few minutes."
	@$(call install,'.[dev]')
	@touch .venv/.demo $@

demo: .venv/.demo
	@medvis demo

# The tree is only read: uncommitted work stays as it is. Two notebooks at a time on two cores, so one thread each; nothing is fetched.
# Three of the other tests, since those with a browser or with processes of their own wait as long as they work; the longest files first (tests/conftest.py).
# Coverage, which makes tests a third slower, is measured over the replay. No result may depend on the last bits: notebooks and tests run on the processor's own kernels; the notebooks' replay against the installed module,
# and what trains, on two threads, once more on the plainest ones (no AVX). A second thread shortens so small a training by little: two workers, whose threads sleep while they wait (passive).
test: export OMP_NUM_THREADS := 1
test: export MKL_NUM_THREADS := 1
test: export TOKENIZERS_PARALLELISM := false
test: export HF_HUB_OFFLINE := 1
test: .venv/.dev
	@echo "== in step, house style, lint"
	@pytest -q -n 2 --dist worksteal tests/test_sync.py tests/test_house.py
	@ruff check medvis tests tools setup.py
	@ruff check --select F821 nbs
	@python tools/format.py --check
	@echo "== notebooks"
	@timeout -s INT -k 60 1300 nbdev_test --n_workers 2 --timing
	@echo "== notebooks, replayed against the installed module, on other kernels"
	@ATEN_CPU_CAPABILITY=default timeout -s INT -k 60 1300 pytest -q -n 2 --dist worksteal --durations 5 --cov=medvis tests/test_replay.py
	@echo "== tests"
	@timeout -s INT -k 60 2400 pytest -q -n 3 --dist loadfile --no-loadscope-reorder --durations 20 $(addprefix --ignore tests/,test_replay.py test_sync.py test_house.py) tests
	@echo "== what trains, on two threads and other kernels"
	@ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=2 MKL_NUM_THREADS=2 OMP_WAIT_POLICY=passive timeout -s INT -k 60 900 pytest -q -n 2 --dist worksteal -m trains $$(grep -l "mark.trains" tests/test_*.py)
	@echo "medvis: every check passed"

lab: .venv/.dev
	@nbdev_install_hooks
	@jupyter lab nbs $(if $(filter 0,$(shell id -u)),--allow-root)

export: .venv/.dev
	@python tools/format.py
	@nbdev_export
	@python tools/docstrings.py medvis
	@python tools/clean.py
	@nbdev_clean
	@python tools/readme.py

docs: .venv/.dev
	@HF_HUB_OFFLINE=1 python tools/site_pages.py
