"""COCO's classes: their ids, which have gaps, and their names.

A detector that was trained on COCO answers with these ids: 1 to 90 for the 80 kinds of things, so
that `num_classes`, the highest id + 1, is 91; and 92 to 200 for the 53 kinds of stuff of the
panoptic annotations (from the files `instances_val2017.json` and `panoptic_val2017.json`).
"""

from collections.abc import Mapping, Sequence

_THING_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, -, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
bear, zebra, giraffe, -, backpack, umbrella, -, -, handbag, tie, suitcase, frisbee, skis,
snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, -, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich,
orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, -,
dining table, -, -, toilet, -, tv, laptop, mouse, remote, keyboard, cell phone, microwave,
oven, toaster, sink, refrigerator, -, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush
"""

THINGS = {
  number: name
  for number, name in enumerate(map(str.strip, _THING_NAMES.split(",")), start=1)
  if name != "-"
}
"""Names by id."""

STUFF = {
  92: "banner", 93: "blanket", 95: "bridge", 100: "cardboard", 107: "counter", 109: "curtain",
  112: "door-stuff", 118: "floor-wood", 119: "flower", 122: "fruit", 125: "gravel", 128: "house",
  130: "light", 133: "mirror-stuff", 138: "net", 141: "pillow", 144: "platform",
  145: "playingfield", 147: "railroad", 148: "river", 149: "road", 151: "roof", 154: "sand",
  155: "sea", 156: "shelf", 159: "snow", 161: "stairs", 166: "tent", 168: "towel",
  171: "wall-brick", 175: "wall-stone", 176: "wall-tile", 177: "wall-wood", 178: "water-other",
  180: "window-blind", 181: "window-other", 184: "tree-merged", 185: "fence-merged",
  186: "ceiling-merged", 187: "sky-other-merged", 188: "cabinet-merged", 189: "table-merged",
  190: "floor-other-merged", 191: "pavement-merged", 192: "mountain-merged", 193: "grass-merged",
  194: "dirt-merged", 195: "paper-merged", 196: "food-other-merged", 197: "building-other-merged",
  198: "rock-merged", 199: "wall-other-merged", 200: "rug-merged",
}  # fmt: skip
"""Names by id, of the panoptic annotations."""

NOT_A_CLASS = "N/A"
"""Stands for the ids in the gaps."""


def names_by_id(names: Mapping[int, str]) -> tuple[str, ...]:
  """Returns a name for each id from 0 to the highest, `NOT_A_CLASS` for those that have none."""
  return tuple(names.get(i, NOT_A_CLASS) for i in range(max(names, default=-1) + 1))


def coco_ids(names: Sequence[str]) -> tuple[int, ...] | None:
  """Returns the ids of COCO's classes in this order; None if these are not COCO's 80 or 133."""
  for classes in (THINGS, THINGS | STUFF):
    ids = {name: number for number, name in classes.items()}
    if set(names) == set(ids):
      return tuple(ids[name] for name in names)
  return None
