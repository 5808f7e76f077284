"""What N:M sparsity costs in training and gains in inference: measured, and predicted before any training."""

if __name__ != "nm_sparsity.benchmarks":
    raise ImportError(f"import this package as nm_sparsity.benchmarks, not as {__name__}")
