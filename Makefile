# Every target creates the environment it needs. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The audit tools are not locked; they have an environment of their own.
AUDIT := $(VENV)-audit
# Processes for tests. Those marked `alone` run one by one.
PROCESSES ?= 2

.PHONY: env demo test test-all check hosts gpu bench audit sbom clean

env: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	@echo "Installing the locked dependencies into $(VENV): about 7 GB with PyTorch, a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps -e .
	touch $@

demo: env
	$(BIN)/cifake-ray demo --out demo

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Everything that needs no Ray cluster, and one test of each verb on a cluster: minutes.
test: check
	$(BIN)/pytest -n $(PROCESSES) --dist loadfile -m "not cluster or smoke"

# All tests: what .ci/run runs.
test-all: check
	$(BIN)/pytest -n $(PROCESSES) --dist loadfile -m "not cluster"
	$(BIN)/pytest -n $(PROCESSES) --dist loadfile -m "cluster and not alone"
	$(BIN)/pytest -m alone --durations=20

hosts: env
	CIFAKE_TEST_HOSTS=1 $(BIN)/pytest -s tests/hosts

# On a machine with a GPU, 8 minutes at most; with CIFAKE_TEST_DEVICE=cpu what a CPU can do of it.
gpu: env
	$(BIN)/pytest -s --confcutdir=tests/gpu tests/gpu

# One page of every verb beside its peers: hours. PAGE names its file.
PAGE ?= bench.md
bench: env
	$(BIN)/python tests/benchmarks/run.py --page $(PAGE)

$(AUDIT)/.installed: Makefile
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet pip-audit==2.10.1 cyclonedx-bom==7.5.0
	touch $@

# Known vulnerabilities of what the image installs. Asks PyPI; --strict makes it an error if there is no
# answer, since a mirror without the list would pass everything.
audit: $(AUDIT)/.installed
	$(AUDIT)/bin/pip-audit --strict --require-hashes --disable-pip -r deploy/requirements.lock

# What the image installs, in CycloneDX format.
sbom: $(AUDIT)/.installed
	$(AUDIT)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
		--output-format JSON -o sbom.json deploy/requirements.lock

clean:
	rm -rf $(VENV) $(AUDIT) sbom.json demo build dist .mypy_cache .ruff_cache .pytest_cache
