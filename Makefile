# Everything below works in a fresh clone with nothing but Python 3.11+ and make.

VENV := .venv
BIN := $(VENV)/bin

# the first of these that is new enough; `make PYTHON=/path/to/python ...` decides otherwise
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $$p && break; done)

# an editable install maps each kernel folder by name, so a new folder means a new install
KERNELS := $(sort $(wildcard kernels/*/__init__.py))
KEY := $(shell echo "$(KERNELS)" | cksum | cut -d' ' -f1)
DEMO := $(VENV)/.installed-plots-$(KEY)
DEV := $(VENV)/.installed-dev-$(KEY)

DEMO_ARGS ?= --num-clients 20 --clients-per-round 4 --num-rounds 8 --local-steps 10 --alpha 100 \
	--max-eval-examples 400

.PHONY: help demo methods test test-slow test-gpu test-browser lint clean

help:
	@echo "make demo       federated fine-tuning on the embedded text, about 3 minutes on 2 cores"
	@echo "make methods    the benchmark of methods and its results page; hours, resumed by repeating it"
	@echo "make test       the tests that need no GPU, about 8 minutes on 2 cores"
	@echo "make test-slow  the tests that take minutes each"
	@echo "make test-gpu   the tests that need a CUDA or ROCm device"
	@echo "make test-browser  the comparison's page in headless Chromium (Debian: apt install chromium)"
	@echo "make lint       ruff check and ruff format --check"
	@echo "make clean      remove $(VENV), builds and caches; runs/ stays"

demo: $(DEMO)
	$(BIN)/fastrank simulate $(DEMO_ARGS) --output-dir "runs/demo-$$(date +%Y%m%d-%H%M%S)"

# JOBS runs at a time, of one thread each
JOBS ?= 2
PRESETS := common heterogeneous full-gap slora-density sa-schedules fedara-ablation

methods: $(DEMO)
	for preset in $(PRESETS); do \
		source=bench/methods/$$preset; [ -d $$source ] || source=$$source.toml; \
		$(BIN)/fastrank compare $$source --jobs $(JOBS) --records-only \
			--out bench/results/methods/$$preset || exit 1; \
	done
	$(BIN)/python -m fastrank.bench.methods_report

# processes of their own, because TRITON_INTERPRET acts when a kernel is decorated; all always run
test: $(DEV)
	@BIN=$(BIN) .ci/test

test-slow: $(DEV)
	@BIN=$(BIN) .ci/test --slow

test-gpu: $(DEV)
	$(BIN)/python -m pytest -q -m gpu

test-browser: $(DEV)
	$(BIN)/python -m pytest -q -m browser tests/federated

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO): pyproject.toml setup.py constraints.txt
	@$(call install,plots)

$(DEV): pyproject.toml setup.py constraints.txt
	@$(call install,dev)

define install
	if [ -z "$(PYTHON)" ]; then \
		echo "fastrank needs Python 3.11 or newer, and none of $(CANDIDATES) is;" \
			"install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; fi; \
	if ! $(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null; then \
		echo "fastrank needs Python 3.11 or newer, but $(PYTHON) is" \
			"$$($(PYTHON) --version 2>/dev/null || echo missing);" \
			"name another: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; fi; \
	if [ ! -x $(BIN)/pip ]; then \
		$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) can't make a virtual environment; on Debian and Ubuntu" \
			"install the package python3-venv" >&2; exit 1; }; fi; \
	echo "installing fastrank into $(VENV) (the first time downloads PyTorch: minutes)"; \
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[$(1)]" && \
	rm -f $(VENV)/.installed-$(1)-* && touch $@
endef
