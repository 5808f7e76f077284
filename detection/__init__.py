"""N:M sparse training as an MMDetection plug-in: ``custom_imports = dict(imports=["nm_sparsity.detection"])``.

Importing it registers `NMSparseHook` and, where mmcv has no compiled operators, puts torchvision's in their place.
"""

from importlib.util import find_spec
from typing import Any

INSTALL = "MMCV_WITH_OPS=0 pip install 'nm-sparsity[detection]'"
INSTALLED = all(find_spec(name) is not None for name in ("mmengine", "mmcv", "mmdet"))

if INSTALLED:
    from nm_sparsity.detection import ops

    ops.install()
    from nm_sparsity.detection.hooks import NMSparseHook as NMSparseHook
else:

    def __getattr__(name: str) -> Any:
        if name == "NMSparseHook":
            raise ImportError(f"MMDetection is not installed; run: {INSTALL}")
        raise AttributeError(name)
