# Every target sets up what it needs: a virtual environment in .venv and the native core in place.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INTEGRATIONS := $(VENV)/.integrations
DOCS := $(VENV)/.docs
RELEASE := build/release
DISTRIBUTED := examples/train_distributed.py
RESULTS ?= bench/results/local.json
TORCHES ?= 2.13.0 2.14.1
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# For development: two architectures, and the CUDA kernels on the host for their tests.
export FASTOPT_CUDA_ARCHS ?= 80 90a
export FASTOPT_HOST_SIM ?= 1

# The tests that run the kernels, for `make sanitize`.
KERNEL_TESTS := tests/test_canaries.py tests/test_optimizer_parity.py \
	tests/test_optimizer_layouts.py tests/test_lamb.py tests/test_muon.py tests/test_card_lamb.py \
	tests/test_state_storage.py tests/test_gradient_release.py tests/test_schedule_free.py \
	tests/test_conversions.py tests/test_optimizer_properties.py tests/test_training_tail.py \
	tests/test_grad_norm.py tests/test_card_optimizers.py tests/test_card_state_storage.py \
	tests/test_activations.py \
	tests/test_lstm_parity.py tests/test_lstm_properties.py tests/test_lstm_operator.py \
	tests/test_attention.py tests/test_attention_sequences.py tests/test_card_attention.py \
	tests/test_card_lstm.py tests/test_cuda_lstm.py tests/test_linear_cross_entropy.py

.PHONY: demo examples test test-integrations docs coverage bench gpu lint format sanitize wheel \
	smoke build clean harden harden-quick

$(INSTALLED): requirements-dev.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	FASTOPT_CUDA=off FASTOPT_HOST_SIM=0 $(BIN)/pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps --editable .
	touch $@

build: $(INSTALLED)
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: build
	$(BIN)/python examples/classify_text.py

# Every program at its smallest size.
examples: build
	set -e; for program in $(filter-out $(DISTRIBUTED),$(wildcard examples/[a-z]*.py)); do \
		$(BIN)/python $$program --smoke; done
	$(BIN)/torchrun --standalone --nproc-per-node=2 $(DISTRIBUTED) --smoke

test: build
	$(BIN)/python -m pytest --ignore=tests/integrations --ignore=tests/harden

$(INTEGRATIONS): $(INSTALLED) requirements-integrations.txt
	$(BIN)/pip install --quiet --disable-pip-version-check \
		--requirement requirements-integrations.txt --constraint requirements-dev.txt
	touch $@

# What frameworks would fetch is not there: models are made from configurations, data by the tests.
test-integrations: build $(INTEGRATIONS)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/integrations

# What is run to break fastopt: see tests/harden/report.py. Only `harden` and the parts alone write
# docs/reliability.md.
harden: build
	$(BIN)/python tests/harden/report.py

harden-quick: build
	$(BIN)/python tests/harden/report.py --quick

# One part, such as harden-races, harden-leaks, harden-differential.
harden-%: build
	$(BIN)/python tests/harden/report.py $*

$(DOCS): $(INSTALLED) requirements-docs.txt
	$(BIN)/pip install --quiet --disable-pip-version-check \
		--requirement requirements-docs.txt --constraint requirements-dev.txt
	touch $@

# Warnings are errors, dead links among them. The variable silences an advertisement.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

coverage: build $(INTEGRATIONS)
	$(BIN)/python -m coverage erase
	HF_HUB_OFFLINE=1 $(BIN)/python -m coverage run -m pytest --ignore=tests/harden
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

bench: build
	$(BIN)/python -m pytest bench --benchmark-group-by=group --benchmark-columns=median,min,iqr,rounds
	$(BIN)/python -m bench --output $(RESULTS)

# On a machine with a card, by its own python3: nothing is installed. GPU_FLAGS=--simulate takes the
# host simulator for the card.
gpu:
	$(PYTHON) -m bench.gpu --results $(if $(filter command line environment,$(origin RESULTS)),$(RESULTS),bench/results) $(GPU_FLAGS)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Leaks are not looked for: the interpreter and torch leave memory behind on purpose.
sanitize: build
	FASTOPT_SANITIZE=1 $(BIN)/python setup.py --quiet build \
		--build-lib build/sanitize/lib --build-temp build/sanitize/temp
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		FASTOPT_SANITIZE=1 FASTOPT_EXPECTED_PATH=build/sanitize/lib \
		sh -c 'cd build/sanitize/lib && $(abspath $(BIN))/python -m pytest -x $(abspath $(KERNEL_TESTS))'

$(RELEASE)/.installed: requirements-release.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

# The wheel is built from the sdist, in an environment of its own, for every architecture of setup.py.
# Torch brings the one OpenMP that a process may have.
wheel: $(RELEASE)/.installed
	rm -rf build/dist dist
	env -u FASTOPT_CUDA_ARCHS FASTOPT_HOST_SIM=0 $(RELEASE)/bin/python -m build --outdir build/dist
	PATH="$(abspath $(RELEASE)/bin):$$PATH" auditwheel repair --exclude libgomp.so.1 \
		--wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist
	$(RELEASE)/bin/auditwheel show dist/*.whl
	$(RELEASE)/bin/twine check --strict dist/*

# The wheel that `make wheel` left, in clean environments. A torch for cards is gigabytes.
smoke:
	$(PYTHON) tools/smoke_wheel.py dist/*.whl --torch $(TORCHES)

clean:
	rm -rf build dist *.egg-info .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis
