# Two commands do everything: `make demo` and `make test`. Both make the virtual environment they use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-nightly test-third-party test-kernel lint types bench-quick format clean

demo: $(INSTALLED)
	$(BIN)/python -m recipes.finetune_minilm

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

# the property tests at ten times their size
test-nightly: $(INSTALLED)
	HYPOTHESIS_PROFILE=nightly OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/test_properties.py

# around optimizers of other packages, which are installed apart from ours
test-third-party:
	$(PYTHON) -m venv .venv-third-party
	.venv-third-party/bin/python -m pip install --quiet -c constraints.txt torch numpy scipy pytest
	.venv-third-party/bin/python -m pip install --quiet --no-deps -r tests/third_party/requirements.txt -e .
	OMP_NUM_THREADS=1 .venv-third-party/bin/python -m pytest tests/third_party

# the CUDA kernel without a GPU, in Triton's interpreter and compiled for an H100
test-kernel:
	$(PYTHON) -m venv build/venv-kernel
	build/venv-kernel/bin/python -m pip install --quiet -c constraints.txt torch numpy scipy pytest
	build/venv-kernel/bin/python -m pip install --quiet --no-deps -r tests/kernel/requirements.txt -e .
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 build/venv-kernel/bin/python -m pytest tests/test_kernel.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-quick: $(INSTALLED)
	$(BIN)/python -m benchmarks.plateau --quick

$(INSTALLED): pyproject.toml constraints.txt recipes/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r recipes/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-third-party build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
