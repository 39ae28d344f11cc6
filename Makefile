# Everything a person types lives here; how a machine is prepared lives in scripts/setup.
#
#   make demo         set up, train a classifier with every product computed by jax_nano, compare five programs
#   make test         set up, then run the tests          (make test ARGS="-k matmul -x", JOBS=0 for one process)
#   make help         the other targets
#
# Everything made lands in $(VENV), with a stamp for each step, so a second run does only what changed.
# It is the newest Python here that JAX has packages for. PYTHON=python3.11 VENV=.venv-3.11 sets up a second one beside it.

PYTHON ?= $(shell scripts/setup find-python)
VENV   ?= .venv
# The peers of the benchmark, gigabytes, are installed into an environment of their own.
PEERS  ?= .venv-peers
ARGS   ?=
# A lock file (scripts/packaging/ci.lock): its versions are installed, by their hashes, instead of the newest.
LOCK   ?=
# Processes that share the tests. Each holds a JAX, so no more than a few.
JOBS   ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))

# How long `make soak` takes.
MINUTES ?= 60

STAMPS := $(VENV)/.stamps
DIST   := $(VENV)/wheel
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

# What the wheel is made of: a change in any of these rebuilds it.
SOURCES := pyproject.toml CMakeLists.txt README.md LICENSE LICENSES.md scripts/packaging/backend.py \
           $(shell find csrc jax_nano -type f -not -name '*.pyc' -not -name '*.so')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo decode docs test fuzz sanitize soak lint format wheel bench bench-quick bench-peers bench-compare info \
        kernel-table wheels wheels-test lock clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMPS)/examples  ## set up, train on real images, compare five programs with plain JAX (ARGS="--report")
	$(BIN)/python examples/digits.py
	$(BIN)/python examples/demo.py $(ARGS)

decode: $(STAMPS)/examples  ## decode with weights of 32 to 4 bits; a picture in build/decode.png (ARGS="--blocks 12")
	@mkdir -p build
	$(BIN)/python examples/decode.py --save build/decode.png $(ARGS)

test: $(STAMPS)/test  ## set up and run the tests
	$(BIN)/pytest --numprocesses $(JOBS) $(ARGS)

fuzz: $(STAMPS)/test  ## run random programs with and without acceleration (ARGS="--programs 1000 --gate both")
	PYTHONPATH=tests $(BIN)/python -P -m fuzz --jobs $(JOBS) $(ARGS)

sanitize: $(STAMPS)/test  ## the runtime's tests and a thousand hostile calls with ASan, UBSan and TSan (long)
	$(PIP) install "nanobind>=2.9"
	scripts/sanitize $(ARGS) address,undefined $(BIN)/python
	$(if $(ARGS),,scripts/sanitize thread $(BIN)/python)
	@printf '\nWhat ran with sanitizers, without an error:\n'; cat build/sanitize-*/summary.txt

soak: $(STAMPS)/test  ## hostile calls, changed exported programs, random programs for an hour (MINUTES=10)
	scripts/soak $(MINUTES) $(BIN)/python $(JOBS)

lint: $(STAMPS)/test  ## check style, formatting and types
	scripts/lint $(BIN)

format: $(STAMPS)/test  ## rewrite the sources in the project's format
	scripts/lint --fix $(BIN)

bench: $(STAMPS)/bench  ## measure jax_nano and every peer (long)
	$(BIN)/python -m benchmarks run $(ARGS)

bench-quick: $(STAMPS)/bench  ## the same, a few shapes in under three minutes
	$(BIN)/python -m benchmarks run --quick $(ARGS)

bench-peers:  ## the same with the libraries of today, which it installs in .venv-peers (half an hour)
	$(MAKE) VENV=$(PEERS) $(PEERS)/.stamps/peers
	$(PEERS)/bin/python -m benchmarks run --dtype f32 --cache warm --rounds 5 --sample-ms 10 --also $(ARGS)

docs: $(STAMPS)/docs  ## build the documentation as a site, in build/site
	$(BIN)/mkdocs build --strict

bench-compare: $(STAMPS)/test  ## ten products and five models beside jnp, against the ratios of the last release
	$(BIN)/python -m benchmarks floor --against benchmarks/data/floor-zen3.json

info: $(STAMPS)/install  ## what runs on this machine, and why
	$(BIN)/python -P -m jax_nano info

kernel-table: $(STAMPS)/install  ## write the table of docs/kernels.md again, from the machine code
	scripts/kernel-table $(BIN)

wheel: $(STAMPS)/wheel  ## build the wheel
	@ls -sh $(DIST)/*.whl

wheels:  ## build the sdist and the wheels of all Pythons for a release, in dist/
	scripts/wheels build dist

wheels-test:  ## install the wheels of dist/ in fresh environments, with the oldest and the newest JAX, and run them
	scripts/wheels test dist

lock:  ## resolve the versions again that continuous integration and releases install
	scripts/packaging/lock

clean:  ## remove build products, so that the next run rebuilds the package
	rm -rf build $(DIST) $(STAMPS)/wheel

distclean: clean  ## remove the virtual environment, caches and benchmark results as well
	rm -rf $(VENV) $(PEERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis results

# --- set-up -------------------------------------------------------------------------------------

$(STAMPS)/debian: scripts/setup
	scripts/setup debian
	@mkdir -p $(@D) && touch $@

$(STAMPS)/venv: $(STAMPS)/debian
	scripts/setup venv "$(PYTHON)" "$(VENV)"
	@touch $@

$(STAMPS)/wheel: $(STAMPS)/venv $(SOURCES)
	@echo "building the kernels and the extension"
	@rm -rf $(DIST)
	@$(BIN)/python scripts/packaging/progress.py $(VENV)/build.log \
	  $(BIN)/python -m pip --disable-pip-version-check wheel --verbose --no-deps --wheel-dir $(DIST) .
	@touch $@

$(STAMPS)/locked: $(STAMPS)/venv $(LOCK)
	$(if $(LOCK),$(PIP) install --require-hashes -r $(LOCK))
	@touch $@

$(STAMPS)/install: $(STAMPS)/wheel $(STAMPS)/locked
	$(PIP) install --force-reinstall --no-deps $(DIST)/*.whl
	@touch $@

# One stamp for each extra of pyproject.toml: its dependencies are installed beside the wheel.
$(STAMPS)/examples $(STAMPS)/test $(STAMPS)/bench $(STAMPS)/docs: $(STAMPS)/%: $(STAMPS)/install
	$(PIP) install "$$(echo $(DIST)/*.whl)[$*]"
	@touch $@

$(STAMPS)/peers: $(STAMPS)/bench scripts/setup
	scripts/setup peers "$(VENV)"
	@touch $@
