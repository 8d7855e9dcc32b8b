# make book · make test · make reproduce · make check-numbers · make lab: each sets up .venv by itself, once; make setup: that alone
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready-$(shell cat settings.ini constraints.txt setup.py pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: setup book test reproduce check-numbers lab clean
.DELETE_ON_ERROR:

setup: $(READY)

book: $(READY)
	$(BIN)/facebook-nb tour
	$(BIN)/facebook-nb book

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -n 2 --dist loadgroup

reproduce: $(READY)
	$(BIN)/facebook-nb reproduce
	$(BIN)/facebook-nb book

check-numbers: $(READY)
	$(BIN)/facebook-nb reproduce --one-seed

lab: $(READY)
	$(BIN)/jupyter trust nbs/*/*.ipynb > /dev/null
	$(BIN)/jupyter lab nbs/chapters

clean:
	rm -rf _build runs .pytest_cache .ruff_cache

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; say which with make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[faces,ode,book,dev]'
	rm -f .venv/ready-*
	touch $@
