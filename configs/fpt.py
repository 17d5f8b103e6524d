r"""FPT: boxes and masks of objects on a feature pyramid with attention across levels.

  Zhang et al., "Feature Pyramid Transformer", ECCV 2020, arXiv:2007.09451

    python -m vit_jax_zoo.main --config=configs/fpt.py
    python -m vit_jax_zoo.main --config=configs/fpt.py:demo_mask
    python -m vit_jax_zoo.main --config=configs/fpt.py:demo,neck=fpn
    python -m vit_jax_zoo.main --config=configs/fpt.py:finetune,source=coco:/mine,masks=true

| variant                                          | trains on     | expected                     |
|--------------------------------------------------|---------------|------------------------------|
| demo, demo_mask                                  | scenes, 64x64 | AP50 of 0.9, of masks 0.85   |
| faster_rcnn_r50_fpt_coco  _fpn_  _bfp_  r101_fpt | COCO          | up to 8.5 % more than bfp    |
| mask_rcnn_r50_fpt_coco    _fpn_  _bfp_  r101_fpt | COCO          | up to 6.0 % more than bfp    |
| faster_rcnn_r50_fpt_official_coco  mask_         | COCO          | -                            |
| mask_rcnn_lambda_resnet_101_coco  152            | COCO          | 49.4/43.5, 50.0/43.9 AP      |
| finetune                                         | your images   | depends                      |

The demos also draw the cross-level attention of an object, `explain_levels`; for other variants use
`--config.explain=true`, which needs a finest level of at most 64x64 positions.

`neck` is the feature pyramid transformer (fpt), a feature pyramid network (fpn) or the plain
bottom-up pyramid (bfp), the paper's baseline.
Semantic segmentation is in `configs/fpt_segmentation.py`.
Each function below is one recipe. Batch sizes are global.
"""

