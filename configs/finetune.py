r"""Your own images, one folder per class: fine-tunes any classifier.

    python -m vit_jax_zoo.main --config=configs/finetune.py:source=folder:/path
    python -m vit_jax_zoo.main \
      --config=configs/finetune.py:model=vit_b16,source=folder:/path,init_from=ViT-B_16.npz
    python -m vit_jax_zoo.main \
      --config=configs/finetune.py:model=lambda_resnet26t,source=folder:/path,batch_size=16
    python -m vit_jax_zoo.predict --model=runs/... --images=photos/

| variant | trains on   | from                                        | expected |
|---------|-------------|---------------------------------------------|----------|
| finetune| your images | the ViT paper; what is usual for ResNets    | depends  |

Data: one folder per class, `source=folder:/path`; see `data/sources/folder.py`. About a tenth of
  the training images, by a hash of their names, selects the best checkpoint (`val`); `test` is the
  folder `test`, or another tenth. Unreadable images are logged, counted and skipped. The classes
  are the folders, sorted by name, or the lines of the text file `class_names`. Also csv:labels.csv,
  hf:user/name, wds:/path and tfds:beans (docs/guides/data.md). `multi_label=true` for images with
  any number of classes: a sigmoid for each. `flip=false` where left and right differ, as in text.
Weights: `init_from`, a file, a published name (docs/MODELS.md) or a run; by default AugReg's
  ImageNet-21k weights for a ViT, timm's for a LambdaResNet, which are then downloaded.
Few images: the best checkpoint has the lowest loss on `val`, since the accuracy on a few images is
  coarse. With many, use --config.checkpoint.best=val/accuracy and
  --config.checkpoint.best_mode=max, as papers do.
Small machines: `batch_size=8`, `--config.accumulation_steps=4`, `--config.model.remat=dots` (ViT),
  `head_only=true` (the rest is frozen), `dtype=float32` on a CPU, which has no fast bfloat16.

The function below is the recipe. iGPT's fine-tuning, with its two losses, is in
`configs/igpt.py` (`s_finetune,source=folder:/path`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config of `[variant,]field=value...`."""
  return common.build(arg, VARIANTS, RENAMED)


def finetune(  # noqa: PLR0913  (each is a field that a command line may set)
  *,
  model: str = "vit_b16",
  source: str = "folder:/path",
  init_from: str = "",
  num_epochs: float = 20.0,
  batch_size: int = 32,
  learning_rate: float = 0.0,
  image_size: int = 0,
  class_names: str = "",
  flip: bool = True,
  multi_label: bool = False,
  head_only: bool = False,
  dtype: str = "bfloat16",
  data_dir: str = "",
) -> ConfigDict:
  """Fine-tunes a pretrained classifier on your own classes.

  Paper: none. ViTs as in arXiv:2010.11929, appendix B.1.1: SGD with momentum 0.9, gradients clipped
    to norm 1, cosine to 0, no weight decay, a zero-initialised head; evaluations resize whole
    images to a square. A tenth is warm-up. LambdaResNets: 0.01 for batch 256 (arXiv:1805.08974).
  Learning rate: scaled linearly with `batch_size` (arXiv:1706.02677): 0.03 for 512 is 0.001875 for
    32. If the accuracy on `val` is poor, try a third and three times of it.
  Hardware: any. The largest batch that fits was not measured.
  Expected: depends on the images; report `best/test/accuracy`. Not yet run here.
  """
  model = common.model_name(model)
  family = _family(model)
  image_size = image_size or family.image_size
  config = ConfigDict({"seed": 0, "num_epochs": num_epochs, "batch_size": batch_size})
  config.model = {"name": model, "num_classes": placeholder(int), "dtype": dtype}
  sigmoid = {"objective": "sigmoid"} if multi_label else {}
  config.task = common.task("classification", per_class=True, **sigmoid)
  config.task.update(image_mean=family.image_mean, image_std=family.image_std)

  train, evaluation = _transforms(image_size, flip=flip, multi_label=multi_label)
  prepared = source.startswith(("tfds:", "demo:"))
  fit, choose = ("train[:90%]", "train[90%:]") if prepared else ("fit", "choose")
  images = {"source": source} | ({"class_names": class_names} if class_names else {})
  config.data = {
    "train": {**images, "split": fit, "transforms": train},
    "eval": {
      "val": {**images, "split": choose, "transforms": evaluation},
      "test": {**images, "split": "test", "transforms": evaluation},
    },
    "loader": {"num_workers": 0, "on_corrupt": "skip"},
  }

  rate = common.scaled_rate("sgd", family.learning_rate, batch_size, family.batch_size)
  config.optimizer = {"name": "sgd", "learning_rate": learning_rate or rate, "momentum": 0.9}
  config.optimizer.update(clip_norm=1.0, schedule={"name": "cosine", "warmup_steps": 0.1})
  if head_only:
    config.optimizer.rules = (("head/.*", {"frozen": False}), (".*", {"frozen": True}))
  config.recipe = common.recipe(family.batch_size, family.learning_rate)
  config.init_from = init_from or _published(model)
  once_an_epoch = max(1 / num_epochs, 0.02) if num_epochs > 1 else 0  # fraction of the run
  config.log_every, config.eval_every = 20, once_an_epoch
  best = {"best": "val/loss", "best_mode": "min", "eval_best_at_end": True}
  config.checkpoint = {"every": once_an_epoch, "keep": 1, **best}
  return common.with_data_dir(config, data_dir)


