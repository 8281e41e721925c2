# The Python that .venv is made with: 3.10 or newer, for example make test PYTHON=python3.11
PYTHON ?= python3
# pytest processes, one thread each
TEST_JOBS ?= 2
# more arguments for demo, test or lint, for example make test ARGS='-k scan'
ARGS ?=
VENV_PYTHON := .venv/bin/python
# a file's tests in one process, in the files' order: the file with the fewest tests, which xdist
# would keep for the end, takes longest
SIDE_BY_SIDE = -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

# of the tests, what the original family must pass: configs, models, a round a task
ORIGINAL_TESTS := tests/test_configs/test_build.py tests/test_models tests/test_ops \
  tests/test_checkpoint.py tests/test_tools/test_train.py::test_train \
  tests/test_tools/test_test.py::test_predictions_and_pictures

.PHONY: help install gpu demo test test-original lint doctor clean distclean

help:
	@echo 'make demo       train the three small models on drawn shapes, print a table'
	@echo 'make test       run the tests'
	@echo 'make test-original   the same for the original OpenMMLab family, in .venv-original'
	@echo 'make lint       run ruff'
	@echo 'make doctor     say what is installed and which scan runs'
	@echo 'make install    set up .venv (demo, test, lint and doctor do it by themselves)'
	@echo 'make gpu        try the CUDA parts again after they failed to install'
	@echo 'make clean      remove caches; make distclean: .venv too'

install:
	@command -v '$(PYTHON)' >/dev/null || { \
	  echo 'error: $(PYTHON) not found: install Python 3.10 or newer, or name it: PYTHON=python3.11' >&2; \
	  exit 1; }
	@'$(PYTHON)' tools/install.py

gpu:
	@'$(PYTHON)' tools/install.py --retry-gpu

demo: install
	@$(VENV_PYTHON) demo/shapes_demo.py $(ARGS)

test: install
	@OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-original:
	@'$(PYTHON)' tools/install.py --family original
	@OMP_NUM_THREADS=1 .venv-original/bin/python -m pytest $(SIDE_BY_SIDE) $(ORIGINAL_TESTS) $(ARGS)

lint: install
	@$(VENV_PYTHON) -m ruff check . $(ARGS)

doctor: install
	@$(VENV_PYTHON) -m mmgroupmamba.doctor

clean:
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	@rm -rf .venv .venv-original
