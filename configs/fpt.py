r"""FPT: boxes, masks and label maps from a feature pyramid with attention across levels.

  Zhang et al., "Feature Pyramid Transformer", ECCV 2020, arXiv:2007.09451

    python -m vit_jax_zoo.main --config=configs/fpt.py
    python -m vit_jax_zoo.main --config=configs/fpt.py:demo_mask
    python -m vit_jax_zoo.main --config=configs/fpt.py:demo,neck=fpn
    python -m vit_jax_zoo.main --config=configs/fpt.py:finetune,source=coco:/mine,masks=true
    python -m vit_jax_zoo.main --config=configs/fpt.py:segmentation_cityscapes
    python -m vit_jax_zoo.main \
      --config=configs/fpt.py:segmentation_finetune,source=segmentation:/mine,values=0+255

| variant                                          | trains on     | expected                     |
|--------------------------------------------------|---------------|------------------------------|
| demo, demo_mask                                  | scenes, 64x64 | AP50 of 0.9, of masks 0.85   |
| faster_rcnn_r50_fpt_coco  _fpn_  _bfp_  r101_fpt | COCO          | up to 8.5 % more than bfp    |
| mask_rcnn_r50_fpt_coco    _fpn_  _bfp_  r101_fpt | COCO          | up to 6.0 % more than bfp    |
| faster_rcnn_r50_fpt_official_coco  mask_         | COCO          | -                            |
| finetune                                         | your images   | depends                      |
| demo_segmentation                                | scenes, 64x64 | mIoU 0.7                     |
| segmentation_cityscapes _ade20k _voc _lip        | label maps    | 1.6, 1.7, 1.2, 2.0 points    |
|                                                  |               | of mIoU more than ufp        |
| segmentation_finetune                            | your images   | depends                      |

The demos also draw the cross-level attention of an object, `explain_levels`; for other variants use
`--config.explain=true`, which needs a finest level of at most 64x64 positions.

`neck` is the feature pyramid transformer (fpt), a feature pyramid network (fpn), or the paper's
baselines: the plain bottom-up pyramid (bfp), for segmentation the unscathed pyramid (ufp).
Each function below is one recipe. Batch sizes are global.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common
from configs.common import variant_of


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config of `variant[,field=value...]`; the demo by default."""
  return common.build(arg, VARIANTS, RENAMED)


def demo(*, neck: str = "fpt", num_steps: int = 500, batch_size: int = 16) -> ConfigDict:
  """Faster R-CNN on the demo's scenes: digits in front of textures, 64x64 pixels.

  Paper: none; the modules are the paper's, on maps of strides 4, 8 and 16.
  Hardware: any. Two CPU cores need a few minutes.
  Expected: box AP50 of 0.9.
  Ours: box AP50 of 0.92 and AP of 0.64 on the 400 test scenes, one seed.
  """
  config = ConfigDict({"seed": 0, "num_steps": num_steps, "batch_size": batch_size})
  config.eval_batch_size = 40
  config.model = {"name": f"faster_rcnn_r50_{neck}", "num_classes": placeholder(int)}
  size = {"blocks": (1, 1, 2, 1), "widths": (16, 24, 32, 32), "stem_width": 32}
  config.model.backbone = {**size, "stem": "deep", "norm": "batch_norm"}
  config.model.update(levels=("c2", "c3", "c4"), extra_levels=0, width=64)
  config.model.neck_fields = {"norm": "batch_norm"}
  config.model.update(anchor_sizes=(20, 28, 40), aspect_ratios=(1, 1.6))  # digits: 20 to 40 pixels
  config.model.proposals = {"pre_nms_top_n": (100, 60), "post_nms_top_n": (48, 24)}
  config.model.update(canonical_size=28, canonical_stride=8, box_head={"width": 128})
  config.task = common.task("instance_detection", score_threshold=0.5)
  config.task.update(rpn_batch_size_per_image=64, rpn_fg_iou_thresh=0.6, rpn_inside_only=False)
  config.task.update(box_batch_size_per_image=24, box_positive_fraction=0.5)
  config.task.box_detections_per_img = 20

  pad = {"name": "pad_objects", "num": 4}
  train = [{"name": "load_objects"}, pad]
  test = [{"name": "load_objects", "as_annotated": True}, pad]
  config.data = {
    "train": {"source": "demo:scenes", "split": "train", "transforms": train},
    "eval": {"test": {"source": "demo:scenes", "split": "test", "transforms": test}},
  }

  config.optimizer = {"name": "adamw", "learning_rate": 2e-3, "weight_decay": 1e-4}
  config.optimizer.update(clip_norm=10.0, schedule={"name": "cosine", "warmup_steps": 50})
  config.explain = neck == "fpt"
  config.log_every, config.eval_every = 50, 0
  config.checkpoint = {"every": 0, "keep": 1}
  return config


