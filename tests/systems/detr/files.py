"""DETR fixtures as official files and as Hugging Face folders."""

import json
import shutil

from safetensors.numpy import load_file

from tests.conftest import golden_folder

OFFICIAL = ("detr_a", "detr_dc5_a", "detr_panoptic_a")
HUGGING_FACE = ("detr_hf_a", "detr_hf_timm_a", "detr_hf_panoptic_a")


def official_file(name):
  return str(golden_folder(name) / "weights.safetensors")


def overrides_of(name):
  """Fields that the official file lacks: the dilation of the last stage."""
  config = json.loads((golden_folder(name) / "config.json").read_text())
  if not config["dilation"]:
    return {}
  sizes = {"blocks": config["depths"], "widths": config["stage_planes"]}
  backbone = {key: tuple(value) for key, value in sizes.items()}
  return {"backbone": {**backbone, "stem_width": config["stem_width"], "output_stride": 16}}


def hugging_face_folder(name, path):
  """Writes the fixture as a Hugging Face model folder."""
  source = golden_folder(name)
  golden = json.loads((source / "config.json").read_text())
  path.mkdir(parents=True, exist_ok=True)
  shutil.copy(source / "weights.safetensors", path / "model.safetensors")
  copied = (
    "d_model", "num_queries", "encoder_layers", "decoder_layers", "encoder_ffn_dim",
    "decoder_ffn_dim", "encoder_attention_heads", "decoder_attention_heads", "dilation",
  )  # fmt: skip
  config = {key: golden[key] for key in copied}
  config |= {"model_type": "detr", "dropout": 0.1, "activation_function": "relu"}
  config["id2label"] = {str(i): f"thing {i}" for i in range(golden["num_labels"])}
  (path / "config.json").write_text(json.dumps(config))
  return str(path)


def arrays_of(folder):
  return load_file(f"{folder}/model.safetensors")
