# One command each. Every target first brings .venv up to date with pyproject.toml and requirements.lock.
#
#   make mini                    run the whole study on generated data; results/mini/ and its RESULTS.md
#   make notebook NB=04          run one notebook   (several: NB="04 05"; options: ARGS="-p steps 10"; PROFILE=paper)
#   make lab                     open JupyterLab
#   make test                    all tests
#   make quick                   the tests that take seconds
#   make workflow ARGS=-n        Snakemake, for a cluster: what would run (see Snakefile and README)
#   make clean                   back to the mini results that came with the repository, caches removed
#   make distclean               remove .venv too
#
# PYTHON=python3.12 chooses the interpreter that .venv is made from (3.11, 3.12 or 3.13).

PYTHON ?= python3
PROFILE ?= mini
ARGS ?=
EXTRAS := lab,eval,onnx,openvino,stream,sam3,dev

VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup mini notebook lab test quick workflow clean distclean

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

setup: $(READY)

# The stamp is removed first and written last, so an interrupted install is taken up again.
# An environment whose interpreter is gone, or of an unsupported version, is made anew.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
$(READY): pyproject.toml requirements.lock
	@rm -f $(READY)
	@$(RUN) -c 'import pip; $(SUPPORTED)' 2>/dev/null || { \
	    $(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
	        echo "$(PYTHON) is $$($(PYTHON) --version 2>&1 || true): the study needs Python 3.11, 3.12 or 3.13." \
	             "Name one: make PYTHON=python3.12 ..." >&2; exit 1; }; \
	    $(PYTHON) -m venv --clear $(VENV); }
	$(RUN) -m pip install --constraint requirements.lock --editable '.[$(EXTRAS)]'
	@touch $(READY)

mini: $(READY)
	$(RUN) -m evsam_lib.run --profile mini $(ARGS)

notebook: $(READY)
	@test -n "$(NB)" || { echo 'Which notebook? For example: make notebook NB=04' >&2; exit 2; }
	$(RUN) -m evsam_lib.run --profile $(PROFILE) $(NB) $(ARGS)

lab: $(READY)
	$(RUN) -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

test: $(READY)
	$(RUN) -m pytest $(ARGS)

quick: $(READY)
	$(RUN) -m pytest -m 'not slow and not browser' $(ARGS)

# In an environment of its own: Snakemake holds packages of the study back, and only calls the runner.
SNAKEMAKE := .venv-workflow/bin/snakemake
$(SNAKEMAKE): | $(READY)
	@rm -rf .venv-workflow
	$(RUN) -m venv .venv-workflow
	.venv-workflow/bin/python -m pip install --quiet 'snakemake>=9.10,<10' || { rm -rf .venv-workflow; exit 1; }

workflow: $(SNAKEMAKE)
	$(SNAKEMAKE) $(ARGS)

clean:
	rm -rf results/mini .pytest_cache .ruff_cache .hypothesis build dist
	@git checkout --quiet -- results/mini 2>/dev/null || true
	find evsam_lib tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .venv-workflow *.egg-info
