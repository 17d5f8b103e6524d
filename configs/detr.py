r"""DETR: a demo, and the recipes of the paper.

  Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, arXiv:2005.12872

    python -m vit_jax_zoo.main --config=configs/detr.py
    python -m vit_jax_zoo.main --config=configs/detr.py:demo_panoptic  # after the first
    python -m vit_jax_zoo.main --config=configs/detr.py:r50,num_epochs=500
    python -m vit_jax_zoo.main --config=configs/detr.py:r50,source=coco:/path,accumulation_steps=16
    python -m vit_jax_zoo.main --config=configs/detr.py:r50_finetune,source=coco:/mine
    python -m vit_jax_zoo.main --config=configs/detr.py:r50_finetune,source=coco:/mine,masks=true

| variant                                  | trains on         | from     | expected          |
|------------------------------------------|-------------------|----------|-------------------|
| demo                                     | scenes of digits  | -        | AP50 0.8          |
| demo_panoptic                            | scenes of digits  | -        | PQ 0.35           |
| r50 r101 r50_dc5 r101_dc5                | COCO              | table 1  | AP 42.0 (R50)     |
| r50_panoptic r101_panoptic r50_dc5_...   | COCO panoptic     | table 5  | boxes, stage 1    |
| r50_masks r101_masks r50_dc5_masks       | COCO panoptic     | table 5  | PQ 43.4 (R50)     |
| r50_finetune r101_finetune r50_dc5_...   | your own images   | -        | depends           |

Each function below is one recipe. Batch sizes are global.

Small machines. `accumulation_steps=n` cuts each batch of 64 into n parts that run one after the
other: the same training in n times the time, as the frozen norms look at no batch. A smaller
`batch_size` is another training; its learning rate is then scaled by the root of the ratio, as is
due to Adam (Malladi et al., arXiv:2205.10287), which the paper does not try.

`num_classes` is the highest class id + 1, and comes from the data: 91 for COCO, whose ids are used
as they are. "No object" is one logit more, the last.
"""

