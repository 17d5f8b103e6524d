r"""Prepares a dataset as ArrayRecord files, which training reads by index.

    python -m vit_jax_zoo.data.prepare --dataset=imagenet2012 --data_dir=... --manual_dir=...
        with TFDS, from the archives in manual_dir. The only command that needs TensorFlow:
        pip install -e '.[prepare]'
    python -m vit_jax_zoo.data.prepare --from_tfrecord=.../imagenet2012/5.1.0 --data_dir=...
        from TFRecord files prepared by TFDS. No TensorFlow.
    python -m vit_jax_zoo.data.prepare --from_folder=... --dataset=flowers --data_dir=...
        from class folders, as `folder:` reads them. No TensorFlow.

Then train with `source="tfds:imagenet2012"`, and `data_dir` if it is not `$TFDS_DATA_DIR`.
"""

import argparse
import difflib
import importlib.util
import json
import os
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import NoReturn

import rich.console
import rich.progress
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from vit_jax_zoo.data.sources import folder
from vit_jax_zoo.data.sources import tfds as tfds_source
from vit_jax_zoo.errors import one_line

_CONSOLE = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)


def prepare_tfds(name: str, data_dir: pathlib.Path, manual_dir: str | None = None) -> pathlib.Path:
  """Prepares a TFDS dataset, downloaded or in `manual_dir`, as ArrayRecord; returns its folder.

  ValueError for an unknown dataset or missing archives; ModuleNotFoundError without TensorFlow,
  with which TFDS writes.
  """
  known = tfds.list_builders(with_community_datasets=False)  # community datasets need the network
  if re.split("[/:]", name)[0] not in known:
    nearest = ", ".join(difflib.get_close_matches(name, known)) or "none"
    raise ValueError(f"--dataset={name} is not a TFDS dataset; closest matches: {nearest}")
  if importlib.util.find_spec("tensorflow") is None:
    remedy = "pip install -e '.[prepare]', here or in another environment"
    raise ModuleNotFoundError(f"preparing {name} needs TensorFlow, unlike reading it: {remedy}")
  try:
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    _check_disk(name, data_dir, int(builder.info.dataset_size or 0))
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    builder.download_and_prepare(download_config=config)
  except (AssertionError, FileNotFoundError) as error:
    raise ValueError(f"TFDS could not prepare {name}: {one_line(str(error))[:400]}") from error
  return pathlib.Path(builder.data_dir)


def convert_tfrecord(prepared: str, data_dir: pathlib.Path) -> pathlib.Path:
  """Converts a TFRecord dataset of TFDS to ArrayRecord; returns its folder below `data_dir`.

  An interrupted conversion resumes at the first unfinished file. FileNotFoundError if there is no
  prepared dataset; ValueError if its files are not TFRecord, or do not have all records.
  """
  source = pathlib.Path(tfds_source.at_path(prepared))
  info = json.loads((source / "dataset_info.json").read_text())
  if info.get("fileFormat", "tfrecord") != "tfrecord":
    raise ValueError(f"{source} has {info['fileFormat']} files, expected tfrecord")
  target = data_dir / info["name"] / info.get("configName", "") / info["version"]
  if target.exists():
    raise ValueError(f"{target}: exists; remove it to convert {source} again")
  splits = tfds.builder_from_directory(source).info.splits.values()
  shards = [pair for s in splits for pair in zip(s.filepaths, s.shard_lengths, strict=True)]
  _check_disk(info["name"], data_dir, sum(os.path.getsize(shard) for shard, _ in shards))

  scratch = target.with_name(target.name + ".incomplete")
  scratch.mkdir(parents=True, exist_ok=True)
  for shard, length in rich.progress.track(shards, "converting", console=_CONSOLE):
    new = scratch / shard.name.replace(".tfrecord", ".array_record")
    if not new.exists():
      _convert_shard(os.fspath(shard), length, new)
  for file in source.iterdir():
    if file.is_file() and ".tfrecord" not in file.name:
      shutil.copyfile(file, scratch / file.name)
  for split in info["splits"]:
    template = split.get("filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")
    split["filepathTemplate"] = template.replace("tfrecord", "array_record")
  info["fileFormat"] = "array_record"
  (scratch / "dataset_info.json").write_text(json.dumps(info, indent=1))
  os.rename(scratch, target)
  return target


