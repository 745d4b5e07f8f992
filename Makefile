# make setup | demo | test | lint | test-versions, from a fresh clone with Python 3.11+, make and a package index.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# The lowest Python that is declared, for test-versions alone.
PYTHON_LOWEST ?= python3.10
STAMP := $(VENV)/.installed
REQUIREMENTS := requirements.txt requirements-dev.txt constraints.txt

.PHONY: setup demo test lint test-versions
.DELETE_ON_ERROR:

setup: $(STAMP)

# A torch that the chosen Python already imports serves (it may be a CUDA build that took long to fetch);
# otherwise the tested one is installed. The stamp is written last, so an interrupted set-up starts over.
# Packages are compiled here, on all cores (pip would take one): where Python may not write .pyc files, as in CI, each
# process would otherwise compile transformers again. Some packages carry templates that are no Python, hence the || true.
$(STAMP): $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'make: "$(PYTHON)" is not Python 3.11 or newer; install one and run: make PYTHON=python3.11 setup' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo 'make: "$(PYTHON)" lacks the venv module; install it (Debian and Ubuntu: apt-get install python3-venv)' >&2; exit 1; }
	@mkdir -p $(VENV)
	@if $(PYTHON) -c 'import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8))' 2>/dev/null; then \
	  echo "setup: using the torch of $(PYTHON)"; \
	  $(PYTHON) -m venv --system-site-packages $(VENV) && grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	else \
	  $(PYTHON) -m venv $(VENV) && cp constraints.txt $(VENV)/constraints.txt; \
	fi
	@echo "setup: installing packages into $(VENV)"
	@$(PY) -m pip install --quiet --no-compile --disable-pip-version-check -c $(VENV)/constraints.txt -r requirements-dev.txt
	@echo "setup: compiling them"
	@$(PY) -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

demo: setup
	@mkdir -p out
	@$(PY) -m selfforcing_core generate --model tiny --prompt "a red square moving left slowly" \
	  --frames 33 --seed 2 --out out/demo.mp4 --sheet out/demo.png --overwrite
	@echo out/demo.mp4
	@echo out/demo.png

# The tests against a real ComfyUI need its checkouts and its packages: .ci/run starts them. Each worker begins with its
# share of the files in their order, so that most of what a file's tests share is made once, and helps out when it is
# done; tests/conftest.py puts the longest files first. One thread each, for there are as many workers as cores; at most
# four, for each takes a GB. Our own files are compiled once for all processes, also where CI forbids it.
test: setup
	env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(PY) -m pytest --ignore=tests/comfyui \
	  --numprocesses=auto --maxprocesses=4 --dist=worksteal

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

# Two environments of several GB in .venv-lowest and .venv-newest, and hours on two cores: before a release, not in CI.
test-versions: setup
	$(PY) -m tests.support.versions --lowest-python $(PYTHON_LOWEST) --out bench/results/versions.json
