# Everything from a bare clone with only Python 3.11 or newer:
#   make demo       install, then steer the built-in model and write pictures to demo/
#   make test       install, then lint and all tests
#   make lint       ruff and pyright
#   make gpu-bench  the long benchmark, on a machine with a CUDA device (resumable)
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# one thread a process: two processes with two torch threads each are slower than with one
export OMP_NUM_THREADS ?= 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test lint gpu-bench gpu-check clean
.DEFAULT_GOAL := demo

demo: .venv/.core-stamp
	$(BIN)/steer demo --out demo

test: .venv/.dev-stamp lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -q --nbmake --nbmake-timeout=600 --durations=10 tests notebooks

lint: .venv/.dev-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

gpu-check: .venv/.core-stamp
	$(BIN)/python -m benchmarks.gpu_check | tee benchmarks/results/gpu_check.txt
	$(BIN)/python -m benchmarks.driven_cost --device cuda | tee benchmarks/results/driven_cost_gpu.txt

gpu-bench: .venv/.core-stamp
	$(BIN)/python -m benchmarks.even_digits --device cuda --nfe 100000 300000 1000000

.venv/.core-stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed; '$(PYTHON)' is not. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	@$(PIP) -e .
	@touch $@

.venv/.dev-stamp: .venv/.core-stamp
	@$(PIP) -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv demo runs .pytest_cache .ruff_cache .hypothesis