def prepare_folder(root: str, name: str, data_dir: pathlib.Path) -> pathlib.Path:
  """Packs class folders as ArrayRecord, returns the folder; ValueError for a bad name, no image."""
  if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
    raise ValueError(f"--dataset={name!r} cannot name a dataset; use lower case, digits and _")
  sources = {s: open_() for s, open_ in folder.find_splits(root).items() if s != "all"}
  features = {
    "image": tfds.features.Image(shape=(None, None, 3)),
    "label": tfds.features.ClassLabel(names=next(iter(sources.values())).info.class_names),
  }
  splits = {}
  for split, source in sources.items():
    text = one_line(f"reading {source.info.name}")
    tracked = rich.progress.track(range(len(source)), text, console=_CONSOLE)
    splits[split] = map(source.__getitem__, tracked)
  # A folder's order is already shuffled.
  return tfds_source.write_dataset(name, features, splits, data_dir, shuffle=False)


def _convert_shard(shard: str, length: int, new: pathlib.Path) -> None:
  unfinished = new.with_name(new.name + ".part")
  # group_size:1, as TFDS: records are compressed one by one.
  writer = array_record_module.ArrayRecordWriter(str(unfinished), "group_size:1")
  records = tfds_source.TFRecordFiles([shard], [length], bytes)
  for i in range(length):
    writer.write(records[i])
  writer.close()
  os.rename(unfinished, new)


def _check_disk(name: str, data_dir: pathlib.Path, size: int) -> None:
  data_dir.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(data_dir).free
  _print(
    f"{name}: about {size / 2**30:.1f} GiB in {data_dir}, where {free / 2**30:.1f} GiB are free; "
    "downloads and shuffling may temporarily need as much again"
  )
  if size > free:
    raise ValueError(f"--data_dir={data_dir}: not enough space for {name}; choose another")


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs one of the three commands and prints how to use the result."""
  summary, _, usage = (__doc__ or "").partition("\n\n")
  parser = _Parser(
    description=summary, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--dataset", help="name in TFDS, or of the new dataset with --from_folder")
  default = str(tfds_source.default_data_dir())
  parser.add_argument("--data_dir", default=default, help="output folder (default: %(default)s)")
  parser.add_argument("--manual_dir", help="archives that TFDS may not download")
  parser.add_argument("--from_tfrecord", help="dataset prepared by TFDS as TFRecord")
  parser.add_argument("--from_folder", help="a folder of class folders")
  given = parser.parse_args(arguments)
  if not given.dataset and not given.from_tfrecord:
    parser.error("set --dataset=imagenet2012 or --from_tfrecord=<prepared folder>")
  for flag in ("data_dir", "from_tfrecord", "from_folder"):
    if "://" in (value := getattr(given, flag) or ""):
      parser.error(f"--{flag}={value} is not on a local disk; prepare on one, and copy")
  data_dir = pathlib.Path(given.data_dir).expanduser()
  try:
    if given.from_tfrecord:
      prepared = convert_tfrecord(given.from_tfrecord, data_dir)
    elif given.from_folder:
      prepared = prepare_folder(given.from_folder, given.dataset, data_dir)
    else:
      prepared = prepare_tfds(given.dataset, data_dir, given.manual_dir)
  except (ValueError, OSError, ModuleNotFoundError) as error:
    raise SystemExit(one_line(f"prepare: {error}")) from error
  _print(f"ready: {prepared}")
  _print(f"use it as source='tfds:{prepared}'")


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    super().error(one_line(message))


def _print(text: str) -> None:
  _CONSOLE.print(one_line(text), markup=False)


if __name__ == "__main__":
  main()
