"""Mask R-CNN R50-FPN 2x, 2:4 sparse, from a 2:4 sparse ImageNet backbone (Zhou et al., arXiv 2102.04010)."""

_base_ = ["mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py", "./sparse_2to4.py"]

model = dict(backbone=dict(init_cfg=dict(type="Pretrained", checkpoint="runs/resnet50_2to4/finalized.pt")))
