# make demo    everything once: serve, hot-load, tune with two strategies, compare (about ten minutes on two cores)
# make test    formatting, types, import rules, proto lint and all tests
# make test-kinds  the numeric tests as on other kinds of processors (hours on two cores; KINDS='--kind avx2' for one)
# make bench   the benchmarks, into benchmarks/results and the README; VLLM=DIR LLAMA_CPP=DIR name peers' environments
# make fuzz    100,000 mutated messages and 10,000 mutated files against a real server, into benchmarks/results
# make kill    kill -9 of front, engine and tuner under load (about half an hour); KILLS=20 for fewer
# make proto   regenerates the committed stubs
# make clean   removes what the other targets made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-kinds lint bench kill fuzz proto install clean

install: $(STAMP)

# torch comes first and pinned: without the pin a resolver may choose a build that brings gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Graftwork needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[server,quant,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/dates/demo.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint proto

# Toy models are too small for two threads each; two test processes use the cores better.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-kinds: $(STAMP)
	$(BIN)/python -m tests.kinds $(KINDS)

bench: $(STAMP)
	$(BIN)/python -m benchmarks.serving $(if $(VLLM),--vllm $(VLLM)) $(if $(LLAMA_CPP),--llama-cpp $(LLAMA_CPP)) --output benchmarks/results/serving.json
	$(BIN)/python -m benchmarks.front --output benchmarks/results/front.json
	$(BIN)/python -m benchmarks.hot_load --output benchmarks/results/hot_load.json
	$(BIN)/python -m benchmarks.neighbours --output benchmarks/results/neighbours.json
	$(BIN)/python -m benchmarks.overload --output benchmarks/results/overload.json
	$(BIN)/python -m benchmarks.report

fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seed 1 --messages 100000 --files 10000 --output benchmarks/results/fuzz.json

kill: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kill --kills $(or $(KILLS),300) --output benchmarks/results/kills.json

proto: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python proto/generate.py

clean:
	rm -rf $(VENV) .demo .bench .mypy_cache .pytest_cache .ruff_cache .hypothesis
