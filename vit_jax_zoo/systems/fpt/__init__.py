"""Feature Pyramid Transformer, arXiv:2007.09451: detection and segmentation."""

from vit_jax_zoo.registry import Format, System

SYSTEM = System(
  models={
    "fpt_segmentation": "transformer:PyramidSegmenter",
    "fpt_pyramid": "transformer:FeaturePyramidTransformer",
  },
  variants={"faster_rcnn": "transformer:DETECTORS", "mask_rcnn": "transformer:DETECTORS"},
  necks={"fpt": "transformer:FeaturePyramidTransformer"},
  tasks={"semantic_segmentation": "task:SemanticSegmentation"},
  predictors={"semantic_segmentation": "predictor:SegmentationPredictor"},
  formats=(
    Format("pth", "faster_rcnn", "weights_rcnn", "the official code's detectors with FPT"),
    Format("pth", "fpt_pyramid", "weights_official", "the official code's FPT"),
    Format("pth-fpt", "faster_rcnn", "weights_official", "the official code's FPT"),
  ),
  part_readers={"*/neck": "weights_official:read_neck"},
  several_inputs=("fpt_pyramid",),
  parts=("fpt_pyramid",),
  renamed_fields=(("model.*flavor", "variant"),),
  removed_fields={
    "model*.ground_parts": 4,
    "model.neck_fields.rendering": "head",
    "model.neck_fields.drop_block_size": 3,
    "model.transformer.drop_block_size": 3,
  },
)
