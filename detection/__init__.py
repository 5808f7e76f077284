"""N:M sparse detection and instance segmentation: MMDetection's detectors, through `nm_sparsity.detection.plugin`.

Raises:
    ImportError: to ``python -m nm_sparsity.detection...``, naming the packages of the ``detection`` extra that are
        missing, and the install line.
"""

import sys
from importlib.util import find_spec

PACKAGES = (
    *("torchvision", "pycocotools", "onedl-mmengine", "onedl-mmcv", "onedl-mmdetection"),
    *("mmengine", "mmcv", "mmcv-lite", "mmdet"),
)
"""Distributions whose versions a run records, beside core's: the forks of OpenMMLab's packages, or the originals."""

_NEEDED = ("matplotlib", "mmcv", "mmdet", "mmengine", "pycocotools", "sklearn", "torchvision", "tqdm", "tyro")

# Python sets argv[0] to "-m" while it looks for the module that `python -m` names. An error of this package's import
# is one line then, without a traceback.
if sys.argv[:1] == ["-m"] and (_missing := [name for name in _NEEDED if find_spec(name) is None]):
    raise ImportError(
        f"{', '.join(_missing)} not installed; run: MMCV_WITH_OPS=0 pip install 'nm-sparsity[detection]'", name=__name__
    )
