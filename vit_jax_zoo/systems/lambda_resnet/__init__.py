"""LambdaResNet, arXiv:2102.08602: classification, and a backbone for detectors."""

from vit_jax_zoo.registry import Format, System

SYSTEM = System(
  models={"lambda_resnet": "model:LambdaResNet"},
  variants={"mask_rcnn": "model:DETECTORS"},
  backbones={"lambda_resnet": "model:LambdaBackbone"},
  formats=(Format("safetensors-timm", "lambda_resnet", "weights_timm", "timm's LambdaResNet"),),
  backbone_readers=("weights_timm:recognize_backbone",),
  published="weights_timm:PUBLISHED",
  paper_scores="weights_timm:PAPER_SCORES",
  removed_fields={"model.lambda_layer.qkv_bias": False},
)
