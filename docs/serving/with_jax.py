"""Classifies images with an exported StableHLO program: needs jax, numpy and Pillow.

python docs/serving/with_jax.py out/program a.jpg b.png

The program is exported with --format=stablehlo --with_preprocessing.
"""

import json
import pathlib
import sys

import jax.export
import numpy as np
from PIL import Image

folder, *files = map(pathlib.Path, sys.argv[1:])
program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
names = json.loads((folder / "model.json").read_text())["class_names"]

for file in files:
  image = np.asarray(Image.open(file).convert("RGB"))
  logits = np.asarray(program.call(image[None])["logits"][0])
  best = int(np.argmax(logits))
  print(file.name, names[best] if names else best)
