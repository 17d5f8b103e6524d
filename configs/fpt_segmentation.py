r"""FPT's semantic segmentation: a demo, and recipes for Cityscapes, ADE20K, PASCAL VOC and LIP.

  Zhang et al., "Feature Pyramid Transformer", ECCV 2020, arXiv:2007.09451

    python -m vit_jax_zoo.main --config=configs/fpt.py:demo_segmentation
    python -m vit_jax_zoo.main --config=configs/fpt.py:demo_segmentation,neck=ufp

With `neck=ufp` the pyramid stands alone, without the transformer: the paper's comparison.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config of `variant[,field=value...]`; the demo by default."""
  return common.build(arg, VARIANTS)


def demo_segmentation(
  *, neck: str = "fpt", num_steps: int = 500, batch_size: int = 16, seed: int = 0
) -> ConfigDict:
  """The class of every pixel of the demo's scenes: ten digits in front of five textures.

  Paper: none; the parts are the paper's, on maps of a quarter of the image's sides.
  Hardware: any. Two CPU cores need a few minutes.
  """
  load = {"name": "load_label_map"}
  source = {"source": "demo:scenes", "panoptic": True, "transforms": [load]}
  suffix = "" if neck == "fpt" else f"_{neck}"
  return ConfigDict(
    {
      "seed": seed,
      "num_steps": num_steps,
      "batch_size": batch_size,
      "eval_batch_size": 40,
      "model": {
        "name": f"fpt_segmentation_r50{suffix}",
        "num_classes": placeholder(int),
        "width": 48,
        "kernel_sizes": (1, 3, 5, 9),
        "window": 5,
        "backbone": {
          "blocks": (1, 1, 2, 1),
          "widths": (8, 16, 32, 32),
          "stem": "conv3",
          "stem_width": 16,
          "output_stride": 16,
        },
      },
      "task": {
        "name": "semantic_segmentation",
        "num_classes": placeholder(int),
        "class_names": placeholder(tuple),
        "per_class": True,
      },
      "data": {
        "train": {**source, "split": "train"},
        "eval": {"test": {**source, "split": "test"}},
      },
      "optimizer": {
        "name": "adamw",
        "learning_rate": 3e-3,
        "weight_decay": 1e-4,
        "clip_norm": 5.0,
        "schedule": {"name": "cosine", "warmup_steps": 50},
      },
      "log_every": 50,
      "eval_every": 0,
      "checkpoint": {"every": 0, "keep": 1},
    }
  )


VARIANTS = {"demo_segmentation": demo_segmentation}
