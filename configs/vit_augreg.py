r"""AugReg: ViT with the augmentation and regularisation of "How to train your ViT?".

  Steiner, Kolesnikov, Zhai, Wightman, Uszkoreit, Beyer, "How to train your ViT? Data, Augmentation,
  and Regularization in Vision Transformers", arXiv:2106.10270

    python -m vit_jax_zoo.main --config=configs/vit.py:b16_augreg21k
    python -m vit_jax_zoo.main --config=configs/vit.py:l16_augreg,augmentation=strong1

| variant                               | trains on    | expected top-1            |
|---------------------------------------|--------------|---------------------------|
| b16_augreg    ti16 s16 s32 b32 l16    | ImageNet-1k  | -                         |
| b16_augreg21k ti16 s16 s32 b32 l16    | ImageNet-21k | 85.5 % after fine-tuning  |

Included in `configs/vit.py`, which has all variants.
"""

import functools

from ml_collections import ConfigDict

from configs import common, vit_common


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config of `variant[,field=value...]`; the first of `VARIANTS` by default."""
  return common.build(arg, VARIANTS)


def augreg(  # noqa: PLR0913  (each is a field that a command line may set)
  size: str,
  *,
  augmentation: str = "",
  num_epochs: int = 300,
  batch_size: int = 4096,
  image_size: int = 224,
  dropout_rate: float = 0.0,
  drop_path_rate: float = 0.0,
  weight_decay: float = 1e-4,
  source: str = "tfds:imagenet2012",
  data_dir: str = "",
) -> ConfigDict:
  """ViT on ImageNet-1k from scratch, as in "How to train your ViT?".

  Paper: arXiv:2106.10270: Adam, 300 epochs, learning rate 1e-3, cosine, 10k steps of warm-up, batch
    4096, gradients clipped to norm 1, fully decoupled weight decay of 1e-4 on kernels ("wd 0.1" in
    names of published files; for "wd 0.03" `weight_decay=3e-5`), sigmoid cross-entropy, head
    bias initialised to -6.9, class token and no layer before the head. RandAugment is TensorFlow's
    variant: magnitudes exceed 10, and magnitude 0 is not the identity.
  Fields: `augmentation` is none, light1, light2, medium1, medium2, strong1 or strong2, by default
    that of the authors' code for this size; the paper's regularization is `dropout_rate` and
    `drop_path_rate` of 0.1.
  Hardware: TPUs in the paper.
  Expected: not stated for these rows; the paper reports fine-tuned models.
  Not yet run here.
  """
  config = vit_common.base(f"vit_{size}", source, image_size, batch_size)
  config.data.eval = vit_common.imagenet_evaluations(source, image_size)
  config.model.head_bias_init = -6.9
  _as_augreg(config, size, augmentation or IMAGENET[size], weight_decay)
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
  weight_decay: float = 1e-4,
  source: str = "tfds:imagenet21k",
  data_dir: str = "",
  num_classes: int = 21_843,
  few_shot: str = "",
) -> ConfigDict:
  """ViT pre-training on ImageNet-21k, as in "How to train your ViT?".

  Paper: arXiv:2106.10270, 300 or 30 epochs; otherwise as `augreg`, with a head bias of -10.
  Data: as for `imagenet21k`, which also describes `few_shot`.
  Hardware: TPUs in the paper.
  Expected: after fine-tuning on ImageNet at 384 pixels, with the recommended upstream of each size
    (github.com/google-research/vision_transformer, its README): Ti/16 78.22 %, S/32 79.58 %, S/16
    83.73 %, B/32 83.59 %, B/16 85.49 %, L/16 85.59 %.
  Not yet run here.
  """
  config = vit_common.base(f"vit_{size}", source, image_size, batch_size)
  vit_common.hold_out(config, source, image_size)
  config.model.update(num_classes=num_classes, head_bias_init=-10.0)
  config.task.num_classes = num_classes
  _as_augreg(config, size, augmentation or IMAGENET21K[size], weight_decay)
  config.num_epochs = num_epochs
  config.model.update(dropout_rate=dropout_rate, drop_path_rate=drop_path_rate)
  vit_common.track_few_shots(config, few_shot, image_size)
  return common.with_data_dir(config, data_dir)


IMAGENET = {
  "ti16": "light1", "s32": "medium1", "s16": "medium2", "b32": "medium2", "b16": "medium2",
  "l16": "medium2",
}  # fmt: skip
IMAGENET21K = {
  "ti16": "none", "s32": "none", "s16": "light1", "b32": "light2", "b16": "light2",
  "l16": "medium2",
}  # fmt: skip
"""big_vision's default for each size, for 30 and for 300 epochs."""


def _as_augreg(config: ConfigDict, size: str, augmentation: str, weight_decay: float) -> None:
  """Sets the fields common to AugReg's recipes on both datasets."""
  if augmentation not in vit_common.AUGMENTATIONS:
    raise ValueError(common.unknown_name("augmentation", augmentation, vit_common.AUGMENTATIONS))
  vit_common.augment(config, vit_common.AUGMENTATIONS[augmentation])
  config.task.objective = "sigmoid"
  config.model.update(vit_common.memory(size))
  config.sharding = vit_common.sharding(size)
  config.optimizer = vit_common.decoupled_adam(weight_decay)


VARIANTS = {
  **{f"{size}_augreg": functools.partial(augreg, size) for size in IMAGENET},
  **{f"{size}_augreg21k": functools.partial(augreg21k, size) for size in IMAGENET21K},
}
"""Included in the variants of `configs/vit.py`."""