def demo_mask(*, neck: str = "fpt", num_steps: int = 500, batch_size: int = 16) -> ConfigDict:
  """Mask R-CNN on the demo's scenes.

  Paper: none; see `demo`.
  Hardware: any. Two CPU cores need a few minutes more than for boxes only.
  Expected: mask AP50 of 0.85, boxes as in `demo`.
  Ours: mask AP50 of 0.88 and AP of 0.54, box AP50 of 0.94 and AP of 0.66 on the 400 test scenes,
    one seed.
  """
  config = demo(neck=neck, num_steps=num_steps, batch_size=batch_size)
  config.model.name = f"mask_rcnn_r50_{neck}"
  config.model.update(mask_head={"num_convs": 2, "width": 48}, mask_pool_size=14)
  for split in (config.data.train, config.data.eval.test):
    load, pad = split.transforms
    things = {"name": "keep_classes", "below": 10}  # without the five classes of stuff
    split.update(panoptic=True, transforms=[{**load, "masks": True}, things, pad])
  return config


def coco(  # noqa: PLR0913  (each is a field that a command line may set)
  detector: str,
  *,
  masks: bool,
  batch_size: int = 16,
  accumulation_steps: int = 1,
  drop_block_rate: float = 0.0,
  norm: str = "frozen_batch_norm",
  source: str = "tfds:coco/2017",
  data_dir: str = "",
) -> ConfigDict:
  """Faster or Mask R-CNN on COCO, with one of the three pyramids, or the official code's variant.

  Paper: arXiv:2007.09451; schedule and sizes are those of the official repository's configs: SGD
    with momentum 0.9, learning rate 0.05 for batch 16, 500 steps of warm-up from a third of it;
    boxes 120,000 steps (/ 10 after 80,000 and 100,000), masks 180,000 (120,000 and 160,000); weight
    decay 1e-4 on kernels, biases at twice the learning rate; one of six shorter sides up to 1200,
    longer side up to 1400, test at 1000; flips. Norms, stem and first stage of the backbone are
    frozen. The paper also lists DropBlock (`drop_block_rate=0.1`), which is off in the code, and
    batch norm over all devices: `norm=batch_norm` trains the backbone's norms.
  Padding: images of a batch are padded to one size, and the transformer attends to padded
    positions, as in the code: detections depend slightly on the other images of the batch.
  Weights: `--config.task.backbone_file` initialises the backbone: Caffe's ResNet-50 in the official
    variants (R-50.pkl or resnet50_caffe.pth), torchvision's in the others. `--config.init_from`
    is a whole detector: a run, torchvision's files, or a state dict of the official code.
  Hardware: 8 GPUs, 2 images each.
  Expected: up to 8.5 % (boxes) and 6.0 % (masks) more AP, relative to `bfp`'s, on test-dev.
  Not yet run here.
  """
  scale = 16 / batch_size
  steps, boundaries = (180_000, (120_000, 160_000)) if masks else (120_000, (80_000, 100_000))
  config = ConfigDict({"seed": 0, "num_steps": round(steps * scale), "batch_size": batch_size})
  config.accumulation_steps, config.eval_batch_size = accumulation_steps, 16
  config.model = {"name": detector, "num_classes": placeholder(int), "dtype": "bfloat16"}
  config.model.backbone = {"blocks": (3, 4, 6, 3), "norm": norm}
  config.model.neck_fields = {"drop_block_rate": drop_block_rate}
  config.task = common.task("instance_detection")
  config.task.update(backbone_file=placeholder(str), neck_file=placeholder(str))

  sides = (1200, 1200, 1000, 800, 600, 400)  # one is drawn
  scale_jitter = {"name": "resize_shorter", "shorter": sides, "longest": 1400}
  pad = {"name": "pad_objects"}
  train = [{"name": "load_objects", "masks": masks}, {"name": "random_flip"}, scale_jitter, pad]
  val = [_ground_truth(masks=masks), {**scale_jitter, "shorter": 1000}, pad]
  config.data = {
    "train": {"source": source, "split": "train", "transforms": train},
    "eval": {"val": {"source": source, "split": "validation", "transforms": val}},
    "loader": {"num_workers": 8, "buckets": 6},
  }

  rate = common.scaled_rate("sgd", 0.05, batch_size, 16)
  config.optimizer = {"name": "sgd", "learning_rate": rate, "momentum": 0.9, "weight_decay": 1e-4}
  warmup = {"warmup_steps": 500, "warmup_start": 1 / 3}
  boundaries = tuple(round(step * scale) for step in boundaries)
  config.optimizer.schedule = {"name": "step", "boundaries": boundaries, **warmup}
  config.optimizer.rules = (FROZEN_STEM, (".*/bias", {"learning_rate": 2.0}))
  config.recipe = common.recipe(batch_size=16, learning_rate=0.05)
  config.log_every, config.eval_every = 50, 10_000
  config.checkpoint = {"every": 2_000, "keep": 1}
  return common.with_data_dir(config, data_dir)


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
  config = ConfigDict({"seed": 0, "num_epochs": float(num_epochs), "batch_size": batch_size})
  config.accumulation_steps, config.eval_batch_size = accumulation_steps, 16
  detector = f"{'mask' if masks else 'faster'}_rcnn_r50_{neck}"
  config.model = {"name": detector, "num_classes": placeholder(int), "dtype": dtype}
  config.task = common.task("instance_detection", per_class=True, neck_file=placeholder(str))
  config.task.backbone_file = placeholder(str) if init_from else RESNET[50]
  config.init_from = init_from or None

  sides = tuple(range(640, 801, 32))  # one is drawn
  scale_jitter = {"name": "resize_shorter", "shorter": sides, "longest": 1333}
  pad = {"name": "pad_objects"}
  train = [{"name": "load_objects", "masks": masks}, {"name": "random_flip"}, scale_jitter, pad]
  val = [_ground_truth(masks=masks), {"name": "resize_shorter"}, pad]
  config.data = {
    "train": {"source": source, "split": "train", "transforms": train},
    "eval": {"val": {"source": source, "split": "validation", "transforms": val}},
    "loader": {"num_workers": 0, "buckets": 3, "on_corrupt": "skip"},
  }

  rate = learning_rate or common.scaled_rate("sgd", 0.005, batch_size, 4)
  config.optimizer = {"name": "sgd", "learning_rate": rate, "momentum": 0.9, "weight_decay": 1e-4}
  config.optimizer.schedule = {"name": "step", "boundaries": (2 / 3, 8 / 9), "warmup_steps": 0.05}
  config.optimizer.rules = (FROZEN_STEM,)
  config.recipe = common.recipe(batch_size=4, learning_rate=0.005)
  config.log_every, config.eval_every = 10, 0.05
  config.checkpoint = {"every": 0.05, "keep": 1, "eval_best_at_end": True}
  return common.with_data_dir(config, data_dir)


