r"""LambdaResNets: a demo, and the recipe of the paper's ablations.

  Bello, "LambdaNetworks: Modeling long-range interactions without attention", ICLR 2021,
  arXiv:2102.08602

    python -m vit_jax_zoo.main --config=configs/lambda_resnet.py
    python -m vit_jax_zoo.main --config=configs/lambda_resnet.py:ccll_imagenet

| variant                                             | trains on   | expected top-1           |
|-----------------------------------------------------|-------------|--------------------------|
| demo                                                | digits, 8x8 | 97 %                     |
| llll_imagenet  clll  ccll  cccl  cccc               | ImageNet-1k | 78.4 78.3 78.3 77.3 76.9 |

The four letters are the stages of a ResNet-50: C with 3x3 convolutions, L with lambda layers. Each
function below is a page of the lab book. Batch sizes are global. ImageNet has to be prepared first,
see the README.
"""

import functools

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config of `variant[,field=value...]`; the demo by default."""
  return common.build(arg, VARIANTS)


def demo(*, num_steps: int = 500, batch_size: int = 128) -> ConfigDict:
  """A small LambdaResNet on scikit-learn's handwritten digits: 1437 to learn from, 360 for a test.

  Paper: none; the blocks are the paper's, with lambda layers on the 8x8 and 4x4 maps.
  Hardware: any. Two CPU cores need about two minutes.
  Expected: 97 % of the test digits.
  """
  return ConfigDict(
    {
      "seed": 0,
      "num_steps": num_steps,
      "batch_size": batch_size,
      "model": {
        "name": "lambda_resnet_50",
        "num_classes": placeholder(int),
        "stem": "conv3",
        "stem_width": 32,
        "blocks": (2, 2, 1, 1),
        "widths": (16, 24, 32, 32),
        "lambda_blocks": ((1,), "all", "none", "none"),
        "lambda_layer": {"dim_k": 8, "receptive_field": 7},
      },
      "task": {
        "name": "classification",
        "num_classes": placeholder(int),
        "class_names": placeholder(tuple),
        "top_k": 3,
      },
      "data": {
        "train": {
          "source": "demo:digits",
          "split": "train",
          "transforms": [{"name": "random_translate", "pixels": 1}],
        },
        "eval": {
          "test": {"source": "demo:digits", "split": "test", "transforms": [{"name": "decode"}]}
        },
      },
      "optimizer": {
        "name": "sgd",
        "learning_rate": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "schedule": {"name": "cosine", "warmup_steps": 50},
        "weight_decay": 1e-4,
      },
      "log_every": 50,
      "eval_every": 250,
      "checkpoint": {"every": 250, "keep": 1},
    }
  )


def imagenet(
  placement: str,
  *,
  num_epochs: int = 90,
  batch_size: int = 4096,
  image_size: int = 224,
  source: str = "tfds:imagenet2012",
  data_dir: str = "",
) -> ConfigDict:
  """ResNet-50 with lambda layers in the stages marked l, on ImageNet-1k for 90 epochs.

  Paper: arXiv:2102.08602, the recipe of its ablations (tables 3 to 5): SGD with momentum 0.9, batch
    4096, rate 0.1 for each 256 images, 5 epochs of warm-up, cosine; weight decay 1e-4 on kernels
    and embeddings; label smoothing 0.1; running averages of batch norm and of the parameters
    decay by 0.9999; crops and flips, no dropout, no RandAugment; trained and tested at 224 pixels.
  Hardware: 32 TPU v3 cores in the paper. Training throughput there, in images a second on 8 cores:
    llll 1160, clll 2200, ccll 4980, cccl 7160, cccc 7240.
  Expected top-1: llll 78.4, clll 78.3, ccll 78.3, cccl 77.3, cccc 76.9 %.
  Not yet run here.
  """
  steps_per_epoch = 1_281_167 / batch_size
  crop = {"name": "random_resized_crop", "size": image_size, "area": (0.08, 1.0)}
  middle = [
    {"name": "resize_small", "size": image_size * 8 // 7},
    {"name": "central_crop", "size": image_size},
  ]
  config = ConfigDict(
    {
      "seed": 0,
      "num_epochs": num_epochs,
      "batch_size": batch_size,
      "model": {
        "name": f"lambda_resnet_50_{placement}",
        "num_classes": placeholder(int),
        "norm_momentum": 0.9999,
        "dtype": "bfloat16",
      },
      "task": {
        "name": "classification",
        "num_classes": placeholder(int),
        "class_names": placeholder(tuple),
        "label_smoothing": 0.1,
        "image_mean": (0.485, 0.456, 0.406),
        "image_std": (0.229, 0.224, 0.225),
      },
      "data": {
        "train": {
          "source": source,
          "split": "train",
          "transforms": [crop, {"name": "random_flip"}],
        },
        "eval": {"val": {"source": source, "split": "validation", "transforms": middle}},
        "loader": {"num_workers": 8},
      },
      "optimizer": {
        "name": "sgd",
        "learning_rate": 0.1 * batch_size / 256,
        "momentum": 0.9,
        "schedule": {"name": "cosine", "warmup_steps": round(5 * steps_per_epoch)},
        "weight_decay": 1e-4,
      },
      "ema_decay": 0.9999,
      "log_every": 50,
      "eval_every": 2_500,
      "checkpoint": {"every": 2_500, "keep": 1},
    }
  )
  return common.with_data_dir(config, data_dir)


VARIANTS = {
  "demo": demo,
  **{
    f"{placement}_imagenet": functools.partial(imagenet, placement)
    for placement in ("llll", "clll", "ccll", "cccl", "cccc")
  },
}
