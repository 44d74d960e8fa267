# Each target makes the environment that it needs. VENV= says where it lives, PYTHON= what makes it.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo test coverage test-all bugs test-fast lint docs linkcheck bench grid zoo accuracy recovery atlas deployment clean

demo: $(VENV)/.base
	$(BIN)/tncompress demo --overwrite $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto $(ARGS)

coverage: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --cov --cov-report=term:skip-covered $(ARGS)

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --zoo $(ARGS)

bugs: $(VENV)/.test
	$(BIN)/python tests/plant_bugs.py $(ARGS)

test-fast: $(VENV)/.test
	$(BIN)/python -m pytest -n auto -m "not slow" $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy tncompress

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html $(ARGS)

linkcheck: $(VENV)/.docs
	$(BIN)/sphinx-build --keep-going -b linkcheck docs docs/_build/linkcheck $(ARGS)

bench: $(VENV)/.base
	$(BIN)/python examples/benchmarks/layers_speed.py layers
	$(BIN)/python examples/benchmarks/layers_speed.py choices --most 50
	for network in vgg16 resnet50; do \
	  $(BIN)/python examples/benchmarks/networks_speed.py one --network $$network --compile && \
	  $(BIN)/python examples/benchmarks/decomposition_speed.py --network $$network || exit 1; done
	$(BIN)/python examples/benchmarks/decomposition_speed.py --cp --compress resnet50
	$(BIN)/python examples/benchmarks/training_speed.py layers
	$(BIN)/python examples/benchmarks/layers_speed.py page

grid: $(VENV)/.base
	$(BIN)/python examples/geometry_grid.py --out docs/geometries.md $(ARGS)

zoo: $(VENV)/.test
	$(BIN)/python examples/zoo_table.py $(ARGS)

accuracy: $(VENV)/.base
	$(BIN)/python examples/accuracy_at_size.py train
	$(BIN)/python examples/accuracy_at_size.py measure
	$(BIN)/python examples/accuracy_at_size.py time --network resnet20
	$(BIN)/python examples/accuracy_at_size.py time --network resnet50
	$(BIN)/python examples/accuracy_at_size.py page

recovery: $(VENV)/.test
	$(BIN)/python examples/accuracy_at_size.py train
	$(BIN)/python examples/finetune_recovery.py measure --network cnn4 $(ARGS)
	$(BIN)/python examples/finetune_recovery.py measure --network resnet20 $(ARGS)
	$(BIN)/python examples/finetune_recovery.py steps --network resnet20
	$(BIN)/python examples/finetune_recovery.py steps --network resnet50 --batch 8 --rounds 6
	$(BIN)/python examples/finetune_recovery.py page

atlas: $(VENV)/.base
	$(BIN)/python examples/atlas_speed.py $(ARGS)

deployment: $(VENV)/.base
	$(BIN)/python examples/deployment.py $(ARGS)

# A stamp says which extras are installed, and is older than pyproject.toml when they have changed.
$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.%: pyproject.toml $(VENV)/.base
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
