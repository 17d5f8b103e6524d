"""This package's side of every comparison, through its public train and prediction steps."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from implementations.base import Implementation, Setting
from vit_jax_zoo import export
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.registry import create_model, sharding_rules
from vit_jax_zoo.systems.fpt.transformer import FeaturePyramidTransformer
from vit_jax_zoo.systems.fpt.weights_official import state_dict
from vit_jax_zoo.systems.igpt.model import complete
from vit_jax_zoo.systems.ttsr.search import find_matches, transfer
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.tasks.base import LossContext
from vit_jax_zoo.training import host, sharding
from vit_jax_zoo.training.train_step import TrainingOptions, abstract_batch_of, build_program
from vit_jax_zoo.weights import Preprocess, Pretrained
from vit_jax_zoo.weights.load import flatten_variables
from vit_jax_zoo.weights.readers import write_safetensors

host.keep_freed_memory()  # as the commands do

ADAMW = {"name": "adamw", "learning_rate": 1e-4, "weight_decay": 0.1, "clip_norm": 1.0}
DETR = {
  **ADAMW,
  "weight_decay": 1e-4,
  "clip_norm": 0.1,
  "rules": (
    ("backbone/(stem|c2_block).*", {"frozen": True}),
    ("backbone/.*", {"learning_rate": 0.1}),
    (".*", {"weight_decay": 1.0}),
  ),
}
"""Optimizer of the paper, as in configs/detr.py."""

NUM_CLASSES, COCO_CLASSES, TARGETS, OBJECTS = 1000, 91, 100, 7
TEXTURE_WIDTHS = (256, 128, 64)  # VGG-19's relu3_1, relu2_1, relu1_1


def random_variables(init: Any, *args: Any) -> Any:
  """Returns initial variables plus noise, since a zero-initialised head would hide differences."""
  fresh = jax.device_get(jax.jit(init)(jax.random.key(0), *args))
  rng = np.random.default_rng(1)
  noisy = jax.tree.map(lambda x: x + 0.02 * rng.standard_normal(x.shape, x.dtype), fresh["params"])
  return {**fresh, "params": noisy}


def _model(setting: Setting, **fields: Any) -> Any:
  model = create_model(setting.model, dtype=setting.dtype, **fields)
  scanned = setting.unroll and hasattr(model, "scan_layers")
  return model.clone(scan_layers=False) if scanned else model


def classification(setting: Setting) -> Implementation:
  """ViT and LambdaResNet: train step and prediction step."""
  rng = np.random.default_rng(0)
  size = (setting.image_size, setting.image_size)
  batch = {
    "image": rng.integers(0, 256, (setting.batch_size, *size, 3), dtype=np.uint8),
    "label": rng.integers(0, NUM_CLASSES, setting.batch_size, dtype=np.int32),
  }
  fields: dict[str, Any] = {"num_classes": NUM_CLASSES}
  if setting.model.startswith("vit"):
    fields["activation"] = "gelu_tanh"
  model = _model(setting, **fields)
  images = normalize_images(jnp.asarray(batch["image"]), 0.5, 0.5)
  variables = random_variables(functools.partial(model.init, train=False), images)
  _write(setting, "safetensors-timm", model, variables, size)
  setting.write_inputs(**batch)
  task = create_task("classification", model, num_classes=NUM_CLASSES)
  logits = jax.jit(functools.partial(model.apply, train=False))(variables, images)["logits"]
  outputs = {"logits": logits, "training loss": _first_loss(task, variables, batch)}
  return _steps(setting, task, variables, batch, ADAMW, outputs)


def pixels(setting: Setting) -> Implementation:
  """Image GPT: train step, and sampling of the last pixels."""
  model = _model(setting, num_positions=setting.image_size**2)
  rng = np.random.default_rng(0)
  shape = (setting.batch_size, model.num_positions)
  tokens = rng.integers(0, model.num_colors, shape, dtype=np.int32)
  init = functools.partial(model.init, method="from_tokens")
  variables = random_variables(init, jnp.asarray(tokens))
  clusters = np.asarray(variables["palette"]["clusters"])
  images = (clusters[tokens] * 0.5 + 0.5) * 255
  side = setting.image_size
  batch = {"image": images.reshape(-1, side, side, 3).astype(np.float32)}
  _write(setting, "hf", model, variables, (side, side), task="pixel_modelling")
  setting.write_inputs(tokens=tokens)
  task = create_task("pixel_modelling", model)
  apply = jax.jit(functools.partial(model.apply, method="from_tokens"))
  logits = apply(variables, tokens)["pixel_logits"]
  outputs = {"logits": logits, "training loss": _first_loss(task, variables, batch)}
  result = _steps(setting, task, variables, batch, ADAMW, outputs)
  draw = jax.jit(functools.partial(complete, model))
  placed = jax.device_put(variables)
  given = jnp.full(setting.batch_size, model.num_positions - setting.pixels)

  def sample(count: int) -> None:
    for seed in range(count):
      images = draw(placed, tokens, given, jax.random.key(seed))
    jax.block_until_ready(images)

  return dataclasses.replace(result, runs={"train": result.runs["train"], "sample": sample})


def detection(setting: Setting) -> Implementation:
  """DETR: train step with matching and losses of six layers, and prediction step."""
  rng = np.random.default_rng(0)
  images, size = setting.batch_size, (setting.image_size, setting.image_size)
  batch = {
    "image": rng.integers(0, 256, (images, *size, 3), dtype=np.uint8),
    "boxes_cxcywh": rng.uniform(0.1, 0.5, (images, TARGETS, 4)).astype(np.float32),
    "labels": rng.integers(0, COCO_CLASSES, (images, TARGETS)).astype(np.int32),
    "is_target": np.tile(np.arange(TARGETS) < OBJECTS, (images, 1)),
  }
  model = _model(setting)
  task = create_task("detection", model, num_classes=COCO_CLASSES)
  normalized = normalize_images(jnp.asarray(batch["image"]), task.image_mean, task.image_std)
  variables = random_variables(functools.partial(model.init, train=False), normalized)
  _write(setting, "hf", model, variables, size, task="detection")
  setting.write_inputs(**batch)
  predicted = jax.jit(functools.partial(model.apply, train=False))(variables, normalized)
  outputs = {name: predicted[name] for name in ("logits", "boxes_cxcywh")}
  return _steps(setting, task, variables, batch, DETR, outputs)


def texture_search(setting: Setting) -> Implementation:
  """TTSR: texture search and transfer of three levels, and its gradients."""
  rng = np.random.default_rng(0)
  side = setting.image_size
  shapes = {"queries": (side, TEXTURE_WIDTHS[0]), "references": (side, TEXTURE_WIDTHS[0])}
  shapes |= {f"level_{s}": (side * s, c) for s, c in zip((1, 2, 4), TEXTURE_WIDTHS, strict=True)}
  maps = {
    name: np.maximum(rng.normal(size=(setting.batch_size, n, n, c)), 0).astype(np.float32)
    for name, (n, c) in shapes.items()
  }
  setting.write_inputs(**maps)

  def search(queries: jax.Array, references: jax.Array, *levels: jax.Array) -> tuple[Any, ...]:
    match = find_matches(queries, references)
    width = references.shape[2]
    textures = [
      transfer(x, match.index, grid_width=width, scale=x.shape[2] // width) for x in levels
    ]
    return match.relevance, *textures

  def total(*maps: jax.Array) -> jax.Array:
    return sum(jnp.sum(x) for x in search(*maps))

  placed = tuple(jax.device_put(x) for x in maps.values())
  forward, gradient = jax.jit(search), jax.jit(jax.grad(total, argnums=tuple(range(len(placed)))))
  relevance, *textures = forward(*placed)
  outputs = {"relevance": relevance, "index": find_matches(*placed[:2]).index}
  outputs |= {f"texture {s}": x for s, x in zip((1, 2, 4), textures, strict=True)}
  runs = {
    "search": repeated(lambda: forward(*placed)),
    "search and gradient": repeated(lambda: gradient(*placed)),
  }
  return Implementation(runs, _numpy(outputs), device())


def pyramid(setting: Setting) -> Implementation:
  """FPT in the official variant: four levels, forward and with gradients."""
  width = int(setting.model.rpartition("_")[2])
  model = FeaturePyramidTransformer(
    width, "official", lateral=False, dropout_rate=0.0, dtype=setting.dtype
  )
  rng = np.random.default_rng(0)
  levels = [
    rng.normal(size=(setting.batch_size, side, side, width)).astype(np.float32)
    for side in (setting.image_size // stride for stride in (4, 8, 16, 32))
  ]
  variables = random_variables(functools.partial(model.init, train=False), levels)
  flat = {path: np.asarray(x) for path, x in flatten_variables(variables).items()}
  write_safetensors(f"{setting.weights}.safetensors", state_dict(flat))
  setting.write_inputs(**{f"p{i}": x for i, x in enumerate(levels, 2)})
  placed, maps = jax.device_put(variables), jax.device_put(levels)
  forward = jax.jit(functools.partial(model.apply, train=False))

  def total(params: Any, levels: Any) -> Any:
    results, new = model.apply(
      {**placed, "params": params}, levels, train=True, mutable=["batch_stats"]
    )
    return sum(jnp.sum(x * x) for x in results), new

  gradient = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
  outputs = {f"p{i}": x for i, x in enumerate(forward(placed, maps), 2)}
  runs = {
    "forward": repeated(lambda: forward(placed, maps)),
    "forward and backward": repeated(lambda: gradient(placed["params"], maps)),
  }
  return Implementation(runs, _numpy(outputs), device())


def repeated(call: Any) -> Any:
  """Returns a function that calls `call` n times and waits for the last result."""

  def run(count: int) -> None:
    for _ in range(count):
      result = call()
    jax.block_until_ready(result)

  return run


def device() -> str:
  """Returns the number and kind of the devices."""
  return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _write(
  setting: Setting,
  file_format: str,
  model: Any,
  variables: Any,
  size: tuple[int, int],
  task: str = "classification",
) -> None:
  """Writes the weights in a published format."""
  pretrained = Pretrained(model, variables, Preprocess(size), {"image_size": size}, task=task)
  export.write(pretrained, file_format, setting.weights)


def _first_loss(task: Any, variables: Any, batch: Mapping[str, Any]) -> Any:
  """Returns the loss of the first training step."""

  @jax.jit
  def loss(variables: Any, batch: Any) -> Any:
    context = LossContext(jax.random.key(0), jnp.int32(0), task.normalizers(batch))
    return task.loss(variables, batch, context).loss

  return loss(variables, batch)


def _steps(
  setting: Setting,
  task: Any,
  variables: Any,
  batch: Mapping[str, np.ndarray],
  optimizer: Mapping[str, Any],
  outputs: Mapping[str, Any],
) -> Implementation:
  """Compiles the train and prediction steps of a run."""
  program = build_program(
    task,
    abstract_batch_of(batch, setting.batch_size),
    TrainingOptions(optimizer=optimizer, num_steps=100_000),
    mesh=sharding.create_mesh({"data": -1}),
    rules=sharding_rules(setting.model),
  )
  placed = sharding.to_global(batch, program.mesh)
  state = program.initial_state(seed=0, pretrain=lambda fresh: {**fresh, **variables})
  kept = program.initial_state(seed=0, pretrain=lambda fresh: {**fresh, **variables}).variables

  def train(count: int) -> None:
    nonlocal state
    for _ in range(count):
      state, metrics = program.train_step(state, placed)
    jax.block_until_ready((state, metrics))

  def predict(count: int) -> None:
    for _ in range(count):
      predictions = program.predict_step(kept, placed)
    jax.block_until_ready(predictions)

  return Implementation({"train": train, "predict": predict}, _numpy(outputs), device())


def _numpy(outputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
  return {name: np.asarray(jax.device_get(x), np.float32) for name, x in outputs.items()}
