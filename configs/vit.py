r"""Vision Transformers: a demo, and the recipes of the papers.

  ViT      Dosovitskiy et al., ICLR 2021, arXiv:2010.11929
  better   Beyer, Zhai, Kolesnikov, "Better plain ViT baselines for ImageNet-1k", arXiv:2205.01580
  AugReg   Steiner et al., "How to train your ViT? Data, Augmentation, and Regularization in Vision
           Transformers", arXiv:2106.10270

    python -m vit_jax_zoo.main --config=configs/vit.py
    python -m vit_jax_zoo.main --config=configs/vit.py:s16_imagenet
    python -m vit_jax_zoo.main --config=configs/vit.py:s16_imagenet,source=folder:/path
    python -m vit_jax_zoo.main --config=configs/vit.py:b16_imagenet,data_dir=gs://bucket/data
    python -m vit_jax_zoo.main --config=configs/vit.py:b16_imagenet21k,batch_size=1024
    python -m vit_jax_zoo.main \
      --config=configs/vit.py:b16_finetune,dataset=cifar100,init_from=ViT-B_16.npz

| variant                           | trains on    | from                 | expected top-1 |
|-----------------------------------|--------------|----------------------|----------------|
| demo                              | digits, 8x8  | -                    | 98 %           |
| s16_imagenet                      | ImageNet-1k  | better, section 2    | 76.5 %         |
| b16_imagenet      b32 l16 l32     | ImageNet-1k  | ViT, table 3         | 74.8 %         |
| b16_imagenet21k   ti16 s16 ... h14| ImageNet-21k | ViT, table 3         | 47.9 %         |
| b16_augreg        ti16 s16 b32 l16| ImageNet-1k  | AugReg               | -              |
| b16_augreg21k     ti16 s16 b32 l16| ImageNet-21k | AugReg               | 85.5 % later   |
| b16_finetune      b32 l16 l32 h14 | ImageNet ... | ViT, tables 4 and 5  | 84.0 %         |

Each function below is a page of the lab book. Batch sizes are global. ImageNet and ImageNet-21k
have to be prepared first, see the README; or take `source=folder:/path` with class folders in
`train/` and `val/`. `data_dir` says where prepared data lie, for training and all evaluations.
"""

