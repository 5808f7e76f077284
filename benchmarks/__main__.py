"""`python -m nm_sparsity.benchmarks` runs the whole suite."""

from nm_sparsity.benchmarks.suite import main

if __name__ == "__main__":
    raise SystemExit(main())
