# make demo and make test need python >= 3.11, pip, make and git, and make their own virtual environment.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
# Two test processes share the cores: threads that spin while they wait would take them from each other.
test test-all test-cpus: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-all test-cpus lint format types models docs bench tiny-klein tiny-pixel tiny-flux2 clean

# make demo QUICK=1 leaves the live finetune out.
demo: $(VENV)/ready
	$(RUN)/liftkit demo $(if $(QUICK),--quick)

test: lint types
	@echo "Running the tests: about 7 minutes on 2 cores"
	$(RUN)/pytest -n 2 -m "not slow"
	@echo "Running the numeric tests as other CPUs would: about 4 minutes"
	$(RUN)/python -m tests.cpus --quick

test-all: lint types
	@echo "Running all tests: about 20 minutes on 2 cores"
	$(RUN)/pytest -n 2
	$(INSTALL) --no-deps --upgrade -c constraints.txt --target build/quantizers torchao bitsandbytes
	PYTHONPATH=build/quantizers $(RUN)/pytest tests/test_quantize.py tests/test_precision.py
	$(RUN)/python -m tests.cpus

# The numeric tests with other kernels, threads and places of the weights in memory: one machine stands in for others.
test-cpus: $(VENV)/ready
	@echo "Running the numeric tests in 24 settings: about 8 minutes on 2 cores"
	$(RUN)/python -m tests.cpus

lint: $(VENV)/ready
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/lint-imports

types: $(VENV)/ready
	$(RUN)/mypy

format: $(VENV)/ready
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

# The list of supported models, and its table in the README, from the specimens of the test suite.
models: $(VENV)/ready
	$(RUN)/python -m tools.model_table

# What is generated in docs/ from schemas and the command line itself.
docs: models
	$(RUN)/python -m tools.recipe_reference
	$(RUN)/python -m tools.cli_reference

bench: $(VENV)/ready
	$(RUN)/python -m benchmarks

# torch first and at its pinned version, so that no other package's range chooses a newer build.
INSTALL := $(RUN)/python -m pip install --quiet --disable-pip-version-check
OLD_PYTHON := import sys; sys.exit("liftkit needs python >= 3.11, this is " + sys.version if sys.version_info < (3, 11) else 0)

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c '$(OLD_PYTHON)'
	@echo "Installing torch and friends into $(VENV), about 2 minutes, 1.9 GB (more where torch comes with CUDA)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	@$(INSTALL) -c constraints.txt -e ".[dev]"
	@touch $@

# The embedded checkpoint, from nothing, with one seed: about two hours on 2 cores. The flow and the decoder need
# only the encoder and run side by side under make -j2.
KLEIN := build/tiny-klein
TRAIN := $(RUN)/python -u -m tools.tiny_klein

tiny-klein: $(KLEIN)/flow.done $(KLEIN)/vae-sharp.safetensors $(KLEIN)/oracle.safetensors
	$(TRAIN) assemble
	$(TRAIN) measure

$(KLEIN)/vae.safetensors: | $(VENV)/ready
	$(TRAIN) vae
$(KLEIN)/oracle.safetensors: | $(VENV)/ready
	$(TRAIN) oracle --threads 1
$(KLEIN)/vae-sharp.safetensors: $(KLEIN)/vae.safetensors
	$(TRAIN) decoder --threads 1
$(KLEIN)/flow.done: $(KLEIN)/vae.safetensors
	$(TRAIN) flow --threads 1
	touch $@

# The shipped finetune of the embedded checkpoint: four to five hours on one core. Stage 4 is one run, resumed twice with
# other keys: from step 8000, where its rate had decayed to 45 %, at the full rate again with noise of all levels; then once more.
PIXEL := build/tiny-pixel
STAGE := $(RUN)/liftkit finetune tiny-klein threads=1 previews.every=0 validation.every=0 data.cache=$(PIXEL)/cache \
	optimizer.name=muon trainable.head=null
LONGER := objective.loss=flow trainable.open=0
MORE := model=$(PIXEL)/3/model $(LONGER) seed=3 compile=true checkpoints.every=1000 checkpoints.keep=12 \
	"data.sources=[{kind: demo, count: 131072}]"

tiny-pixel: | $(VENV)/ready
	mkdir -p $(PIXEL)
	$(RUN)/liftkit convert liftkit/assets/tiny-klein --images demo --device cpu --overwrite -o $(PIXEL)/base
	$(STAGE) model=$(PIXEL)/base optimizer.warmup=20 steps=900 -o $(PIXEL)/1
	$(STAGE) model=$(PIXEL)/1/model $(LONGER) optimizer.warmup=20 steps=3700 optimizer.decay_from=0.3 seed=1 -o $(PIXEL)/2
	$(STAGE) model=$(PIXEL)/2/model $(LONGER) optimizer.warmup=20 steps=15000 optimizer.decay_from=0.2 seed=2 compile=true \
		"data.sources=[{kind: demo, count: 65536}]" -o $(PIXEL)/3
	$(STAGE) $(MORE) steps=12500 optimizer.decay_from=0.2 -o $(PIXEL)/4
	$(STAGE) $(MORE) steps=16000 optimizer.decay_from=0.5 noise.std=1.7 --resume $(PIXEL)/4/checkpoints/step-0008000 -o $(PIXEL)/4
	$(STAGE) $(MORE) steps=24000 optimizer.decay_from=0.66667 optimizer.learning_rate=1.5e-3 noise.std=1.7 save=adapter \
		--resume latest -o $(PIXEL)/4

# The embedded model on FLUX.2's own latents, behind TAEF2: half an hour on one core, or a minute on a GPU with
# FLUX2_FLOW="--device cuda --batch-size 256 --pool 65536 --workers 14".
FLUX2_FLOW ?= --steps 1200

tiny-flux2: | $(VENV)/ready
	$(RUN)/python -u -m tools.tiny_flux2 flow $(FLUX2_FLOW)
	$(RUN)/python -m tools.tiny_flux2 assemble
	$(RUN)/python -m tools.tiny_flux2 measure

clean:
	rm -rf build out .venv .pytest_cache .ruff_cache .mypy_cache
