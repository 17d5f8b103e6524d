"""Naming what pictures show: the likeliest classes, and what they rest on."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from vit_jax_zoo.inference.base import Image, Options, Prediction, Trained
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.visualize.attention import attention_rollout, draw_attention, draw_lambdas
from vit_jax_zoo.visualize.classification import draw_ranking


class ClassificationPredictor:
  """The `top_k` likeliest classes of a picture; with `explain`, where the model looked."""

  reads: ClassVar[frozenset[str]] = frozenset({"top_k", "explain"})

  def __init__(self, trained: Trained, options: Options) -> None:
    """Takes the model."""
    self._trained, self._options = trained, options
    self._task: Any = trained.task
    self._apply = jax.jit(functools.partial(_apply, self._task, options.explain))

  def __call__(self, image: Image) -> Prediction:
    """Returns `top`, best first: `label`, `name` where it is known, `probability`."""
    prepared = np.asarray(self._trained.prepare(image)["image"])
    logits, seen = self._apply(self._trained.variables, prepared[None])
    logits = np.asarray(logits)[0].astype(np.float64)
    probabilities = _probabilities(logits, self._task.objective)
    best = np.argsort(-probabilities, kind="stable")[: max(1, self._options.top_k)]
    names = self._task.class_names
    top = [
      {
        "label": int(label),
        **({"name": names[label]} if names else {}),
        "probability": float(probabilities[label]),
      }
      for label in best
    ]
    said = [names[label] if names else f"class {label}" for label in best]
    pictures: dict[str, Figure] = {
      "": draw_ranking(image, said, [entry["probability"] for entry in top])
    }
    if self._options.explain:
      pictures |= _explain(self._trained.model, np.clip(prepared, 0, 255), seen, said[0])
    return Prediction({"top": top}, pictures)


def _apply(task: Any, explain: bool, variables: Any, image: Any) -> tuple[Any, Any]:  # noqa: FBT001
  images = normalize_images(jnp.asarray(image), task.image_mean, task.image_std)
  if not explain:
    return task.model.apply(variables, images, train=False)["logits"], {}
  outputs, state = task.model.apply(variables, images, train=False, mutable=["intermediates"])
  return outputs["logits"], _kept(state["intermediates"])


def _kept(intermediates: Any) -> dict[str, Any]:
  """Returns attention maps and lambdas by path: all else would be copied to no purpose."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(intermediates):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.rsplit("/", 2)[-2] in ("weights", "position_lambda", "content_lambda"):
      found[name] = leaf
  return found


def _probabilities(logits: np.ndarray, objective: str) -> np.ndarray:
  if objective == "sigmoid":
    return 1 / (1 + np.exp(-logits))
  shifted = np.exp(logits - logits.max())
  return shifted / shifted.sum()


def _explain(
  model: Any, image: np.ndarray, seen: dict[str, Any], caption: str
) -> dict[str, Figure]:
  """Draws what the model family has to show.

  Raises:
    ValueError: nothing: its layers are all convolutions.
  """
  weights = _attention_maps(seen)
  if weights is not None:
    side = model.patch_side
    grid = (image.shape[0] // side, image.shape[1] // side)
    patches = attention_rollout(weights)[0][:, -grid[0] * grid[1] :]
    # The head sees the class token, or the mean over the patches.
    looked = patches[0] if model.pool == "cls" else patches[-grid[0] * grid[1] :].mean(axis=0)
    figure = draw_attention(
      image[None],
      looked.reshape(1, *grid).astype(np.float32),
      [caption],
      title="Attention",
      subtitle="rolled out from the head to the patches",
    )
    return {"attention": figure}
  lambdas = {
    path.removesuffix("/position_lambda/0"): np.asarray(leaf)[0]
    for path, leaf in seen.items()
    if "position_lambda" in path and np.ndim(leaf) == 5
  }
  if not lambdas:
    raise ValueError("--explain draws attention or lambdas, and this model has neither")
  return {"lambdas": draw_lambdas(image, lambdas)}


def _attention_maps(seen: dict[str, Any]) -> np.ndarray | None:
  """Returns the maps of all layers, [l b heads n n], of scanned or unrolled blocks."""
  maps = {path: np.asarray(leaf) for path, leaf in seen.items() if "/weights/" in path}
  if not maps:
    return None
  scanned = [leaf for leaf in maps.values() if leaf.ndim == 5]
  if scanned:
    return scanned[0]
  ordered = sorted(
    maps, key=lambda path: int("".join(filter(str.isdigit, path.split("block_")[1].split("/")[0])))
  )
  return np.stack([maps[path] for path in ordered])
