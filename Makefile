# Two commands: `make demo` and `make test`. Neither needs an account, a login or a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export WANDB_MODE ?= offline

.PHONY: demo test lint mutants soak clean

$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# A real run, small enough for two CPU cores: defaults that fit, the LR finder, OneCycle, evaluation, checkpoints and plots.
demo: $(VENV)/.installed
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train_standard.py \
		--model resnet18 --img_size 48 --epochs 6 --run_name demo-$$(date +%Y%m%d-%H%M%S)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In the order of their names, not those with the fewest tests last: the longest have few.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Breaks the core one place at a time and says which breaks no test sees; bounded to an hour.
mutants: $(VENV)/.installed
	$(BIN)/python -m tests.mutants --minutes 60

soak: $(VENV)/.installed
	$(BIN)/python -m tests.soak

clean:
	rm -rf $(VENV)
