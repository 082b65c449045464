# make demo and make test start from a bare clone: Python 3.10+, a C and C++ compiler, and pip's package index.
#   PYTHON=python3.12   the interpreter the virtual environment is made from
#   ARGS="-k crash -x"  further arguments for pytest, the demo or a benchmark
PYTHON ?= python3
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet install -c constraints.txt
extra = $$(sed -n 's/^$(1) = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
ENGINE := fxckpt/engine/_engine.abi3.so
SOURCES := setup.py $(wildcard csrc/*.h csrc/*/*.[ch] fxckpt/engine/*.py fxckpt/engine/*.h)

C_CHECK := -std=c11 -D_GNU_SOURCE -Wall -Wextra -Werror -Icsrc -fsyntax-only

.PHONY: demo test crash kills fuzz faults model soak bench lint clean distclean
.SUFFIXES:

# On cores that are shared, OpenMP threads that spin at a barrier keep the thread they wait for from running: steps
# then take several times as long. Asleep they cost nothing. Benchmarks keep the default, which is what users have.
demo test: export OMP_WAIT_POLICY ?= PASSIVE

# Here a warning of the C compiler is an error; at users', whose compilers may be newer, it is not.
test lint: export FXCKPT_WERROR ?= 1

demo: $(ENGINE)
	@$(PY) examples/demo.py $(ARGS)

test: $(ENGINE) $(VENV)/.cuda-headers
	@$(PY) -m pytest -n 3 --dist worksteal $(ARGS)

# The long versions of what make test runs short: every power cut, and a hundred kills.
crash: $(ENGINE)
	@FXCKPT_CRASH=full $(PY) -m pytest tests/campaigns/test_power_cut.py $(ARGS)

# Every error at every call of a training; and runs that are killed and disturbed at random, one after the other. Behind them the
# engine's C programs, a minute each.
faults: $(ENGINE)
	@FXCKPT_FAULTS=full $(PY) -m pytest -n 2 --dist worksteal tests/campaigns/test_faults.py -k whichever $(ARGS)
	@FXCKPT_C_SECONDS=60 $(PY) -m pytest tests/engine/test_c_programs.py

# Larger settings of the model of chunks and fences, every interleaving of each.
model: $(ENGINE)
	@FXCKPT_MODEL=full $(PY) -m pytest tests/campaigns/test_chunk_model.py $(ARGS)

soak: export FXCKPT_SOAK ?= 500
soak: $(ENGINE)
	@$(PY) -m pytest -s tests/campaigns/test_soak.py $(ARGS)

# Kills with 600 MB of state also where /dev/shm is small; then the same beside the peers that are installed.
kills: $(ENGINE)
	@FXCKPT_KILLS=100 $(PY) -m pytest tests/campaigns/test_kill_loop.py $(ARGS)
	@FXCKPT_KILLS=50 FXCKPT_STATE_MB=600 $(PY) -m pytest -s tests/promises/test_monitor.py -k every_step $(ARGS)
	@FXCKPT_KILLS=50 FXCKPT_STATE_MB=600 sh tools/small_shm.sh $(PY) -m pytest -s tests/promises/test_monitor.py -k "every_step and 600" $(ARGS)
	@$(PY) benchmarks/kills.py
	@sh tools/small_shm.sh $(PY) benchmarks/kills.py --only fxckpt-monitor

# Every option of every optimizer, in every form and compiled in three types; then the table in docs/optimizers.md anew.
.PHONY: optimizers
optimizers: $(ENGINE)
	@$(PY) tools/optimizer_table.py
	@FXCKPT_OPTIMIZERS=full $(PY) -m pytest -n 2 tests/optim/test_every_optimizer.py tests/journal/test_made_again.py tests/journal/test_several.py tests/journal/test_sums.py $(ARGS)

# Every model of tests/support/model_cases.py through Inductor itself, with and without us, then killed and resumed, and the
# examples that compile one: half an hour.
.PHONY: models
models: $(ENGINE)
	@FXCKPT_MODELS=full $(PY) -m pytest tests/campaigns/test_models.py tests/campaigns/test_models_in_backward.py tests/graph/test_in_backward.py \
		tests/graph/test_one_graph_layers.py tests/loops/test_loops.py tests/project/test_project.py $(ARGS)

# Twenty training loops as people write them, and epochs of a loader with workers, each killed many times; and every kind of loader
# with workers in every way.
.PHONY: loops
loops: export FXCKPT_LOOPS ?= 20
loops: $(ENGINE)
	@$(PY) -m pytest -n 2 --dist worksteal tests/loops/test_twenty_loops.py tests/loops/test_killed_in_an_epoch.py \
		tests/loops/test_loaders.py $(ARGS)

# Updates inside the backward: killed at any instant of one, and twenty loops with them.
.PHONY: in-backward
in-backward: export FXCKPT_IN_BACKWARD ?= 200
in-backward: $(ENGINE)
	@$(PY) -m pytest -s tests/campaigns/test_kills_in_backward.py tests/loops/test_loops_in_backward.py $(ARGS)

# Two ranks under torchrun's agent, killed and restarted.
.PHONY: ranks
ranks: export FXCKPT_RANKS ?= 100
ranks: export FXCKPT_LIVES ?= 100
ranks: $(ENGINE)
	@$(PY) -m pytest tests/ranks/test_restarts.py tests/ranks/test_lives.py tests/ranks/test_lost_disks.py tests/ranks/test_sharded.py \
		tests/ranks/test_replicas.py tests/ranks/test_joint_journal.py $(ARGS)

# Hugging Face's Trainer, Accelerate, Lightning and Fabric, thirty kills of each case.
.PHONY: integrations
integrations: export FXCKPT_INTEGRATIONS ?= 30
integrations: $(ENGINE)
	@$(PY) -m pytest -n 2 --dist worksteal tests/integrations/test_hf_trainer.py tests/integrations/test_hf_attach.py tests/integrations/test_accelerate.py tests/integrations/test_lightning.py tests/integrations/test_fabric.py $(ARGS)

# torchtitan's own Trainer on two ranks, killed and restarted. It imports Triton, which torch for CPUs has not; neither is installed
# where other tests would find it.
.PHONY: titan
titan: $(ENGINE) $(VENV)/.titan
	@PYTHONPATH=$(CURDIR)/$(VENV)/titan $(PY) -m pytest tests/ranks/test_titan_itself.py $(ARGS)

# Ray Train's workers, killed and started again.
.PHONY: ray
ray: $(ENGINE) $(VENV)/.ray
	@PYTHONPATH=$(CURDIR)/$(VENV)/ray $(PY) -m pytest tests/integrations/test_ray.py $(ARGS)

# The documents' blocks as they stand, where make test shortens loops and leaves Inductor out.
.PHONY: docs
docs: $(ENGINE)
	@FXCKPT_DOCS=full $(PY) -m pytest tests/project/test_documents.py tests/integrations/test_documented_diffs.py $(ARGS)

# A thousand kills of runs with a journal, every byte of a record with a bit flipped, and two hundred trainings of chance.
.PHONY: journal
journal: export FXCKPT_JOURNAL ?= 1000
journal: export FXCKPT_TURNS ?= 200
journal: $(ENGINE)
	@FXCKPT_FLIP_EVERY=1 $(PY) -m pytest -s tests/campaigns/test_journal_kills.py tests/journal/test_damage.py tests/journal/test_random_turns.py $(ARGS)

bench: $(ENGINE)
	@$(PY) benchmarks/optimizer_step.py $(ARGS)
	@$(PY) benchmarks/overhead.py $(ARGS)

# The models that people know, beside other ways to save: half an hour on a machine that does nothing else. Then the tables of
# README.md and docs/benchmarks.md, and their plot, from the results.
.PHONY: bench-models tables
bench-models: $(ENGINE)
	@$(PIP) $(call extra,bench)
	@$(PY) benchmarks/models.py --json benchmarks/results/models.json $(ARGS)
	@$(PY) benchmarks/tables.py

tables: $(VENV)/.packages
	@$(PY) benchmarks/tables.py

# An hour of inputs that hypothesis makes of good files; FXCKPT_FUZZ_SECONDS chooses another time.
fuzz: export FXCKPT_FUZZ_SECONDS ?= 3600
fuzz: $(ENGINE)
	@$(PY) -m pytest -s tests/campaigns/test_fuzz.py tests/campaigns/test_fuzz_import.py $(ARGS)

# The engine is built first: its binding is imported where types are checked.
lint: $(ENGINE) $(VENV)/.lint
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet .
	@$(VENV)/bin/codespell
	@$(PY) -m mypy
	@$(PY) tools/type_completeness.py 99
	@$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	@$${CC:-cc} $(C_CHECK) $(filter-out csrc/testing/%,$(wildcard csrc/*/*.c))
	@$${CC:-cc} $(C_CHECK) -DFX_TESTING -DFX_MUTATIONS $(filter-out %/headers.c,$(wildcard csrc/*/*.c tests/engine/c/*.c))
	@echo "lint: nothing to complain about"

# torch comes first and exactly as constraints.txt pins it, so that nothing else can choose its version.
$(VENV)/.packages: constraints.txt pyproject.toml
	@sh tools/check_toolchain.sh "$(PYTHON)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and the packages that build and test fxckpt into $(VENV) (once; torch is large)"
	@$(PIP) "$$(grep '^torch' constraints.txt)"
	@$(PIP) "setuptools>=77" wheel "cffi>=1.16" numpy $(call extra,test)
	@touch $@

$(VENV)/.lint: $(VENV)/.packages
	@$(PIP) $(call extra,lint)
	@touch $@

$(VENV)/.titan: $(VENV)/.packages
	@$(PIP) --no-deps --target $(VENV)/titan "torchtitan==0.3.0" torch_checkpointing "spmd_types==0.2.3" triton typeguard tyro docstring_parser einops
	@touch $@

$(VENV)/.ray: $(VENV)/.packages
	@$(PIP) --no-deps --target $(VENV)/ray "ray>=2.60" tensorboardX msgpack jsonschema jsonschema-specifications referencing rpds-py
	@touch $@

# Two toolkits' headers, for a test that reads them: in a folder of their own, as torch may want other versions.
$(VENV)/.cuda-headers: $(VENV)/.packages
	@$(PIP) --no-deps --target $(VENV)/cuda-headers "nvidia-cuda-runtime-cu12==12.8.*" "nvidia-cuda-runtime==13.*"
	@touch $@

$(ENGINE): $(VENV)/.packages $(SOURCES)
	@echo "building the engine"
	@$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

clean:
	rm -rf build dist *.egg-info .demo-* .bench-* .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -f $(ENGINE) fxckpt/engine/_engine.c
	find fxckpt tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