import dataclasses
import functools
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common
from vit_jax_zoo.ops.names import unknown_name


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config of `variant[,field=value...]`; the demo by default."""
  return common.build(arg, VARIANTS)


def demo(*, num_steps: int = 1000, batch_size: int = 128) -> ConfigDict:
  """A small ViT on scikit-learn's handwritten digits: 1437 to learn from, 360 to be tested on.

  Paper: none; the architecture is ViT's, with patches of 2x2 pixels, so 16 of them. With so few
    images it takes positions that need not be learned, mean pooling and averaged parameters.
  Hardware: any. Two CPU cores need about two minutes.
  Expected: 98 % of the test digits; 98.6, 98.1 and 98.1 % with seeds 0, 1 and 2 when this page was
    written (360 of them, so 0.3 % each).
  """
  return ConfigDict(
    {
      "seed": 0,
      "num_steps": num_steps,
      "batch_size": batch_size,
      "model": {
        "name": "vit_ti16",
        "num_classes": placeholder(int),
        "patch_size": 2,
        "width": 64,
        "depth": 4,
        "num_heads": 4,
        "mlp_dim": 128,
        "pool": "mean",
        "position_embedding": "sincos_2d",
      },
      "task": {
        "name": "classification",
        "num_classes": placeholder(int),
        "class_names": placeholder(tuple),
        "top_k": 3,
        "label_smoothing": 0.1,
      },
      "data": {
        "train": {
          "source": "demo:digits",
          "split": "train",
          "transforms": [{"name": "random_translate", "pixels": 1}],
        },
        "eval": {"test": {"source": "demo:digits", "split": "test", "transforms": DECODE}},
      },
      "optimizer": {
        "name": "adamw",
        "learning_rate": 3e-3,
        "schedule": {"name": "cosine", "warmup_steps": 100},
        "weight_decay": 0.3,
        "clip_norm": 1.0,
      },
      "ema_decay": 0.99,
      "log_every": 50,
      "eval_every": 200,
      "checkpoint": {"every": 200, "keep": 1},
    }
  )


def s16_imagenet(
  *,
  num_epochs: int = 90,
  batch_size: int = 1024,
  image_size: int = 224,
  source: str = "tfds:imagenet2012",
  data_dir: str = "",
) -> ConfigDict:
  """ViT-S/16 on ImageNet-1k from scratch, the "better plain ViT".

  Paper: arXiv:2205.01580, section 2: mean pooling, a tanh layer before the head, sin-cos positions,
    batch 1024, Adam with a fully decoupled weight decay of 1e-4 on kernels, RandAugment(2, 10),
    mixup(0.2) with one share a batch.
  Expected: 76.5 % after 90 epochs, 80 % after 300.
  Hardware: 90 epochs took 6.5 hours on a TPU v3-8.
  Not yet run here.
  """
  config = _from_scratch("vit_s16", source, image_size, batch_size)
  config.num_epochs = num_epochs
  config.model.update(
    pool="mean",
    position_embedding="sincos_2d",
    representation_size=384,
  )
  _augment(config, AUGMENTATIONS["light2"])
  config.data.eval = _imagenet_evaluations(source, _resize_and_crop(image_size))
  config.optimizer = _decoupled_adam()
  return common.with_data_dir(config, data_dir)


def imagenet(
  size: str,
  *,
  num_epochs: int = 300,
  batch_size: int = 4096,
  image_size: int = 224,
  source: str = "tfds:imagenet2012",
  data_dir: str = "",
) -> ConfigDict:
  """ViT on ImageNet-1k from scratch, as the ViT paper has it.

  Paper: arXiv:2010.11929, table 3: Adam, 300 epochs, rate 3e-3, cosine, weight decay 0.3, dropout
    0.1, gradients clipped to norm 1, 10k steps of warm-up, batch 4096.
  Hardware: the paper used TPU v3; it states no time for this row.
  Expected, at 224 pixels (github.com/google-research/vision_transformer/issues/62):
    B/16 74.79 %, B/32 69.19 %, L/16 72.59 %, L/32 66.90 %.
  Not yet run here.
  """
  config = _from_scratch(f"vit_{size}", source, image_size, batch_size)
  config.num_epochs = num_epochs
  config.model.update(dropout_rate=0.1, representation_size=WIDTHS[size], **_memory(size))
  config.sharding = _sharding(size)
  config.data.eval = _imagenet_evaluations(source, _resize_and_crop(image_size))
  config.optimizer = {
    "name": "adamw",
    "learning_rate": 3e-3,
    "schedule": {"name": "cosine", "warmup_steps": 10_000},
    "weight_decay": 0.3,
    "clip_norm": 1.0,
  }
  return common.with_data_dir(config, data_dir)


def imagenet21k(  # noqa: PLR0913  (each is a field that a command line may set)
  size: str,
  *,
  num_epochs: int = 90,
  batch_size: int = 4096,
  image_size: int = 224,
  source: str = "tfds:imagenet21k",
  data_dir: str = "",
  num_classes: int = 21_843,
  multi_label: bool = False,
) -> ConfigDict:
  """ViT pre-training on ImageNet-21k, or on a set of one's own with as many labels an image.

  Paper: arXiv:2010.11929, table 3: Adam, rate 1e-3, linear decay, weight decay 0.03, dropout 0.1,
    10k steps of warm-up, batch 4096; 90 epochs, for L 30 or 90. From the authors' issues 2 and 34:
    decay to 1e-5, sigmoid cross-entropy summed over 21,843 classes, the head's bias starting at
    -10, a tanh layer before the head. Ti, S and H are not in the table: Ti and S have B's row
    without dropout, H has L's.
  Data: TFDS has no builder for ImageNet-21k. `source` is a prepared folder, `tfds:/path`, or one
    with a folder for each class in `train`, `folder:/path`; `num_classes` is its. JFT-style sets,
    with any number of labels an image, need `multi_label=true`.
  Hardware: TPU v3; 0.23k core-days for L/16.
  Expected, top-1 on held-out ImageNet-21k images (vision_transformer issue 62): B/16 47.88 %, B/32
    44.04 %, L/16 49.90 %, L/32 45.42 %, H/14 49.06 %. What counts is the transfer: `b16_finetune`.
  Not yet run here.
  """
  config = _from_scratch(f"vit_{size}", source, image_size, batch_size)
  config.num_epochs = num_epochs
  config.model.update(
    num_classes=num_classes,
    dropout_rate=0.0 if size in ("ti16", "s16") else 0.1,
    representation_size=WIDTHS[size],
    head_bias_init=-10.0,
    **_memory(size),
  )
  config.task.update(num_classes=num_classes, objective="sigmoid")
  config.sharding = _sharding(size)
  config.data.train.split = "train[51200:]"
  labels = [{"name": "multi_hot", "num_classes": num_classes}] if multi_label else []
  config.data.train.transforms = config.data.train.transforms + labels
  transforms = _resize_and_crop(image_size) + labels
  config.data.eval = {"val": {"source": source, "split": "train[:51200]", "transforms": transforms}}
  config.optimizer = {
    "name": "adamw",
    "learning_rate": 1e-3,
    "schedule": {"name": "linear", "warmup_steps": 10_000, "end_value": 1e-5},
    "weight_decay": 0.03,
  }
  return common.with_data_dir(config, data_dir)


def augreg(  # noqa: PLR0913  (each is a field that a command line may set)
  size: str,
  *,
  augmentation: str = "",
  num_epochs: int = 300,
  batch_size: int = 4096,
  image_size: int = 224,
  dropout_rate: float = 0.0,
  drop_path_rate: float = 0.0,
  source: str = "tfds:imagenet2012",
  data_dir: str = "",
) -> ConfigDict:
  """ViT on ImageNet-1k from scratch, as "How to train your ViT?" has it.

  Paper: arXiv:2106.10270: Adam, 300 epochs, rate 1e-3, cosine, 10k steps of warm-up, batch 4096,
    gradients clipped to norm 1, a fully decoupled weight decay of 1e-4 on kernels ("wd 0.1" in the
    names of the published files), sigmoid cross-entropy, a head's bias that starts at -6.9, class
    token and no layer before the head.
  Fields: `augmentation` is none, light1, light2, medium1, medium2, strong1 or strong2, by default
    what the authors' code has for this size; where the paper regularises, it has 0.1 as
    `dropout_rate` and `drop_path_rate`.
  Hardware: TPUs in the paper.
  Expected: the paper's figures are of models fine-tuned later; none is stated here for these rows.
  Not yet run here.
  """
  config = _from_scratch(f"vit_{size}", source, image_size, batch_size)
  config.data.eval = _imagenet_evaluations(source, _resize_and_crop(image_size))
  config.model.head_bias_init = -6.9
  _as_augreg(config, size, augmentation or AUGREG_IMAGENET[size])
  config.num_epochs = num_epochs
  config.model.update(dropout_rate=dropout_rate, drop_path_rate=drop_path_rate)
  return common.with_data_dir(config, data_dir)


def augreg21k(  # noqa: PLR0913  (each is a field that a command line may set)
  size: str,
  *,
  augmentation: str = "",
  num_epochs: int = 300,
  batch_size: int = 4096,
  image_size: int = 224,
  dropout_rate: float = 0.0,
  drop_path_rate: float = 0.0,
  source: str = "tfds:imagenet21k",
  data_dir: str = "",
  num_classes: int = 21_843,
) -> ConfigDict:
  """ViT pre-training on ImageNet-21k, as "How to train your ViT?" has it.

  Paper: arXiv:2106.10270, for 300 epochs or 30; otherwise like `augreg`, with a head's bias of -10.
  Data: as for `imagenet21k`.
  Hardware: TPUs in the paper.
  Expected: after fine-tuning on ImageNet at 384 pixels, with the recommended upstream of each size
    (github.com/google-research/vision_transformer, its README): Ti/16 78.22 %, S/16 83.73 %, B/32
    83.59 %, B/16 85.49 %, L/16 85.59 %.
  Not yet run here.
  """
  config = _from_scratch(f"vit_{size}", source, image_size, batch_size)
  config.data.train.split = "train[51200:]"
  evaluation = {"split": "train[:51200]", "transforms": _resize_and_crop(image_size)}
  config.data.eval = {"val": {"source": source, **evaluation}}
  config.model.update(num_classes=num_classes, head_bias_init=-10.0)
  config.task.num_classes = num_classes
  _as_augreg(config, size, augmentation or AUGREG_IMAGENET21K[size])
  config.num_epochs = num_epochs
  config.model.update(dropout_rate=dropout_rate, drop_path_rate=drop_path_rate)
  return common.with_data_dir(config, data_dir)


def finetune(  # noqa: PLR0913  (each is a field that a command line may set)
  size: str,
  *,
  image_size: int = 384,
  dataset: str = "imagenet2012",
  source: str = "",
  data_dir: str = "",
  init_from: str = "",
  learning_rate: float = 0.03,
  batch_size: int = 512,
) -> ConfigDict:
  """Fine-tuning a pre-trained ViT at a higher resolution; positions are resized to the new grid.

  Paper: arXiv:2010.11929, appendix B.1.1 and table 4: SGD with momentum 0.9, batch 512, cosine
    to 0, 500 steps of warm-up, gradients clipped to norm 1, no weight decay, a new head that starts
    at 0 and no layer before it. The paper chooses `learning_rate` on `val`, a held-out part of the
    training images, from .003 .01 .03 .06 on ImageNet and .001 .003 .01 .03 elsewhere.
  Data: a TFDS name of `TRANSFERS`, or images of your own: `source=folder:/path`, with the steps of
    the Pets; 10 % of `train` are `val`, and the folder `test` or `val` is `test`. With a smaller
    batch, divide the rate by the same factor.
  Weights: `init_from`, by default the paper's ImageNet-21k checkpoint in this folder, such as
    ViT-B_16.npz; get it from https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz.
    A folder of a run of our own does as well.
  Evaluation: as in the authors' code, whole images resized to a square, whatever their shape.
  Hardware: ImageNet with B/16 took 6.5 hours on the authors' A100 machine, with L/16 16.8.
  Expected on ImageNet at 384 pixels, table 5: B/16 83.97 %, B/32 81.28 %, L/16 85.15 %, L/32
    80.99 %, H/14 85.13 %. On CIFAR-100: 91.67, 91.97, 93.44, 93.04, 93.82 %.
  Not yet run here.
  """
  if dataset not in TRANSFERS:
    raise ValueError(unknown_name("dataset", dataset, TRANSFERS))
  transfer = OWN_IMAGES if source else TRANSFERS[dataset]
  source = source or f"tfds:{dataset}"
  config = _from_scratch(f"vit_{size}", source, image_size, batch_size)
  config.num_steps = transfer.num_steps
  config.model.update(_memory(size))
  config.sharding = _sharding(size)
  config.data.train.split = transfer.train
  squash = [
    {"name": "resize", "size": image_size, "method": "bilinear", "dtype": "float32"},
  ]
  config.data.eval = {
    name: {"source": source, "split": split, "transforms": squash}
    for name, split in (("val", transfer.val), ("test", transfer.test))
  }
  config.optimizer = {
    "name": "sgd",
    "learning_rate": learning_rate,
    "momentum": 0.9,
    "accumulator_dtype": "bfloat16",
    "schedule": {"name": "cosine", "warmup_steps": transfer.warmup_steps},
    "clip_norm": 1.0,
  }
  config.init_from = init_from or f"ViT-{size[0].upper()}_{size[1:]}.npz"
  config.eval_every = config.checkpoint.every = transfer.num_steps // 10
  return common.with_data_dir(config, data_dir)


@dataclasses.dataclass(frozen=True)
class Transfer:
  """A data set to fine-tune on: table 4's steps, and the splits of appendix B.1.1."""

  num_steps: int
  warmup_steps: int
  train: str
  val: str
  test: str


