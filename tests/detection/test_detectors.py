"""MMDetection's own configs, reduced in width: converted, trained a step, predicting, finalized, verified."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner

from nm_sparsity.core import finalize, verify
from nm_sparsity.detection import evaluate
from nm_sparsity.detection.hooks import mappings

WIDTHS = ("in_channels", "out_channels", "feat_channels", "conv_out_channels", "fc_out_channels")
WIDTHS += ("embed_dims", "feedforward_channels", "num_feats")
DEPTHS = ("num_layers", "stacked_convs")


def shrink(config: Any) -> None:
    """An eighth of all widths, one layer of each stack."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if key in WIDTHS:
            config[key] = [width // 8 for width in value] if isinstance(value, list) else value // 8
        elif key in DEPTHS:
            config[key] = 1
        elif isinstance(value, dict | list):
            shrink(value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sparse", "dense"),
    [
        ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco", "roi_head.bbox_head.shared_fcs.0", "backbone.conv1"),
        ("mask_rcnn/mask-rcnn_r50_fpn_1x_coco", "roi_head.mask_head.convs.0.conv", "backbone.conv1"),
        ("retinanet/retinanet_r50_fpn_1x_coco", "bbox_head.retina_cls", "backbone.conv1"),
        ("fcos/fcos_r50-caffe_fpn_gn-head_1x_coco", "bbox_head.conv_reg", "backbone.conv1"),
        ("cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco", "roi_head.bbox_head.2.shared_fcs.0", "backbone.conv1"),
        ("detr/detr_r50_8xb2-150e_coco", "encoder.layers.0.self_attn.attn", "query_embedding"),
    ],
)
def test_detector(make_config: Callable[..., Any], run: Callable[..., Any], name: str, sparse: str, dense: str) -> None:
    config = make_config(f"mmdet::{name}.py", pattern="2:4")
    shrink(config.model)
    config.model.backbone.update(base_channels=8, init_cfg=None)
    if config.model.type == "FCOS":  # a group needs more than one channel
        config.model.bbox_head.norm_cfg = {"type": "GN", "num_groups": 4}
    for part in mappings(config.model.test_cfg):  # after one step, nothing passes the usual threshold
        if "score_thr" in part:
            part["score_thr"] = 0.0
    masks = "mask_head" in config.model.get("roi_head", {})
    steps = [{"type": "LoadImageFromFile"}, {"type": "Resize", "scale": (64, 64)}]
    steps += [{"type": "LoadAnnotations", "with_bbox": True, "with_mask": masks}]
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    for loader in (config.train_dataloader, config.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.pipeline = [*copy.deepcopy(steps), {"type": "PackDetInputs", "meta_keys": keys}]
    config.train_dataloader.batch_size = 8

    runner = run(config)
    model = runner.model
    changed = model.get_submodule(sparse)
    weight = next(p for n, p in changed.named_parameters() if n.endswith("weight"))
    assert runner.optim_wrapper.optimizer.state[weight]["momentum_buffer"].abs().sum() > 0  # it was trained
    loader = Runner.build_dataloader(config.test_dataloader, seed=0)
    before = evaluate.predict(model, loader)
    assert before
    finalize(model)
    names = [check.name for check in verify(model, "2:4").checked]
    assert any(found.startswith(sparse) for found in names)
    assert not any(found.startswith(dense) for found in names)
    assert evaluate.predict(model, loader) == before
    assert torch.isfinite(weight).all()


def test_the_packaged_r50_configs_reach_every_layer_but_the_stem(tmp_path: Path) -> None:
    """72 weights of Mask R-CNN R50 (and the mask head's transposed convolution), 67 of Faster R-CNN."""
    from mmdet.registry import MODELS

    from nm_sparsity.detection import config as configs
    from nm_sparsity.detection.hooks import NMSparseHook

    for name, count in (("mask_rcnn_r50_fpn_1x_coco_2to4", 73), ("faster_rcnn_r50_fpn_2x_coco_2to8", 67)):
        config = configs.read(name)
        config.model.backbone.init_cfg = None
        with torch.device("meta"):
            model = MODELS.build({**config.model, "_scope_": "mmdet"})
        hook = NMSparseHook(**{k: v for k, v in config.custom_hooks[0].items() if k != "type"})
        report = hook.config.sparsify(model)
        assert len(report.sparse) == count
        assert [weight.name for weight in report.weights if weight.pattern == "dense"] == ["backbone.conv1.weight"]
