"""Add to any MMDetection config's ``_base_``: 2:8 sparsity trained from scratch with SR-STE, everything eligible."""

custom_imports = dict(imports=["nm_sparsity.detection.plugin"])
custom_hooks = [dict(type="NMSparseHook", pattern="2:8", method="sr-ste")]