TRANSFERS = {
  "imagenet2012": Transfer(20_000, 500, "train[:99%]", "train[99%:]", "validation"),
  "cifar10": Transfer(10_000, 500, "train[:98%]", "train[98%:]", "test"),
  "cifar100": Transfer(10_000, 500, "train[:98%]", "train[98%:]", "test"),
  "oxford_iiit_pet": Transfer(500, 100, "train[:90%]", "train[90%:]", "test"),
  # 1020 + 1020 images, all of them training images in the paper; the last 10 % of them are `val`.
  "oxford_flowers102": Transfer(500, 100, "train+validation[:80%]", "validation[80%:]", "test"),
}
"""By their TFDS names."""

OWN_IMAGES = Transfer(500, 100, "train[:90%]", "train[90%:]", "test")

WIDTHS = {"ti16": 192, "s16": 384, "b16": 768, "b32": 768, "l16": 1024, "l32": 1024, "h14": 1280}
"""Width of each model (table 1), which is also that of its pre-training layer before the head."""

DECODE = [{"name": "decode"}]

KERNELS_DECAY = (
  (".*/kernel", {"weight_decay": 1.0}),
  (".*", {"weight_decay": 0.0}),
)
"""Weight decay on kernels alone, as big_vision has it: not on positions, class token and norms."""


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """A column of AugReg's table: RandAugment(2, magnitude), and mixup by Beta(alpha, alpha)."""

  magnitude: int | None = None
  mixup_alpha: float | None = None


