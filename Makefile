# Everything a newcomer runs. Needs only Python 3.11 or newer with venv and pip; all else goes into .venv.

PYTHON ?= python3
MODEL ?= tiny
SECONDS ?= 3600
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo circuits-model docs check test test-all test-nightly interop bench notes clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'

install: $(VENV)/.installed ## Make .venv with the `pipeline` command, every release pinned

install-dev: $(VENV)/.installed-dev ## Add the test runner, the linters and the type checker

# torch comes first and alone: its pin decides which build is used, and nothing after it may pull in another.
$(VENV)/.installed: EXTRAS := smollm2
$(VENV)/.installed-dev: EXTRAS := smollm2,dev
$(VENV)/.installed $(VENV)/.installed-dev: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; run: make PYTHON=/path/to/python3.11")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt $(TORCH) setuptools
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $(VENV)/.installed $@

demo: install ## Run every stage on a small model and its text; MODEL=tiny (default) or smollm2
	$(VENV)/bin/pipeline demo --model $(MODEL)

circuits-model: install ## Train a transcoder for every layer of SmolLM2 from one cache, in demo/; see docs/guides/circuits-model.md
	$(VENV)/bin/pipeline circuits-model --out demo

# One thread per test process: two processes on two cores beat one process that splits every small product.
test test-all test-nightly interop bench: export OMP_NUM_THREADS = 1
test test-all test-nightly: export HF_HUB_OFFLINE = 1

docs: export NO_MKDOCS_2_WARNING = 1
docs: install-dev ## Build the docs site into site/; open site/index.html
	$(VENV)/bin/mkdocs build --quiet

check: install-dev ## Style, formatting, import direction, types and the docs site; seconds to a minute
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy --strict
	@$(MAKE) --no-print-directory docs

test: check ## All checks and every test that is not slow; what CI runs
	$(VENV)/bin/pytest -n 2 --dist worksteal -m "not slow and not interop"

test-all: check ## All checks and all tests but those of interop
	$(VENV)/bin/pytest -n 2 --dist worksteal -m "not interop"

test-nightly: install-dev ## Fuzz, crash, refuse, cut the power and kill for SECONDS=3600; other inputs and moments each day
	@failed=; run() { echo "$(VENV)/bin/python -m $$*"; $(VENV)/bin/python -m "$$@" --seed $$(date +%j) || failed="$$failed $$1"; }; \
	  run tests.faults.fuzz --seconds $$(($(SECONDS) / 8)); \
	  run tests.faults.hostile --seconds $$(($(SECONDS) / 8)); \
	  run tests.faults --seconds $$(($(SECONDS) * 3 / 4)); \
	  test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

interop: install-dev ## Load exports in the packages they are for; installs those (15 GB)
	$(VENV)/bin/pytest -m interop -o faulthandler_timeout=3600 tests/pipeline/formats tests/pipeline/circuit/test_viewer_package.py

bench: install-dev ## The quick benchmarks
	$(VENV)/bin/python -m benchmarks

notes: ## Print what CHANGELOG.md says of a version: make --silent notes VERSION=0.1.0
	@awk -v heading='## [$(VERSION)]' '/^## / { inside = index($$0, heading) == 1; next } inside && (n || NF) { print; n++ } \
	  END { if (!n) { print "CHANGELOG.md has no notes under $(VERSION)" > "/dev/stderr"; exit 1 } }' CHANGELOG.md

clean: ## Remove build products and tool caches; keeps .venv and the demo's results
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find pipeline storage training analysis tests benchmarks -name __pycache__ -type d -exec rm -rf {} +
