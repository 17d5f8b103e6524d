"""Shared by ViT's recipes: data, augmentation, optimizers, sharding, remat.

Augmentations have the names of "How to train your ViT?" (arXiv:2106.10270). RandAugment is
TensorFlow's variant (`rand_augment`, `data/transforms/augment.py`), as in Google's code.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

WIDTHS = {
  "ti16": 192, "s16": 384, "s32": 384, "b16": 768, "b32": 768, "l16": 1024, "l32": 1024,
  "h14": 1280, "r50_b16": 768, "r50_b32": 768, "r50_l16": 1024, "r50_l32": 1024,
}  # fmt: skip
"""Width of each model (table 1) and of the layer before its head in pre-training."""

KERNELS_DECAY = (
  (".*/kernel", {"weight_decay": 1.0}),
  (".*", {"weight_decay": 0.0}),
)
"""Weight decay on kernels only, as in big_vision: not on positions, class token and norms."""


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """A column of AugReg's table: RandAugment(2, magnitude) and mixup with Beta(alpha, alpha)."""

  magnitude: int | None = None
  mixup_alpha: float | None = None


AUGMENTATIONS = {
  "none": Augmentation(),
  "light1": Augmentation(0),  # RandAugment(2, 0) is not the identity
  "light2": Augmentation(10, 0.2),
  "medium1": Augmentation(15, 0.2),
  "medium2": Augmentation(15, 0.5),
  "strong1": Augmentation(20, 0.5),
  "strong2": Augmentation(20, 0.8),
}
"""arXiv:2106.10270 and big_vision's configs. Magnitudes are EfficientNet's and exceed 10."""


def augment(config: ConfigDict, augmentation: Augmentation) -> None:
  """Adds RandAugment and mixup to crop and flip."""
  if augmentation.magnitude is not None:
    randomly = {"name": "rand_augment", "num_layers": 2, "magnitude": augmentation.magnitude}
    config.data.train.transforms = [*config.data.train.transforms, randomly]
  if augmentation.mixup_alpha is not None:
    config.task.mixup_alpha = augmentation.mixup_alpha


def decoupled_adam(weight_decay: float = 1e-4) -> dict[str, Any]:
  """big_vision's Adam since AugReg: weight decay is not multiplied by the peak learning rate."""
  return {
    "name": "adamw",
    "learning_rate": 1e-3,
    "schedule": {"name": "cosine", "warmup_steps": 10_000},
    "weight_decay": weight_decay,
    "weight_decay_mode": "fully_decoupled",
    "clip_norm": 1.0,
    "mu_dtype": "bfloat16",
    "rules": KERNELS_DECAY,
  }


def base(model: str, source: str, image_size: int, batch_size: int) -> ConfigDict:
  """Fields of all recipes: Inception crop, flip, bfloat16, number of classes from the data."""
  return ConfigDict(
    {
      "seed": 0,
      "batch_size": batch_size,
      "model": {"name": model, "num_classes": placeholder(int), "dtype": "bfloat16"},
      "task": {
        "name": "classification",
        "num_classes": placeholder(int),
        "class_names": placeholder(tuple),
      },
      "data": {
        "train": {
          "source": source,
          "split": "train[:99%]",
          "transforms": [
            {"name": "random_resized_crop", "size": image_size, "area": (0.05, 1.0)},
            {"name": "random_flip"},
          ],
        },
        "eval": {},
        "loader": {"num_workers": 8},
      },
      "log_every": 50,
      "eval_every": 5_000,
      "checkpoint": {"every": 5_000, "keep": 1},
    }
  )


def imagenet_evaluations(source: str, image_size: int) -> dict[str, Any]:
  """Evaluations `val` (held-out training images) and the official validation set."""
  transforms = resize_and_crop(image_size)
  return {
    name: {"source": source, "split": split, "transforms": transforms}
    for name, split in (("minival", "train[99%:]"), ("val", "validation"))
  }


def resize_and_crop(image_size: int) -> list[dict[str, Any]]:
  """Central 7/8 of the shorter side: 256 -> 224."""
  return [
    {"name": "resize_small", "size": image_size * 8 // 7},
    {"name": "central_crop", "size": image_size},
  ]


def hold_out(
  config: ConfigDict, source: str, image_size: int, labels: list[dict[str, Any]] | None = None
) -> None:
  """Holds out 51,200 training images for the evaluation `val`, for datasets without their own.

  Args:
    config: of `base`.
    source: of training and evaluation.
    image_size: of the evaluation.
    labels: transforms of the labels, for both.
  """
  labels = labels or []
  config.data.train.split = "train[51200:]"
  config.data.train.transforms = config.data.train.transforms + labels
  transforms = resize_and_crop(image_size) + labels
  config.data.eval = {"val": {"source": source, "split": "train[:51200]", "transforms": transforms}}


def track_few_shots(config: ConfigDict, source: str, image_size: int) -> None:
  """Adds the evaluation `few_shot`, the pre-training metric of ViT and big_vision.

  Args:
    config: with its other evaluations.
    source: ImageNet-1k, whose first 65,000 training images are used for fitting; "" for none.
    image_size: of the evaluation.
  """
  if source:
    config.data.eval.few_shot = {
      "source": source,
      "split": "validation",
      "fit_split": "train[:65000]",
      "probe": {"name": "few_shot", "shots": (1, 5, 10)},
      "transforms": resize_and_crop(image_size),
    }


def memory(size: str) -> dict[str, str]:
  """Remat policy by model size: see `nn.transformer`."""
  return {"remat": {"l": "dots", "h": "full"}.get(_letter(size), "none")}


def sharding(size: str) -> dict[str, Any]:
  """Replicates the parameters of small models; shards those of large ones over all devices."""
  split = _letter(size) in "lh"
  return {"mesh": {"data": 1, "fsdp": -1} if split else {"data": -1}}


def _letter(size: str) -> str:
  """Returns the Transformer's size: `l` for `r50_l16`."""
  return size.split("_")[-1][0]
