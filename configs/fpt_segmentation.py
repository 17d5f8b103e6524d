r"""FPT's semantic segmentation: a demo, and recipes for Cityscapes, ADE20K, PASCAL VOC and LIP.

  Zhang et al., "Feature Pyramid Transformer", ECCV 2020, arXiv:2007.09451

    python -m vit_jax_zoo.main --config=configs/fpt.py:demo_segmentation
    python -m vit_jax_zoo.main --config=configs/fpt.py:segmentation_cityscapes
    python -m vit_jax_zoo.main \
      --config=configs/fpt.py:segmentation_finetune,source=segmentation:/mine,values=0+255

`neck=ufp` is the pyramid without the transformer, the paper's baseline.

| variant                 | trains on           | gain in the paper, mIoU |
|-------------------------|---------------------|-------------------------|
| demo_segmentation       | demo:scenes, 64x64  | not in the paper        |
| segmentation_cityscapes | Cityscapes, fine    | 1.6 points (test)       |
| segmentation_ade20k     | ADE20K, 150 classes | 1.7 points (val)        |
| segmentation_voc        | PASCAL VOC 2012     | 1.2 points (test)       |
| segmentation_lip        | LIP, human parts    | 2.0 points (val)        |
| segmentation_finetune   | your images         | not in the paper        |

Gains over the pyramid alone are quoted from the paper's abstract and summaries of it. The recipes
could not be checked against its text: crop sizes, learning rates and lengths are those usual for
dilated networks of its time. They start from a ResNet pretrained on ImageNet:
`--config.task.backbone_file=resnet101.pth`, torchvision's or timm's.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config of `variant[,field=value...]`; the demo by default."""
  return common.build(arg, VARIANTS)


def demo(
  *, neck: str = "fpt", num_steps: int = 900, batch_size: int = 16, seed: int = 0
) -> ConfigDict:
  """Semantic segmentation of the demo's scenes: ten digits, five textures.

  Paper: none; the modules are the paper's, on maps of a quarter of the image's height and width.
  Hardware: any. A step of 16 images takes about 0.55 s on two CPU cores.
  Expected: mIoU 0.7. (Upper bound at this output stride 0.89: ground truth, averaged and enlarged.)
  Ours: mIoU 0.717, pixel accuracy 91 %, one seed: textures 0.86 to 0.93, digits 0.53 to 0.71; ten
    minutes on two shared cores. Digits are a fifth of the pixels and ten of the classes: their
    class weight is 5. Without it nearly all digits are classified as 1 (mIoU 0.31 after 600 steps);
    starting from the backbone of `configs/fpt.py:demo_mask` did not change that.
  """
  load = {"name": "load_label_map"}
  source = {"source": "demo:scenes", "panoptic": True, "transforms": [load]}
  return ConfigDict(
    {
      "seed": seed,
      "num_steps": num_steps,
      "batch_size": batch_size,
      "eval_batch_size": 40,
      "model": _demo_model(neck),
      "task": {
        "name": "semantic_segmentation",
        "num_classes": placeholder(int),
        "class_names": placeholder(tuple),
        "per_class": True,
        "class_weights": (5.0,) * 10 + (1.0,) * 5,
      },
      "data": {
        "train": {**source, "split": "train"},
        "eval": {"test": {**source, "split": "test"}},
      },
      "optimizer": {
        "name": "adamw",
        "learning_rate": 3e-3,
        "weight_decay": 1e-4,
        "clip_norm": 5.0,
        "schedule": {"name": "cosine", "warmup_steps": 50},
      },
      "log_every": 50,
      "eval_every": 0,
      "explain": neck == "fpt",
      "checkpoint": {"every": 0, "keep": 1},
    }
  )


def _demo_model(neck: str) -> dict[str, Any]:
  return {
    "name": _model_name(50, neck),
    "num_classes": placeholder(int),
    "width": 48,
    "kernel_sizes": (1, 3, 5, 9),
    "window": 3,
    "backbone": {
      "blocks": (1, 1, 2, 2),
      "widths": (16, 24, 32, 48),
      "stem": "deep",
      "stem_width": 32,
      "output_stride": 4,
    },
  }


