"""Twenty training steps of ViT against the same steps in PyTorch.

The tolerances are derived from the change of the reference's curve with the summation order.
"""

import jax
import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file

from tests.conftest import golden_folder
from vit_jax_zoo import load_pretrained
from vit_jax_zoo.registry import sharding_rules
from vit_jax_zoo.systems.vit import weights_timm as vit_timm
from vit_jax_zoo.tasks.classification import Classification
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.train_step import TrainingOptions, abstract_batch_of, build_program

WEIGHTS = golden_folder("vit_timm_a") / "weights.safetensors"


def train(config, inputs):
  """Returns losses and gradient norms of all steps, and the final parameters by timm's names."""
  loaded = load_pretrained(str(WEIGHTS), num_heads=4)
  images = inputs["images"].transpose(0, 1, 3, 4, 2)
  batches = [
    {"image": image, "label": label} for image, label in zip(images, inputs["labels"], strict=True)
  ]
  task = Classification(
    loaded.model, num_classes=10, label_smoothing=0.1, image_mean=0.0, image_std=1 / 255
  )
  optimizer = config["optimizer"]
  b1, b2 = optimizer["betas"]
  program = build_program(
    task,
    abstract_batch_of(batches[0], config["batch"]),
    TrainingOptions(
      {
        "name": "adamw",
        "learning_rate": optimizer["lr"],
        "b1": b1,
        "b2": b2,
        "eps": optimizer["eps"],
        "weight_decay": optimizer["weight_decay"],
        "clip_norm": config["clip"]["global_norm"],
      },
      num_steps=config["steps"],
    ),
    mesh=sharding.create_mesh({"data": 1}, jax.devices()[:1]),
    rules=sharding_rules("vit_b16"),
  )
  losses, norms = [], []
  with jax.set_mesh(program.mesh):
    state = program.initial_state(0, pretrain=lambda fresh: {**fresh, **loaded.variables})
    for step in range(config["steps"]):
      batch = sharding.to_global(batches[step % len(batches)], program.mesh)
      state, metrics = program.train_step(state, batch)
      losses.append(float(metrics["loss"].compute()))
      norms.append(float(metrics["gradient_norm"].compute()))
  params = traverse_util.flatten_dict(jax.device_get(state.params), sep="/")
  return np.array(losses), np.array(norms), vit_timm.state_dict(params)


def test_training_curve_equals_pytorch(load_golden):
  config, inputs, outputs = load_golden("train_vit_timm_a")
  losses, norms, params = train(config, inputs)
  np.testing.assert_allclose(losses, outputs["loss"], rtol=1e-4)
  np.testing.assert_allclose(norms, outputs["grad_norm"], rtol=1e-3)
  start = load_file(WEIGHTS)
  compared = [key.removeprefix("param/") for key in outputs if key.startswith("param/")]
  assert len(compared) == 5
  for key in compared:
    update, expected = params[key] - start[key], outputs[f"param/{key}"] - start[key]
    difference = np.linalg.norm(update - expected) / np.linalg.norm(expected)
    assert difference < 1e-3, f"{key}: update differs by {difference:.1e}"
