"""Faster R-CNN (arXiv:1506.01497) and Mask R-CNN (arXiv:1703.06870) on feature pyramids."""

from vit_jax_zoo.registry import Format, System

SYSTEM = System(
  models={"faster_rcnn": "model:RCNN", "mask_rcnn": "model:RCNN"},
  other_names=((r"(faster|mask)rcnn", r"\1_rcnn"),),
  tasks={"instance_detection": "task:InstanceDetection"},
  predictors={"instance_detection": "predictor:InstancePredictor"},
  necks={"fpn": "heads:FeaturePyramid", "bfp": "heads:BottomUpPyramid"},
  formats=(Format("pth-torchvision", "faster_rcnn", "weights", "torchvision's R-CNN"),),
  backbone_readers=("weights:recognize_backbone",),
  renamed_fields=(
    ("task.anchor_samples", "rpn_batch_size_per_image"),
    ("task.anchor_foreground", "rpn_positive_fraction"),
    ("task.anchor_high", "rpn_fg_iou_thresh"),
    ("task.anchor_low", "rpn_bg_iou_thresh"),
    ("task.anchor_beta", "rpn_smooth_l1_beta"),
    ("task.inside_only", "rpn_inside_only"),
    ("task.roi_samples", "box_batch_size_per_image"),
    ("task.roi_foreground", "box_positive_fraction"),
    ("task.roi_threshold", "box_fg_iou_thresh"),
    ("task.box_weights", "bbox_reg_weights"),
    ("task.box_beta", "box_smooth_l1_beta"),
    ("task.least_score", "box_score_thresh"),
    ("task.nms_threshold", "box_nms_thresh"),
    ("task.max_detections", "box_detections_per_img"),
    ("model.proposals.before_nms", "pre_nms_top_n"),
    ("model.proposals.after_nms", "post_nms_top_n"),
    ("model.proposals.nms_threshold", "nms_thresh"),
  ),
  removed_fields={"model.proposals.least_side": 0.0, "task.max_candidates": 2000},
)
