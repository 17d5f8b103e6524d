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
    python -m vit_jax_zoo.main --config=configs/vit.py:l16_augreg,augmentation=strong1
    python -m vit_jax_zoo.main \
      --config=configs/vit.py:b16_finetune,dataset=cifar100,init_from=ViT-B_16.npz

| variant                              | trains on    | from                | expected top-1 |
|--------------------------------------|--------------|---------------------|----------------|
| demo                                 | digits, 8x8  | -                   | 98 %           |
| s16_imagenet                         | ImageNet-1k  | better, section 2   | 76.5 %         |
| b16_imagenet    b32 l16 l32          | ImageNet-1k  | ViT, table 3        | 74.8 %         |
| b16_imagenet21k ti16 s16 ... r50_b16 | ImageNet-21k | ViT, table 3        | 47.9 %         |
| b16_jft b32 l16 l32 h14 r50_b16 ...  | your own     | ViT, table 3        | 84.2 % later   |
| b16_augreg      ti16 s16 s32 b32 l16 | ImageNet-1k  | AugReg              | -              |
| b16_augreg21k   ti16 s16 s32 b32 l16 | ImageNet-21k | AugReg              | 85.5 % later   |
| b16_finetune    b32 l16 l32 h14 ...  | ImageNet ... | ViT, tables 4 and 5 | 84.0 %         |

