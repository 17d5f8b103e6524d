r"""LambdaResNets: a demo, and the recipes of the paper: ablations, scaled networks, Mask R-CNN.

  Bello, "LambdaNetworks: Modeling long-range interactions without attention", ICLR 2021,
  arXiv:2102.08602

    python -m vit_jax_zoo.main --config=configs/lambda_resnet.py
    python -m vit_jax_zoo.main --config=configs/lambda_resnet.py:r50_ccll
    python -m vit_jax_zoo.main --config=configs/lambda_resnet.py:lambda152_256,batch_size=2048
    python -m vit_jax_zoo.main \
      --config=configs/lambda_resnet.py:lambda152_288_pseudo,pseudo_source=tfds:/path/to/pseudo/1.0.0

| variant                               | trains on           | expected top-1           |
|---------------------------------------|---------------------|--------------------------|
| demo                                  | digits, 8x8         | 97 %                     |
| r50_llll  r50_clll ... r50_cccc       | ImageNet, 90 epochs | 78.4 78.3 78.3 77.3 76.9 |
| lambda50_128 ... lambda420_320        | ImageNet, 350       | 77.4 ... 83.8 ... 84.9   |
| lambda50_128_pseudo ...               | and 130M more       | 82.1 ... 86.7            |
| mask_rcnn_lambda_resnet_101_coco  152 | COCO                | 49.4/43.5, 50.0/43.9 AP  |

The four letters are the stages of a ResNet-50: C for 3x3 convolutions, L for lambda layers.
`lambda152_256` is depth 152 at 256 px. Each function below is one recipe. Batch sizes are global;
the learning rate is scaled with them, as in the paper. Prepare ImageNet: docs/guides/data.md.
"""

from typing import NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common
from configs.common import variant_of


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config of `variant[,field=value...]`; the demo by default."""
  return common.build(arg, VARIANTS, RENAMED)


def demo(*, num_steps: int = 500, batch_size: int = 128) -> ConfigDict:
  """A small LambdaResNet on scikit-learn's handwritten digits: 1437 for training, 360 for test.

  Paper: none; the blocks are the paper's, with lambda layers on the 8x8 and 4x4 maps.
  Hardware: any. Two CPU cores need about two minutes.
  Expected: 97 % of the test digits.
  Ours: 98.1 % of 360 test digits, one seed. Rounding depends on cores and versions: earlier runs
    had 97.5 % on one core and 98.6 % on two.
  """
  config = ConfigDict({"seed": 0, "num_steps": num_steps, "batch_size": batch_size})
  config.model = {"name": "lambda_resnet_50", "num_classes": placeholder(int)}
  config.model.update(stem="conv3", stem_width=32, blocks=(2, 2, 1, 1), widths=(16, 24, 32, 32))
  config.model.lambda_blocks = ((1,), "all", "none", "none")
  config.model.lambda_layer = {"dim_k": 8, "receptive_field": 7}
  config.task = common.task("classification", top_k=3)
  shift = {"name": "random_translate", "pixels": 1}
  config.data = {
    "train": {"source": "demo:digits", "split": "train", "transforms": [shift]},
    "eval": {
      "test": {"source": "demo:digits", "split": "test", "transforms": [{"name": "decode"}]}
    },
  }
  config.optimizer = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": True}
  config.optimizer.update(weight_decay=1e-4, schedule={"name": "cosine", "warmup_steps": 50})
  config.log_every, config.eval_every = 50, 250
  config.explain = True
  config.checkpoint = {"every": 250, "keep": 1}
  return config


def imagenet(
  name: str,
  *,
  num_epochs: int = 90,
  batch_size: int = 4096,
  image_size: int = 224,
  source: str = "tfds:imagenet2012",
  data_dir: str = "",
) -> ConfigDict:
  """ResNet-50 with lambda layers in the stages marked l, on ImageNet-1k for 90 epochs.

  Paper: arXiv:2102.08602, tables 3 to 5 (ablations): SGD with momentum 0.9, batch 4096, learning
    rate 0.1 per 256 images, 5 epochs of warm-up, cosine; weight decay 1e-4 on kernels and
    embeddings; label smoothing 0.1; batch norm statistics and the EMA of the parameters decay by
    0.9999; crops and flips, no dropout, no RandAugment; trained and tested at 224 pixels.
  Hardware: 32 TPU v3 cores in the paper. Training throughput there, in images per second on 8
    cores: llll 1160, clll 2200, ccll 4980, cccl 7160, cccc 7240.
  Expected top-1: llll 78.4, clll 78.3, ccll 78.3, cccl 77.3, cccc 76.9 %.
  Not yet run here.
  """
  config = ConfigDict({"seed": 0, "num_epochs": num_epochs, "batch_size": batch_size})
  config.model = {"name": f"lambda_resnet_{name}", "num_classes": placeholder(int)}
  config.model.update(norm_momentum=0.9999, dtype="bfloat16")
  config.task = common.task("classification", label_smoothing=0.1)
  config.task.update(image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))

  crop = {"name": "random_resized_crop", "size": image_size, "area": (0.08, 1.0)}
  resize = {"name": "resize_small", "size": image_size * 8 // 7}  # 256 for 224
  val = [resize, {"name": "central_crop", "size": image_size}]
  config.data = {
    "train": {"source": source, "split": "train", "transforms": [crop, {"name": "random_flip"}]},
    "eval": {"val": {"source": source, "split": "validation", "transforms": val}},
    "loader": {"num_workers": 8},
  }

  rate = common.scaled_rate("sgd", 0.1, batch_size, 256)
  config.optimizer = {"name": "sgd", "learning_rate": rate, "momentum": 0.9, "weight_decay": 1e-4}
  config.optimizer.schedule = {"name": "cosine", "warmup_steps": round(5 * IMAGES / batch_size)}
  config.recipe = common.recipe(batch_size=4096, learning_rate=1.6)
  config.ema_decay = 0.9999
  config.log_every, config.eval_every = 50, 2_500
  config.checkpoint = {"every": 2_500, "keep": 1}
  return common.with_data_dir(config, data_dir)


class Network(NamedTuple):
  """A row of the appendix's table: a network and its regularization."""

  depth: int
  image_size: int  # in pixels, in training and test
  magnitude: int  # of RandAugment
  dropout_rate: float  # before the classifier
  drop_path_rate: float  # stochastic depth