AUGMENTATIONS = {
  "none": Augmentation(),
  "light1": Augmentation(0),  # RandAugment(2, 0) is not nothing
  "light2": Augmentation(10, 0.2),
  "medium1": Augmentation(15, 0.2),
  "medium2": Augmentation(15, 0.5),
  "strong1": Augmentation(20, 0.5),
  "strong2": Augmentation(20, 0.8),
}
"""arXiv:2106.10270 and big_vision's configs. Magnitudes are EfficientNet's, which go beyond 10."""

AUGREG_IMAGENET = {
  "ti16": "light1", "s16": "medium2", "b32": "medium2", "b16": "medium2", "l16": "medium2",
}  # fmt: skip
AUGREG_IMAGENET21K = {
  "ti16": "none", "s16": "light1", "b32": "light2", "b16": "light2", "l16": "medium2",
}  # fmt: skip
"""What big_vision takes for each size by default, whether for 30 or 300 epochs."""


def _augment(config: ConfigDict, augmentation: Augmentation) -> None:
  """Adds what an augmentation has beyond crop and flip."""
  if augmentation.magnitude is not None:
    randomly = {"name": "rand_augment", "num_layers": 2, "magnitude": augmentation.magnitude}
    config.data.train.transforms = [*config.data.train.transforms, randomly]
  if augmentation.mixup_alpha is not None:
    config.task.mixup_alpha = augmentation.mixup_alpha


