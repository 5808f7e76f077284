"""N:M sparse training as an MMEngine plug-in: ``custom_imports = dict(imports=["nm_sparsity.detection.plugin"])``.

Importing it registers `NMSparseHook` and, where mmcv has no compiled operators, puts torchvision's in their place. In
Python, import it before ``mmdet.apis``.
"""

from nm_sparsity.detection import ops
from nm_sparsity.detection.hooks import NMSparseHook as NMSparseHook

ops.install()
