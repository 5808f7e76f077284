"""N:M sparse training as an MMDetection plug-in: ``custom_imports = dict(imports=["nm_sparsity.detection"])``.

Importing it registers `NMSparseHook` and, where mmcv has no compiled operators, puts torchvision's in their place.

Raises:
    ImportError: naming the packages of the ``detection`` extra that are missing, and the install line.
"""

from importlib.util import find_spec

_NEEDED = ("matplotlib", "mmcv", "mmdet", "mmengine", "pycocotools", "sklearn", "torchvision", "tqdm", "tyro")

if _missing := [name for name in _NEEDED if find_spec(name) is None]:
    # With the package's name, `python -m nm_sparsity.detection...` prints one line and no traceback.
    raise ImportError(
        f"{', '.join(_missing)} not installed; run: MMCV_WITH_OPS=0 pip install 'nm-sparsity[detection]'", name=__name__
    )
else:
    from nm_sparsity.detection import ops

    ops.install()
    from nm_sparsity.detection.hooks import NMSparseHook as NMSparseHook
