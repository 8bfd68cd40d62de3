# Everything from a fresh clone: `make train`, `make test`. Needs Python >= 3.10 with venv, a C++ compiler, and make.
PYTHON ?= python3
VENV ?= .venv

# Relative on purpose: pip splits this variable at spaces, and a clone may lie in a folder that has some.
PIP := PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(VENV)/bin/python -m pip install -qq
RUN := $(VENV)/bin/python -m
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc cmake -type f 2>/dev/null)

.PHONY: help train test lint format bench docs docs-serve wheel clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

train: $(VENV)/.train ## set up, then train on the digits with the defaults of ep-train
	$(VENV)/bin/ep-train

# A thread for each process: threads of several would wait for each other.
test: $(VENV)/.test ## set up, then ruff, mypy and every test
	$(RUN) ruff check .
	$(RUN) mypy
	OMP_NUM_THREADS=1 $(RUN) pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/.dev ## ruff, mypy and clang-format, changing nothing
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: $(VENV)/.dev ## rewrite the sources as ruff and clang-format want them
	$(RUN) ruff check --fix-only .
	$(RUN) ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format -i

bench: $(VENV)/.train ## the benchmark suite on this CPU (10 minutes), and its tables in docs/performance.md
	$(RUN) benchmarks run cpu
	$(RUN) benchmarks report

docs: $(VENV)/.docs ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

docs-serve: $(VENV)/.docs ## the same while you write, at http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs serve

wheel: $(VENV)/.test ## dist/ep_kernels-*.whl
	rm -rf build/lib* build/bdist* # else files deleted since the last wheel come back
	$(RUN) build --wheel --no-isolation

clean: ## remove everything that the other targets made
	rm -rf $(VENV) build dist ep_kernels/lib *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One virtual environment; one stamp for each set of extras in it. A stamp older than the sources it was made from sets
# up again; pip and ninja then do only what changed.
$(VENV)/.train $(VENV)/.test $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(VENV)/.tools $(SOURCES)
	@command -v $(CXX) >/dev/null || { echo "No C++ compiler ($(CXX)). Install one: apt install g++, or dnf install gcc-c++"; exit 1; }
	@echo "[3/3] compiling the kernels, installing what '$*' needs (the first time about a minute; some minutes where there is an nvcc)"
	@$(PIP) --no-build-isolation --editable '.[$*]'
	@$(RUN) ep_kernels.info | sed -n 's/^build  */      /p'
	@touch $@

# torch comes before the package, and the build uses that one: without isolation there is no second copy to download.
$(VENV)/.tools: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo "$(PYTHON) is missing or too old: Python >= 3.10 is needed. Name another one with: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module. Install it: apt install python3-venv"; exit 1; }
	@echo "[1/3] making a virtual environment in $(VENV) (seconds)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/3] installing torch and the build tools (a minute or two, and a large download the first time)"
	@$(PIP) --upgrade pip
	@$(PIP) torch setuptools wheel cmake ninja
	@touch $@
