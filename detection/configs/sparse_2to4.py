"""Add to any MMDetection config's ``_base_``: 2:4 sparsity trained from scratch with SR-STE, everything eligible."""

custom_imports = dict(imports=["nm_sparsity.detection.plugin"])
custom_hooks = [dict(type="NMSparseHook", pattern="2:4", method="sr-ste")]
