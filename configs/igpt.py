r"""Image GPT: a demo, and the recipes of the paper.

  iGPT     Chen et al., "Generative Pretraining from Pixels", ICML 2020

    python -m vit_jax_zoo.main --config=configs/igpt.py
    python -m vit_jax_zoo.main --config=configs/igpt.py:l_imagenet48
    python -m vit_jax_zoo.plan --config=configs/igpt.py:xl_imagenet64 --topology=v5p:4x4x4
    python -m vit_jax_zoo.main \
      --config=configs/igpt.py:s_finetune,dataset=cifar100,init_from=runs/igpt_s_imagenet
    python -m vit_jax_zoo.main --eval_only \
      --config=configs/igpt.py:s_probe,dataset=stl10,init_from=runs/igpt_s_imagenet
    python -m vit_jax_zoo.main --eval_only --config=configs/igpt.py:s_eval_nll

| variant                        | trains on       | from               | expected            |
|--------------------------------|-----------------|--------------------|---------------------|
| demo                           | digits, 8x8     | -                  | 1.3 nats per pixel  |
| s_imagenet   m l xl            | ImageNet, 32x32 | sections 3.1, 3.3  | S 2.09 nats         |
| l_imagenet48 xl_imagenet64     | 48x48, 64x64    | sections 3.1, 3.3  | -                   |
| s_finetune   m l               | CIFAR, ImageNet | section 3.4        | L 99.0 %, 88.5 %    |
| s_probe      m l               | CIFAR-10, ...   | section 3.5        | L 96.3 %            |
| s_eval_nll   m l               | ImageNet, 32x32 | OpenAI's README    | S 2.0895 nats       |

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


def demo(*, num_steps: int = 700, batch_size: int = 64, num_colors: int = 16) -> ConfigDict:
  """A small iGPT on scikit-learn's handwritten digits, without labels.

  Fits the palette to the training digits and trains next-pixel prediction. At the end it completes
  the lower half of one test digit per class, and evaluates linear probes of every layer's features.

  Paper: none; the architecture and the optimizer are iGPT's.
  Hardware: any. Two CPU cores need a few minutes: 7.5 minutes of CPU time.
  Expected: 1.3 nats per pixel on the test digits; a bigram model has 1.83.
  Ours: 1.27 nats, one seed. Linear probes: 89 % for the layer selected on validation, the last (83
    % for the first block's input, 84 to 88 % for the middle layers); all below the 96 % of raw
    pixels, at 0.3M parameters and 1437 images.
  """
  config = ConfigDict({"seed": 0, "num_steps": num_steps, "batch_size": batch_size})
  config.eval_batch_size = 64
  config.model = {"name": "igpt_s", "num_colors": num_colors, "num_positions": 64}
  config.model.update(width=64, depth=6, num_heads=4)
  config.task = {"name": "pixel_modelling", "completions": 6}

  whole = {"source": "demo:digits", "transforms": [{"name": "decode"}]}
  half = {"source": "demo:digits", "transforms": [{"name": "keep_prefix", "fraction": 0.5}]}
  one_per_class = "+".join(f"test[{i}:{i + 1}]" for i in range(10, 360, 36))
  config.data = {
    "train": {**whole, "split": "train"},
    "eval": {
      "test": {**whole, "split": "test"},
      "completions": {**half, "split": one_per_class},
      "probe": {**whole, "fit_split": "train", "split": "test"},
    },
  }

  config.optimizer = {"name": "adam", "learning_rate": 3e-3, "b2": 0.95}
  config.optimizer.schedule = {"name": "cosine", "warmup_steps": 100}
  config.log_every, config.eval_every = 50, 0
  config.checkpoint = {"every": 350, "keep": 1}
  return config


def imagenet(
  size: str,
  *,
  image_size: int = 32,
  learning_rate: float = 0.0,
  source: str = "tfds:imagenet2012",
  data_dir: str = "",
) -> ConfigDict:
  """Pre-training on ImageNet without labels, at 32x32, 48x48 or 64x64 pixels.

  Paper: sections 3.1 and 3.3 and appendix: Adam with b2 0.95 (0.999 gives loss spikes), no weight
    decay, no dropout, batch 128, a million steps; XL batch 64 and two million. One epoch of
    warm-up, then cosine to 0. Learning rates: L 0.001 at 32 pixels and 0.01 at 48, XL 0.0003 at 64;
    S and M are not stated and use L's: the paper searched .01 .003 .001 .0003 ... for the best
    final loss.
  Data: 4 % of the training images are held out; the official validation images are the test set.
    Short side 256 to 384, a random 224 crop, then resized to `image_size` with antialiasing (the
    paper states no filter). XL also had 100 million images from the web, which are not public.
  Palette: 512 colours, fitted at the start, or OpenAI's: --config.task.palette=kmeans_centers.npy
  Masked pixel modelling ("BERT") instead of autoregressive: --config.model.causal=False
  Hardware: L took about 2500 V100-days. L and XL shard their parameters over all devices and
    recompute each block (remat "full"). Compiled for, not run on, TPUs (docs/PLANS.md): XL at 64
    pixels needs 6.1 of 95 GiB per chip of a v5p:4x4x4, and 2.7 of 16 GiB of a v5e:16x16. The latter
    has more chips than the batch has images, so use tensor parallelism too:
    --config.sharding.mesh.fsdp=64 --config.sharding.mesh.model=4 for XL, 128 and 2 for L,
    `.data=128` and `.model=2` for S and M.
  Expected at 32 pixels, in nats per pixel on the test images: S 2.0895, M 2.0614, L 2.0466.
  Not yet run here.
  """
  batch_size, num_steps = (64, 2_000_000) if size == "xl" else (128, 1_000_000)
  rate = RATES.get((size, image_size), 1e-3)
  config = ConfigDict({"seed": 0, "num_steps": num_steps, "batch_size": batch_size})
  config.model = {"name": f"igpt_{size}", "num_positions": image_size**2, "dtype": "bfloat16"}
  config.model.remat = "attention"
  config.task = {"name": "pixel_modelling", "palette": placeholder(str), "palette_images": 20_000}

  train, test = _crops(image_size), _center(image_size)
  config.data = {
    "train": {"source": source, "split": "train[:96%]", "transforms": train},
    "eval": {
      "val": {"source": source, "split": "train[96%:]", "transforms": test},
      "test": {"source": source, "split": "validation", "transforms": test},
    },
    "loader": {"num_workers": 8},
  }

  config.optimizer = {"name": "adam", "learning_rate": learning_rate or rate, "b2": 0.95}
  config.optimizer.schedule = {"name": "cosine", "warmup_steps": 1_229_920 // batch_size}
  config.recipe = common.recipe(batch_size=batch_size, learning_rate=rate)
  config.sharding = {"mesh": {"data": -1}}
  config.log_every, config.eval_every = 50, 10_000
  config.checkpoint = {"every": 10_000, "keep": 1, "best": "val/log_likelihood"}
  return common.with_data_dir(config, data_dir)


def finetune(  # noqa: PLR0913  (each is a field that a command line may set)
  size: str,
  *,
  dataset: str = "cifar10",
  image_size: int = 32,
  source: str = "",
  data_dir: str = "",
  num_epochs: float = 0.0,
  learning_rate: float = 0.0,
  init_from: str = "",
) -> ConfigDict:
  """Fine-tuning with labels: the sum of the generative and the classification loss.

  Paper: section 3.4 and appendix: batch and Adam of pre-training, a constant learning rate,
    searched again and typically a tenth of pre-training's (the default, 0), no dropout; the head is
    on the last layer; early stopping on held-out training images: the best checkpoint is kept.
    CIFAR: a tenth held out; reflection padding of 4 pixels, crop, flip. ImageNet: 4 % held out;
    crops as in pre-training. The paper states no number of epochs (18 for a network from scratch on
    ImageNet); by default 20, on ImageNet 18.
  Data: `dataset` is cifar10, cifar100 or imagenet2012; or `source`, such as folder:/path, with
    ImageNet's crops and the splits `train` and `test`.
  Weights: `init_from`, a run of `imagenet`, or a published name such as igpt_s_imagenet; includes
    the palette.
  Hardware: not stated.
  Expected with L: CIFAR-10 99.0 %, CIFAR-100 88.5 %; ImageNet 66.3 % at 32 pixels, 72.6 % at 48.
  Not yet run here.
  """
  if dataset not in FINETUNED:
    raise ValueError(common.unknown_name("dataset", dataset, FINETUNED))
  train_split, val_split, test_split, epochs, epoch = OWN_IMAGES if source else FINETUNED[dataset]
  is_cifar = dataset.startswith("cifar") and not source
  source = source or f"tfds:{dataset}"
  rate = RATES.get((size, image_size), 1e-3) / 10
  config = ConfigDict({"seed": 0, "num_epochs": num_epochs or epochs, "batch_size": 128})
  config.model = {"name": f"igpt_{size}", "num_positions": image_size**2, "dtype": "bfloat16"}
  config.model.update(num_classes=placeholder(int), remat="attention")
  config.task = {"name": "pixel_modelling", "palette": placeholder(str), "class_weight": 1.0}

  train, test = _crops(image_size), _center(image_size)
  if is_cifar:
    shift = {"name": "random_translate", "pixels": 4, "fill": None}  # reflection padding
    down = [] if image_size == 32 else [_resize(image_size)]
    train, test = [*down, shift, {"name": "random_flip"}], down or [{"name": "decode"}]
  config.data = {
    "train": {"source": source, "split": train_split, "transforms": train},
    "eval": {
      "val": {"source": source, "split": val_split, "transforms": test},
      "test": {"source": source, "split": test_split, "transforms": test},
    },
    "loader": {"num_workers": 8},
  }

  config.optimizer = {"name": "adam", "learning_rate": learning_rate or rate, "b2": 0.95}
  config.optimizer.schedule = {"name": "constant"}
  config.recipe = common.recipe(batch_size=128, learning_rate=rate)
  config.init_from = init_from or f"runs/igpt_{size}_imagenet"
  config.sharding = {"mesh": {"data": -1}}
  config.log_every, config.eval_every = 50, epoch
  config.checkpoint = {"every": epoch, "keep": 1, "best": "val/accuracy"}
  return common.with_data_dir(config, data_dir)


def linear_probe(
  size: str, *, dataset: str = "cifar10", data_dir: str = "", init_from: str = ""
) -> ConfigDict:
  """Linear probes of every layer, for `--eval_only`: no training.

  Paper: section 3.5: L-BFGS logistic regression on the mean over positions of a layer's normalised
    input, without augmentation; a tenth of the training images selects layer and strength.
    ImageNet's probe uses SGD: python -m vit_jax_zoo.transfer --workdir=runs/igpt_l_imagenet
    --suite=linear_sgd --data=imagenet2012. XL's 15360 features are five layers around the best:
    --concatenate=5 there and --config.data.eval.probe.probe.concatenate=5 here.
  Data: `dataset` is cifar10, cifar100 or stl10.
  Weights: `init_from`, a run of `imagenet`.
  Hardware: holds the features of all layers in memory: 18 GB for L on CIFAR.
  Expected with L at 32 pixels: CIFAR-10 96.3 %, CIFAR-100 82.8 %, STL-10 95.5 %.
  Not yet run here.
  """
  if dataset not in PROBED:
    raise ValueError(common.unknown_name("dataset", dataset, PROBED))
  config = ConfigDict({"seed": 0, "num_steps": 1, "batch_size": 128})
  config.model = {"name": f"igpt_{size}", "num_positions": 32 * 32, "dtype": "bfloat16"}
  config.model.remat = "attention"
  config.task = {"name": "pixel_modelling", "palette": placeholder(str)}
  data = {"source": f"tfds:{dataset}", "transforms": [_resize(32)]}
  config.data = {
    "train": {**data, "split": "train"},
    "eval": {"probe": {**data, "fit_split": "train", "split": "test"}},
    "loader": {"num_workers": 8},
  }
  config.optimizer = {"name": "adam", "learning_rate": 0.0, "schedule": {"name": "constant"}}
  config.init_from = init_from or f"runs/igpt_{size}_imagenet"
  config.sharding = {"mesh": {"data": -1}}
  config.log_every = 50
  config.checkpoint = {"every": 1_000, "keep": 1}
  return common.with_data_dir(config, data_dir)


def published_nats(
  size: str,
  *,
  source: str = "tfds:imagenet2012",
  split: str = "validation",
  init_from: str = "",
  data_dir: str = "",
) -> ConfigDict:
  """Negative log-likelihood of a published checkpoint, for `--eval_only`.

  Paper: none; the values are from the README of openai/image-gpt, on ImageNet's validation images.
  Data: short side 224, central crop, resized to 32x32 with antialiasing. OpenAI does not state the
    filter, and smoother images have lower values: expect two matching decimals.
  Weights: `init_from`: a published name such as igpt_s_imagenet (OpenAI's file, by default) or
    igpt_s_imagenet_hub, a local file or folder of either format, or a run of `imagenet`. Their
    palette is used; values with another palette are not comparable.
  Hardware: any, in float32; S has 77M parameters, and there are 50,000 images of 1024 pixels.
  Expected test/nats: S 2.0895, M 2.0614, L 2.0466.
  Not yet run here. Images and weights were not available; the tests use small ones.
  """
  config = ConfigDict({"seed": 0, "num_steps": 1, "batch_size": 128})
  config.model = {"name": f"igpt_{size}", "num_positions": 32 * 32, "dtype": "float32"}
  config.model.remat = "none"
  config.task = {"name": "pixel_modelling", "palette": placeholder(str)}
  config.task.palette_images = 128  # for a palette that the checkpoint's replaces
  test = {"source": source, "split": split, "transforms": _center(32)}
  config.data = {"train": {**test}, "eval": {"test": test}, "loader": {"num_workers": 8}}
  config.optimizer = {"name": "sgd", "learning_rate": 0.0, "schedule": {"name": "constant"}}
  config.init_from = init_from or f"igpt_{size}_imagenet"
  config.sharding = {"mesh": {"data": -1}}
  config.log_every = 50
  config.checkpoint = {"every": 1_000, "keep": 1}
  return common.with_data_dir(config, data_dir)


RATES = {("l", 48): 1e-2, ("xl", 64): 3e-4}
"""Learning rates by size and resolution, if not 0.001."""

FINETUNED = {
  "cifar10": ("train[:90%]", "train[90%:]", "test", 20.0, 351),
  "cifar100": ("train[:90%]", "train[90%:]", "test", 20.0, 351),
  "imagenet2012": ("train[:96%]", "train[96%:]", "validation", 18.0, 9_609),
}
"""By TFDS name: training, validation and test split; number of epochs; steps of an epoch."""

OWN_IMAGES = ("train[:90%]", "train[90%:]", "test", 20.0, 100)
"""As `FINETUNED`; evaluated every 100 steps."""

PROBED = ("cifar10", "cifar100", "stl10")
"""TFDS names."""


def _crops(image_size: int) -> list[dict[str, Any]]:
  """Short side 256 to 384, a random 224 crop, then resized (appendix)."""
  scale = {"name": "random_resize_small", "smallest": 256, "largest": 384}
  return [scale, {"name": "random_crop", "size": 224}, _resize(image_size)]


def _center(image_size: int) -> list[dict[str, Any]]:
  """Short side 224, central crop, then resized."""
  scale = {"name": "resize_small", "size": 224, "method": "antialias"}
  return [scale, {"name": "central_crop", "size": 224}, _resize(image_size)]


def _resize(image_size: int) -> dict[str, Any]:
  return {"name": "resize", "size": image_size, "method": "antialias"}


FSDP = {"mesh": {"data": 1, "fsdp": -1}}
LARGE: dict[str, Any] = {"model": {"remat": "full"}, "sharding": FSDP}
"""Blocks are recomputed; parameters are sharded over all devices."""

VARIANTS = {
  "demo": demo,
  "s_imagenet": variant_of(imagenet, size="s"),
  "m_imagenet": variant_of(imagenet, size="m"),
  "l_imagenet": variant_of(imagenet, size="l", **LARGE),
  "xl_imagenet": variant_of(imagenet, size="xl", **LARGE),
  "l_imagenet48": variant_of(imagenet, size="l", image_size=48, **LARGE),
  "xl_imagenet64": variant_of(imagenet, size="xl", image_size=64, **LARGE),
  "s_finetune": variant_of(finetune, size="s"),
  "m_finetune": variant_of(finetune, size="m"),
  "l_finetune": variant_of(finetune, size="l", **LARGE),
  "s_probe": variant_of(linear_probe, size="s"),
  "m_probe": variant_of(linear_probe, size="m"),
  "l_probe": variant_of(linear_probe, size="l", **LARGE),
  "s_eval_nll": variant_of(published_nats, size="s"),
  "m_eval_nll": variant_of(published_nats, size="m"),
  "l_eval_nll": variant_of(published_nats, size="l", sharding=FSDP),
}

RENAMED = {f"{size}_nats": f"{size}_eval_nll" for size in ("s", "m", "l")}
