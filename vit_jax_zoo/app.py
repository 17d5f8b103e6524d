"""A web page that applies models to images dropped on it, and shows where they look.

    python -m vit_jax_zoo.app --model=runs/vit_demo
    python -m vit_jax_zoo.app --model=runs/detr_demo --model=runs/ttsr_demo --port=8000

A model is a run, a published file or folder, or a published name; several have a tab each. The page
is at http://127.0.0.1:7860, for this machine only. Needs `pip install -e '.[app]'`.
"""

import base64
import contextlib
import importlib
import io
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from absl import flags

from vit_jax_zoo import cli
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.errors import escape_controls, one_line
from vit_jax_zoo.inference import base
from vit_jax_zoo.inference.load import load

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags; not on import, as other commands have flags of the same names."""
  flags.DEFINE_multi_string("model", [], "a run, or a published file, folder or name")
  flags.DEFINE_string("host", "127.0.0.1", "address to listen at; 0.0.0.0: for other machines")
  flags.DEFINE_integer("port", 7860, "port to listen at")
  flags.DEFINE_bool("share", False, "also create a public link, through gradio.live")


def main(argv: Sequence[str]) -> int:
  """Serves the page until it is interrupted; returns 0."""
  if not (paths := [*FLAGS.model, *argv[1:]]):
    raise ValueError("--model is missing; expected a run's folder, or a published file or name")
  with tempfile.TemporaryDirectory() as folder:
    os.environ.setdefault("GRADIO_TEMP_DIR", folder)  # of uploads
    page = build([Model(path) for path in paths], folder)
    page.launch(server_name=FLAGS.host, server_port=FLAGS.port, share=FLAGS.share, show_error=True)
  return 0


class Model:
  """A model of the page; `inputs` are its fields: the image, and options that are images."""

  def __init__(self, path: str) -> None:
    self.name = path
    self._trained = load(path)
    self._kind = base.predictor_class(self._trained)
    read = [option for option in base.list_options() if option.name in self._kind.reads]
    self.inputs = ["image", *(option.name for option in read if option.type is pathlib.Path)]
    self._predictors: dict[bytes, Any] = {}  # the last one, by the images among its options

  def predict(self, *images: str | None) -> base.Result:
    """Returns the result for the image files of `inputs`."""
    files = dict(zip(self.inputs, images, strict=True))
    if missing := [name for name, file in files.items() if not file]:
      raise ValueError(f"{missing[0]}: missing; drop an image there")
    pixels = {name: base.read_image(str(file)) for name, file in files.items()}
    image_array, key = pixels.pop("image"), b"".join(x.tobytes() for x in pixels.values())
    if key not in self._predictors:
      self._predictors = {key: self._create(pixels)}
    return self._predictors[key](image_array)

  def _create(self, images: dict[str, np.ndarray]) -> Any:
    if "explain" in self._kind.reads:
      with contextlib.suppress(ValueError):  # this model has nothing to explain
        return base.create_predictor(self._trained, base.Options(explain=True, **images))
    return base.create_predictor(self._trained, base.Options(**images))

  def examples(self) -> list[dict[str, np.ndarray]]:
    """Returns inputs from the test data of a run, as far as these are still there."""
    data = self._trained.config.get("data", {})
    section = next(iter(data.get("eval", {}).values()), {})
    try:
      source = load_source(section["source"], section["split"])
    except (KeyError, ValueError, OSError):  # a published model, or its data are elsewhere
      return []
    chosen = np.linspace(0, len(source) - 1, min(4, len(source))).round().astype(int)
    return [self._kind.example_input(source[int(index)]) for index in chosen]


def build(models: Sequence[Model], folder: str) -> Any:
  """Returns the `gradio.Blocks`; writes example images to a folder. ImportError without Gradio."""
  os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no telemetry
  try:
    gr: Any = importlib.import_module("gradio")
  except ImportError:
    raise ImportError("the web page needs Gradio: pip install -e '.[app]'") from None
  with gr.Blocks(title="vit_jax_zoo", analytics_enabled=False) as page:
    short = [os.path.basename(os.path.normpath(model.name)) for model in models]
    labels = short if len(set(short)) == len(short) else [model.name for model in models]
    for model, label in zip(models, labels, strict=True):
      with gr.Tab(escape_controls(label)):
        _draw_model(gr, model, tempfile.mkdtemp(dir=folder))
  return page


def _draw_model(gr: Any, model: Model, folder: str) -> None:
  with gr.Row():
    with gr.Column():
      inputs = [gr.Image(type="filepath", label=name, height=300) for name in model.inputs]
      button = gr.Button("Predict", variant="primary")
      if examples := model.examples():
        files = [
          [_as_file(folder, f"{i}_{name}", example[name]) for name in model.inputs]
          for i, example in enumerate(examples)
        ]
        gr.Examples(files, inputs, label="from the test data")
    with gr.Column():
      answer = gr.Textbox(label="answer")
      picture = gr.Image(show_label=False, format="png", interactive=False)
  pictures = gr.HTML()
  with gr.Accordion("JSON", open=False):
    record = gr.JSON(show_label=False)

  def respond(*files: str | None) -> list[Any]:
    try:
      result = model.predict(*files)
    except (ValueError, OSError) as error:
      raise gr.Error(one_line(str(error)), print_exception=False) from None
    others = "\n".join(_as_html(result.draw(name)) for name in result.pictures if name)
    return [result.summary, result.draw(), others, result.to_dict()]

  outputs = [answer, picture, pictures, record]
  button.click(respond, inputs, outputs, api_name="predict")
  inputs[-1].upload(respond, inputs, outputs)


def _as_html(picture: PIL.Image.Image) -> str:
  stream = io.BytesIO()
  picture.save(stream, "PNG")
  data = base64.b64encode(stream.getvalue()).decode()
  return f'<img src="data:image/png;base64,{data}" style="max-width: 100%; display: inline">'


def _as_file(folder: str, name: str, image: np.ndarray) -> str:
  path = os.path.join(folder, f"{name}.png")
  PIL.Image.fromarray(image).save(path)
  return path


if __name__ == "__main__":
  cli.run(main, define_flags)