def _as_augreg(config: ConfigDict, size: str, augmentation: str) -> None:
  """Sets what AugReg's recipes have in common on both data sets."""
  if augmentation not in AUGMENTATIONS:
    raise ValueError(unknown_name("augmentation", augmentation, AUGMENTATIONS))
  _augment(config, AUGMENTATIONS[augmentation])
  config.task.objective = "sigmoid"
  config.model.update(_memory(size))
  config.sharding = _sharding(size)
  config.optimizer = _decoupled_adam()


def _decoupled_adam() -> dict[str, Any]:
  """Adam as big_vision has it since AugReg: weight decay is not multiplied by the peak rate."""
  return {
    "name": "adamw",
    "learning_rate": 1e-3,
    "schedule": {"name": "cosine", "warmup_steps": 10_000},
    "weight_decay": 1e-4,
    "weight_decay_mode": "fully_decoupled",
    "clip_norm": 1.0,
    "mu_dtype": "bfloat16",
    "rules": KERNELS_DECAY,
  }


def _from_scratch(model: str, source: str, image_size: int, batch_size: int) -> ConfigDict:
  """What all recipes have in common: Inception crop, flip, bfloat16, numbers from the data."""
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


def _imagenet_evaluations(source: str, transforms: list[dict[str, Any]]) -> dict[str, Any]:
  """A held-out part of the training images, by which to choose, and the official validation set."""
  return {
    name: {"source": source, "split": split, "transforms": transforms}
    for name, split in (("minival", "train[99%:]"), ("val", "validation"))
  }


def _resize_and_crop(image_size: int) -> list[dict[str, Any]]:
  """The middle 7/8 of the shorter side: 256 -> 224."""
  return [
    {"name": "resize_small", "size": image_size * 8 // 7},
    {"name": "central_crop", "size": image_size},
  ]


def _memory(size: str) -> dict[str, str]:
  """What the blocks of a model keep for the backward pass: see `layers.transformer`."""
  return {"remat": {"l": "dots", "h": "full"}.get(size[0], "none")}


def _sharding(size: str) -> dict[str, Any]:
  """Parameters on every device, or split over all of them where they are many."""
  split = size[0] in "lh"
  return {"mesh": {"data": 1, "fsdp": -1} if split else {"data": -1}}


VARIANTS = {
  "demo": demo,
  "s16_imagenet": s16_imagenet,
  **{f"{s}_imagenet": functools.partial(imagenet, s) for s in ("b16", "b32", "l16", "l32")},
  **{f"{size}_imagenet21k": functools.partial(imagenet21k, size) for size in WIDTHS},
  **{f"{size}_augreg": functools.partial(augreg, size) for size in AUGREG_IMAGENET},
  **{f"{size}_augreg21k": functools.partial(augreg21k, size) for size in AUGREG_IMAGENET21K},
  **{f"{s}_finetune": functools.partial(finetune, s) for s in ("b16", "b32", "l16", "l32")},
  # 384 is not a multiple of 14.
  "h14_finetune": functools.partial(finetune, "h14", image_size=392),
}
