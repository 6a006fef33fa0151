# make demo   a model learns to generate images from text: 14 minutes on 2 quiet cores, longer without AVX-512 BF16, ends with runs/demo/report.html and runs/demo/evaluation/report.html
# make demo-image-to-image   the paper's sketch experiment in small, ends with runs/image-to-image/report.html
# make docs   docs/config.md, from the config's fields
# make test   all quick tests            make check   lint, format, types
# make test-one-unit-off   the same, as on a processor with another square root
# make test-slow   the slower proofs     make bench   the figures in benchmarks/results
# make rehearse   the 12B run with all its options, narrow: trained, killed, gone on with, released (part of test-slow)
# make test-deepspeed-matrix   what is asked of DeepSpeed, under each version of engine/deepspeed/versions.py

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
PRESET := emoji
DATA := data/emoji
RUN := runs/demo
CANDIDATES := 32
# Threads of one process wait for one another, which crawls beside any other busy process; ranks of
# one thread do not (benchmarks/busy_machine.py).
RANKS := 2
# A port of its own: DeepSpeed's default is the same for every run of a machine.
PORT := $(shell shuf -i 12000-31999 -n 1)
LAUNCH = $(BIN)/deepspeed --master_port $(PORT) --num_accelerators $(RANKS) --module dalle_dist
SET := paths.images=$(DATA) paths.tokens=$(DATA)-tokens paths.tokenizer=$(DATA)/tokenizer.json \
       paths.dvae_run=$(RUN)-dvae paths.run=$(RUN) \
       paths.clip_run=$(RUN)-clip $(EXTRA)

.PHONY: demo demo-short demo-image-to-image rehearse test test-slow test-one-unit-off test-deepspeed-matrix check format docs bench clean
.DELETE_ON_ERROR:

demo: $(RUN)/report.html $(RUN)/evaluation/report.html
	@echo "Open $(RUN)/report.html; the table of generated images is $(RUN)/report.png"
	@echo "Open $(RUN)/evaluation/report.html: what reranking by CLIP brings"

# One CLIP chooses among candidates, one of another seed judges what it has chosen.
$(RUN)/evaluation/report.html: $(RUN)/release/config.yaml $(RUN)-clip/release/config.yaml $(RUN)-judge/release/config.yaml
	$(LAUNCH) evaluate $(RUN)/release $(DATA) --candidates $(CANDIDATES) --rerank $(RUN)-clip/release \
	  --clip $(RUN)-judge/release --score-clip $(RUN)-judge/release -o $(RUN)/evaluation

$(RUN)-clip/release/config.yaml: $(DATA)/tokenizer.json
	$(LAUNCH) train-clip $(PRESET) --resume auto $(SET)

$(RUN)-judge/release/config.yaml: $(DATA)/tokenizer.json
	$(LAUNCH) train-clip $(PRESET) --resume auto $(SET) paths.clip_run=$(RUN)-judge seed=1000

$(RUN)/report.html: $(RUN)/release/config.yaml
	$(BIN)/dalle-dist report $(PRESET) $(SET)

$(RUN)/release/config.yaml: $(DATA)-tokens/held-out/index.json $(DATA)/tokenizer.json
	$(LAUNCH) train $(PRESET) --resume auto $(SET)

$(DATA)-tokens/held-out/index.json: $(RUN)-dvae/release/config.yaml
	$(BIN)/dalle-dist encode $(PRESET) $(SET)

$(RUN)-dvae/release/config.yaml: $(DATA)/held-out/index.json
	$(LAUNCH) train-dvae $(PRESET) --resume auto $(SET)

$(DATA)/tokenizer.json: $(DATA)/held-out/index.json
	$(BIN)/dalle-dist tokenizer train $(PRESET) $(SET)

# Order only: a newer environment is no reason to render anew what is there, and would be refused.
$(DATA)/held-out/index.json: | $(VENV)/ready
	$(BIN)/dalle-dist data emoji $(DATA) --size 64 $(PAIRS)

# The same stages in a few minutes: it proves that they run, its images are poor.
demo-short:
	$(MAKE) demo RUN=runs/demo-short DATA=data/emoji-short CANDIDATES=4 \
	  EXTRA="clip_train.steps=20 clip_train.warmup=5 dvae_train.steps=60 dvae_train.eval_every=60 train.steps=40 train.warmup=10 train.eval_every=40 train.sample_every=40"

demo-image-to-image:
	$(MAKE) runs/image-to-image/report.html PRESET=emoji-image-to-image RUN=runs/image-to-image \
	  DATA=data/emoji-pairs PAIRS=--pairs

# A file's tests stay in one process, which shares what they set up. pytest-xdist would start with the
# files of most tests; the longest have few, and tests/conftest.py puts those first.
TEST_PROCESSES := 2
PYTEST := $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test: $(VENV)/triton $(VENV)/peers
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(VENV)/triton $(VENV)/peers
	$(PYTEST) -m "slow and not gpu"

rehearse: $(VENV)/ready
	$(BIN)/python -m pytest tests/train/test_rehearsal.py

# As on a processor whose square root of vectors is one unit off in the last place.
test-one-unit-off: $(VENV)/triton
	PYTHONPATH=$(CURDIR)/tests/one_unit_off $(PYTEST) -m "not slow and not gpu"

# The newest is the one in the virtual environment; the others lie beside it, without what they need.
OLD_DEEPSPEEDS := 0.18.9 0.17.5

test-deepspeed-matrix: $(VENV)/ready $(OLD_DEEPSPEEDS:%=build/deepspeed-%)
	set -e; for folder in "" $(OLD_DEEPSPEEDS:%=build/deepspeed-%); do \
	  PYTHONPATH=$$folder $(BIN)/python -m pytest -q tests/engine/test_deepspeed.py; done

build/deepspeed-%: $(VENV)/ready
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target $@ deepspeed==$*

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/ready
	$(BIN)/python -m dalle_dist.config.docs > docs/config.md

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.attention_tiles
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.dvae_step
	$(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.generate --releases $(wildcard runs/demo/release)
	$(BIN)/python -m benchmarks.precision --threads=1
	$(BIN)/python -m benchmarks.precision_cost
	$(BIN)/python -m benchmarks.powersgd_math
	$(BIN)/python -m benchmarks.gradient_path --threads=1
	$(BIN)/python -m benchmarks.plan --threads=1
	$(BIN)/python -m benchmarks.on_paper
	$(BIN)/python -m benchmarks.powersgd_network --threads=1
	$(BIN)/python -m benchmarks.fid --threads=1
	$(BIN)/python -m benchmarks.data --threads=1
	$(BIN)/torchrun --nproc-per-node 2 -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.checkpoint_convert
	$(BIN)/python -m benchmarks.busy_machine
	$(BIN)/python -m benchmarks.slurm_start
	$(BIN)/python -m benchmarks.watch --threads=1

# torch goes first: DeepSpeed's set-up imports it, and must not bring another one of its own.
$(VENV)/ready: setup.py kernels/setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt setuptools wheel torch
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e kernels -e '.[test,clip]'
	touch $@

# What imported models are compared with. Their own requirements do not install any more; the tests
# stand in for those that they do not use.
$(VENV)/peers: $(VENV)/ready
	$(BIN)/pip install --quiet --no-deps DALL-E==0.1 dalle-pytorch==1.6.6
	touch $@

# The kernels' tests interpret and compile them without a GPU; the demo does without these 290 MB.
$(VENV)/triton: $(VENV)/ready
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e 'kernels[gpu]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info kernels/*.egg-info
