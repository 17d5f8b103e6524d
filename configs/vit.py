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

| variant                              | trains on    | from                | expected top-1 |
|--------------------------------------|--------------|---------------------|----------------|
| demo                                 | digits, 8x8  | -                   | 98 %           |
| s16_imagenet                         | ImageNet-1k  | better, section 2   | 76.5 %         |
| b16_imagenet    b32 l16 l32          | ImageNet-1k  | ViT, table 3        | 74.8 %         |
| b16_imagenet21k ti16 s16 ... r50_b16 | ImageNet-21k | ViT, table 3        | 47.9 %         |
| b16_jft b32 l16 l32 h14 r50_b16 ...  | your own    | ViT, table 3        | 84.2 % later   |
| b16_augreg      ti16 s16 s32 b32 l16 | ImageNet-1k  | AugReg              | -              |
| b16_augreg21k   ti16 s16 s32 b32 l16 | ImageNet-21k | AugReg              | 85.5 % later   |
| b16_finetune    b32 l16 l32 h14 ...  | ImageNet ... | ViT, tables 4 and 5 | 84.0 %         |

`augreg` and `finetune` are in `configs/vit_augreg.py` and `configs/vit_finetune.py`.
Each function below is one recipe. Batch sizes are global. Prepare ImageNet and ImageNet-21k first,
see docs/guides/data.md; or use `source=folder:/path` with class folders in `train/` and `val/`.
`data_dir` is the folder of prepared datasets, for training and all evaluations.
"""

import functools

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common, vit_augreg, vit_common, vit_finetune


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config of `variant[,field=value...]`; the demo by default."""
  return common.build(arg, VARIANTS)


def demo(*, num_steps: int = 1000, batch_size: int = 128) -> ConfigDict:
  """A small ViT on scikit-learn's handwritten digits: 1437 for training, 360 for test.

  Paper: none; the architecture is ViT's, with 16 patches of 2x2 pixels. With so few images it uses
    sin-cos position embeddings, mean pooling and an EMA of the parameters.
  Hardware: any. Two CPU cores need about two minutes.
  Expected: 98 % of the test digits.
  Ours: 97.2, 97.8 and 98.3 % of the 360 test digits with seeds 0, 1 and 2.
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
      "explain": True,
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

  Paper: arXiv:2205.01580, section 2: mean pooling, a tanh layer before the head, sin-cos position
    embeddings, batch 1024, Adam with a fully decoupled weight decay of 1e-4 on kernels,
    RandAugment(2, 10) in TensorFlow's variant, mixup(0.2) with one weight per batch.
  Expected: 76.5 % after 90 epochs, 80 % after 300.
  Hardware: 90 epochs took 6.5 hours on a TPU v3-8.
  Not yet run here.
  """
  config = vit_common.base("vit_s16", source, image_size, batch_size)
  config.num_epochs = num_epochs
  config.model.update(
    pool="mean",
    position_embedding="sincos_2d",
    representation_size=384,
  )
  vit_common.augment(config, vit_common.AUGMENTATIONS["light2"])
  config.data.eval = vit_common.imagenet_evaluations(source, image_size)
  config.optimizer = vit_common.decoupled_adam()
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
  """ViT on ImageNet-1k from scratch, as in the ViT paper.

  Paper: arXiv:2010.11929, table 3: Adam, 300 epochs, learning rate 3e-3, cosine, weight decay 0.3,
    dropout 0.1, gradients clipped to norm 1, 10k steps of warm-up, batch 4096.
  Hardware: TPU v3; the paper states no time for this row.
  Expected, at 224 pixels (github.com/google-research/vision_transformer/issues/62):
    B/16 74.79 %, B/32 69.19 %, L/16 72.59 %, L/32 66.90 %.
  Not yet run here.
  """
  config = vit_common.base(f"vit_{size}", source, image_size, batch_size)
  config.num_epochs = num_epochs
  config.model.update(
    dropout_rate=0.1,
    representation_size=vit_common.WIDTHS[size],
    **vit_common.memory(size),
  )
  config.sharding = vit_common.sharding(size)
  config.data.eval = vit_common.imagenet_evaluations(source, image_size)
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
  few_shot: str = "",
) -> ConfigDict:
  """ViT pre-training on ImageNet-21k, or on another large dataset.

  Paper: arXiv:2010.11929, table 3: Adam, learning rate 1e-3, linear decay, weight decay 0.03,
    dropout 0.1, 10k steps of warm-up, batch 4096; 90 epochs, for L 30 or 90. From the authors'
    issues 2 and 34: decay to 1e-5, sigmoid cross-entropy summed over 21,843 classes, head bias
    initialised to -10, a tanh layer before the head. Ti, S and H are not in the table: Ti and S use
    B's row without dropout, H uses L's.
  Data: TFDS has no builder for ImageNet-21k. `source` is a prepared folder, `tfds:/path`, or one
    with class folders in `train`, `folder:/path`; `num_classes` is its number of classes. Datasets
    with several labels per image need `multi_label=true`.
  Progress: `few_shot=tfds:imagenet2012` logs the paper's pre-training metric: the accuracy of ridge
    regression on five images per class of ImageNet-1k, which must be prepared too.
  Hardware: TPU v3; 0.23k core-days for L/16.
  Expected, top-1 on held-out ImageNet-21k images (vision_transformer issue 62): B/16 47.88 %, B/32
    44.04 %, L/16 49.90 %, L/32 45.42 %, H/14 49.06 %. For fine-tuned accuracy see `b16_finetune`.
  Not yet run here.
  """
  config = _with_many_labels(
    size, source, image_size, batch_size, num_classes=num_classes, multi_label=multi_label
  )
  config.num_epochs = num_epochs
  config.model.dropout_rate = 0.0 if size in ("ti16", "s16") else 0.1
  config.optimizer.update(learning_rate=1e-3, weight_decay=0.03)
  config.optimizer.schedule.end_value = 1e-5
  vit_common.track_few_shots(config, few_shot, image_size)
  return common.with_data_dir(config, data_dir)