def demo_segmentation(
  *, neck: str = "fpt", num_steps: int = 900, batch_size: int = 16, seed: int = 0
) -> ConfigDict:
  """Semantic segmentation of the demo's scenes: ten digits, five textures.

  Paper: none; the modules are the paper's, on maps of a quarter of the image's height and width.
  Hardware: any. A step of 16 images takes about 0.55 s on two CPU cores.
  Expected: mIoU 0.7. (Upper bound at this output stride 0.89: ground truth, averaged and enlarged.)
  Ours: mIoU 0.717, pixel accuracy 91 %, one seed: textures 0.86 to 0.93, digits 0.53 to 0.71; ten
    minutes on two shared cores. Digits are a fifth of the pixels and ten of the classes: their
    class weight is 5. Without it nearly all digits are classified as 1 (mIoU 0.31 after 600 steps);
    starting from the backbone of `demo_mask` did not change that.
  """
  config = ConfigDict({"seed": seed, "num_steps": num_steps, "batch_size": batch_size})
  config.eval_batch_size = 40
  config.model = {"name": _segmenter(50, neck), "num_classes": placeholder(int)}
  config.model.update(width=48, kernel_sizes=(1, 3, 5, 9), window=3)
  size = {"blocks": (1, 1, 2, 2), "widths": (16, 24, 32, 48), "stem_width": 32}
  config.model.backbone = {**size, "stem": "deep", "output_stride": 4}
  config.task = common.task("semantic_segmentation", per_class=True)
  config.task.class_weights = (5.0,) * 10 + (1.0,) * 5
  scenes = {"source": "demo:scenes", "panoptic": True, "transforms": [{"name": "load_label_map"}]}
  config.data = {
    "train": {**scenes, "split": "train"},
    "eval": {"test": {**scenes, "split": "test"}},
  }
  config.optimizer = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 1e-4}
  config.optimizer.update(clip_norm=5.0, schedule={"name": "cosine", "warmup_steps": 50})
  config.explain = neck == "fpt"
  config.log_every, config.eval_every = 50, 0
  config.checkpoint = {"every": 0, "keep": 1}
  return config


