"""TTSR, arXiv:2006.04139: 4x super-resolution with a reference image."""

import pathlib

from vit_jax_zoo.registry import Format, Option, System

SYSTEM = System(
  models={"ttsr": "model:TTSR"},
  tasks={"super_resolution": "task:SuperResolution"},
  predictors={"super_resolution": "predictor:SuperResolutionPredictor"},
  options=(
    Option("reference", pathlib.Path, None, "reference image for super-resolution"),
    Option("tile", int, None, "tile size in pixels of the input, to use less memory"),
  ),
  formats=(
    Format("pt", "ttsr", "weights", "the official code's TTSR"),
    Format("pth-vgg19", "ttsr", "weights:VggFormat", "torchvision's VGG-19"),
  ),
  published="weights:PUBLISHED",
  paper_scores="weights:PAPER_SCORES",
  part_readers={
    "vgg": "weights:read_vgg",
    "params/generator/extractor": "weights:read_vgg",
  },
  several_inputs=("ttsr",),
  renamed_fields=(
    ("task.critic_updates", "discriminator_updates"),
    ("optimizer.critic", "discriminator"),
    ("recipe.learning_rates.critic", "discriminator"),
  ),
  removed_fields={
    "model.residual_scale": 1.0,
    "task.transferal_kind": "l2",
    "task.transferal_by_trust": False,
    "task.adversarial_kind": "wasserstein",
  },
)
