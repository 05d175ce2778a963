# make demo    the whole job on this machine's CPU: teacher, cache, students, report (QUICK=1: a few minutes)
# make test    the test suite, with the demo in its short form
# make test-slow     what takes longer: clusters, kills by the dozen, benchmarks; the other half of what CI runs
# make test-nightly  the longest forms of the reliability tests
# make check   format, lint, types, import contract
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RUN := runs/demo$(if $(QUICK),-quick)
export PYTHON

.PHONY: demo test test-slow test-nightly check install clean
.DEFAULT_GOAL := demo

install:
	@command -v c++ >/dev/null || { \
	  echo "A C++ toolchain is needed. On Debian: apt-get install build-essential python3-dev python3-venv" >&2; exit 1; }
	@launch/install.sh $(VENV)

demo: install
	$(BIN)/genrecal demo --output $(RUN) $(if $(QUICK),--quick) $(if $(TRAIN_TEACHER),--train-teacher)

test: install
	$(BIN)/python -m pytest -q -n 2

test-slow: install
	$(BIN)/python -m pytest -q -n 2 -m 'slow and not nightly'

test-nightly: install
	$(BIN)/python -m pytest -q -m nightly

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf runs/demo runs/demo-quick
