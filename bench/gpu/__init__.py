"""What must happen on a card, in one command: ``bash bench/gpu_suite.sh OUT``; see :mod:`bench.gpu.suite`."""
