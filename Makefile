VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.test-ready
BENCH_READY := $(VENV)/.bench-ready

.PHONY: analyze test demo bench lint clean

analyze: $(READY)
	$(BIN)/medvlm analyze examples/chest-xray/chest-xray.jpg --out out/chest-xray

test: $(TEST_READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

demo: $(TEST_READY)
	$(BIN)/medvlm demo

bench: $(BENCH_READY)
	$(BIN)/python benchmarks/read_ct.py

lint: $(TEST_READY)
	$(BIN)/ruff check medvlm tests benchmarks examples

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(READY): $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(TEST_READY): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,test]"
	touch $@

$(BENCH_READY): $(TEST_READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	touch $@

clean:
	rm -rf $(VENV) out
