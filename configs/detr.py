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

Memory: `accumulation_steps=n` splits each batch of 64 into n micro-batches: the same training in n
times the time, since the frozen norms have no batch statistics. A smaller `batch_size` changes the
training; the learning rate is then scaled with the square root of the ratio (Malladi et al.,
arXiv:2205.10287, for Adam), which the paper does not test.

`num_classes` is the highest class id + 1, read from the data: 91 for COCO, whose ids are not
renumbered. "No object" is one additional, last logit.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common
from configs.common import variant_of


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config of `variant[,field=value...]`; the demo by default."""
  return common.build(arg, VARIANTS)


def demo(*, num_steps: int = 2500, batch_size: int = 32, seed: int = 0) -> ConfigDict:
  """A small DETR on scenes of handwritten digits, 64x64 pixels: 4000 for training, 400 for test.

  Paper: the architecture is DETR's, with stride 8. Trained from scratch; the paper's backbone is
    pretrained on ImageNet, and its DETR trains for 300 epochs of 118,000 images. Therefore an
    auxiliary loss also applies the class and box heads to the encoder's tokens (`dense_weight`),
    with a weight that falls to 0 over the first 80 % of the run, so that one query per object
    remains. AP50 after 400 steps: 0.19 with this loss, 0.02 without. The "no object" weight is 0.3
    (paper: 0.1), since a larger fraction of 12 queries than of 100 matches an object. Batch norms
    are trained; no dropout; class loss weight 3.
  Hardware: any. Two CPU cores need about ten minutes: 13 minutes of CPU time.
  Expected: box AP50 0.8.
  Ours: box AP50 0.86, AP 0.53, one seed. An earlier run, of AP 0.54: at threshold 0.5, 829 of 978
    digits are detected; 85 of the others are detected with the wrong class; 55 duplicates remain.
    (With two decoder layers, "no object" weight 0.1 and a constant auxiliary weight: AP50 0.82, AP
    0.50.)
  """
  config = ConfigDict({"seed": seed, "num_steps": num_steps, "batch_size": batch_size})
  config.eval_batch_size = 40
  config.model = {"name": "detr_r50", "num_classes": placeholder(int), "num_queries": 12}
  config.model.update(width=64, encoder_depth=1, decoder_depth=3, num_heads=8, mlp_dim=128)
  config.model.update(dropout_rate=0.0, dense_predictions=True)
  size = {"blocks": (1, 1, 1, 1), "widths": (16, 32, 64, 64), "stem_width": 32}
  config.model.backbone = {**size, "norm": "batch_norm", "output_stride": 8}
  config.task = common.task("detection", class_weight=3.0, no_object_weight=0.3)
  config.task.update(dense_weight=1.0, dense_steps=max(1, round(0.8 * num_steps)))
  config.task.update(score_threshold=0.5, draw_attention=True)

  scale = {"name": "random_scale_crop", "shorter": (64,), "longest": None, "crop_probability": 1.0}
  jitter = {**scale, "crop_from": (60, 64, 68, 72), "crop_sides": (60, 60)}  # to 64x64 pixels
  pad = {"name": "pad_objects", "num": 8}
  train = [{"name": "load_objects"}, jitter, pad]
  test = [{"name": "load_objects", "as_annotated": True}, pad]
  config.data = {
    "train": {"source": "demo:scenes", "split": "train", "transforms": train},
    "eval": {"test": {"source": "demo:scenes", "split": "test", "transforms": test}},
  }

  config.optimizer = {"name": "adamw", "learning_rate": 2e-3, "weight_decay": 1e-4}
  config.optimizer.update(clip_norm=5.0, schedule={"name": "cosine", "warmup_steps": 100})
  config.log_every, config.eval_every = 50, 500
  config.checkpoint = {"every": 500, "keep": 1}
  return config


def demo_panoptic(
  *,
  num_steps: int = 1000,
  batch_size: int = 24,
  seed: int = 0,
  init_from: str = "runs/detr_demo",
) -> ConfigDict:
  """Panoptic segmentation of the demo's scenes: ten digits (things), five textures (stuff).

  Paper: section 4.4; boxes and masks are trained jointly, which the paper allows (its results are
    from masks trained afterwards). Masks have a quarter of the image's height and width, 16x16, as
    in the paper; a digit's stroke is little wider than one mask pixel.
  Weights: `init_from`, by default the demo's run: train that first. Its class head is dropped,
    since the textures are new classes.
  Hardware: any. Two CPU cores need about five minutes, after the demo.
  Expected: PQ 0.35.
  Ours: PQ 0.39 (SQ 0.63, RQ 0.60), one seed, from the demo's run: digits 0.27 (SQ 0.59, RQ 0.44),
    textures 0.63; box AP50 0.89 (15 classes), mask AP50 of digits 0.18. PQ 0.13 at half of the
    steps: classes and boxes converge before masks. Longer training was not tried.
  """
  config = demo(num_steps=num_steps, batch_size=batch_size, seed=seed)
  config.model.mask_head = True
  config.task.update(stuff_from=10, segment_threshold=0.5, mask_weight=20.0, dice_weight=2.0)
  config.optimizer.learning_rate = 1e-3
  config.init_from = init_from
  train, test = config.data.train, config.data.eval.test
  train.panoptic = test.panoptic = True
  train.transforms[0]["masks"] = True
  test.transforms[0]["segment_map"] = True
  return config


def coco(
  backbone: str,
  *,
  num_epochs: int = 300,
  batch_size: int = 64,
  accumulation_steps: int = 1,
  source: str = "tfds:coco/2017",
  data_dir: str = "",
  backbone_file: str = "",
) -> ConfigDict:
  """DETR on COCO, or on your own folder in COCO's format, from an ImageNet backbone.

  Paper: arXiv:2005.12872, section 4 and A.4: AdamW, learning rate 1e-4, backbone 1e-5; stem, first
    stage and all norms of the backbone frozen; weight decay 1e-4, gradients clipped to norm 0.1,
    dropout 0.1; flips, shorter side 480 to 800, crops; learning rate / 10 after 200 of 300 epochs
    (`num_epochs=500`: after 400; other lengths: after two thirds). No warm-up, no EMA.
  Weights: `backbone_file`, by default torchvision's IMAGENET1K_V1, as in the paper.
  Differs from the paper: weight decay applies to the transformer, the heads and the backbone, as in
    its code; DC5 masks padding in the backbone (`masked_backbone`), where the code trains with one
    image per GPU; computes in bfloat16, with norms, heads, matching and losses in float32.
  Hardware: 16 V100, 4 images each (DC5: 64, 1 each); three days for 300 epochs of R50.
  Expected, AP of boxes on val2017 (github.com/facebookresearch/detr): after 500 epochs R50 42.0,
    R50-DC5 43.3, R101 43.5, R101-DC5 44.9; R50 39.5 after 150.
  Not yet run here.
  """
  config = ConfigDict({"seed": 0, "num_epochs": float(num_epochs), "batch_size": batch_size})
  config.accumulation_steps, config.eval_batch_size = accumulation_steps, 8
  config.model = {"name": f"detr_{backbone}", "num_classes": placeholder(int), "remat": "dots"}
  config.model.update(masked_backbone=backbone.endswith("dc5"), dtype="bfloat16")
  config.task = common.task("detection")
  config.task.backbone_file = backbone_file or _torchvision_weights(backbone)

  train = [{"name": "load_objects", "masks": False}, {"name": "random_flip"}]
  train += [{"name": "random_scale_crop"}, {"name": "pad_objects"}]
  val = [{"name": "load_objects", "as_annotated": True, "segment_map": False}]
  val += [{"name": "resize_shorter"}, {"name": "pad_objects"}]
  val_split = "val" if source.startswith("coco:") else "validation"
  config.data = {
    "train": {"source": source, "split": "train", "transforms": train},
    "eval": {"val": {"source": source, "split": val_split, "transforms": val}},
    "loader": {"num_workers": 8, "buckets": 6},
  }

  rate = common.scaled_rate("adamw", 1e-4, batch_size, 64)
  config.optimizer = {"name": "adamw", "learning_rate": rate, "weight_decay": 1e-4}
  config.optimizer.clip_norm = 0.1
  config.optimizer.schedule = {"name": "step", "boundaries": (0.8 if num_epochs == 500 else 2 / 3,)}
  config.optimizer.rules = (
    ("backbone/(stem|c2_block).*", {"frozen": True}),
    ("backbone/.*", {"learning_rate": 0.1}),
    (".*", {"weight_decay": 1.0}),
  )
  config.recipe = common.recipe(batch_size=64, learning_rate=1e-4)
  config.log_every, config.eval_every = 50, 10_000
  config.checkpoint = {"every": 2_000, "keep": 1}
  return common.with_data_dir(config, data_dir)


def panoptic(
  backbone: str,
  *,
  num_epochs: int = 300,
  batch_size: int = 64,
  accumulation_steps: int = 1,
  source: str = "tfds:coco/2017_panoptic",
  data_dir: str = "",
  backbone_file: str = "",
) -> ConfigDict:
  """DETR for panoptic segmentation, first stage: boxes of things and stuff.

  Paper: section 4.4: as for detection, with each segment's bounding box. 250 classes: COCO's ids of
    things (up to 90) and stuff (up to 200), not renumbered.
  Differs from the paper's code: boxes are those of COCO's files, whose right and lower edges are
    one pixel beyond the segment; crowds are dropped, as in detection.
  Hardware: as for detection.
  Expected: AP of things' boxes after the second stage 38.8 (R50), 40.2 (R50-DC5), 40.1 (R101).
  Not yet run here.
  """
  config = coco(
    backbone, num_epochs=num_epochs, batch_size=batch_size, accumulation_steps=accumulation_steps,
    source=source, data_dir=data_dir, backbone_file=backbone_file,
  )  # fmt: skip
  config.model.num_classes = config.task.num_classes = 250
  config.data.train.panoptic = config.data.eval.val.panoptic = True
  return config


def masks(
  backbone: str,
  *,
  num_epochs: int = 25,
  batch_size: int = 64,
  accumulation_steps: int = 1,
  source: str = "tfds:coco/2017_panoptic",
  data_dir: str = "",
  init_from: str = "",
) -> ConfigDict:
  """DETR for panoptic segmentation, second stage: trains the mask head only.

  Paper: section 4.4 and A.4: 25 epochs, learning rate 1e-4, divided by 10 after 15.
  Weights: `init_from`, by default the first stage's run.
  Hardware: not stated. Mask memory limits a GPU to one or two images; use `accumulation_steps`.
  Expected on val2017 (github.com/facebookresearch/detr): PQ 43.4 with R50, 44.6 with R50-DC5, 45.1
    with R101.
  Not yet run here.
  """
  config = panoptic(
    backbone, num_epochs=num_epochs, batch_size=batch_size, accumulation_steps=accumulation_steps,
    source=source, data_dir=data_dir,
  )  # fmt: skip
  config.model = {"name": f"detr_{backbone}_panoptic", "dropout_rate": 0.0, "remat": "dots"}
  config.model.update(masked_backbone=backbone.endswith("dc5"), dtype="bfloat16")
  config.task = common.task("detection", num_classes=250, stuff_from=91)
  config.optimizer.schedule.boundaries = (0.6,)
  config.optimizer.rules = (
    (f"({DETECTOR}).*", {"frozen": True}),
    ("mask_.*", {"weight_decay": 1.0}),
  )
  config.data.train.transforms[0]["masks"] = True
  config.data.eval.val.transforms[0]["segment_map"] = True
  config.init_from = init_from or f"runs/detr_{backbone}_panoptic"
  return config


def finetune(  # noqa: PLR0913  (each is a field that a command line may set)
  backbone: str,
  *,
  source: str = "coco:/path",
  masks: bool = False,
  init_from: str = "",
  num_epochs: int = 50,
  batch_size: int = 4,
  accumulation_steps: int = 1,
  learning_rate: float = 0.0,
  dtype: str = "bfloat16",
  data_dir: str = "",
) -> ConfigDict:
  """Fine-tunes a COCO-pretrained DETR on your own classes, from about 20 images.

  Paper: none. DETR does not converge from scratch on a few thousand images: start from published
    weights; all but the class head are kept (facebookresearch/detr, issues 9, 125 and 169).
  Data: `source=coco:/path`, with splits `train` and `val`; see `data/sources/coco.py`; or
    `hf:/path`, `hf:user/name`, boxes only. Without a `val`:
    --config.data.train.split=train[:80%] --config.data.eval.val.split=train[80%:].
  Masks: `masks=true` also trains and evaluates instance masks, from the file's segmentations.
  Weights: `init_from`, a file, a published name or a run; by default the official ones, which are
    downloaded, with `masks=true` those of the panoptic model.
  Length: 250 steps for 20 images, 575 for 46 and 6,250 for 500, with a warm-up of 5 %. `val` is
    evaluated 20 times; the best checkpoint is kept and evaluated at the end. For more than 2,000
    images, start with 15 epochs.
  Learning rate: by default 5e-5 for batch 4, scaled with the square root of the batch size.
  Hardware: a GPU of 16 GB fits about four images of 800 pixels; use `accumulation_steps` for more.
    `dtype=float32` on a CPU, which has no fast bfloat16.
  Expected: depends on the data.
  Not yet run here.
  """
  config = coco(
    backbone, num_epochs=num_epochs, batch_size=batch_size, accumulation_steps=accumulation_steps,
    source=source, data_dir=data_dir,
  )  # fmt: skip
  config.optimizer.learning_rate = learning_rate or common.scaled_rate("adamw", 5e-5, batch_size, 4)
  config.optimizer.schedule.warmup_steps = 0.05
  config.recipe = common.recipe(batch_size=4, learning_rate=5e-5)
  config.model.update(mask_head=masks, dtype=dtype)
  config.task = common.task("detection", per_class=True)
  if masks:
    config.data.train.transforms[0]["masks"] = True
    config.data.eval.val.transforms[0]["run_lengths"] = 500_000
  is_panoptic = masks and backbone in PANOPTIC
  config.init_from = init_from or f"detr_{backbone}{'_panoptic' if is_panoptic else ''}_coco"
  with config.ignore_type():  # from a number of steps to a fraction of the run
    config.log_every, config.eval_every = 10, 0.05
    config.checkpoint = {"every": 0.05, "keep": 1, "eval_best_at_end": True}
    config.data.loader = {"num_workers": 0, "buckets": 3, "on_corrupt": "skip"}
  return config


def _torchvision_weights(backbone: str) -> str:
  """Returns torchvision's IMAGENET1K_V1 weights of a backbone, such as `r50_dc5`."""
  name = "resnet101-63fe2227" if backbone.startswith("r101") else "resnet50-0676ba61"
  return f"https://download.pytorch.org/models/{name}.pth"


DETECTOR = "backbone|input_projection|query_embedding|transformer|class_head|box_head"
"""Regular expression of DETR's parameters except the mask head's."""

BACKBONES = ("r50", "r50_dc5", "r101", "r101_dc5")
"""Of table 1."""

PANOPTIC = ("r50", "r50_dc5", "r101")
"""Of table 5."""

VARIANTS = {
  "demo": demo,
  "demo_panoptic": demo_panoptic,
  **{name: variant_of(coco, backbone=name) for name in BACKBONES},
  **{f"{name}_panoptic": variant_of(panoptic, backbone=name) for name in PANOPTIC},
  **{f"{name}_masks": variant_of(masks, backbone=name) for name in PANOPTIC},
  **{f"{name}_finetune": variant_of(finetune, backbone=name) for name in BACKBONES},
}
