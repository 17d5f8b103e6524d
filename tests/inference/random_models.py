"""Small models of each system with random variables, for tests of exports."""

import jax
import numpy as np

from tests.conftest import system_module
from vit_jax_zoo.registry import create_model
from vit_jax_zoo.weights import Preprocess, Pretrained

RESNET = {"blocks": (1, 1, 1, 1), "widths": (4, 4, 8, 8), "stem_width": 4}
SMALL = {"depth": 2, "width": 16, "num_heads": 2}
MODELS = {
  "vit": ("vit_b16", (32, 48), "classification", {**SMALL, "mlp_dim": 32, "num_classes": 5}),
  "igpt": ("igpt_s", (4, 4), "pixel_modelling", {**SMALL, "num_colors": 8, "num_positions": 16}),
  "lambda_resnet": (
    "lambda_resnet_50",
    (64, 64),
    "classification",
    {"blocks": (1, 1, 1, 1), "widths": (8,) * 4, "lambda_blocks": ("none", "none", "none", "all")},
  ),
  "detr": (
    "detr_r50",
    (64, 96),
    "detection",
    {
      **{"num_classes": 4, "num_queries": 6, "width": 16, "num_heads": 2, "mlp_dim": 16},
      **{"encoder_depth": 1, "decoder_depth": 2, "backbone": RESNET},
    },
  ),
  "fpt": (
    "fpt_segmentation_r50",
    (32, 48),
    "semantic_segmentation",
    {"num_classes": 3, "width": 8, "kernel_sizes": (1, 3), "window": 3, "backbone": RESNET},
  ),
}


def random_model(system, **preprocess):
  """Returns a small model with random variables; variances are positive."""
  system_module(system)
  name, size, task, fields = MODELS[system]
  model = create_model(name, **fields)
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *size, 3), np.float32))
  rng = np.random.default_rng(0)

  def draw(path, x):
    values = rng.normal(float(x.ndim == 1), 0.2, x.shape).astype(np.float32)
    return np.abs(values) + 0.1 if "var" in jax.tree_util.keystr(path) else values

  variables = jax.tree_util.tree_map_with_path(draw, shapes)
  config = {"num_classes": fields.get("num_classes"), "image_size": size}
  made = Preprocess(size, **preprocess)
  names = tuple(f"class {i}" for i in range(fields.get("num_classes") or 0))
  fields = {"class_names": names} if task == "classification" else {}
  return Pretrained(model, variables, made, config, task, fields)
