"""LambdaNetworks' claims (arXiv:2102.08602, sections 5.1 and 5.2, appendix D.1) on shapes.

    python -m benchmarks.claims.lambda_resnet

Networks are trained on scenes of 32x32 pixels; steps are measured at higher resolutions, too.
The self-attention of the comparison is multi-query attention with the lambda layer's queries, keys,
values and relative position embeddings: the same parameters, but with attention maps.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.claims import common
from benchmarks.claims.common import Part, Scores, Setting, table_of
from vit_jax_zoo import builder

SCENES = common.labelled_shapes(10_000)
ACCURACY = "test/accuracy"
SIDES, BATCHES = (64, 128), (8, 32)  # of the measured steps; resolutions have batch 8
_COMMON = {"source": "demo:shapes", "label_key": "label"}
_DECODE, _MOVE = {"name": "decode"}, {"name": "random_translate", "pixels": 4}
_SHRINK = {"name": "resize", "size": 32, "method": "area"}
FIELDS = {
  "num_steps": 1_500, "batch_size": 32, "eval_batch_size": 100, "eval_every": 0,
  "checkpoint.every": 0, "optimizer.learning_rate": 0.05,
  "data.train": {**_COMMON, "split": "train", "transforms": [_DECODE, _MOVE, _SHRINK]},
  "data.eval": {"test": {**_COMMON, "split": "test", "transforms": [_DECODE, _SHRINK]}},
  "model.stem": "conv7", "model.blocks": (1, 2, 1, 1), "model.widths": (16, 24, 32, 48),
  "model.lambda_blocks": ("all", "all", "all", "none"),  # maps of 8x8, 4x4 and 2x2
}  # fmt: skip


def _layer() -> Any:
  from vit_jax_zoo.systems.lambda_resnet import layer

  return layer


def content_only() -> None:
  """Sets the position embeddings to zero."""
  layer = _layer()
  original = layer.apply_lambdas
  layer.apply_lambdas = lambda q, k, v, embeddings, **options: original(
    q, k, v, embeddings * 0, **options
  )


def position_only() -> None:
  """Subtracts what the content lambdas add to the output."""
  layer = _layer()
  original = layer.apply_lambdas

  def apply(queries: Any, keys: Any, values: Any, embeddings: Any, **options: Any) -> Any:
    result = original(queries, keys, values, embeddings, **options)
    content = jnp.einsum("bhwik,bkv->bhwiv", queries, result.content_lambda)
    return result._replace(output=result.output - content)

  layer.apply_lambdas = apply


def self_attention() -> None:
  """Replaces lambdas by multi-query self-attention with relative position embeddings."""
  layer = _layer()

  def apply(queries: Any, keys: Any, values: Any, embeddings: Any, **options: Any) -> Any:
    del options
    relative = layer.relative_embeddings(layer._crop(embeddings, keys.shape[1:3]), keys.shape[1:3])
    logits = jnp.einsum("bhwik,byxuk->bhwiyx", queries, keys)
    logits += jnp.einsum("bhwik,hywxuk->bhwiyx", queries, relative)
    weights = jax.nn.softmax(logits, axis=(-2, -1))
    output = jnp.einsum("bhwiyx,byxuv->bhwiv", weights, values)
    return layer.LambdaOutput(output, jnp.zeros(()), jnp.zeros(()))

  layer.apply_lambdas = apply


def cost(config: ConfigDict, _: Any) -> Scores:
  """Returns seconds and temporary memory of a training step, by resolution and batch size."""
  scores = {}
  for side, batch_size in [*((side, BATCHES[0]) for side in SIDES), (SIDES[0], BATCHES[1])]:
    config.batch_size = config.eval_batch_size = batch_size
    resize = {"name": "resize", "size": side}
    for spec in (config.data.train, config.data.eval.test):
      spec.transforms = [_DECODE, resize]
    experiment = builder.build(config)
    with experiment.train_batches() as batches:
      batch = next(batches)
    with jax.set_mesh(experiment.mesh):
      program = experiment.program(batch)
      state = program.initial_state(0)
      step = program.train_step.lower(state, batch).compile()
      memory = step.memory_analysis().temp_size_in_bytes
      state, _ = jax.block_until_ready(step(state, batch))
      times = []
      for _ in range(5):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        times.append(time.perf_counter() - start)
    name = f"{side} px, batch {batch_size}"
    scores |= {f"ms, {name}": min(times) * 1e3, f"MB, {name}": memory / 1e6}
  return scores


def _network(
  fields: Mapping[str, Any] | None = None, patch: Callable[[], None] | None = None
) -> Setting:
  fields = FIELDS | (fields or {})
  return Setting("lambda_resnet:demo", fields, (ACCURACY,), prepare=SCENES, patch=patch)


def _scope(side: int | None) -> dict[str, Any]:
  return {"model.lambda_layer": {"dim_k": 8, "receptive_field": side}}


GLOBAL = _scope(None)
CONVOLUTIONS = {"model.lambda_blocks": ("none", "none", "none", "none")}
KINDS = {
  "lambdas": (GLOBAL, None),
  "self-attention": (GLOBAL, self_attention),
  "convolutions": (CONVOLUTIONS, None),
}
SETTINGS = (
  {name: _network(*kind) for name, kind in KINDS.items()}
  | {
    "content only": _network(GLOBAL, content_only),
    "position only": _network(GLOBAL, position_only),
  }
  | {f"scope {side}": _network(_scope(side)) for side in (3, 7)}
  | {
    f"cost of {name}": Setting(
      "lambda_resnet:demo", {**FIELDS, **fields}, patch=patch, measure=cost, train=False
    )
    for name, (fields, patch) in KINDS.items()
  }
)

_STEPS = [f"{side} px, batch {BATCHES[0]}" for side in SIDES] + [
  f"{SIDES[0]} px, batch {BATCHES[1]}"
]

PARTS = (
  Part(
    key="interactions",
    columns=table_of(
      {"both": "lambdas", "position only": "position only", "content only": "content only"},
      {"accuracy": ACCURACY},
    ),
    rows="lambdas",
    axis="accuracy",
    ordered=False,
    compared={
      "Both above position only": (("lambdas", ACCURACY), ("position only", ACCURACY)),
      "Position only above content only": (("position only", ACCURACY), ("content only", ACCURACY)),
    },
  ),
  Part(
    key="scope",
    columns={
      "accuracy": {
        **{f"{side}x{side}": (f"scope {side}", ACCURACY) for side in (3, 7)},
        "global": ("lambdas", ACCURACY),
      }
    },
    rows="scope",
    axis="accuracy",
    compared={
      "7x7 above 3x3": (("scope 7", ACCURACY), ("scope 3", ACCURACY)),
      "Global above 7x7": (("lambdas", ACCURACY), ("scope 7", ACCURACY)),
    },
  ),
  Part(
    key="layers",
    columns=table_of(
      {name: name for name in KINDS}, {"accuracy": ACCURACY, "parameters": "parameters"}
    ),
    rows="layers",
    axis="accuracy",
    ordered=False,
    compared={
      "Lambdas above self-attention": (("lambdas", ACCURACY), ("self-attention", ACCURACY)),
      "Lambdas above convolutions": (("lambdas", ACCURACY), ("convolutions", ACCURACY)),
    },
  ),
  Part(
    key="cost",
    columns={
      f"{name}, {unit}": {step: (f"cost of {name}", f"{unit}, {step}") for step in _STEPS}
      for unit in ("MB", "ms")
      for name in KINDS
    },
    rows="images",
    axis="MB",
    plotted=tuple(f"{name}, MB" for name in KINDS),
    compared={
      f"Self-attention needs more memory than lambdas at {step}": (
        ("cost of self-attention", f"MB, {step}"),
        ("cost of lambdas", f"MB, {step}"),
      )
      for step in _STEPS
    },
  ),
)

if __name__ == "__main__":
  common.main("lambda_resnet")