def jft(  # noqa: PLR0913  (each is a field that a command line may set)
  size: str,
  *,
  num_epochs: int = 0,
  batch_size: int = 4096,
  image_size: int = 224,
  source: str = "tfds:jft",
  data_dir: str = "",
  num_classes: int = 18_291,
  multi_label: bool = True,
  few_shot: str = "",
) -> ConfigDict:
  """ViT pre-training on a dataset like JFT-300M: very large, with several labels per image.

  Paper: arXiv:2010.11929, table 3: Adam, linear decay, weight decay 0.1, no dropout, 10k steps of
    warm-up, batch 4096. Learning rates: B 8e-4, L/32 6e-4, L/16 4e-4, H/14 3e-4, R50+B 8e-4,
    R50+L/32 2e-4, R50+L/16 4e-4. Epochs: 7, H/14 14; L/16 and R50+L/16 7 or 14. As in
    `imagenet21k`, not in the table: sigmoid cross-entropy summed over the classes, head bias
    initialised to -10, a tanh layer before the head.
  Data: JFT is not public. `source=tfds:/path` is your own prepared dataset, whose `label` is a list
    of classes; `num_classes` is their number (18,291 for JFT in later papers); `multi_label=false`
    for one label per image. The first 51,200 images are held out.
  Progress: `few_shot`, as in `imagenet21k`.
  Hardware: TPU v3; 0.68k core-days for L/16, 2.5k for H/14.
  Expected on ImageNet, fine-tuned at 384 pixels (table 5): B/16 84.15 %, B/32 80.73 %, L/16 87.12
    %, L/32 84.37 %, H/14 88.04 %; hybrids (table 6): R50+B/32 84.90 %, R50+B/16 85.58 %, R50+L/32
    85.68 %, R50+L/16 87.12 %.
  Not yet run here.
  """
  rate, usual_epochs = JFT[size]
  config = _with_many_labels(
    size, source, image_size, batch_size, num_classes=num_classes, multi_label=multi_label
  )
  config.num_epochs = num_epochs or usual_epochs
  config.optimizer.update(learning_rate=rate, weight_decay=0.1)
  vit_common.track_few_shots(config, few_shot, image_size)
  return common.with_data_dir(config, data_dir)


def _with_many_labels(
  size: str,
  source: str,
  image_size: int,
  batch_size: int,
  *,
  num_classes: int,
  multi_label: bool,
) -> ConfigDict:
  """Fields common to ImageNet-21k and JFT: sigmoid cross-entropy per class."""
  config = vit_common.base(f"vit_{size}", source, image_size, batch_size)
  config.model.update(
    num_classes=num_classes,
    representation_size=vit_common.WIDTHS[size],
    head_bias_init=-10.0,
    **vit_common.memory(size),
  )
  config.task.update(num_classes=num_classes, objective="sigmoid")
  config.sharding = vit_common.sharding(size)
  labels = [{"name": "multi_hot", "num_classes": num_classes}] if multi_label else []
  vit_common.hold_out(config, source, image_size, labels)
  config.optimizer = {"name": "adamw", "schedule": {"name": "linear", "warmup_steps": 10_000}}
  return config


DECODE = [{"name": "decode"}]

IMAGENET = ("b16", "b32", "l16", "l32")
IMAGENET21K = ("ti16", "s16", "b16", "b32", "l16", "l32", "h14", "r50_b16")

JFT = {
  "b16": (8e-4, 7), "b32": (8e-4, 7), "l16": (4e-4, 14), "l32": (6e-4, 7), "h14": (3e-4, 14),
  "r50_b16": (8e-4, 7), "r50_b32": (8e-4, 7), "r50_l16": (4e-4, 14), "r50_l32": (2e-4, 7),
}  # fmt: skip
"""Learning rate and epochs of table 3."""

VARIANTS = {
  "demo": demo,
  "s16_imagenet": s16_imagenet,
  **{f"{size}_imagenet": functools.partial(imagenet, size) for size in IMAGENET},
  **{f"{size}_imagenet21k": functools.partial(imagenet21k, size) for size in IMAGENET21K},
  **{f"{size}_jft": functools.partial(jft, size) for size in JFT},
  **vit_augreg.VARIANTS,
  **vit_finetune.VARIANTS,
}
