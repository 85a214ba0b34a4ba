# Each target creates what it needs. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FLOOR := .venv-floor
DEMO := outputs/digits
# Models this small run many times slower on two threads than on one.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: help install demo test suite lint format floor benchmark clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

$(READY): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): some minutes, about 6 GB with the CUDA libraries that PyTorch brings"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25" -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

install: $(READY) ## create the environment

demo: $(READY) ## train on digits with and without registers, save, load back, draw attention, report artifacts
	$(ONE_THREAD) $(LAUNCH) examples/train_image_classification.py --output_dir $(DEMO)
	$(ONE_THREAD) $(LAUNCH) examples/train_image_classification.py --output_dir $(DEMO)-plain --num_register_tokens 0
	$(ONE_THREAD) $(BIN)/python examples/inference.py --model_dir $(DEMO) --compare_with $(DEMO)-plain
	$(ONE_THREAD) $(BIN)/python examples/artifacts.py --model_dir $(DEMO) --compare_with $(DEMO)-plain
	$(BIN)/vitreg card $(DEMO)
	@echo "with registers:    $$(grep -m1 '"accuracy"' $(DEMO)/results.json) in $(DEMO)"
	@echo "without registers: $$(grep -m1 '"accuracy"' $(DEMO)-plain/results.json) in $(DEMO)-plain"
	@echo "model card:        $(DEMO)/README.md"
	@echo "pictures:          $(DEMO)/training_curve.png $(DEMO)/attention.png"
	@echo "artifact reports:  $(DEMO)/artifacts/report.html $(DEMO)/comparison/report.html"

test: $(READY) ## run the tests of this package
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadscope

suite: $(READY) ## run Transformers' own common tests on the family
	$(ONE_THREAD) $(BIN)/python tests/common_suite/run.py -n 2

lint: $(READY) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## rewrite files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(FLOOR)/.ready: pyproject.toml
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --upgrade "pip>=25"
	$(FLOOR)/bin/python -m pip install --quiet -e ".[dev]" "torch==2.11.*" "torchvision==0.26.*" "transformers==5.17.*"
	touch $@

# Old versions use what Python and PyTorch have deprecated since; no one can act on those warnings.
floor: $(FLOOR)/.ready ## run the tests with the oldest supported Transformers and PyTorch
	$(ONE_THREAD) $(FLOOR)/bin/python -m pytest -n 2 --dist loadscope -W ignore::DeprecationWarning -W ignore::FutureWarning

benchmark: $(READY) ## measure speed against other implementations: about three hours; then the tables and the picture
	for size in small base; do for how in --onnx --compile; do \
	$(ONE_THREAD) $(BIN)/python benchmarks/pooled_features.py --size $$size $$how || exit 1; done; done
	$(ONE_THREAD) $(BIN)/python benchmarks/pooled_features.py --family dinov3 --batch_sizes 1 8
	for one in loading training_step mixed_resolutions preprocessing jpeg_decoding attention_maps analysis_pass; do \
	$(ONE_THREAD) $(BIN)/python benchmarks/$$one.py || exit 1; done
	$(BIN)/python benchmarks/report.py

clean: ## remove environments, caches and outputs
	rm -rf $(VENV) $(FLOOR) .cache outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis
