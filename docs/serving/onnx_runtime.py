"""Classifies images with an exported ONNX graph: needs onnxruntime, numpy and Pillow.

python docs/serving/onnx_runtime.py out/onnx a.jpg b.png

The graph is exported with --format=onnx --with_preprocessing.
"""

import json
import pathlib
import sys

import numpy as np
import onnxruntime
from PIL import Image

folder, *files = map(pathlib.Path, sys.argv[1:])
session = onnxruntime.InferenceSession(folder / "model.onnx")
names = json.loads((folder / "model.json").read_text())["class_names"]

for file in files:
  image = np.asarray(Image.open(file).convert("RGB"))
  (logits,) = session.run(["logits"], {"images": image[None]})
  best = int(np.argmax(logits[0]))
  print(file.name, names[best] if names else best)
