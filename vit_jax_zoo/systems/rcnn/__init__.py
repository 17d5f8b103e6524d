"""Faster R-CNN (arXiv:1506.01497) and Mask R-CNN (arXiv:1703.06870) on feature pyramids."""

from vit_jax_zoo.registry import Format, System

SYSTEM = System(
  models={"faster_rcnn": "model:RCNN", "mask_rcnn": "model:RCNN"},
  other_names=((r"(faster|mask)rcnn", r"\1_rcnn"),),
  tasks={"instance_detection": "task:InstanceDetection"},
  predictors={"instance_detection": "predictor:InstancePredictor"},
  necks={"fpn": "heads:FeaturePyramid", "bfp": "heads:BottomUpPyramid"},
  formats=(Format("pth-torchvision", "faster_rcnn", "weights_torchvision", "torchvision's R-CNN"),),
  backbone_readers=("weights_detectron:recognize_backbone",),
)
