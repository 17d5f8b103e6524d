"""Published checkpoints by name: resolves names to files, downloads them, and uploads exports.

Downloads are stored in `~/.cache/vit_jax_zoo` or `$VIT_JAX_ZOO_CACHE`; those from the Hugging Face
hub in its own cache. Not by pooch: it compares whole checksums, and publishers give only prefixes.
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

from absl import logging
from etils import epath

from vit_jax_zoo.registry import load_from_each, model_name
from vit_jax_zoo.weights.key_map import WeightsError
from vit_jax_zoo.weights.readers import find_prefix

CACHE_VARIABLE, DEFAULT_CACHE = "VIT_JAX_ZOO_CACHE", "~/.cache/vit_jax_zoo"
CHUNK = 1 << 20
TIMEOUT = 30  # seconds without data

_HUB_NAME = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")
_TIMM_NAME = re.compile(r"\w+\.\w*in\d+k\w*")  # vit_base_patch16_224.augreg_in21k
_HUB_JSON = ["config.json", "preprocessor_config.json"]
_HUB_WEIGHTS = (
  ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"],
  ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"],
)


@dataclasses.dataclass(frozen=True)
class Entry:
  """A published checkpoint; each system lists its own in `System.published`."""

  model: str  # the registry's name of its architecture; "" of a part of a model
  urls: tuple[str, ...] = ()  # of its files; the first is read, the others are stored beside it
  hub: str = ""  # "owner/name" on the Hugging Face hub, instead of `urls`
  sha256: str = ""  # of the first file, or its prefix, if published
  score: str = "–"  # the publisher's, ImageNet-1k top-1 by default, with the image size
  source: str = "–"  # of the score


@functools.cache
def entries() -> Mapping[str, Entry]:
  """Returns the published checkpoints of all systems, by the name that `load_pretrained` takes."""
  return {name: entry for table in load_from_each("published") for name, entry in table.items()}


def resolve(name: str) -> str:
  """Returns the local or `gs://` path of a checkpoint; downloads it if necessary.

  `name` is an existing path, a key of `entries()`, a URL, or "owner/name" on the Hugging Face hub.
  Raises WeightsError for an unknown name or another file than the published one, OSError (one line)
  if a download fails, ImportError without `huggingface_hub`.
  """
  if name.startswith(("http://", "https://")):
    return download(name)
  if epath.Path(name).exists() or find_prefix(name):
    return name
  if entry := entries().get(name):
    if entry.hub:
      return _from_hub(entry.hub)
    folder = name if len(entry.urls) > 1 else ""
    path = download(entry.urls[0], sha256=entry.sha256, folder=folder)
    for url in entry.urls[1:]:
      download(url, folder=folder)
    return path
  if _HUB_NAME.fullmatch(name) and not name.endswith((".npz", ".safetensors", ".pth", ".bin")):
    return _from_hub(name)
  if _TIMM_NAME.fullmatch(name):
    return _from_hub(f"timm/{name}")
  raise WeightsError(f"{name}: no such file; expected a checkpoint or published name{_hint(name)}")


def _hint(name: str) -> str:
  file = f"/{name.rsplit('/', 1)[-1]}"
  same = [k for k, entry in entries().items() if any(u.endswith(file) for u in entry.urls)]
  if same:
    return f". To download a published file of that name, give {' or '.join(same)}"
  nearest = difflib.get_close_matches(model_name(name), entries(), n=1, cutoff=0.4)
  return f"; did you mean the published {nearest[0]}?" if nearest else ""


def download(url: str, *, sha256: str = "", folder: str = "") -> str:
  """Downloads a file unless it is cached; returns its path. OSError if that fails.

  It gets its name only when it is complete, and `sha256`, possibly a prefix, matches. `folder` is a
  subfolder of the cache, by default derived from the URL.
  """
  file = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rsplit("/", 1)[-1]
  cache = epath.Path(os.environ.get(CACHE_VARIABLE, DEFAULT_CACHE)).expanduser()
  target = cache / (folder or hashlib.sha256(url.encode()).hexdigest()[:8]) / file
  if target.exists():
    return str(target)
  target.parent.mkdir(parents=True, exist_ok=True)
  unfinished = target.with_name(f"{target.name}.{os.getpid()}.part")
  try:
    found = _transfer(url, unfinished)
  except (OSError, HTTPException, ValueError) as error:
    unfinished.unlink(missing_ok=True)
    reason = getattr(error, "reason", None) or error
    fix = "if this machine is offline, download it elsewhere and give the file's path"
    raise OSError(f"cannot download {url} ({reason}); {fix}") from None
  if not found.startswith(sha256):
    unfinished.unlink()
    wrong = f"{url} is not the file that was published: its sha256 begins with {found[:16]}"
    raise WeightsError(f"{wrong}, expected {sha256}")
  unfinished.rename(target)
  return str(target)


def _transfer(url: str, target: epath.Path) -> str:
  """Copies a URL to a file with a progress log; returns the sha256 of the content."""
  digest, done = hashlib.sha256(), 0
  logging.info("downloading %s", url)
  with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, target.open("wb") as file:
    total = int(answer.headers.get("Content-Length") or 0)
    while chunk := answer.read(CHUNK):
      file.write(chunk)
      digest.update(chunk)
      done += len(chunk)
      progress = done / 1e6, f"of {total / 1e6:.0f} MB" if total else "MB"
      logging.log_every_n_seconds(logging.INFO, "%.0f %s", 5, *progress)
  if total and done != total:
    raise OSError(f"the connection broke after {done} of {total} bytes")
  return digest.hexdigest()


def push(name: str, output: epath.Path, card: epath.Path) -> str:
  """Uploads a folder, or a file and its card, to "user/name" on the hub; returns the address."""
  hub = _import_hub(f"--push_to_hub={name}: needs huggingface_hub")
  try:
    api = hub.HfApi()
    api.create_repo(name, exist_ok=True)
    if output.is_dir():
      return str(api.upload_folder(repo_id=name, folder_path=output))
    api.upload_file(repo_id=name, path_or_fileobj=str(card), path_in_repo="README.md")
    return str(api.upload_file(repo_id=name, path_or_fileobj=str(output), path_in_repo=output.name))
  except Exception as error:  # its class depends on the network library
    reason = " ".join(str(error).split()).replace(hub.get_token() or "\0", "<token>")
    fix = "Log in by `hf auth login` or $HF_TOKEN, with a token that may write"
    raise OSError(f"--push_to_hub={name}: {reason.rstrip('.')}. {fix}") from None


def _import_hub(wrong: str) -> Any:
  try:
    return importlib.import_module("huggingface_hub")
  except ImportError:
    raise ImportError(f"{wrong}; pip install -e '.[hub]'") from None


def _from_hub(name: str) -> str:
  hub = _import_hub(f"{name}: no such file; for a model on Hugging Face's hub")
  for patterns in _HUB_WEIGHTS:
    try:
      folder = hub.snapshot_download(name, allow_patterns=[*_HUB_JSON, *patterns])
    except Exception as error:  # its class depends on the network library
      reason = (str(error).strip() or type(error).__name__).splitlines()[0]
      raise OSError(
        f"{name}: no such file, and not on the Hugging Face hub ({reason}); expected a model. "
        "If this machine is offline, download it elsewhere and give its folder"
      ) from None
    if any((epath.Path(folder) / pattern).exists() for pattern in patterns[:2]):
      return str(folder)
  raise WeightsError(f"{name} on Hugging Face's hub has neither model.safetensors nor a pickle")
