# Every target makes its own environment first (tools/setup.sh); a second run starts at once.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(HOME)/.cargo/bin:$(PATH):/usr/sbin:/sbin
CARGO := cargo --quiet
CRATE := --manifest-path mesh/engine/Cargo.toml

.PHONY: bench-ca crowd kill-points attacks fuzz differential rotation help setup demo test check test-unit test-native test-netns test-kernel bench bench-floor docs docs-check sbom lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

setup:  ## system packages, Python environment, native build
	@PYTHON=$(PYTHON) tools/setup.sh

demo: setup  ## the product's main job on real packets, in under half a minute (root)
	@$(BIN)/retinue demo $(ARGS)

test: setup  ## all checks and all tests; with CI set the kernel lane, too
	@$(MAKE) --no-print-directory check test-native
	@$(BIN)/python tools/run_tests.py

check: setup  ## formatting, lints, types, architecture, generated docs
	@$(BIN)/ruff check
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python tools/check_tree.py
	@$(BIN)/python tools/reference_docs.py --check
	@cargo fmt $(CRATE) --check
	@$(CARGO) clippy $(CRATE) --all-targets --locked -- -D warnings

test-unit: setup  ## tests that need no privilege
	@$(BIN)/python -m pytest tests/unit tests/cli tests/ha

test-native: setup  ## the engine's own tests, and its fuzz targets over mutated corpora
	@cargo test $(CRATE) --locked --no-default-features -q

fuzz: setup  ## every fuzz target of the engine with coverage feedback, SECONDS_EACH=20 (stable Rust)
	@mesh/engine/fuzz/run.sh

attacks: setup  ## a million forged datagrams on the live engine, and rekeying in real time, about four minutes (root)
	@CI=true RETINUE_LONG=1 RETINUE_ATTACKS=1000000 $(BIN)/python -m pytest -s tests/netns/test_engine_attacks.py tests/netns/test_engine_modes.py

test-netns: setup  ## real packets in network namespaces (root)
	@CI=true $(BIN)/python -m pytest tests/netns

test-kernel: setup  ## the kernel's WireGuard: Debian's kernel booted in qemu, no virtualisation needed (root)
	@$(BIN)/python tools/kernel_lane.py $(ARGS)

differential: setup  ## 100,000 random flows, evaluator against packets (root)
	@CI=true RETINUE_FLOWS=100000 $(BIN)/python -m pytest -s tests/netns/test_differential.py

kill-points: setup  ## the CA killed at more than 200 system calls of issuing, about ten minutes; and one token claimed 50 times at once, 100 rounds
	@$(BIN)/python -m tests.ha.kill_points
	@$(BIN)/python -m tests.ha.claims

rotation: setup  ## replace the whole authority under traffic, 200 identities (root)
	@CI=true RETINUE_ROTATION_IDENTITIES=200 RETINUE_ROTATION_SPREAD=40 $(BIN)/python -m pytest -s tests/netns/test_rotation.py

bench-ca: setup  ## the control plane: certificates/s beside other authorities, the feed before 5,000 streams, a herd; writes out/ca.json
	@$(BIN)/python -m tests.bench.ca $(ARGS)

crowd: setup  ## revocation before 5,000 TLS streams and 50 real agents, about ten minutes; writes out/crowd.json (root)
	@$(BIN)/python -m tests.ha.crowd $(ARGS)

bench: setup  ## speed beside no tunnel, wireguard-go and nebula, and the table of ratios; writes out/bench.json (root)
	@$(BIN)/python -m tests.bench $(ARGS)

bench-floor: setup  ## a minute against the distribution's wireguard-go and nebula; fails below the floor (root)
	@$(BIN)/python -m tests.bench --floor $(ARGS)

chaos: setup  ## break everything on purpose, half an hour: the failure table with figures; writes out/chaos.json (root)
	@$(BIN)/python -m tests.chaos $(ARGS)

sim: setup  ## simulated meshes on virtual time, by seed; ARGS="--seeds 10000"
	@$(BIN)/python -m tests.sim $(ARGS)

machine: setup  ## moves, crashes and restores over the real code, 500 random stories
	@RETINUE_MACHINE=500 $(BIN)/python -m pytest -q -k promises tests/model/test_move_machine.py

docs: setup  ## generate docs/reference from the code
	@$(BIN)/python tools/reference_docs.py

sbom: setup  ## the bill of materials: out/sbom.json (CycloneDX)
	@$(BIN)/python tools/sbom.py

lock: setup  ## pin the closure of the Python dependencies with hashes
	@$(BIN)/python -m pip install -q uv && $(BIN)/uv pip compile -q --generate-hashes --no-emit-index-url --no-header --extra dev -o requirements.lock pyproject.toml

clean:  ## remove what make made
	rm -rf .venv out mesh/engine/target mesh/_native*.so