def _transforms(image_size: int, *, flip: bool, multi_label: bool) -> tuple[list[Any], list[Any]]:
  """Returns the transforms of training and evaluation."""
  train = [{"name": "random_resized_crop", "size": image_size, "area": (0.05, 1.0)}]
  train += [{"name": "random_flip"}] if flip else []
  squash = {"name": "resize", "size": image_size, "method": "bilinear", "dtype": "float32"}
  labels = [{"name": "multi_hot"}] if multi_label else []
  return [*train, *labels], [squash, *labels]


class Family(NamedTuple):
  """Recipe of a family of models."""

  learning_rate: float  # of SGD, for a batch of `batch_size`
  batch_size: int
  image_size: int  # default side of the images, in pixels
  image_mean: float | tuple[float, ...]  # of pixels in [0, 1], as in the published weights
  image_std: float | tuple[float, ...]
  weights: Mapping[str, tuple[str, ...]]  # suffix of published names -> models; first match wins


AUGREG = ("ti16", "s32", "s16", "b16", "l16", "r_ti16", "r26_s32", "r50_l32")
VIT = {
  "augreg_imagenet21k": tuple(f"vit_{size}" for size in AUGREG),
  "imagenet21k": ("vit_b32", "vit_l32", "vit_h14", "vit_r50_b16"),
}
LAMBDA = {"imagenet": ("lambda_resnet50ts", "lambda_resnet26t", "lambda_resnet26rpt_256")}

FAMILIES = {
  "vit": Family(0.03, 512, 224, 0.5, 0.5, VIT),
  "lambda_resnet": Family(0.01, 256, 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), LAMBDA),
}


def _family(model: str) -> Family:
  for prefix, family in FAMILIES.items():
    if model.startswith(prefix):
      return family
  known = [name for family in FAMILIES.values() for name in sum(family.weights.values(), ())]
  raise ValueError(common.unknown_name("classifier", model, known))


def _published(model: str) -> str:
  """Returns the published weights to start a model from, by name."""
  weights = _family(model).weights
  for ending, models in weights.items():
    if model in models:
      return f"{model}_{ending}"
  unknown = common.unknown_name("model with published weights", model, sum(weights.values(), ()))
  raise ValueError(f"{unknown}. Or set init_from=<a file or a run's folder>")


VARIANTS = {"finetune": finetune}

RENAMED = {"own": "finetune"}