def _model_name(depth: int, neck: str) -> str:
  return f"fpt_segmentation_r{depth}" + ("" if neck == "fpt" else f"_{neck}")


def _recipe(  # noqa: PLR0913 (a data set's numbers, by name)
  source: str,
  *,
  num_classes: Any,
  crop: int,
  num_epochs: float,
  batch_size: int,
  learning_rate: float,
  load: dict[str, object],
  depth: int,
  neck: str,
  buckets: int | None = 6,
) -> ConfigDict:
  load = {"name": "load_label_map", **load}
  fields = {"source": source}
  augmented = [load, *_augmentation(crop)]
  return ConfigDict(
    {
      "seed": 0,
      "num_epochs": num_epochs,
      "batch_size": batch_size,
      "eval_batch_size": batch_size,
      "model": {
        "name": _model_name(depth, neck),
        "num_classes": num_classes,
        "auxiliary_head": True,
        "dtype": "bfloat16",
        "transformer": {"drop_block_rate": 0.1},
      },
      "task": {
        "name": "semantic_segmentation",
        "num_classes": num_classes,
        "class_names": placeholder(tuple),
        "per_class": True,
        "backbone_file": placeholder(str),
      },
      "data": {
        "train": {**fields, "split": "train", "transforms": augmented},
        "eval": {
          "val": {**fields, "split": "val", "transforms": [load, {"name": "pad_label_map"}]}
        },
        "loader": {"num_workers": 8, "buckets": buckets},
      },
      "optimizer": {
        "name": "sgd",
        "learning_rate": learning_rate,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": {"name": "poly", "power": 0.9},
        "rules": (("backbone/.*", {"learning_rate": 0.1}),),
      },
      "log_every": 50,
      "eval_every": 5_000,
      "checkpoint": {"every": 5_000, "keep": 1},
    }
  )


def _augmentation(crop: int) -> list[dict[str, Any]]:
  return [
    {"name": "random_scale", "smallest": 0.5, "largest": 2.0},
    {"name": "random_window", "height": crop, "width": crop},
    {"name": "random_flip"},
    {"name": "pad_label_map", "height": crop, "width": crop},
  ]


# Values of `*_labelIds.png` that are trained, in the order of their train ids.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def cityscapes(
  *,
  source: str = "segmentation:data/cityscapes",
  depth: int = 101,
  neck: str = "fpt",
  data_dir: str = "",
) -> ConfigDict:
  """Cityscapes' 2975 finely annotated images, 19 classes, in crops of 769 pixels.

  Paper: arXiv:2007.09451, section 4.2; lengths, learning rates and crops are usual ones, see above.
  Hardware: 8 devices of 32 GB, one or two images each.
  Expected: the paper reports a gain of 1.6 points of mIoU over the pyramid alone.
  Data: `leftImg8bit/` and `gtFine/` in the published layout, or TFDS's:
    `source=tfds:cityscapes/semantic_segmentation,data_dir=/data`.
  Batch norm statistics are those of the global batch ("synchronised").
  Not yet run here.
  """
  config = _recipe(
    source, num_classes=19, crop=769, num_epochs=240, batch_size=8, learning_rate=0.01,
    load={"classes": _CITYSCAPES_IDS}, buckets=None, depth=depth, neck=neck,
  )  # fmt: skip
  if source.startswith(("segmentation:", "segments:")):
    for split in (config.data.train, config.data.eval.val):
      split.images = "leftImg8bit/{split}/{name}_leftImg8bit.*"
      split.labels = "gtFine/{split}/{name}_gtFine_labelIds.png"
  return common.with_data_dir(config, data_dir)


def ade20k(
  *, source: str = "segmentation:data/ADEChallengeData2016", depth: int = 101, neck: str = "fpt"
) -> ConfigDict:
  """ADE20K's 20210 images, 150 classes, in crops of 513 pixels; its label 0 is "other".

  Paper: arXiv:2007.09451, section 4.2; lengths, learning rates and crops are usual ones, see above.
  Hardware: 8 devices of 16 GB.
  Expected: the paper reports a gain of 1.7 points of mIoU over the pyramid alone.
  Data: `images/` and `annotations/` in the published layout. Not yet run here.
  """
  return _recipe(
    source, num_classes=150, crop=513, num_epochs=120, batch_size=16, learning_rate=0.02,
    load={"offset": -1, "ignore": (0,)}, depth=depth, neck=neck,
  )  # fmt: skip


