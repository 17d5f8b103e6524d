"""Serves an exported StableHLO program over HTTP: POST an image file, get its class as JSON.

python docs/serving/http_server.py out/program 8000
curl --data-binary @a.jpg localhost:8000

The program is exported with --format=stablehlo --with_preprocessing.
"""

import http.server
import io
import json
import pathlib
import sys

import jax
import numpy as np
from jax import export
from PIL import Image

folder, port = pathlib.Path(sys.argv[1]), int(sys.argv[2])
program = jax.jit(export.deserialize(bytearray((folder / "model.stablehlo").read_bytes())).call)
names = json.loads((folder / "model.json").read_text())["class_names"]


class Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    try:
      data = io.BytesIO(self.rfile.read(int(self.headers["Content-Length"])))
      image = np.asarray(Image.open(data).convert("RGB"))
      best = int(np.argmax(program(image[None])["logits"][0]))
    except (OSError, TypeError, ValueError) as error:
      self.send_error(400, explain=str(error))
      return
    content = json.dumps({"class": names[best] if names else best}).encode()
    self.send_response(200)
    self.send_header("Content-Type", "application/json")
    self.end_headers()
    self.wfile.write(content)


server = http.server.HTTPServer(("127.0.0.1", port), Handler)
if __name__ == "__main__":
  server.serve_forever()
