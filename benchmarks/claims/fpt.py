"""FPT's claims (arXiv:2007.09451, section 4.1) on scenes with shapes of many sizes.

python -m benchmarks.claims.fpt
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from benchmarks.claims import common
from benchmarks.claims.common import Part, Scores, Setting, table_of

KINDS = {"ST": "self", "GT": "ground", "RT": "render"}
STEPS = 600
_LOAD, _PAD = {"name": "load_objects"}, {"name": "pad_objects", "num": 6}
FIELDS = {
  "data.train.source": "demo:shapes",
  "data.eval.test.source": "demo:shapes",
  "data.train.transforms": [_LOAD, _PAD],
  "data.eval.test.transforms": [{**_LOAD, "as_annotated": True}, _PAD],
  "model.anchor_sizes": (12, 24, 44),  # shapes: 8 to 54 pixels
  "model.canonical_size": 24,
}
SCORES = ("test/box_ap", "test/box_ap50")
SCALE = 4  # COCO's limits of sizes, 32 and 96 pixels, are 8 and 24 pixels of these images


def keep(parts: tuple[str, ...]) -> Callable[[], None]:
  """Returns a patch that leaves only these transformers in the pyramid."""

  def patch() -> None:
    from vit_jax_zoo.systems.fpt.transformer import FeaturePyramidTransformer

    for part in set(KINDS) - set(parts):  # no channels in the concatenation
      setattr(FeaturePyramidTransformer, f"_{KINDS[part]}", _nothing)

  return patch


def _nothing(_: Any, __: str, x: Any, *others: Any, train: bool) -> Any:
  del others, train
  return x[..., :0]


def by_size(config: ConfigDict, variables: Any) -> Scores:
  """Returns AP of small, medium and large shapes, and FLOPs of a prediction."""
  (found,) = common.evaluate(config, variables, {"": _enlarge}).values()
  sizes = [f"box_ap_{size}" for size in ("small", "medium", "large")]
  return {k: found[k] for k in sizes if k in found} | common.flops(config, variables)


def _enlarge(batch: dict[str, Any], found: dict[str, Any] | None) -> dict[str, Any]:
  """Scales areas and boxes in the scores, in place of the batch, and those of the predictions."""
  if found is None:
    batch["original_size"] = batch["original_size"] * SCALE
    batch["area"] = batch["area"] * SCALE**2
  return batch if found is None else found


SETTINGS = {
  neck: Setting(f"fpt:demo,neck={neck},num_steps={STEPS}", FIELDS, SCORES, measure=by_size)
  for neck in ("bfp", "fpn")
} | {
  " + ".join(parts): Setting(
    f"fpt:demo,num_steps={STEPS}", FIELDS, SCORES, patch=keep(parts), measure=by_size
  )
  for parts in (("ST",), ("GT",), ("RT",), tuple(KINDS))
}
ALL = " + ".join(KINDS)

PARTS = (
  Part(
    key="transformers",
    columns=table_of(
      {{"bfp": "plain pyramid", "fpn": "FPN"}.get(name, name): name for name in SETTINGS},
      {
        "AP": "test/box_ap",
        "AP50": "test/box_ap50",
        "below 8 px": "box_ap_small",
        "8 to 24 px": "box_ap_medium",
        "above 24 px": "box_ap_large",
        "parameters": "parameters",
        "FLOPs": "flops",
      },
    ),
    rows="pyramid",
    axis="box AP",
    ordered=False,
    plotted=("AP", "8 to 24 px", "above 24 px"),
    compared={
      **{
        f"{name} has a higher AP than the plain pyramid": ((name, SCORES[0]), ("bfp", SCORES[0]))
        for name in (*KINDS, ALL)
      },
      "All three have a higher AP than an FPN": ((ALL, SCORES[0]), ("fpn", SCORES[0])),
    },
  ),
)

if __name__ == "__main__":
  common.main("fpt")
