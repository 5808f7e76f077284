"""N:M sparse training as an MMDetection plug-in: ``custom_imports = dict(imports=["nm_sparsity.detection"])``.

Importing it registers `NMSparseHook` and, where mmcv has no compiled operators, torchvision's in their place.
"""

from importlib.util import find_spec

if find_spec("mmengine") is not None and find_spec("mmcv") is not None:
    from nm_sparsity.detection import ops

    ops.install()