def voc(
  *, source: str = "segmentation:data/VOCdevkit/VOC2012", depth: int = 101, neck: str = "fpt"
) -> ConfigDict:
  """PASCAL VOC 2012, 21 classes with the background, in crops of 513 pixels.

  Paper: arXiv:2007.09451, section 4.2; lengths, learning rates and crops are usual ones, see above.
  Hardware: 8 devices of 16 GB.
  Expected: the paper reports a gain of 1.2 points of mIoU over the pyramid alone.
  Data: `JPEGImages/`, `SegmentationClass/` and `ImageSets/` in the published layout: 1464 images.
    Add the PNGs and lists of Hariharan et al. for 10582. Not yet run here.
  """
  return _recipe(
    source, num_classes=21, crop=513, num_epochs=50, batch_size=16, learning_rate=0.01,
    load={}, depth=depth, neck=neck,
  )  # fmt: skip


def lip(
  *, source: str = "segmentation:data/lip", depth: int = 101, neck: str = "fpt"
) -> ConfigDict:
  """LIP's 30462 people, 20 classes with the background, in crops of 473 pixels.

  Paper: arXiv:2007.09451, section 4.2; lengths, learning rates and crops are usual ones, see above.
  Hardware: 8 devices of 16 GB.
  Expected: the paper reports a gain of 2.0 points of mIoU over the pyramid alone.
  Data: `images/<split>/` and `labels/<split>/`. No flips: label maps distinguish left and right
    limbs. Not yet run here.
  """
  config = _recipe(
    source, num_classes=20, crop=473, num_epochs=150, batch_size=32, learning_rate=0.007,
    load={}, depth=depth, neck=neck,
  )  # fmt: skip
  transforms = config.data.train.transforms
  config.data.train.transforms = [t for t in transforms if t["name"] != "random_flip"]
  return config


def finetune(  # noqa: PLR0913  (each is a field that a command line may set)
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
    `data/sources/segmentation.py`. Without a `val`: --config.data.train.split=train[:80%]
    --config.data.eval.val.split=train[80%:].
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
  if not (class_names or classes or kind == "tfds"):
    class_names = f"{folder}/classes.txt"
  config = _recipe(
    source, num_classes=len(classes) or placeholder(int), crop=crop, num_epochs=float(num_epochs),
    batch_size=batch_size,
    learning_rate=learning_rate or common.scaled_rate("sgd", 0.005, batch_size, 4),
    load={"classes": classes} if classes else {}, depth=depth, neck=neck,
  )  # fmt: skip
  config.accumulation_steps = accumulation_steps
  config.model.dtype = dtype
  config.optimizer.schedule.warmup_steps = 0.05
  if class_names:
    config.data.train.class_names = config.data.eval.val.class_names = class_names
  if init_from:
    config.init_from = init_from
  else:
    config.task.backbone_file = BACKBONES[depth]
  return common.for_few_images(config)


def _numbers(text: str) -> tuple[int, ...]:
  """Returns the numbers of a text such as "0+255" or "1-20+30"."""
  try:
    ranges = [list(map(int, part.split("-"))) for part in text.split("+") if text]
  except ValueError:
    message = f"segmentation_finetune,values={text!r}: expected numbers and ranges, such as 0+255"
    raise ValueError(message) from None
  return tuple(i for numbers in ranges for i in range(numbers[0], numbers[-1] + 1))


BACKBONES = {
  50: "https://download.pytorch.org/models/resnet50-0676ba61.pth",
  101: "https://download.pytorch.org/models/resnet101-63fe2227.pth",
}
"""torchvision's IMAGENET1K_V1."""

VARIANTS = {
  "demo_segmentation": demo,
  "segmentation_cityscapes": cityscapes,
  "segmentation_ade20k": ade20k,
  "segmentation_voc": voc,
  "segmentation_lip": lip,
  "segmentation_finetune": finetune,
}
"""Included in the variants of `configs/fpt.py`."""
