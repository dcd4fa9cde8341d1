# Everything a clone can do. Only Rust and Python need to be present; the rest is installed into $(VENV).
#
#   make demo                 a dataset, a daemon, a Python trainer and a Rust one, side by side
#   make demo DATASET=PATH    the same on a dataset of yours
#   make test                 what CI runs
#   make bench                the benchmarks, beside their rivals; JSON under benches/results/

SHELL := /bin/bash
.DEFAULT_GOAL := help

export CARGO_TERM_COLOR ?= auto
CARGO := cargo --locked
# Shared by all clones of this user, since it takes minutes and gigabytes; VENV=.venv puts it into the tree.
export VENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/robocache/venv
DATASET ?=

.PHONY: help demo test bench clean format images

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -n 7
	@printf '%s\n' '  make format               rustfmt and ruff over the tree' \
	  '  make images               rebuild the GPU images from kernels/cuda' \
	  '  make clean                build products, demo data; not $$VENV'

demo:
	@tools/demo.sh $(DATASET)

test:
	@.ci/steps

bench:
	@tools/bench.sh

images:
	@tools/images.sh

format:
	$(CARGO) fmt
	@tools/venv.sh
	$(VENV)/bin/ruff format client/python tools benches examples
	$(VENV)/bin/ruff check --fix client/python tools benches examples

clean:
	cargo clean
	rm -rf .demo .venv .cache client/python/python/robocache/bin client/python/python/robocache/*.so
