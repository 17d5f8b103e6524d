"""DETR, arXiv:2005.12872: detection and panoptic segmentation as set prediction."""

from vit_jax_zoo.registry import Format, System

SYSTEM = System(
  models={"detr": "model:Detr"},
  tasks={"detection": "task:Detection"},
  predictors={"detection": "predictor:DetectionPredictor"},
  formats=(
    Format("pth", "detr", "weights_official", "the official code's DETR"),
    Format("hf", "detr", "weights_hf", "Hugging Face's DETR"),
  ),
  published="weights_official:PUBLISHED",
  paper_scores="weights_official:PAPER_SCORES",
  heads=("class_head/", "mask_head/", "mask_attention/"),
  scanned_layers=("(?<=transformer/)(?:en|de)coder",),
  renamed_fields=(
    ("task.cell_weight", "dense_weight"),
    ("task.cell_steps", "dense_steps"),
    ("model.cell_predictions", "dense_predictions"),
  ),
  removed_fields={"model.pre_norm": False},
)