import functools
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common, fpt_segmentation


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config of `variant[,field=value...]`; the demo by default."""
  return common.build(arg, VARIANTS)


def demo(*, neck: str = "fpt", num_steps: int = 500, batch_size: int = 16) -> ConfigDict:
  """Faster R-CNN on the demo's scenes: digits in front of textures, 64x64 pixels.

  Paper: none; the modules are the paper's, on maps of strides 4, 8 and 16.
  Hardware: any. Two CPU cores need a few minutes.
  Expected: box AP50 of 0.9.
  Ours: box AP50 of 0.92 and AP of 0.64 on the 400 test scenes, one seed.
  """
  return _demo(neck, num_steps, batch_size)


def demo_mask(*, neck: str = "fpt", num_steps: int = 500, batch_size: int = 16) -> ConfigDict:
  """Mask R-CNN on the demo's scenes.

  Paper: none; see `demo`.
  Hardware: any. Two CPU cores need a few minutes more than for boxes alone.
  Expected: mask AP50 of 0.85, boxes as in `demo`.
  Ours: mask AP50 of 0.88 and AP of 0.54, box AP50 of 0.94 and AP of 0.66 on the 400 test scenes,
    one seed.
  """
  config = _demo(neck, num_steps, batch_size)
  config.model.name = f"mask_rcnn_r50_{neck}"
  config.model.mask_head = {"num_convs": 2, "width": 48}
  config.model.mask_pool_size = 14
  for split in (config.data.train, *config.data.eval.values()):
    load, pad = split.transforms
    # The data have 15 classes; the five of stuff are dropped.
    things = {"name": "keep_classes", "below": 10}
    split.panoptic = True
    split.transforms = [{**load, "masks": True}, things, pad]
  return config


def _demo(neck: str, num_steps: int, batch_size: int) -> ConfigDict:
  pad = {"name": "pad_objects", "num": 4}
  return ConfigDict(
    {
      "seed": 0,
      "num_steps": num_steps,
      "batch_size": batch_size,
      "eval_batch_size": 40,
      "model": _demo_model(neck),
      "task": {
        "name": "instance_detection",
        "num_classes": placeholder(int),
        "class_names": placeholder(tuple),
        "rpn_batch_size_per_image": 64,
        "rpn_fg_iou_thresh": 0.6,
        "rpn_inside_only": False,
        "box_batch_size_per_image": 24,
        "box_positive_fraction": 0.5,
        "box_detections_per_img": 20,
        "score_threshold": 0.5,
      },
      "data": {
        "train": {
          "source": "demo:scenes",
          "split": "train",
          "transforms": [{"name": "load_objects"}, pad],
        },
        "eval": {
          "test": {
            "source": "demo:scenes",
            "split": "test",
            "transforms": [{"name": "load_objects", "as_annotated": True}, pad],
          }
        },
      },
      "optimizer": {
        "name": "adamw",
        "learning_rate": 2e-3,
        "weight_decay": 1e-4,
        "clip_norm": 10.0,
        "schedule": {"name": "cosine", "warmup_steps": 50},
      },
      "log_every": 50,
      "eval_every": 0,
      "explain": neck == "fpt",
      "checkpoint": {"every": 0, "keep": 1},
    }
  )


def _demo_model(neck: str) -> dict[str, Any]:
  """Three levels, with anchors of the size of the digits: 20 to 40 pixels."""
  return {
    "name": f"faster_rcnn_r50_{neck}",
    "num_classes": placeholder(int),
    "backbone": {
      "blocks": (1, 1, 2, 1),
      "widths": (16, 24, 32, 32),
      "stem": "deep",
      "stem_width": 32,
      "norm": "batch_norm",
    },
    "levels": ("c2", "c3", "c4"),
    "extra_levels": 0,
    "neck_fields": {"norm": "batch_norm"},
    "width": 64,
    "anchor_sizes": (20, 28, 40),
    "aspect_ratios": (1, 1.6),
    "proposals": {"pre_nms_top_n": (100, 60), "post_nms_top_n": (48, 24)},
    "canonical_size": 28,
    "canonical_stride": 8,
    "box_head": {"width": 128},
  }


def coco(
  model: str,
  *,
  batch_size: int = 16,
  accumulation_steps: int = 1,
  drop_block_rate: float = 0.0,
  norm: str = "frozen_batch_norm",
  source: str = "",
  data_dir: str = "",
) -> ConfigDict:
  """Faster or Mask R-CNN on COCO, with one of the three pyramids, or the official code's variant.

  Paper: arXiv:2007.09451; schedule and sizes are those of the official repository's configs: SGD
    with momentum 0.9, learning rate 0.05 for batch 16, 500 steps of warm-up from a third of it;
    boxes 120,000 steps (/ 10 after 80,000 and 100,000), masks 180,000 (120,000 and 160,000); weight
    decay 1e-4 on kernels, biases at twice the learning rate; one of six shorter sides up to 1200,
    longer side up to 1400, test at 1000; flips. Norms, stem and first stage of the backbone are
    frozen. The paper also lists DropBlock (`drop_block_rate`, 0.1 in that paper's detectors), which
    is off in the code, and batch norm over all devices: `norm=batch_norm` trains the backbone's
    norms with statistics of the global batch.
  Padding: images of a batch are padded to one size, and the transformer attends to padded
    positions, as in the code: detections depend slightly on the other images of the batch.
  Weights: `--config.task.backbone_file` initialises the backbone: Caffe's ResNet-50 in the official
    variants (R-50.pkl or resnet50_caffe.pth), torchvision's in the others. `--config.init_from`
    is a whole detector: a run, torchvision's files, or a state dict of the official code.
  Hardware: 8 GPUs, 2 images each.
  Expected: up to 8.5 % more box AP and 6.0 % more mask AP, relative to the plain bottom-up pyramid,
    on test-dev (abstract).
  Not yet run here.
  """
  masks = model.startswith("mask")
  steps, boundaries = (180_000, (120_000, 160_000)) if masks else (120_000, (80_000, 100_000))
  scale = 16 / batch_size
  config = _recipe(model, batch_size, accumulation_steps)
  config.num_steps = round(steps * scale)
  boundaries = tuple(round(step * scale) for step in boundaries)
  warmup = {"warmup_steps": 500, "warmup_start": 1 / 3}
  config.optimizer = {
    "name": "sgd",
    "learning_rate": common.scaled_rate("sgd", 0.05, batch_size, 16),
    "momentum": 0.9,
    "schedule": {"name": "step", "boundaries": boundaries, **warmup},
    "weight_decay": 1e-4,
    "rules": (
      ("backbone/(stem|c2_block).*", {"frozen": True}),
      (".*/bias", {"learning_rate": 2.0}),
    ),
  }
  blocks = (3, 4, 23, 3) if "r101" in model else (3, 4, 6, 3)
  config.model.update(backbone={"blocks": blocks, "norm": norm})
  config.model.neck_fields = {**_NECK_FIELDS.get(model, {}), "drop_block_rate": drop_block_rate}
  sides = (1200, 1200, 1000, 800, 600, 400)
  train = [{"name": "random_flip"}, {"name": "resize_shorter", "shorter": sides, "longest": 1400}]
  test = [{"name": "resize_shorter", "shorter": 1000, "longest": 1400}]
  if model.endswith("official"):  # Caffe: pixels in [0, 255], minus the means, not divided
    config.model.backbone.stride_in_1x1 = True
    config.task.image_mean = (122.7717 / 255, 115.9465 / 255, 102.9801 / 255)
    config.task.image_std = (1 / 255, 1 / 255, 1 / 255)
  return _with_coco(config, train, test, source=source, data_dir=data_dir, masks=masks)


def lambda_coco(
  depth: int,
  *,
  batch_size: int = 256,
  accumulation_steps: int = 1,
  source: str = "",
  data_dir: str = "",
) -> ConfigDict:
  """Mask R-CNN with a LambdaResNet backbone, on COCO from scratch.

  Paper: arXiv:2102.08602, its COCO experiment: 1024x1024 pixels, 130,000 steps of batch 256,
    learning rate 0.32 after 1000 steps of warm-up, / 10 after 90, 95 and 97.5 %; weight decay 4e-5;
    batch norm trained, over all devices; large-scale jitter. Heads and pyramid are the standard
    ones.
  Differs from the paper: the shorter side is drawn from 512 to 2048 and cropped to 1024 (paper: 0.1
    to 2.0 times the image, padded where smaller).
  Hardware: about 128 TPU v3 cores; not stated.
  Expected AP of boxes / masks on val2017: 101 49.4 / 43.5, 152 50.0 / 43.9; with a ResNet-101
    48.2 / 42.6.
  Not yet run here.
  """
  config = _recipe(f"mask_rcnn_lambda_resnet_{depth}", batch_size, accumulation_steps)
  config.num_steps = 130_000
  config.optimizer = {
    "name": "sgd",
    "learning_rate": common.scaled_rate("sgd", 0.32, batch_size, 256),
    "momentum": 0.9,
    "schedule": {
      "name": "step",
      "warmup_steps": 1000,
      "boundaries": (0.9, 0.95, 0.975),
      "factors": (0.1, 0.1, 0.1),
    },
    "weight_decay": 4e-5,
  }
  config.task.update(rpn_inside_only=False, box_smooth_l1_beta=1 / 9)
  jitter = {
    "name": "random_scale_crop",
    "shorter": (1024,),
    "longest": 1024,
    "crop_probability": 1.0,
    "crop_from": tuple(range(512, 2049, 128)),
    "crop_sides": (512, 1024),
  }
  train = [{"name": "random_flip"}, jitter]
  test = [{"name": "resize_shorter", "shorter": 1024, "longest": 1024}]
  return _with_coco(config, train, test, source=source, data_dir=data_dir, masks=True)


def finetune(  # noqa: PLR0913  (each is a field that a command line may set)
  *,
  source: str = "coco:/path",
  masks: bool = False,
  neck: str = "fpt",
  init_from: str = "",
  num_epochs: int = 50,
  batch_size: int = 4,
  accumulation_steps: int = 1,
  learning_rate: float = 0.0,
  dtype: str = "bfloat16",
  data_dir: str = "",
) -> ConfigDict:
  """Fine-tunes Faster or Mask R-CNN on your own classes, from about 20 images.

  Paper: none. SGD with 0.005 for batch 4 (0.02 for 16 is usual for such detectors), / 10 after two
    thirds and 8 / 9 of the run, 5 % of warm-up; norms, stem and first stage of the backbone are
    frozen.
  Data: `source=coco:/path`, with splits `train` and `val`; see `data/sources/coco.py`. Without a
    `val`: --config.data.train.split=train[:80%] --config.data.eval.val.split=train[80%:].
  Masks: `masks=true` trains Mask R-CNN, from the file's segmentations.
  Weights: by default torchvision's ResNet-50, which is downloaded. No FPT weights for COCO are
    published; with few images prefer a whole pretrained detector: `neck=fpn` with `init_from`,
    torchvision's Faster or Mask R-CNN (R50-FPN).
  Length: 250 steps for 20 images, 575 for 46 and 6,250 for 500. `val` is evaluated 20 times; the
    best checkpoint is kept and evaluated at the end. For more than 2,000 images, try 15 epochs.
  Learning rate: scaled linearly with the batch size.
  Hardware: one device; the largest batch that fits was not measured.
  Expected: depends on the data.
  Not yet run here.
  """
  model = f"{'mask' if masks else 'faster'}_rcnn_r50_{neck}"
  config = _recipe(model, batch_size, accumulation_steps)
  config.num_epochs = float(num_epochs)
  config.model.dtype = dtype
  config.task.per_class = True
  if init_from:
    config.init_from = init_from
  else:
    config.task.backbone_file = RESNET50
  config.optimizer = {
    "name": "sgd",
    "learning_rate": learning_rate or common.scaled_rate("sgd", 0.005, batch_size, 4),
    "momentum": 0.9,
    "schedule": {"name": "step", "boundaries": (2 / 3, 8 / 9), "warmup_steps": 0.05},
    "weight_decay": 1e-4,
    "rules": (("backbone/(stem|c2_block).*", {"frozen": True}),),
  }
  shorter = tuple(range(640, 801, 32))
  train = [
    {"name": "random_flip"},
    {"name": "resize_shorter", "shorter": shorter, "longest": 1333},
  ]
  test = [{"name": "resize_shorter"}]
  config = _with_coco(config, train, test, source=source, data_dir=data_dir, masks=masks)
  return common.for_few_images(config)


RESNET50 = "https://download.pytorch.org/models/resnet50-0676ba61.pth"
"""torchvision's IMAGENET1K_V1."""

_OFFICIAL_NECK = {"variant": "official", "norm": "group_norm"}
_NECK_FIELDS = {f"{kind}_rcnn_r50_fpt_official": _OFFICIAL_NECK for kind in ("faster", "mask")}


def _recipe(model: str, batch_size: int, accumulation_steps: int) -> ConfigDict:
  """Common to all recipes on large images."""
  return ConfigDict(
    {
      "seed": 0,
      "batch_size": batch_size,
      "eval_batch_size": 16,
      "accumulation_steps": accumulation_steps,
      "model": {"name": model, "num_classes": placeholder(int), "dtype": "bfloat16"},
      "task": {
        "name": "instance_detection",
        "num_classes": placeholder(int),
        "class_names": placeholder(tuple),
        "backbone_file": placeholder(str),
        "neck_file": placeholder(str),
      },
      "data": {"train": {}, "eval": {}, "loader": {"num_workers": 8, "buckets": 6}},
      "optimizer": {},
      "log_every": 50,
      "eval_every": 10_000,
      "checkpoint": {"every": 2_000, "keep": 1},
    }
  )


def _with_coco(
  config: ConfigDict,
  train: list[dict[str, Any]],
  test: list[dict[str, Any]],
  *,
  source: str,
  data_dir: str,
  masks: bool,
) -> ConfigDict:
  """Sets the data: for boxes TFDS's COCO; for masks your own copy, since TFDS has no masks."""
  source = source or ("coco:/path" if masks else "tfds:coco/2017")
  scored = {"run_lengths": 500_000} if masks else {}
  config.data.train = {
    "source": source,
    "split": "train",
    "transforms": [{"name": "load_objects", "masks": masks}, *train, {"name": "pad_objects"}],
  }
  load = {"name": "load_objects", "as_annotated": True, **scored}
  config.data.eval = {
    "val": {
      "source": source,
      "split": "validation",
      "transforms": [load, *test, {"name": "pad_objects"}],
    }
  }
  return common.with_data_dir(config, data_dir)


_MODELS = (
  "faster_rcnn_r50_fpt", "faster_rcnn_r50_fpn", "faster_rcnn_r50_bfp", "faster_rcnn_r101_fpt",
  "mask_rcnn_r50_fpt", "mask_rcnn_r50_fpn", "mask_rcnn_r50_bfp", "mask_rcnn_r101_fpt",
  "faster_rcnn_r50_fpt_official", "mask_rcnn_r50_fpt_official",
)  # fmt: skip

VARIANTS = {
  "demo": demo,
  "demo_mask": demo_mask,
  **{f"{model}_coco": functools.partial(coco, model) for model in _MODELS},
  **{
    f"mask_rcnn_lambda_resnet_{depth}_coco": functools.partial(lambda_coco, depth)
    for depth in (101, 152)
  },
  "finetune": finetune,
  **fpt_segmentation.VARIANTS,
}
