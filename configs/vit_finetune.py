r"""ViT's fine-tuning, at a higher resolution than pre-training.

  Dosovitskiy et al., ICLR 2021, arXiv:2010.11929, appendix B.1.1

    python -m vit_jax_zoo.main \
      --config=configs/vit.py:b16_finetune,dataset=cifar100,init_from=ViT-B_16.npz

| variant                                | trains on                  | expected top-1            |
|----------------------------------------|----------------------------|---------------------------|
| b16_finetune b32 l16 l32 h14 r50_b16   | imagenet2012               | 84.0 % (B/16)             |
|                                        | cifar10 cifar100           | 91.7 % on CIFAR-100       |
|                                        | oxford_iiit_pet            | 94.7 % (L/16)             |
|                                        | oxford_flowers102          | 99.6 % (L/16)             |

Included in `configs/vit.py`, which has all variants. For your own images see `configs/finetune.py`.
"""

import dataclasses
import functools
from typing import Any

from ml_collections import ConfigDict

from configs import common, vit_common


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config of `variant[,field=value...]`; the first of `VARIANTS` by default."""
  return common.build(arg, VARIANTS)


def finetune(  # noqa: PLR0913  (each is a field that a command line may set)
  size: str,
  *,
  image_size: int = 384,
  dataset: str = "imagenet2012",
  source: str = "",
  data_dir: str = "",
  init_from: str = "",
  num_steps: int = 0,
  learning_rate: float = 0.03,
  batch_size: int = 512,
) -> ConfigDict:
  """Fine-tunes a pretrained ViT at a higher resolution; position embeddings are interpolated.

  Paper: arXiv:2010.11929, appendix B.1.1 and table 4: SGD with momentum 0.9, batch 512, cosine
    to 0, 500 steps of warm-up, gradients clipped to norm 1, no weight decay, zero-initialised head
    and no layer before it. The paper selects `learning_rate` on `val`, held-out training images,
    from .003 .01 .03 .06 on ImageNet and .001 .003 .01 .03 elsewhere. Crops and flips only. The
    results of table 2 use 512 pixels (H/14: 518) and an EMA of the parameters: `image_size=512` and
    `--config.ema_decay=0.9999`.
  Data: `dataset` is imagenet2012 (20,000 steps), cifar10 or cifar100 (10,000), oxford_iiit_pet or
    oxford_flowers102 (500). For your own images, `source=folder:/path`: number of steps as for the
    Pets; 10 % of `train` are `val`, and the folder `test` or `val` is `test`. Scale the learning
    rate with the batch size (`configs/finetune.py` does so itself).
  Weights: `init_from`, by default the paper's ImageNet-21k checkpoint in this folder, such as
    ViT-B_16.npz, from https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz.
    A published name (docs/MODELS.md) or a run's folder is accepted too: AugReg's models are
    fine-tuned in the same way, at 224 or 384 pixels.
  Evaluation: as in the authors' code, whole images resized to a square, of any aspect ratio.
  Hardware: ImageNet with B/16 took 6.5 hours on the authors' A100 machine, with L/16 16.8.
  Expected on ImageNet at 384 pixels, table 5: B/16 83.97 %, B/32 81.28 %, L/16 85.15 %, L/32
    80.99 %, H/14 85.13 %; R50+B/16 85.08 % (the authors' README). On CIFAR-100: 91.67, 91.97,
    93.44, 93.04, 93.82 %. With L/16 (table 2) CIFAR-10 99.15 %, Pets 94.67 %, Flowers 99.61 %.
  Not yet run here.
  """
  if dataset not in TRANSFERS:
    raise ValueError(common.unknown_name("dataset", dataset, TRANSFERS))
  transfer = OWN_IMAGES if source else TRANSFERS[dataset]
  source = source or f"tfds:{dataset}"
  config = vit_common.base(f"vit_{size}", source, image_size, batch_size)
  config.num_steps = num_steps or transfer.num_steps
  config.model.update(vit_common.memory(size))
  config.sharding = vit_common.sharding(size)
  config.data.train.split = transfer.train
  squash = [
    {"name": "resize", "size": image_size, "method": "bilinear", "dtype": "float32"},
  ]
  config.data.eval = {
    name: {"source": source, "split": split, "transforms": squash}
    for name, split in (("val", transfer.val), ("test", transfer.test))
  }
  config.optimizer = _momentum(learning_rate, transfer.warmup_steps)
  config.init_from = init_from or _published(size)
  config.checkpoint.best = "val/accuracy"
  config.eval_every = config.checkpoint.every = max(1, config.num_steps // 10)
  return common.with_data_dir(config, data_dir)


@dataclasses.dataclass(frozen=True)
class Transfer:
  """A fine-tuning dataset: steps of table 4, splits of appendix B.1.1."""

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
  # 1020 + 1020 images, all used for training in the paper; the last 10 % are `val`.
  "oxford_flowers102": Transfer(500, 100, "train+validation[:80%]", "validation[80%:]", "test"),
}
"""By TFDS name."""

OWN_IMAGES = Transfer(500, 100, "train[:90%]", "train[90%:]", "test")


def _momentum(learning_rate: float, warmup_steps: int) -> dict[str, Any]:
  return {
    "name": "sgd",
    "learning_rate": learning_rate,
    "momentum": 0.9,
    "accumulator_dtype": "bfloat16",
    "schedule": {"name": "cosine", "warmup_steps": warmup_steps},
    "clip_norm": 1.0,
  }


def _published(size: str) -> str:
  """Returns the file of the paper's checkpoint: ViT-B_16.npz, R50+ViT-B_16.npz."""
  backbone, _, name = size.rpartition("_")
  prefix = f"{backbone.upper()}+" if backbone else ""
  return f"{prefix}ViT-{name[0].upper()}_{name[1:]}.npz"


VARIANTS = {
  **{
    f"{s}_finetune": functools.partial(finetune, s) for s in ("b16", "b32", "l16", "l32", "r50_b16")
  },
  # 384 is not a multiple of 14.
  "h14_finetune": functools.partial(finetune, "h14", image_size=392),
}
"""Included in the variants of `configs/vit.py`."""
