# Two commands: `make demo` and `make test`. Neither needs an account, a login or a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export WANDB_MODE ?= offline

.PHONY: demo test lint soak clean

$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train_standard.py \
		--debug --model resnet18 --run_name demo-$$(date +%Y%m%d-%H%M%S)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest

soak: $(VENV)/.installed
	$(BIN)/python -m tests.soak

clean:
	rm -rf $(VENV)
