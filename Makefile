# PURSUhInT: `make` explains the targets. Each one sets up .venv by itself when it has to.

STUDY = digits
GRID =
FORCE =
EXECUTOR =
JOBS =
JOB_CORES =
JOB_GPUS =
SLURM =
ARM =
SEED =
DATA =
ARGS =
NOTEBOOKS = notebooks/*.ipynb
PYTHON ?=
# Tried in this order where none is named: the version of the studies of record first.
override PYTHONS := python3.11 python3.12 python3.13 python3.14 python3 python

# What is given reaches commands by the environment, to the letter, so that neither make nor a shell executes a part of
# it. ARGS alone is meant for the shell: the end of a command line, with quotes and all.
GIVEN = STUDY GRID FORCE EXECUTOR JOBS JOB_CORES JOB_GPUS SLURM ARM SEED DATA ARGS NOTEBOOKS PYTHON
STUDY_IS_FROM := $(origin STUDY)
$(foreach name,$(GIVEN),$(eval override $(name) := $$(value $(name))))
export $(GIVEN)

# No environment of another project leaks in, files hold UTF-8 in every locale, and nothing phones home.
unexport PYTHONPATH PYTHONHOME PYTHONWARNINGS
export PYTHONUTF8 := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true

# Notebooks run in their own folder, so a relative DATA counts from here.
ifneq ($(DATA),)
export PURSUHINT_DATA := $(if $(filter /% ~%,$(firstword $(DATA))),$(DATA),$(CURDIR)/$(DATA))
endif

.DEFAULT_GOAL := help
.PHONY: help reproduce export figures test arithmetic lab ui bench strip readme lock clean ready

help: ## explain the targets
	@echo "From which layers of a teacher network should a student take hints?"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  STUDY=name    a file of params/, without .yaml     make reproduce STUDY=cifar100_quick"
	@echo "  GRID=name     a file of params/grids/: many        make reproduce GRID=digits_pairs JOBS=2"
	@echo "                studies, JOBS of them at a time"
	@echo "  FORCE=1       run finished stages again            make reproduce FORCE=1"
	@echo "  EXECUTOR=     local or slurm: train in jobs        make reproduce EXECUTOR=local JOBS=2"
	@echo "  JOBS=number   at most so many jobs at a time"
	@echo "  JOB_CORES=    CPU cores of a job; what the study's threads and loaders use, if not given"
	@echo "  JOB_GPUS=     GPUs of a job; one for each of the study's processes, if not given"
	@echo "  SLURM='...'   options of sbatch                    make reproduce EXECUTOR=slurm SLURM='time=600'"
	@echo "  ARM=, SEED=   which student to export              make export ARM=kd SEED=0"
	@echo "  DATA=folder   where the images lie                 make reproduce STUDY=cifar100_quick DATA=/data"
	@echo "  ARGS='...'    handed to test, lab, ui and bench    make test ARGS='-k hints'"
	@echo "                by the shell, quotes and all"
	@echo "  PYTHON=path   the Python to set up with (3.11 to 3.14)"

# A study ends with the make that started it, also where that is killed.
override RUN = exec env PURSUHINT_PARENT=$$PPID .venv/bin/python -m
override JOB_OPTIONS = --jobs="$$JOBS" --executor="$$EXECUTOR" --cores="$$JOB_CORES" --gpus="$$JOB_GPUS" --slurm="$$SLURM"
override FORCED = $(filter-out 0 no false,$(FORCE))

reproduce: ready ## run a study, from images to report (STUDY, FORCE, DATA, EXECUTOR ...), or many (GRID, JOBS ...)
ifneq ($(GRID),)
	@$(if $(FORCED),echo "FORCE=1 is for one study (STUDY=name); a grid runs what is not there yet" >&2; exit 1)
	@$(if $(filter command line,$(STUDY_IS_FROM)),echo "STUDY or GRID: name one of them" >&2; exit 1)
	@$(RUN) pursuhint_lib.grid reproduce $(JOB_OPTIONS) -- "$$GRID"
else
	@$(RUN) pursuhint_lib.pipeline reproduce $(if $(FORCED),--force) $(JOB_OPTIONS) -- "$$STUDY"
endif

export: ready ## write a student as files that run without this project (STUDY, ARM, SEED, DATA)
	@exec .venv/bin/python -m pursuhint_lib.export --arm="$$ARM" --seed="$$SEED" -- "$$STUDY"

figures: ready ## draw the figures of a published study again from its tables (STUDY)
	@exec .venv/bin/python -m pursuhint_lib.drawings -- "$$STUDY"

# In the order of tests/conftest.py, not by number of tests.
test: ready ## run every test
	@exec .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

arithmetic: ready ## compare this machine's gradients with float64, for every network of the package
	@exec .venv/bin/python -m pursuhint_lib.arithmetic

lab: ready ## open the notebooks in JupyterLab
	@JUPYTER_PREFER_ENV_PATH=1 JUPYTER_PATH="$$PWD/.venv/share/jupyter" exec .venv/bin/python -m jupyterlab \
	  --FileContentsManager.preferred_dir=notebooks --LanguageServerManager.autodetect=False \
	  --LabApp.news_url= --LabApp.extension_manager=readonly \
	  --LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate $(ARGS)

ui: ready ## compare the runs in MLflow's pages
	@exec .venv/bin/python -m pursuhint_lib.tracking_page $(ARGS)

bench: ready ## measure speed and memory (tests/benchmarks)
	@exec .venv/bin/python -m pytest tests/benchmarks -s $(ARGS)

strip: ready ## take outputs and run metadata out of the notebooks, before a commit
	@exec .venv/bin/python -m nbstripout --extra-keys \
	  "metadata.papermill metadata.language_info cell.metadata.papermill cell.metadata.execution" -- $$NOTEBOOKS

readme: ready ## write the results table of README.md from reports/
	@exec .venv/bin/python tools/readme.py

lock: ## renew requirements.lock and environment.yml from pyproject.toml (needs uv)
	@command -v uv >/dev/null || { echo "make lock needs uv on the PATH (pip install uv)" >&2; exit 1; }
	@uv pip compile pyproject.toml --quiet --extra test --universal --generate-hashes --python-version 3.11 \
	  --no-emit-index-url --custom-compile-command "make lock" --output-file requirements.lock
	@$(call WITH_PYTHON,tools/environment.py)

clean: ## remove what running made: runs/, MLflow's store, caches (.venv, data/ and reports/ stay)
	@$(call WITH_PYTHON,tools/clean.py)

ready:
	@$(call WITH_PYTHON,tools/setup_venv.py)

override WITH_PYTHON = for name in $(if $(PYTHON),"$$PYTHON",$(PYTHONS)); do \
    if "$$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null; then \
      exec "$$name" $(1); \
    fi; \
  done; \
  printf '%s\n' "Python 3.11 to 3.14 is needed and none was found (tried: $${PYTHON:-$(PYTHONS)}); \
  name one: make PYTHON=/path/to/python3" >&2; \
  exit 1
