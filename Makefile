# Two commands for users: `make demo` and `make test`. Each makes .venv and installs what it needs; the second time is quick.

PYTHON ?= python3
VENV := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(VENV)/python -m pytest -q -rs -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo curate-demo test test-slow test-oldest check fix bench gpu parity hostile kill-test peers tokenizers docs golden clean help

help:            ## list these targets
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  +##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: .venv/demo ## build real pairs, train a small CLIP on them, evaluate it on icons it has never seen (under 5 minutes on 2 cores)
	$(VENV)/python -m recipes.demo $(ARGS)

curate-demo: .venv/demo .venv/curate ## crawl real pages from a server of one's own, through every stage into shards and a training run
	$(VENV)/python -m recipes.curate_demo $(ARGS)

test: .venv/demo .venv/dev ## run the quick tests (under 8 minutes on 2 cores)
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: .venv/demo .venv/dev ## run the tests that are long by nature: compiling, many ranks, kills (under 20 minutes)
	$(PYTEST) -m slow $(ARGS)

test-oldest: .venv-oldest/done ## run the quick tests with the oldest PyTorch that we take (5 GB: its build for GPUs)
	$(subst $(VENV),.venv-oldest/bin,$(PYTEST)) -m 'not slow' $(ARGS)

check: .venv/demo .venv/dev ## ruff, pyright, import-linter
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/pyright
	$(VENV)/lint-imports

fix: .venv/dev   ## let ruff mend and format
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

bench: .venv/demo peers ## run every benchmark, or one: make bench NAME=tokenizer
	@set -e; for file in $(if $(NAME),benchmarks/$(NAME).py,$(filter-out benchmarks/harness.py benchmarks/checkouts.py benchmarks/parity.py benchmarks/hostile.py benchmarks/kill.py benchmarks/gpu.py,$(wildcard benchmarks/*.py))); do \
		echo "== $$file"; $(VENV)/python $$file $(ARGS); done

gpu:             ## hold a GPU against the processor and measure it (8 minutes; needs PyTorch alone)
	$(PYTHON) benchmarks/gpu.py $(ARGS)

parity: .venv/demo peers ## every layout and published architecture in both directions beside open_clip and transformers (half an hour)
	$(VENV)/python benchmarks/parity.py $(ARGS)
	$(if $(ARGS),,PYTHONPATH=src .venv-peers/bin/python -W ignore benchmarks/parity_families.py)

hostile: .venv/demo .venv/dev ## meet every kind of bad input, each command in a watched process of its own
	$(VENV)/python -W ignore benchmarks/hostile.py $(ARGS)

kill-test: .venv/demo .venv/dev ## kill training a hundred times and compare what comes out (half an hour; goes on where it was)
	$(VENV)/python benchmarks/kill.py $(ARGS)

peers: .venv-peers/done ## build the environment of the libraries we are compared with

tokenizers: .venv/demo peers ## compare ids beside open_clip and transformers: make tokenizers FILE=tokenizer.json (a large vocabulary)
	$(VENV)/python tests/golden/compare_tokenizers.py $(ARGS)
	$(if $(FILE),$(VENV)/python tests/golden/compare_json_tokenizers.py $(FILE) $(ARGS))

docs: .venv/demo ## write docs/cli.md from the commands' own help, the tables of docs/scaling.md from their plans
	$(VENV)/python -m recipes.docs
	$(VENV)/python -m recipes.scaling

golden: peers    ## write the golden values of the tests anew, from the peers
	.venv-peers/bin/python tests/golden/make_features.py
	.venv-peers/bin/python tests/golden/make_checkpoints.py
	.venv-peers/bin/python -W ignore tests/golden/make_preprocess.py
	PYTHONPATH=src .venv-peers/bin/python tests/golden/make_tokenizer_fixture.py

clean:           ## delete environments and runs
	rm -rf .venv .venv-peers .venv-oldest runs

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(VENV)/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	@touch $@

.venv/curate: .venv/bin/python pyproject.toml constraints.txt
	$(VENV)/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/python -m pip install --quiet --constraint constraints.txt --editable '.[curate]'
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	$(VENV)/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

.venv-oldest/done: pyproject.toml constraints.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	sed 's/^torch==.*/torch==2.11.0/' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt torch
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt --editable '.[demo,dev]'
	@touch $@

.venv-peers/done: constraints-peers.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --requirement constraints-peers.txt
	@touch $@