def segmentation(  # noqa: PLR0913  (the numbers of a dataset, and fields of a command line)
  num_classes: int,
  labels: dict[str, Any],
  files: dict[str, str],
  crop: int,
  num_epochs: float,
  batch_size: int,
  learning_rate: float,
  *,
  source: str = "segmentation:/path",
  depth: int = 101,
  neck: str = "fpt",
  flip: bool = True,
  data_dir: str = "",
) -> ConfigDict:
  """Semantic segmentation of Cityscapes, ADE20K, PASCAL VOC 2012 or LIP.

  Paper: arXiv:2007.09451, section 4.2. Only the gains could be checked, in the abstract and
    summaries: crop sizes, learning rates and lengths, in `VARIANTS`, are those usual for dilated
    networks of its time. SGD with momentum 0.9, "poly" schedule, backbone at a tenth of the
    learning rate; scales of 0.5 to 2, crops, flips (not LIP: left and right limbs are classes);
    DropBlock 0.1; batch norm over all devices.
  Data: in the published layouts. Cityscapes: 2975 finely annotated images, 19 classes, or TFDS's,
    `source=tfds:cityscapes/semantic_segmentation,data_dir=/data`. ADE20K: 20210 images, 150
    classes; its label 0 is "other". VOC: 21 classes with the background, 1464 images; 10582 with
    the PNGs and lists of Hariharan et al. LIP: 30462 people, 20 classes with the background.
  Weights: `--config.task.backbone_file=resnet101.pth`, torchvision's or timm's.
  Hardware: 8 devices of 16 GB; for Cityscapes of 32 GB.
  Expected: gain in mIoU over the pyramid alone (`neck=ufp`): Cityscapes 1.6 points (test), ADE20K
    1.7 (val), VOC 1.2 (test), LIP 2.0 (val).
  Not yet run here.
  """
  config = ConfigDict({"seed": 0, "num_epochs": num_epochs, "batch_size": batch_size})
  config.eval_batch_size = batch_size
  config.model = {"name": _segmenter(depth, neck), "num_classes": num_classes or placeholder(int)}
  config.model.update(auxiliary_head=True, dtype="bfloat16", transformer={"drop_block_rate": 0.1})
  config.task = common.task("semantic_segmentation", num_classes=num_classes or placeholder(int))
  config.task.update(per_class=True, backbone_file=placeholder(str))

  load = {"name": "load_label_map", **labels}
  train = [load, {"name": "random_scale", "smallest": 0.5, "largest": 2.0}]
  train += [{"name": "random_window", "height": crop, "width": crop}]
  train += [{"name": "random_flip"}] if flip else []
  train += [{"name": "pad_label_map", "height": crop, "width": crop}]
  val = [load, {"name": "pad_label_map"}]
  files = files if source.startswith(("segmentation:", "segments:")) else {}
  config.data = {
    "train": {"source": source, "split": "train", **files, "transforms": train},
    "eval": {"val": {"source": source, "split": "val", **files, "transforms": val}},
    "loader": {"num_workers": 8, "buckets": 6},
  }

  config.optimizer = {"name": "sgd", "learning_rate": learning_rate, "momentum": 0.9}
  config.optimizer.update(weight_decay=1e-4, schedule={"name": "poly", "power": 0.9})
  config.optimizer.rules = (("backbone/.*", {"learning_rate": 0.1}),)
  config.log_every, config.eval_every = 50, 5_000
  config.checkpoint = {"every": 5_000, "keep": 1}
  return common.with_data_dir(config, data_dir)