import functools
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config of `variant[,field=value...]`; the demo by default."""
  return common.build(arg, VARIANTS)


def demo(*, num_steps: int = 2500, batch_size: int = 32, seed: int = 0) -> ConfigDict:
  """A small DETR finds handwritten digits in 64x64 scenes: 4000 to learn from, 400 to be tested on.

  Paper: the architecture is DETR's, with stride 8. It starts from nothing, where the paper's
    backbone has seen ImageNet and trains for 300 epochs of 118,000 images; therefore class and box
    head also learn from every cell of the encoder's map (`dense_weight`). After 400 steps the AP50
    was 0.19 with that loss and 0.02 without it. It fades until four fifths of the run, so that
    queries may leave an object to one of them. "No object" weighs 0.3, not 0.1: of twelve queries
    more find something than of a hundred. Batch norms learn; no dropout; the class counts three
    times.
  Hardware: any. Two CPU cores need about ten minutes: 13 minutes of CPU time.
  Expected: box AP50 0.8.
  Ours: box AP50 0.86, AP 0.54, one seed. Of 978 digits 829 are found at a threshold of one half, 85
    of the others under another digit's name; 55 are still found twice. (With two decoder layers,
    "no object" at 0.1 and cells that do not fade it was AP50 0.82, AP 0.50.)
  """
  config = _demo(num_steps, batch_size, seed)
  config.task.update(num_classes=placeholder(int), class_names=placeholder(tuple))
  config.model.num_classes = placeholder(int)
  scenes = {"source": "demo:scenes", "split": "train"}
  config.data.train = {**scenes, "transforms": [{"name": "load_objects"}, *JITTER, *PAD_DEMO]}
  load = {"name": "load_objects", "as_annotated": True}
  scenes["split"] = "test"
  config.data.eval = {"test": {**scenes, "transforms": [load, *PAD_DEMO]}}
  return config


def demo_panoptic(
  *,
  num_steps: int = 1000,
  batch_size: int = 24,
  seed: int = 0,
  init_from: str = "runs/detr_demo",
) -> ConfigDict:
  """The demo's DETR with a mask head gives every pixel to a digit or to one of five textures.

  Paper: section 4.4; boxes and masks are learned together, as the paper says one may (its numbers
    come from masks learned afterwards). Masks have a quarter of the image's sides, 16x16, as there;
    a digit's strokes are not much wider than one of their cells.
  Weights: `init_from`, by default the demo's run: train that first. Its classes are dropped, as the
    textures are new ones.
  Hardware: any. Two CPU cores need about five minutes, after the demo.
  Expected: PQ 0.35.
  Ours: PQ 0.39 (SQ 0.63, RQ 0.60), one seed, from the demo's run: 0.27 for digits (SQ 0.59, RQ
    0.44), 0.63 for textures; box AP50 0.89 (of all 15 classes), mask AP50 of digits 0.18. Halfway
    it was PQ 0.13: digits are named and boxed well before their masks are; longer was not tried.
  """
  config = _demo(num_steps, batch_size, seed)
  config.model.update(num_classes=placeholder(int), mask_head=True)
  config.task.update(
    num_classes=placeholder(int),
    class_names=placeholder(tuple),
    stuff_from=10,
    segment_threshold=0.5,
    mask_weight=20.0,
    dice_weight=2.0,
  )
  config.optimizer.learning_rate = 1e-3
  config.init_from = init_from
  scenes = {"source": "demo:scenes", "panoptic": True, "split": "train"}
  load: dict[str, Any] = {"name": "load_objects", "masks": True}
  config.data.train = {**scenes, "transforms": [load, *JITTER, *PAD_DEMO]}
  load = {"name": "load_objects", "as_annotated": True, "segment_map": True}
  scenes["split"] = "test"
  config.data.eval = {"test": {**scenes, "transforms": [load, *PAD_DEMO]}}
  return config


def _demo(num_steps: int, batch_size: int, seed: int) -> ConfigDict:
  """Common to both demos."""
  return ConfigDict(
    {
      "seed": seed,
      "num_steps": num_steps,
      "batch_size": batch_size,
      "eval_batch_size": 40,
      "model": {
        "name": "detr_r50",
        "num_queries": 12,
        "width": 64,
        "encoder_depth": 1,
        "decoder_depth": 3,
        "num_heads": 8,
        "mlp_dim": 128,
        "dropout_rate": 0.0,
        "dense_predictions": True,
        "backbone": {
          "blocks": (1, 1, 1, 1),
          "widths": (16, 32, 64, 64),
          "stem_width": 32,
          "norm": "batch_norm",
          "output_stride": 8,
        },
      },
      "task": {
        "name": "detection",
        "class_weight": 3.0,
        "no_object_weight": 0.3,
        "dense_weight": 1.0,
        "dense_steps": max(1, round(0.8 * num_steps)),
        "score_threshold": 0.5,
        "draw_attention": True,
      },
      "data": {"train": {}, "eval": {}},
      "optimizer": {
        "name": "adamw",
        "learning_rate": 2e-3,
        "schedule": {"name": "cosine", "warmup_steps": 100},
        "weight_decay": 1e-4,
        "clip_norm": 5.0,
      },
      "log_every": 50,
      "eval_every": 500,
      "checkpoint": {"every": 500, "keep": 1},
    }
  )


JITTER = [
  {
    "name": "random_scale_crop",
    "shorter": (64,),
    "longest": None,
    "crop_probability": 1.0,
    "crop_from": (60, 64, 68, 72),
    "crop_sides": (60, 60),
  }
]
"""Scenes a little larger, smaller and elsewhere; 64x64 pixels as before."""

PAD_DEMO = [{"name": "pad_objects", "num": 8}]


def coco(
  model: str,
  *,
  num_epochs: int = 300,
  batch_size: int = 64,
  accumulation_steps: int = 1,
  source: str = "tfds:coco/2017",
  data_dir: str = "",
  backbone_file: str = "",
) -> ConfigDict:
  """DETR on COCO, or on your own folder in COCO's format, from an ImageNet backbone.

  Paper: arXiv:2005.12872, section 4 and A.4: AdamW, 1e-4, backbone 1e-5, its stem, first stage and
    all its norms frozen; weight decay 1e-4, gradients clipped to norm 0.1, dropout 0.1; flips,
    shorter side 480 to 800, crops; rate / 10 after 200 of 300 epochs. For `num_epochs=500` it falls
    after 400; for other lengths after two thirds. No warm-up, no averages.
  Weights: `backbone_file`, by default torchvision's first ImageNet weights, as the paper's.
  Differs from the paper: weights decay on the transformer's and the heads' parameters and on the
    backbone's alike, as in its code; DC5 sees each image as if it came alone (`masked_backbone`),
    where the code trains it with one image a GPU.
  Hardware: 16 V100, 4 images each (DC5: 64, 1 each); three days for 300 epochs of R50.
  Expected, AP of boxes on val2017 (github.com/facebookresearch/detr): after 500 epochs R50 42.0,
    R50-DC5 43.3, R101 43.5, R101-DC5 44.9; R50 39.5 after 150.
  Not yet run here.
  """
  config = _recipe(model, num_epochs, batch_size, accumulation_steps)
  config.model.num_classes = placeholder(int)
  config.task.update(
    num_classes=placeholder(int), class_names=placeholder(tuple), backbone_file=backbone_file
    or BACKBONES[model.split("_")[0]],
  )  # fmt: skip
  _set_data(config, source)
  return common.with_data_dir(config, data_dir)


def panoptic(
  model: str,
  *,
  num_epochs: int = 300,
  batch_size: int = 64,
  accumulation_steps: int = 1,
  source: str = "tfds:coco/2017_panoptic",
  data_dir: str = "",
  backbone_file: str = "",
) -> ConfigDict:
  """DETR for panoptic segmentation, first stage: boxes of things and stuff.

  Paper: section 4.4: as for detection, with the boxes around each segment's pixels. 250 classes:
    COCO's ids of things (up to 90) and stuff (up to 200) as they are.
  Differs from the paper's code: boxes are those of COCO's files, which end behind a segment's last
    pixel, and not on it; crowds are left out, as in detection.
  Hardware: as for detection.
  Expected: AP of things' boxes after the second stage 38.8 (R50), 40.2 (R50-DC5), 40.1 (R101).
  Not yet run here.
  """
  config = _recipe(model, num_epochs, batch_size, accumulation_steps)
  config.model.num_classes = 250
  config.task.update(
    num_classes=250,
    class_names=placeholder(tuple),
    backbone_file=backbone_file or BACKBONES[model.split("_")[0]],
  )
  _set_data(config, source, panoptic=True)
  return common.with_data_dir(config, data_dir)


def masks(
  model: str,
  *,
  num_epochs: int = 25,
  batch_size: int = 64,
  accumulation_steps: int = 1,
  source: str = "tfds:coco/2017_panoptic",
  data_dir: str = "",
  init_from: str = "",
) -> ConfigDict:
  """DETR for panoptic segmentation, second stage: the mask head only; all else is frozen.

  Paper: section 4.4 and A.4: 25 epochs, rate 1e-4, divided by 10 after 15.
  Weights: `init_from`, by default the first stage's run.
  Hardware: not stated. Masks of a batch are large: one or two images a GPU; see accumulation above.
  Expected on val2017 (github.com/facebookresearch/detr): PQ 43.4 with R50, 44.6 with R50-DC5, 45.1
    with R101.
  Not yet run here.
  """
  config = _recipe(model, num_epochs, batch_size, accumulation_steps)
  config.model.update(name=f"detr_{model}_panoptic", dropout_rate=0.0)
  config.task.update(num_classes=250, class_names=placeholder(tuple), stuff_from=91)
  config.optimizer.update(
    schedule={"name": "step", "boundaries": (0.6,)},
    rules=((f"({DETECTOR}).*", {"frozen": True}), ("mask_.*", {"weight_decay": 1.0})),
  )
  _set_data(config, source, panoptic=True, masks=True)
  config.init_from = init_from or f"runs/detr_{model}_panoptic"
  return common.with_data_dir(config, data_dir)


def finetune(  # noqa: PLR0913  (each is a field that a command line may set)
  model: str,
  *,
  source: str = "coco:/path",
  masks: bool = False,
  init_from: str = "",
  num_epochs: int = 50,
  batch_size: int = 4,
  accumulation_steps: int = 1,
  learning_rate: float = 0.0,
  data_dir: str = "",
) -> ConfigDict:
  """A DETR that was trained on COCO learns the classes of your own images, from some 20 on.

  Paper: none. From scratch, DETR learns nothing from a few thousand images: start from published
    weights, of which all but the class head is kept (facebookresearch/detr, issues 9, 125 and 169).
  Data: `source=coco:/path`, with splits `train` and `val`; see `data/sources/coco.py`. Without a
    `val`: --config.data.train.split=train[:80%] --config.data.eval.val.split=train[80%:].
  Masks: `masks=true` also trains and scores instance masks, from the file's outlines.
  Weights: `init_from`, a file, a published name or a run; by default the official ones, which are
    downloaded, with `masks=true` those of the panoptic model.
  Length: 250 steps for 20 images, 575 for 46 and 6,250 for 500, with a warm-up of 5 %. `val` is
    scored 20 times, and the best checkpoint is kept and scored at the end. For more than 2,000
    images, 15 epochs are a start.
  Learning rate: by default 5e-5 for 4 images, by the root of the ratio for other batches.
  Hardware: one GPU of 16 GB holds about four images of 800 pixels; see accumulation above.
  Expected: depends on the data.
  Not yet run here.
  """
  config = _recipe(model, num_epochs, batch_size, accumulation_steps)
  config.optimizer.learning_rate = learning_rate or common.scaled_rate("adamw", 5e-5, batch_size, 4)
  config.optimizer.schedule.warmup_steps = 0.05
  config.model.update(num_classes=placeholder(int), mask_head=masks)
  config.task.update(num_classes=placeholder(int), class_names=placeholder(tuple), per_class=True)
  _set_data(config, source)
  if masks:
    config.data.train.transforms[0]["masks"] = True
    config.data.eval.val.transforms[0]["run_lengths"] = 500_000
  is_panoptic = masks and model in PANOPTIC
  config.init_from = init_from or f"detr_{model}{'_panoptic' if is_panoptic else ''}_coco"
  return common.with_data_dir(common.for_few_images(config), data_dir)


def _recipe(
  model: str, num_epochs: int, batch_size: int, accumulation_steps: int = 1
) -> ConfigDict:
  """Common to all recipes on large images."""
  is_dc5 = "dc5" in model
  return ConfigDict(
    {
      "seed": 0,
      "num_epochs": float(num_epochs),
      "batch_size": batch_size,
      "eval_batch_size": 8,
      "accumulation_steps": accumulation_steps,
      "model": {"name": f"detr_{model}", "masked_backbone": is_dc5, "remat": "dots"},
      "task": {"name": "detection"},
      "data": {"train": {}, "eval": {}, "loader": {"num_workers": 8, "buckets": 6}},
      "optimizer": {
        "name": "adamw",
        "learning_rate": common.scaled_rate("adamw", 1e-4, batch_size, 64),
        "schedule": {"name": "step", "boundaries": (0.8 if num_epochs == 500 else 2 / 3,)},
        "weight_decay": 1e-4,
        "clip_norm": 0.1,
        "rules": (
          ("backbone/(stem|c2_block).*", {"frozen": True}),
          ("backbone/.*", {"learning_rate": 0.1}),
          (".*", {"weight_decay": 1.0}),
        ),
      },
      "log_every": 50,
      "eval_every": 10_000,
      "checkpoint": {"every": 2_000, "keep": 1},
    }
  )


def _set_data(
  config: ConfigDict, source: str, *, panoptic: bool = False, masks: bool = False
) -> None:
  """Sets training and evaluation data, with the paper's augmentation."""
  options: dict[str, Any] = {"panoptic": True} if panoptic else {}
  pad = {"name": "pad_objects"}
  config.data.train = {
    "source": source,
    "split": "train",
    **options,
    "transforms": [
      {"name": "load_objects", "masks": masks},
      {"name": "random_flip"},
      {"name": "random_scale_crop"},
      pad,
    ],
  }
  load = {"name": "load_objects", "as_annotated": True, "segment_map": masks}
  config.data.eval = {
    "val": {
      "source": source,
      "split": "val" if source.startswith("coco:") else "validation",
      **options,
      "transforms": [load, {"name": "resize_shorter"}, pad],
    }
  }


BACKBONES = {
  "r50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
  "r101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
}
"""torchvision's IMAGENET1K_V1."""

MODELS = ("r50", "r50_dc5", "r101", "r101_dc5")
"""Table 1's."""

DETECTOR = "backbone|input_projection|query_embedding|transformer|class_head|box_head"
"""All of DETR's parameters but the mask head's."""

PANOPTIC = ("r50", "r50_dc5", "r101")
"""Table 5's."""

VARIANTS: dict[str, Any] = {
  "demo": demo,
  "demo_panoptic": demo_panoptic,
  **{model: functools.partial(coco, model) for model in MODELS},
  **{f"{model}_panoptic": functools.partial(panoptic, model) for model in PANOPTIC},
  **{f"{model}_masks": functools.partial(masks, model) for model in PANOPTIC},
  **{f"{model}_finetune": functools.partial(finetune, model) for model in MODELS},
}
