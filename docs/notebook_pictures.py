"""Writes pictures of docs/systems/ from the saved outputs of the notebooks in colabs/.

python docs/notebook_pictures.py    # after the notebooks were executed
"""

import base64
import io
import json
import pathlib

from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
PICTURES = {  # file -> notebook, a part of the cell's code, the picture's index (0 if not given)
  "detr_curves": ("detr", '"box_ap50"])'),
  "detr_queries": ("detr", 'draw("attention")'),
  "fpt_levels": ("fpt", 'draw("levels")'),
  "fpt_predictions": ("fpt", "detect("),
  "igpt_heads": ("igpt", "draw_heads("),
  "igpt_probes": ("igpt", "probe_depth"),
  "lambda_resnet_norms": ("lambda_resnet", 'draw("lambdas")'),
  "ttsr_search": ("ttsr", 'draw("search")', 1),
  "vit_heads": ("vit", 'draw("heads")'),
  "vit_positions": ("vit", 'draw("model_positions")'),
}


def find_cell(notebook: str, code: str) -> dict:
  """Returns the only cell of a notebook with this code."""
  path = ROOT / "colabs" / f"{notebook}.ipynb"
  cells = json.loads(path.read_text())["cells"]
  kept = [c for c in cells if c["cell_type"] == "code" and code in "".join(c["source"])]
  if len(kept) != 1:
    raise ValueError(f"{path}: {len(kept)} cells with {code!r}; expected one")
  return kept[0]


def main() -> None:
  """Writes the pictures, each as a PNG in RGB."""
  for name, (notebook, code, *index) in PICTURES.items():
    outputs = (output.get("data", {}) for output in find_cell(notebook, code)["outputs"])
    images = [data["image/png"] for data in outputs if "image/png" in data]
    position = index[0] if index else 0
    if len(images) <= position:
      raise ValueError(f"{notebook}.ipynb: no saved picture of {code!r}; execute the notebook")
    with Image.open(io.BytesIO(base64.b64decode("".join(images[position])))) as picture:
      picture.convert("RGB").save(ROOT / f"docs/systems/{name}.png", optimize=True)


if __name__ == "__main__":
  main()