def segmentation_finetune(  # noqa: PLR0913  (each is a field that a command line may set)
  *,
  source: str = "segmentation:/path",
  class_names: str = "",
  values: str = "",
  depth: int = 50,
  neck: str = "fpt",
  init_from: str = "",
  num_epochs: int = 100,
  batch_size: int = 4,
  accumulation_steps: int = 1,
  learning_rate: float = 0.0,
  crop: int = 513,
  dtype: str = "bfloat16",
) -> ConfigDict:
  """Fine-tunes semantic segmentation on your own classes, from about 20 images.

  Paper: none. SGD with 0.005 for batch 4, the usual learning rate above; 5 % of warm-up.
  Data: `source=segmentation:/path`, images and label PNGs in splits `train` and `val`; see
    `data/sources/segmentation.py`; or `hf:/path`, `hf:user/name`. Without a `val`:
    --config.data.train.split=train[:80%] --config.data.eval.val.split=train[80%:].
  Classes: `class_names`, a text file with one name per line, by default `classes.txt` in the
    folder. Class i has the value i in the label PNGs, and 255 is ignored; otherwise `values` has
    the values in the order of the classes, such as 0+255 or 1-20+30, and all others are ignored.
  Weights: torchvision's ResNet, downloaded; or `init_from`, a run.
  Length: 500 steps for 20 images, 1,150 for 46 and 12,500 for 500. `val` is evaluated 20 times;
    the best checkpoint is kept and evaluated at the end.
  Learning rate: scaled linearly with the batch size.
  Hardware: one device; the largest batch that fits was not measured.
  Expected: depends on the data.
  Not yet run here.
  """
  classes = _numbers(values)
  kind, _, folder = source.partition(":")
  if not (class_names or classes or kind in ("tfds", "hf")):
    class_names = f"{folder}/classes.txt"
  config = segmentation(
    num_classes=len(classes), labels={"classes": classes} if classes else {}, files={}, crop=crop,
    num_epochs=float(num_epochs), batch_size=batch_size, source=source, depth=depth, neck=neck,
    learning_rate=learning_rate or common.scaled_rate("sgd", 0.005, batch_size, 4),
  )  # fmt: skip
  config.accumulation_steps = accumulation_steps
  config.model.dtype = dtype
  config.task.backbone_file = placeholder(str) if init_from else RESNET[depth]
  config.init_from = init_from or None
  if class_names:
    config.data.train.class_names = config.data.eval.val.class_names = class_names
  config.optimizer.schedule.warmup_steps = 0.05
  config.recipe = common.recipe(batch_size=4, learning_rate=0.005)
  with config.ignore_type():  # from a number of steps to a fraction of the run
    config.log_every, config.eval_every = 10, 0.05
    config.checkpoint = {"every": 0.05, "keep": 1, "eval_best_at_end": True}
    config.data.loader = {"num_workers": 0, "buckets": 3, "on_corrupt": "skip"}
  return config


def _ground_truth(*, masks: bool) -> dict[str, Any]:
  """Returns the transform that loads an evaluation's objects; masks as run lengths."""
  run_lengths = {"run_lengths": 500_000} if masks else {}
  return {"name": "load_objects", "as_annotated": True, **run_lengths}


def _segmenter(depth: int, neck: str) -> str:
  return f"fpt_segmentation_r{depth}" + ("" if neck == "fpt" else f"_{neck}")


def _numbers(text: str) -> tuple[int, ...]:
  """Returns the numbers of a text such as "0+255" or "1-20+30"."""
  try:
    ranges = [list(map(int, part.split("-"))) for part in text.split("+") if text]
  except ValueError:
    message = f"segmentation_finetune,values={text!r}: expected numbers and ranges, such as 0+255"
    raise ValueError(message) from None
  return tuple(i for numbers in ranges for i in range(numbers[0], numbers[-1] + 1))


