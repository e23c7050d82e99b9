# make demo    a real application on embedded parts: nothing to install by hand
# make test    every test, on a real Apache Kafka (needs Java 17 and Maven) and a real Redis
# make test-confluent  those of them that say what flowkit promises, on confluent-kafka
# make docs    the documentation, as a site in build/site
# make bench   every benchmark; bench-inline, bench-peers, bench-queue, bench-waiting, bench-growth run one of them
# make soak    1,000,000 messages through the queue, with SIGKILLs every few seconds; SOAK="--workers rq --seed 7" for more
# make chaos   a million messages and more, while processes, Kafka and Redis are killed: under an hour; CHAOS="--list" for more
# make fuzz    the tests of tests/fuzz with many more examples, new ones each time; FUZZ=50000 for even more
# make audit   known vulnerabilities in what flowkit needs, and whether the lowest versions it allows work
# make lint types format clean

PYTHON ?= python3
VENV ?= .venv
PROCESSES ?= 4
BIN = $(VENV)/bin

.PHONY: demo test test-confluent docs lint format types bench bench-inline bench-peers bench-queue bench-waiting bench-growth soak chaos fuzz audit clean

# Each set of packages has a stamp: the demo needs few of them, the tests many.
$(VENV)/.%: setup.cfg setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flowkit needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	@echo "Installing into $(VENV); this takes a minute:"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

$(VENV)/.dev: EXTRAS = dev
$(VENV)/.test: EXTRAS = dev,test
$(VENV)/.bench: EXTRAS = dev,test,bench

demo: $(VENV)/.dev
	$(BIN)/python examples/demo.py

# In several processes, which have servers of their own: most tests wait for something. In the order of the files: by their
# number of tests, those that take minutes would come last, each alone.
SIDE_BY_SIDE = --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

test: $(VENV)/.test
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# What flowkit promises, on the other Kafka client.
ON_CONFLUENT = test_acceptance test_batches test_consumer_kafka test_parallel test_retry_topics test_transactions

test-confluent: $(VENV)/.test
	FLOWKIT_CLIENT=confluent $(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ON_CONFLUENT:%=tests/%.py)

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.test
	$(BIN)/mypy

# BENCH: more arguments, as in make bench-queue BENCH="latency --quick".
bench: bench-inline bench-peers bench-queue bench-waiting bench-growth

bench-inline: $(VENV)/.bench
	$(BIN)/python -W ignore tests/benchmarks/consume.py $(BENCH)

# The other frameworks have an environment of their own, because of their versions of the clients.
bench-peers: $(VENV)/.bench build/peers/.ready
	$(BIN)/python -W ignore tests/benchmarks/peers.py --peers build/peers/bin/python $(BENCH)

build/peers/.ready: tests/benchmarks/peers.txt
	$(PYTHON) -m venv build/peers
	build/peers/bin/python -m pip install --quiet --requirement $<
	touch $@

bench-queue: $(VENV)/.bench
	$(BIN)/python -W ignore tests/benchmarks/queued.py $(BENCH)

bench-waiting: $(VENV)/.bench
	$(BIN)/python -W ignore tests/benchmarks/waiting.py $(BENCH)

bench-growth: $(VENV)/.bench
	$(BIN)/python -W ignore tests/benchmarks/growth.py $(BENCH)

soak: $(VENV)/.test
	$(BIN)/python -W ignore tests/chaos/soak.py $(SOAK)

chaos: $(VENV)/.test
	$(BIN)/python -W ignore tests/chaos/chaos.py $(CHAOS)

FUZZ ?= 5000

fuzz: $(VENV)/.test
	FLOWKIT_FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/fuzz

audit: $(VENV)/.test
	$(BIN)/python .ci/audit.py
	$(BIN)/python .ci/audit.py --lowest

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