Each function below is one recipe. Batch sizes are global. Prepare ImageNet and ImageNet-21k first,
see docs/guides/data.md; or use `source=folder:/path` with class folders in `train/` and `val/`.
`data_dir` is the folder of prepared datasets, for training and all evaluations. For your own images
see `configs/finetune.py`.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common
from configs.common import variant_of


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
  config = ConfigDict({"seed": 0, "num_steps": num_steps, "batch_size": batch_size})
  config.model = {"name": "vit_ti16", "num_classes": placeholder(int), "patch_size": 2}
  config.model.update(width=64, depth=4, num_heads=4, mlp_dim=128)
  config.model.update(pool="mean", position_embedding="sincos_2d")
  config.task = common.task("classification", top_k=3, label_smoothing=0.1)
  shift = {"name": "random_translate", "pixels": 1}
  config.data = {
    "train": {"source": "demo:digits", "split": "train", "transforms": [shift]},
    "eval": {
      "test": {"source": "demo:digits", "split": "test", "transforms": [{"name": "decode"}]}
    },
  }
  config.optimizer = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.3, "clip_norm": 1.0}
  config.optimizer.schedule = {"name": "cosine", "warmup_steps": 100}
  config.ema_decay = 0.99
  config.log_every, config.eval_every = 50, 200
  config.explain = True
  config.checkpoint = {"every": 200, "keep": 1}
  return config


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
  config = ConfigDict({"seed": 0, "num_epochs": num_epochs, "batch_size": batch_size})
  config.model = {"name": "vit_s16", "num_classes": placeholder(int), "dtype": "bfloat16"}
  config.model.update(pool="mean", position_embedding="sincos_2d", representation_size=384)
  config.model.remat = "dots"  # on TPU v3, moves a fifth fewer bytes than storing all activations
  config.task = common.task("classification", mixup_alpha=0.2)

  crop = {"name": "random_resized_crop", "size": image_size, "area": (0.05, 1.0)}
  randaugment = {"name": "rand_augment", "num_layers": 2, "magnitude": 10}
  resize = {"name": "resize_small", "size": image_size * 8 // 7}  # 256 for 224
  center = {"name": "central_crop", "size": image_size}
  config.data = {
    "train": {
      "source": source,
      "split": "train[:99%]",
      "transforms": [crop, {"name": "random_flip"}, randaugment],
    },
    "eval": {
      "minival": {"source": source, "split": "train[99%:]", "transforms": [resize, center]},
      "val": {"source": source, "split": "validation", "transforms": [resize, center]},
    },
    "loader": {"num_workers": 8},
  }

  config.optimizer = {"name": "adamw", "learning_rate": 1e-3, "clip_norm": 1.0}
  config.optimizer.update(weight_decay=1e-4, weight_decay_mode="fully_decoupled", rules=ON_KERNELS)
  config.optimizer.update(mu_dtype="bfloat16", schedule={"name": "cosine", "warmup_steps": 10_000})
  config.log_every, config.eval_every = 50, 5_000
  config.checkpoint = {"every": 5_000, "keep": 1}
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
  config = ConfigDict({"seed": 0, "num_epochs": num_epochs, "batch_size": batch_size})
  config.model = {"name": f"vit_{size}", "num_classes": placeholder(int), "dtype": "bfloat16"}
  config.model.update(dropout_rate=0.1, representation_size=WIDTHS[size], remat=_remat(size))
  config.task = common.task("classification")

  crop = {"name": "random_resized_crop", "size": image_size, "area": (0.05, 1.0)}
  resize = {"name": "resize_small", "size": image_size * 8 // 7}  # 256 for 224
  center = {"name": "central_crop", "size": image_size}
  config.data = {
    "train": {
      "source": source,
      "split": "train[:99%]",
      "transforms": [crop, {"name": "random_flip"}],
    },
    "eval": {
      "minival": {"source": source, "split": "train[99%:]", "transforms": [resize, center]},
      "val": {"source": source, "split": "validation", "transforms": [resize, center]},
    },
    "loader": {"num_workers": 8},
  }

  config.optimizer = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.3, "clip_norm": 1.0}
  config.optimizer.schedule = {"name": "cosine", "warmup_steps": 10_000}
  config.sharding = {"mesh": _mesh(size)}
  config.log_every, config.eval_every = 50, 5_000
  config.checkpoint = {"every": 5_000, "keep": 1}
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
    with several labels per image need `multi_label=true`. The first 51,200 images are held out.
  Progress: `few_shot=tfds:imagenet2012` logs the paper's pre-training metric: the accuracy of ridge
    regression on five images per class of ImageNet-1k, which must be prepared too.
  Hardware: TPU v3; 0.23k core-days for L/16.
  Expected, top-1 on held-out ImageNet-21k images (vision_transformer issue 62): B/16 47.88 %, B/32
    44.04 %, L/16 49.90 %, L/32 45.42 %, H/14 49.06 %. For fine-tuned accuracy see `b16_finetune`.
  Not yet run here.
  """
  config = ConfigDict({"seed": 0, "num_epochs": num_epochs, "batch_size": batch_size})
  config.model = {"name": f"vit_{size}", "num_classes": num_classes, "dtype": "bfloat16"}
  config.model.update(representation_size=WIDTHS[size], head_bias_init=-10.0, remat=_remat(size))
  config.model.dropout_rate = 0.0 if size in ("ti16", "s16") else 0.1
  config.task = common.task("classification", num_classes=num_classes, objective="sigmoid")

  crop = {"name": "random_resized_crop", "size": image_size, "area": (0.05, 1.0)}
  resize = {"name": "resize_small", "size": image_size * 8 // 7}  # 256 for 224
  center = {"name": "central_crop", "size": image_size}
  labels = [{"name": "multi_hot", "num_classes": num_classes}] if multi_label else []
  train, val = [crop, {"name": "random_flip"}, *labels], [resize, center, *labels]
  config.data = {
    "train": {"source": source, "split": "train[51200:]", "transforms": train},
    "eval": {"val": {"source": source, "split": "train[:51200]", "transforms": val}},
    "loader": {"num_workers": 8},
  }
  if few_shot:
    config.data.eval.few_shot = _few_shot(few_shot, [resize, center])

  config.optimizer = {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.03}
  config.optimizer.schedule = {"name": "linear", "warmup_steps": 10_000, "end_value": 1e-5}
  config.sharding = {"mesh": _mesh(size)}
  config.log_every, config.eval_every = 50, 5_000
  config.checkpoint = {"every": 5_000, "keep": 1}
  return common.with_data_dir(config, data_dir)


def jft(  # noqa: PLR0913  (each is a field that a command line may set)
  size: str,
  *,
  num_epochs: int = 7,
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
    warm-up, batch 4096; learning rate and epochs of each size in `VARIANTS` (L/16 and R50+L/16: 7
    or 14 epochs). As in `imagenet21k`, not in the table: sigmoid cross-entropy summed over the
    classes, head bias initialised to -10, a tanh layer before the head.
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
  config = ConfigDict({"seed": 0, "num_epochs": num_epochs, "batch_size": batch_size})
  config.model = {"name": f"vit_{size}", "num_classes": num_classes, "dtype": "bfloat16"}
  config.model.update(representation_size=WIDTHS[size], head_bias_init=-10.0, remat=_remat(size))
  config.task = common.task("classification", num_classes=num_classes, objective="sigmoid")

  crop = {"name": "random_resized_crop", "size": image_size, "area": (0.05, 1.0)}
  resize = {"name": "resize_small", "size": image_size * 8 // 7}  # 256 for 224
  center = {"name": "central_crop", "size": image_size}
  labels = [{"name": "multi_hot", "num_classes": num_classes}] if multi_label else []
  train, val = [crop, {"name": "random_flip"}, *labels], [resize, center, *labels]
  config.data = {
    "train": {"source": source, "split": "train[51200:]", "transforms": train},
    "eval": {"val": {"source": source, "split": "train[:51200]", "transforms": val}},
    "loader": {"num_workers": 8},
  }
  if few_shot:
    config.data.eval.few_shot = _few_shot(few_shot, [resize, center])

  config.optimizer = {"name": "adamw", "learning_rate": 8e-4, "weight_decay": 0.1}
  config.optimizer.schedule = {"name": "linear", "warmup_steps": 10_000}
  config.sharding = {"mesh": _mesh(size)}
  config.log_every, config.eval_every = 50, 5_000
  config.checkpoint = {"every": 5_000, "keep": 1}
  return common.with_data_dir(config, data_dir)


def augreg(  # noqa: PLR0913  (each is a field that a command line may set)
  size: str,
  *,
  augmentation: str = "medium2",
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
  Fields: `augmentation` is a key of `AUGMENTATIONS`, by default that of the authors' code for this
    size; the paper's regularization is `dropout_rate` and `drop_path_rate` of 0.1.
  Hardware: TPUs in the paper.
  Expected: not stated for these rows; the paper reports fine-tuned models.
  Not yet run here.
  """
  config = ConfigDict({"seed": 0, "num_epochs": num_epochs, "batch_size": batch_size})
  config.model = {"name": f"vit_{size}", "num_classes": placeholder(int), "dtype": "bfloat16"}
  config.model.update(dropout_rate=dropout_rate, drop_path_rate=drop_path_rate)
  config.model.update(head_bias_init=-6.9, remat=_remat(size))
  randaugment, mixup = _augmentation(augmentation)
  config.task = common.task("classification", objective="sigmoid", **mixup)

  crop = {"name": "random_resized_crop", "size": image_size, "area": (0.05, 1.0)}
  train = [crop, {"name": "random_flip"}, *randaugment]
  resize = {"name": "resize_small", "size": image_size * 8 // 7}  # 256 for 224
  val = [resize, {"name": "central_crop", "size": image_size}]
  config.data = {
    "train": {"source": source, "split": "train[:99%]", "transforms": train},
    "eval": {
      "minival": {"source": source, "split": "train[99%:]", "transforms": val},
      "val": {"source": source, "split": "validation", "transforms": val},
    },
    "loader": {"num_workers": 8},
  }

  config.optimizer = {"name": "adamw", "learning_rate": 1e-3, "clip_norm": 1.0}
  config.optimizer.update(weight_decay=weight_decay, weight_decay_mode="fully_decoupled")
  config.optimizer.update(rules=ON_KERNELS, mu_dtype="bfloat16")
  config.optimizer.schedule = {"name": "cosine", "warmup_steps": 10_000}
  config.sharding = {"mesh": _mesh(size)}
  config.log_every, config.eval_every = 50, 5_000
  config.checkpoint = {"every": 5_000, "keep": 1}
  return common.with_data_dir(config, data_dir)


def augreg21k(  # noqa: PLR0913  (each is a field that a command line may set)
  size: str,
  *,
  augmentation: str = "light2",
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
  config = ConfigDict({"seed": 0, "num_epochs": num_epochs, "batch_size": batch_size})
  config.model = {"name": f"vit_{size}", "num_classes": num_classes, "dtype": "bfloat16"}
  config.model.update(dropout_rate=dropout_rate, drop_path_rate=drop_path_rate)
  config.model.update(head_bias_init=-10.0, remat=_remat(size))
  randaugment, mixup = _augmentation(augmentation)
  config.task = common.task("classification", num_classes=num_classes, objective="sigmoid", **mixup)

  crop = {"name": "random_resized_crop", "size": image_size, "area": (0.05, 1.0)}
  train = [crop, {"name": "random_flip"}, *randaugment]
  resize = {"name": "resize_small", "size": image_size * 8 // 7}  # 256 for 224
  val = [resize, {"name": "central_crop", "size": image_size}]
  config.data = {
    "train": {"source": source, "split": "train[51200:]", "transforms": train},
    "eval": {"val": {"source": source, "split": "train[:51200]", "transforms": val}},
    "loader": {"num_workers": 8},
  }
  if few_shot:
    config.data.eval.few_shot = _few_shot(few_shot, val)

  config.optimizer = {"name": "adamw", "learning_rate": 1e-3, "clip_norm": 1.0}
  config.optimizer.update(weight_decay=weight_decay, weight_decay_mode="fully_decoupled")
  config.optimizer.update(rules=ON_KERNELS, mu_dtype="bfloat16")
  config.optimizer.schedule = {"name": "cosine", "warmup_steps": 10_000}
  config.sharding = {"mesh": _mesh(size)}
  config.log_every, config.eval_every = 50, 5_000
  config.checkpoint = {"every": 5_000, "keep": 1}
  return common.with_data_dir(config, data_dir)


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
    and no layer before it; crops and flips. `learning_rate` is selected on `val`, held-out training
    images, from .003 .01 .03 .06 on ImageNet and .001 .003 .01 .03 elsewhere. Table 2 uses 512
    pixels (H/14: 518) and an EMA: `image_size=512` and `--config.ema_decay=0.9999`.
  Data: `dataset` is imagenet2012 (20,000 steps), cifar10 or cifar100 (10,000), oxford_iiit_pet or
    oxford_flowers102 (500); or `source=folder:/path`. For few images see `configs/finetune.py`.
  Weights: `init_from`, by default the paper's ImageNet-21k checkpoint in this folder, such as
    ViT-B_16.npz, from https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz;
    or a published name (docs/MODELS.md), such as AugReg's models, or a run's folder.
  Evaluation: as in the authors' code, whole images resized to a square, of any aspect ratio.
  Hardware: ImageNet with B/16 took 6.5 hours on the authors' A100 machine, with L/16 16.8.
  Expected on ImageNet at 384 pixels, table 5: B/16 83.97 %, B/32 81.28 %, L/16 85.15 %, L/32
    80.99 %, H/14 85.13 %; R50+B/16 85.08 % (the authors' README). On CIFAR-100: 91.67, 91.97,
    93.44, 93.04, 93.82 %. With L/16 (table 2) CIFAR-10 99.15 %, Pets 94.67 %, Flowers 99.61 %.
  Not yet run here.
  """
  if dataset not in TRANSFERS:
    raise ValueError(common.unknown_name("dataset", dataset, TRANSFERS))
  steps, warmup_steps, train, val, test = OWN_IMAGES if source else TRANSFERS[dataset]
  source = source or f"tfds:{dataset}"
  config = ConfigDict({"seed": 0, "num_steps": num_steps or steps, "batch_size": batch_size})
  config.model = {"name": f"vit_{size}", "num_classes": placeholder(int), "dtype": "bfloat16"}
  config.model.remat = _remat(size)
  config.task = common.task("classification")

  crop = {"name": "random_resized_crop", "size": image_size, "area": (0.05, 1.0)}
  squash = {"name": "resize", "size": image_size, "method": "bilinear", "dtype": "float32"}
  config.data = {
    "train": {"source": source, "split": train, "transforms": [crop, {"name": "random_flip"}]},
    "eval": {
      "val": {"source": source, "split": val, "transforms": [squash]},
      "test": {"source": source, "split": test, "transforms": [squash]},
    },
    "loader": {"num_workers": 8},
  }

  config.optimizer = {"name": "sgd", "learning_rate": learning_rate, "momentum": 0.9}
  config.optimizer.update(accumulator_dtype="bfloat16", clip_norm=1.0)
  config.optimizer.schedule = {"name": "cosine", "warmup_steps": warmup_steps}
  config.recipe = common.recipe(batch_size=512, learning_rate=0.03)
  config.init_from = init_from or _published(size)
  config.sharding = {"mesh": _mesh(size)}
  config.log_every, config.eval_every = 50, max(1, config.num_steps // 10)
  config.checkpoint = {"every": config.eval_every, "keep": 1, "best": "val/accuracy"}
  return common.with_data_dir(config, data_dir)


WIDTHS = {
  "ti16": 192, "s16": 384, "s32": 384, "b16": 768, "b32": 768, "l16": 1024, "l32": 1024,
  "h14": 1280, "r50_b16": 768, "r50_b32": 768, "r50_l16": 1024, "r50_l32": 1024,
}  # fmt: skip
"""Width of each model (table 1), and of the layer before its head in pre-training."""


def _remat(size: str) -> str:
  """Returns the activation checkpointing of a model of this size: see `nn.transformer`."""
  return {768: "none", 1024: "dots", 1280: "full"}.get(WIDTHS[size], "none")


def _mesh(size: str) -> dict[str, int]:
  """Replicates the parameters of small models; shards those of L and H over all devices."""
  return {"data": 1, "fsdp": -1} if WIDTHS[size] >= 1024 else {"data": -1}


ON_KERNELS = ((".*/kernel", {"weight_decay": 1.0}), (".*", {"weight_decay": 0.0}))
"""Weight decay as in big_vision: not on position embeddings, class token, norms and biases."""

AUGMENTATIONS = {
  "none": (None, None),
  "light1": (0, None),  # RandAugment(2, 0) is not the identity
  "light2": (10, 0.2),
  "medium1": (15, 0.2),
  "medium2": (15, 0.5),
  "strong1": (20, 0.5),
  "strong2": (20, 0.8),
}
"""AugReg's table (arXiv:2106.10270): magnitude of RandAugment(2, .), Beta parameter of mixup.

Magnitudes are EfficientNet's and exceed 10."""


def _augmentation(name: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
  """Returns the transforms and the task's fields of a column of AugReg's table."""
  if name not in AUGMENTATIONS:
    raise ValueError(common.unknown_name("augmentation", name, AUGMENTATIONS))
  magnitude, mixup_alpha = AUGMENTATIONS[name]
  randaugment = {"name": "rand_augment", "num_layers": 2, "magnitude": magnitude}
  return (
    [] if magnitude is None else [randaugment],
    {} if mixup_alpha is None else {"mixup_alpha": mixup_alpha},
  )


def _few_shot(source: str, transforms: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns the evaluation of ViT's and big_vision's pre-training on ImageNet-1k, `source`."""
  probe = {"name": "few_shot", "shots": (1, 5, 10)}
  data = {"source": source, "fit_split": "train[:65000]", "split": "validation"}
  return {**data, "probe": probe, "transforms": transforms}


TRANSFERS = {
  "imagenet2012": (20_000, 500, "train[:99%]", "train[99%:]", "validation"),
  "cifar10": (10_000, 500, "train[:98%]", "train[98%:]", "test"),
  "cifar100": (10_000, 500, "train[:98%]", "train[98%:]", "test"),
  "oxford_iiit_pet": (500, 100, "train[:90%]", "train[90%:]", "test"),
  # 1020 + 1020 images, all used for training in the paper; the last 10 % are `val`.
  "oxford_flowers102": (500, 100, "train+validation[:80%]", "validation[80%:]", "test"),
}
"""By TFDS name: steps of table 4, warm-up; training, validation, test split of appendix B.1.1."""

OWN_IMAGES = (500, 100, "train[:90%]", "train[90%:]", "test")
"""As `TRANSFERS`."""


def _published(size: str) -> str:
  """Returns the file of the paper's checkpoint: ViT-B_16.npz, R50+ViT-B_16.npz."""
  backbone, _, name = size.rpartition("_")
  prefix = f"{backbone.upper()}+" if backbone else ""
  return f"{prefix}ViT-{name[0].upper()}_{name[1:]}.npz"


VARIANTS = {
  "demo": demo,
  "s16_imagenet": s16_imagenet,
  **{f"{size}_imagenet": variant_of(imagenet, size=size) for size in ("b16", "b32", "l16", "l32")},
  **{
    f"{size}_imagenet21k": variant_of(imagenet21k, size=size)
    for size in ("ti16", "s16", "b16", "b32", "l16", "l32", "h14", "r50_b16")
  },
  "b16_jft": variant_of(jft, size="b16"),
  "b32_jft": variant_of(jft, size="b32"),
  "l16_jft": variant_of(jft, size="l16", num_epochs=14, optimizer={"learning_rate": 4e-4}),
  "l32_jft": variant_of(jft, size="l32", optimizer={"learning_rate": 6e-4}),
  "h14_jft": variant_of(jft, size="h14", num_epochs=14, optimizer={"learning_rate": 3e-4}),
  "r50_b16_jft": variant_of(jft, size="r50_b16"),
  "r50_b32_jft": variant_of(jft, size="r50_b32"),
  "r50_l16_jft": variant_of(jft, size="r50_l16", num_epochs=14, optimizer={"learning_rate": 4e-4}),
  "r50_l32_jft": variant_of(jft, size="r50_l32", optimizer={"learning_rate": 2e-4}),
  "ti16_augreg": variant_of(augreg, size="ti16", augmentation="light1"),
  "s32_augreg": variant_of(augreg, size="s32", augmentation="medium1"),
  **{f"{size}_augreg": variant_of(augreg, size=size) for size in ("s16", "b32", "b16", "l16")},
  "ti16_augreg21k": variant_of(augreg21k, size="ti16", augmentation="none"),
  "s32_augreg21k": variant_of(augreg21k, size="s32", augmentation="none"),
  "s16_augreg21k": variant_of(augreg21k, size="s16", augmentation="light1"),
  "b32_augreg21k": variant_of(augreg21k, size="b32"),
  "b16_augreg21k": variant_of(augreg21k, size="b16"),
  "l16_augreg21k": variant_of(augreg21k, size="l16", augmentation="medium2"),
  **{
    f"{size}_finetune": variant_of(finetune, size=size)
    for size in ("b16", "b32", "l16", "l32", "r50_b16")
  },
  "h14_finetune": variant_of(finetune, size="h14", image_size=392),  # 384 is no multiple of 14
}