RESNET = {
  50: "https://download.pytorch.org/models/resnet50-0676ba61.pth",
  101: "https://download.pytorch.org/models/resnet101-63fe2227.pth",
}
"""torchvision's IMAGENET1K_V1."""

FROZEN_STEM = ("backbone/(stem|c2_block).*", {"frozen": True})

R101: dict[str, Any] = {"model": {"backbone": {"blocks": (3, 4, 23, 3)}}}

OFFICIAL: dict[str, Any] = {
  "model": {
    "backbone": {"stride_in_1x1": True},
    "neck_fields": {"variant": "official", "norm": "group_norm"},
  },
  # Caffe's: pixels in [0, 255], minus the means, not divided.
  "task": {
    "image_mean": (122.7717 / 255, 115.9465 / 255, 102.9801 / 255),
    "image_std": (1 / 255, 1 / 255, 1 / 255),
  },
}

COPY = "coco:/path"
"""Your own copy of COCO, since TFDS's has no masks."""

VARIANTS = {
  "demo": demo,
  "demo_mask": demo_mask,
  "faster_rcnn_r50_fpt_coco": variant_of(coco, detector="faster_rcnn_r50_fpt", masks=False),
  "faster_rcnn_r50_fpn_coco": variant_of(coco, detector="faster_rcnn_r50_fpn", masks=False),
  "faster_rcnn_r50_bfp_coco": variant_of(coco, detector="faster_rcnn_r50_bfp", masks=False),
  "faster_rcnn_r101_fpt_coco": variant_of(
    coco, detector="faster_rcnn_r101_fpt", masks=False, **R101
  ),
  "mask_rcnn_r50_fpt_coco": variant_of(coco, detector="mask_rcnn_r50_fpt", masks=True, source=COPY),
  "mask_rcnn_r50_fpn_coco": variant_of(coco, detector="mask_rcnn_r50_fpn", masks=True, source=COPY),
  "mask_rcnn_r50_bfp_coco": variant_of(coco, detector="mask_rcnn_r50_bfp", masks=True, source=COPY),
  "mask_rcnn_r101_fpt_coco": variant_of(
    coco, detector="mask_rcnn_r101_fpt", masks=True, source=COPY, **R101
  ),
  "faster_rcnn_r50_fpt_official_coco": variant_of(
    coco, detector="faster_rcnn_r50_fpt_official", masks=False, **OFFICIAL
  ),
  "mask_rcnn_r50_fpt_official_coco": variant_of(
    coco, detector="mask_rcnn_r50_fpt_official", masks=True, source=COPY, **OFFICIAL
  ),
  "finetune": finetune,
  "demo_segmentation": demo_segmentation,
  "segmentation_cityscapes": variant_of(
    segmentation, source="segmentation:data/cityscapes", num_classes=19, crop=769, num_epochs=240.0,
    batch_size=8, learning_rate=0.01, data={"loader": {"buckets": None}},  # one size
    labels={"classes": (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)},
    files={
      "images": "leftImg8bit/{split}/{name}_leftImg8bit.*",
      "labels": "gtFine/{split}/{name}_gtFine_labelIds.png",
    },
  ),
  "segmentation_ade20k": variant_of(
    segmentation, source="segmentation:data/ADEChallengeData2016", num_classes=150, crop=513,
    num_epochs=120.0, batch_size=16, learning_rate=0.02, labels={"offset": -1, "ignore": (0,)},
    files={},
  ),
  "segmentation_voc": variant_of(
    segmentation, source="segmentation:data/VOCdevkit/VOC2012", num_classes=21, crop=513,
    num_epochs=50.0, batch_size=16, learning_rate=0.01, labels={}, files={},
  ),
  "segmentation_lip": variant_of(
    segmentation, source="segmentation:data/lip", num_classes=20, crop=473, num_epochs=150.0,
    batch_size=32, learning_rate=0.007, flip=False, labels={}, files={},
  ),
  "segmentation_finetune": segmentation_finetune,
}  # fmt: skip

RENAMED = {
  name: f"configs/lambda_resnet.py:{name}"
  for name in ("mask_rcnn_lambda_resnet_101_coco", "mask_rcnn_lambda_resnet_152_coco")
}
