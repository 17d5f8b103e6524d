"""TTSR's claims (arXiv:2006.04139, ablations) on the stereo demo.

python -m benchmarks.claims.ttsr
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from benchmarks.claims import common
from benchmarks.claims.common import Change, Part, Scores, Setting, table_of
from vit_jax_zoo.data.transforms.super_resolution import enlarge, shrink

NOISE = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of noise in the reference
FIELDS = {"task.wrong_references": False, "eval_every": 0, "checkpoint.every": 0}
BASE = ("test/psnr", "test/ssim", "test/bicubic_psnr")


def references(batch: dict[str, Any]) -> dict[str, np.ndarray]:
  """Returns the references of a batch, from the ground truth itself to noise."""
  true, rng = batch["ref_image"].astype(np.float32), np.random.default_rng(0)
  noise = rng.uniform(0, 255, true.shape)
  mixed = {f"{share:.0%} noise": (1 - share) * true + share * noise for share in NOISE}
  mixed["the image itself"] = batch["image"]
  mixed["another part"] = np.roll(true, 1, axis=0)
  return {name: np.round(x).astype(np.uint8) for name, x in mixed.items()}


NAMES = ("the image itself", *(f"{share:.0%} noise" for share in NOISE), "another part")


def by_reference(config: ConfigDict, variables: Any) -> Scores:
  """Returns PSNR with references that are more or less similar to the image."""

  def replace(name: str) -> Change:
    def change(batch: dict[str, Any], found: dict[str, Any] | None) -> dict[str, Any]:
      if found is not None:
        return found
      given = references(batch)[name]
      blurred = np.stack([enlarge(shrink(x), x.shape[:2]) for x in given])
      return {**batch, "ref_image": given, "blurred_ref_image": blurred}

    return change

  found = common.evaluate(config, variables, {name: replace(name) for name in NAMES})
  return {name: scores["psnr"] for name, scores in found.items()}


def without_textures() -> None:
  """Leaves out both attentions: nothing is added to the maps."""
  _model()._attend = lambda _self, _scale, x, _texture, _soft: x * 0


def without_soft_attention() -> None:
  """Adds the transferred textures with a weight of 1."""
  original = _model()._attend
  _model()._attend = lambda self, scale, x, texture, soft: original(
    self, scale, x, texture, soft * 0 + 1
  )


def without_integration() -> None:
  """Leaves out the exchange between scales; the residual blocks stay."""
  from vit_jax_zoo.systems.ttsr import model

  model.Exchange.__call__ = lambda _self, maps: list(maps)


def _model() -> Any:
  from vit_jax_zoo.systems.ttsr.model import TTSR

  return TTSR


def _demo(**fields: Any) -> Setting:
  return Setting("ttsr:demo,num_steps=500", FIELDS, BASE, **fields)


SETTINGS = {
  "all parts": _demo(measure=by_reference),
  "without soft attention": _demo(patch=without_soft_attention),
  "without textures": _demo(patch=without_textures),
  "without integration": _demo(patch=without_integration),
}

PARTS = (
  Part(
    key="parts",
    columns=table_of(
      {name: name for name in SETTINGS},
      {"PSNR": BASE[0], "SSIM": BASE[1], "bicubic": BASE[2], "parameters": "parameters"},
    ),
    rows="setting",
    axis="PSNR, dB",
    ordered=False,
    compared={
      f"All parts have a higher PSNR than {name}": (("all parts", BASE[0]), (name, BASE[0]))
      for name in list(SETTINGS)[1:]
    },
  ),
  Part(
    key="reference",
    columns={
      "PSNR": {
        {"0% noise": "the other view"}.get(name, name): ("all parts", name) for name in NAMES
      }
    },
    rows="reference",
    axis="PSNR, dB",
    compared={
      "The other view is better than another part of the scene": (
        ("all parts", "0% noise"),
        ("all parts", "another part"),
      ),
      "Another part is better than noise": (
        ("all parts", "another part"),
        ("all parts", "100% noise"),
      ),
      "Noise is better than bicubic interpolation": (
        ("all parts", "100% noise"),
        ("all parts", BASE[2]),
      ),
    },
  ),
)

if __name__ == "__main__":
  common.main("ttsr")