NETWORKS = {
  "lambda50_128": Network(50, 128, 10, 0.2, 0.0),
  "lambda50_160": Network(50, 160, 10, 0.2, 0.0),
  "lambda101_160": Network(101, 160, 10, 0.3, 0.0),
  "lambda101_192": Network(101, 192, 15, 0.2, 0.0),
  "lambda152_192": Network(152, 192, 15, 0.3, 0.0),
  "lambda152_224": Network(152, 224, 15, 0.3, 0.1),
  "lambda152_256": Network(152, 256, 15, 0.3, 0.1),
  "lambda152_288": Network(152, 288, 15, 0.3, 0.1),
  "lambda270_256": Network(270, 256, 15, 0.3, 0.1),
  "lambda350_256": Network(350, 256, 15, 0.3, 0.2),
  "lambda350_288": Network(350, 288, 15, 0.3, 0.2),
  "lambda350_320": Network(350, 320, 15, 0.3, 0.2),
  "lambda420_320": Network(420, 320, 15, 0.3, 0.2),
}


def scaled(
  network: Network,
  *,
  num_epochs: int = 350,
  batch_size: int = 4096,
  source: str = "tfds:imagenet2012",
  data_dir: str = "",
) -> ConfigDict:
  """LambdaResNets from 50 to 420 layers deep, on ImageNet-1k for 350 epochs.

  Paper: arXiv:2102.08602, its speed-accuracy curve and appendix: as `imagenet`, but weight decay
    4e-5, RandAugment with 2 layers in TensorFlow's variant, dropout before the classifier and
    stochastic depth, with the appendix's values for this depth and size (`NETWORKS`); trained and
    tested at the same size. The paper uses batch 4096 or 2048, tunes on 2 % of the training images,
    and stops early from 350 layers at 288 pixels on: `best/` in the run's folder has the highest
    score. Momentum 0.9 and the decay of batch norm's statistics are stated for 90 epochs only.
  Hardware: 32 or 64 TPU v3 cores. Seconds for a step of 1024 images on 8 cores in bfloat16: 50 at
    128 .058, at 160 .089; 101 at 160 .14, at 192 .20; 152 at 192 .28, at 224 .38, at 256 .49; 270
    at 256 .91; 350 at 256 1.16, at 288 1.48, at 320 1.91; 420 at 320 2.25.
  Expected top-1: 50 at 128 77.4, at 160 79.2; 101 at 160 80.8, at 192 81.9; 152 at 192 82.5, at 224
    83.2, at 256 83.8; 270 at 256 84.2; 350 at 256 84.4, at 288 84.5, at 320 84.7; 420 at 320 84.9
    %.
  Not yet run here.
  """
  config = ConfigDict({"seed": 0, "num_epochs": num_epochs, "batch_size": batch_size})
  config.model = {"name": f"lambda_resnet_{network.depth}", "num_classes": placeholder(int)}
  config.model.update(norm_momentum=0.9999, dtype="bfloat16")
  config.model.update(dropout_rate=network.dropout_rate, drop_path_rate=network.drop_path_rate)
  config.task = common.task("classification", label_smoothing=0.1)
  config.task.update(image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))

  crop = {"name": "random_resized_crop", "size": network.image_size, "area": (0.08, 1.0)}
  randaugment = {"name": "rand_augment", "num_layers": 2, "magnitude": network.magnitude}
  train = [crop, {"name": "random_flip"}, randaugment]
  resize = {"name": "resize_small", "size": network.image_size * 8 // 7}
  val = [resize, {"name": "central_crop", "size": network.image_size}]
  config.data = {
    "train": {"source": source, "split": "train", "transforms": train},
    "eval": {"val": {"source": source, "split": "validation", "transforms": val}},
    "loader": {"num_workers": 8},
  }

  rate = common.scaled_rate("sgd", 0.1, batch_size, 256)
  config.optimizer = {"name": "sgd", "learning_rate": rate, "momentum": 0.9, "weight_decay": 4e-5}
  config.optimizer.schedule = {"name": "cosine", "warmup_steps": round(5 * IMAGES / batch_size)}
  config.recipe = common.recipe(batch_size=4096, learning_rate=1.6)
  config.ema_decay = 0.9999
  config.log_every, config.eval_every = 50, 2_500
  config.checkpoint = {"every": 2_500, "keep": 1}
  return common.with_data_dir(config, data_dir)


def pseudo_labelled(
  network: Network,
  *,
  num_epochs: int = 350,
  batch_size: int = 4096,
  source: str = "tfds:imagenet2012",
  pseudo_source: str = "tfds:pseudo_labelled",
  data_dir: str = "",
) -> ConfigDict:
  """LambdaResNets on ImageNet-1k and pseudo-labelled images.

  Paper: arXiv:2102.08602, its semi-supervised experiment: the recipe of `scaled` with the same
    strengths, on ImageNet and 130 million images of JFT, filtered, balanced between the classes
    and labelled by an EfficientNet-L2 with Noisy Student (88.4 %).
  Data: these images are not public. `pseudo_source` is your own prepared dataset with ImageNet's
    labels, one per image. The paper states neither how the datasets are mixed nor the length: here
    all images are drawn with equal probability, and `num_epochs` counts ImageNet's epochs only, so
    that the training costs as much as that of `scaled`.
  Hardware: as for `scaled`. 152 at 288 takes .63 seconds for 1024 images on 8 TPU v3 cores.
  Expected top-1: 50 at 128 82.1, at 160 83.4; 101 at 160 84.7, at 192 85.4; 152 at 192 86.1, at 224
    86.5, at 288 86.7 %.
  Not yet run here.
  """
  num_steps = round(num_epochs * IMAGES / batch_size)
  config = ConfigDict({"seed": 0, "num_steps": num_steps, "batch_size": batch_size})
  config.model = {"name": f"lambda_resnet_{network.depth}", "num_classes": placeholder(int)}
  config.model.update(norm_momentum=0.9999, dtype="bfloat16")
  config.model.update(dropout_rate=network.dropout_rate, drop_path_rate=network.drop_path_rate)
  config.task = common.task("classification", label_smoothing=0.1)
  config.task.update(image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))

  crop = {"name": "random_resized_crop", "size": network.image_size, "area": (0.08, 1.0)}
  randaugment = {"name": "rand_augment", "num_layers": 2, "magnitude": network.magnitude}
  train = [crop, {"name": "random_flip"}, randaugment]
  resize = {"name": "resize_small", "size": network.image_size * 8 // 7}
  val = [resize, {"name": "central_crop", "size": network.image_size}]
  config.data = {
    "train": {"source": source, "split": "train", "transforms": train},
    "eval": {"val": {"source": source, "split": "validation", "transforms": val}},
    "loader": {"num_workers": 8},
  }
  more = {"source": pseudo_source, "split": "train"}
  if data_dir and pseudo_source.startswith("tfds:"):
    more["data_dir"] = data_dir
  config.data.train.extra_sources = (more,)

  rate = common.scaled_rate("sgd", 0.1, batch_size, 256)
  config.optimizer = {"name": "sgd", "learning_rate": rate, "momentum": 0.9, "weight_decay": 4e-5}
  config.optimizer.schedule = {"name": "cosine", "warmup_steps": round(5 * IMAGES / batch_size)}
  config.recipe = common.recipe(batch_size=4096, learning_rate=1.6)
  config.ema_decay = 0.9999
  config.log_every, config.eval_every = 50, 2_500
  config.checkpoint = {"every": 2_500, "keep": 1}
  return common.with_data_dir(config, data_dir)


def mask_rcnn(
  depth: int,
  *,
  batch_size: int = 256,
  accumulation_steps: int = 1,
  source: str = "coco:/path",
  data_dir: str = "",
) -> ConfigDict:
  """Mask R-CNN with a LambdaResNet backbone, on COCO from scratch.

  Paper: arXiv:2102.08602, its COCO experiment: 1024x1024 pixels, 130,000 steps of batch 256,
    learning rate 0.32 after 1000 steps of warm-up, / 10 after 90, 95 and 97.5 %; weight decay 4e-5;
    batch norm trained, over all devices; large-scale jitter. Heads and pyramid are the standard
    ones.
  Differs from the paper: the shorter side is drawn from 512 to 2048 and cropped to 1024 (paper: 0.1
    to 2.0 times the image, padded where smaller).
  Hardware: about 128 TPU v3 cores; not stated.
  Expected AP of boxes / masks on val2017: 101 49.4 / 43.5, 152 50.0 / 43.9; with a ResNet-101
    48.2 / 42.6.
  Not yet run here.
  """
  config = ConfigDict({"seed": 0, "num_steps": 130_000, "batch_size": batch_size})
  config.accumulation_steps, config.eval_batch_size = accumulation_steps, 16
  config.model = {"name": f"mask_rcnn_lambda_resnet_{depth}", "num_classes": placeholder(int)}
  config.model.dtype = "bfloat16"
  config.task = common.task("instance_detection")
  config.task.update(backbone_file=placeholder(str), neck_file=placeholder(str))
  config.task.update(rpn_inside_only=False, box_smooth_l1_beta=1 / 9)

  scale = {"name": "random_scale_crop", "shorter": (1024,), "longest": 1024}
  scale |= {"crop_probability": 1.0, "crop_from": tuple(range(512, 2049, 128))}
  jitter = {**scale, "crop_sides": (512, 1024)}
  resize = {"name": "resize_shorter", "shorter": 1024, "longest": 1024}
  pad = {"name": "pad_objects"}
  train = [{"name": "load_objects", "masks": True}, {"name": "random_flip"}, jitter, pad]
  truth = {"name": "load_objects", "as_annotated": True, "run_lengths": 500_000}
  val = [truth, resize, pad]
  config.data = {
    "train": {"source": source, "split": "train", "transforms": train},
    "eval": {"val": {"source": source, "split": "validation", "transforms": val}},
    "loader": {"num_workers": 8, "buckets": 6},
  }

  rate = common.scaled_rate("sgd", 0.32, batch_size, 256)
  config.optimizer = {"name": "sgd", "learning_rate": rate, "momentum": 0.9, "weight_decay": 4e-5}
  steps = {"boundaries": (0.9, 0.95, 0.975), "factors": (0.1, 0.1, 0.1)}
  config.optimizer.schedule = {"name": "step", "warmup_steps": 1000, **steps}
  config.recipe = common.recipe(batch_size=256, learning_rate=0.32)
  config.log_every, config.eval_every = 50, 10_000
  config.checkpoint = {"every": 2_000, "keep": 1}
  return common.with_data_dir(config, data_dir)


PSEUDO_LABELLED = (
  "lambda50_128", "lambda50_160", "lambda101_160", "lambda101_192", "lambda152_192",
  "lambda152_224", "lambda152_288",
)  # fmt: skip
"""Networks with pseudo-label results in the paper."""

IMAGES = 1_281_167
"""Number of ImageNet's training images."""

VARIANTS = {
  "demo": demo,
  "r50_llll": variant_of(imagenet, name="50_llll"),
  "r50_clll": variant_of(imagenet, name="50_clll"),
  "r50_ccll": variant_of(imagenet, name="50_ccll"),
  "r50_cccl": variant_of(imagenet, name="50_cccl"),
  "r50_cccc": variant_of(imagenet, name="50_cccc"),
  **{
    name: variant_of(scaled, network=network)
    for name, network in NETWORKS.items()
    if name != "lambda152_288"  # with pseudo-labels only
  },
  **{f"{n}_pseudo": variant_of(pseudo_labelled, network=NETWORKS[n]) for n in PSEUDO_LABELLED},
  "mask_rcnn_lambda_resnet_101_coco": variant_of(mask_rcnn, depth=101),
  "mask_rcnn_lambda_resnet_152_coco": variant_of(mask_rcnn, depth=152),
}

RENAMED = {
  **{f"{s}_imagenet": f"r50_{s}" for s in ("llll", "clll", "ccll", "cccl", "cccc")},
  **{name.replace("lambda", "r"): name for name in VARIANTS if name.startswith("lambda")},
}
