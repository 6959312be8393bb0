# The two commands of the README, in a fresh clone with Python 3.11 to 3.13 and a C++ compiler:
#
#   make hello        sets up .venv, then asks the embedded model a question (PROMPT="..." for another one)
#   make test         sets up .venv with the test tools, then runs the tests (ARGS="tests/core -x" for some)
#
# Nothing is written outside this folder. A second run sets nothing up unless the package's metadata or its
# native code changed; Python sources are read from src/ and need no reinstall.

PYTHON ?= python3
VENV   ?= .venv
PROMPT ?= What is PagedAttention?
ARGS   ?=

PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
# Installed beside the package, so that native builds are incremental: [build-system] of pyproject.toml,
# and the two programs it drives.
BUILD_TOOLS := "scikit-build-core>=0.11" "nanobind>=2.7" cmake ninja
BUILT_FROM  := pyproject.toml CMakeLists.txt $(shell find native -type f 2>/dev/null)

.PHONY: hello test check bench clean
export VENV

hello: $(VENV)/.base
	$(VENV)/bin/quire generate "$(PROMPT)"

test: $(VENV)/.test
	scripts/test $(ARGS)

check: $(VENV)/.test
	scripts/check

bench: $(VENV)/.base
	scripts/bench

clean:
	rm -rf $(VENV) build dist

$(VENV)/.tools:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Quire needs Python 3.11, 3.12 or 3.13; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(BUILD_TOOLS)
	touch $@

$(VENV)/.base: $(VENV)/.tools $(BUILT_FROM)
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/.test: $(VENV)/.tools $(BUILT_FROM)
	$(PIP) --no-build-isolation --editable ".[test]"
	touch $(VENV)/.base $@
