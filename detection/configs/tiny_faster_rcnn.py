"""Faster R-CNN small enough for two CPU cores: ResNet-18 of half width, three stages, FPN at strides 4, 8, 16."""

_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"

_widths = [32, 64, 128]
_strides = [4, 8, 16]
_channels = 32

model = dict(
    backbone=dict(
        depth=18,
        base_channels=_widths[0],
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=_widths, out_channels=_channels, num_outs=3),
    rpn_head=dict(
        in_channels=_channels,
        feat_channels=_channels,
        anchor_generator=dict(scales=[4], ratios=[1.0], strides=_strides),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=2), out_channels=_channels, featmap_strides=_strides),
        bbox_head=dict(in_channels=_channels, fc_out_channels=128),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=50),
        rcnn=dict(sampler=dict(num=32, pos_fraction=0.5)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale_factor=1.0),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
_in_process = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=8, **_in_process, dataset=dict(filter_cfg=dict(min_size=1), pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, **_in_process, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

_epochs = 20
train_cfg = dict(max_epochs=_epochs, val_interval=4)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=2e-3, weight_decay=1e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=_epochs, eta_min=2e-5, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(max_keep_ckpts=2))
log_processor = dict(window_size=10)
