"""Backbones that others have trained, whatever they are published as.

    torchvision, timm    conv1.weight, layer1.0.conv1.weight, ...       a ResNet
    Hugging Face         embedder.embedder.convolution.weight, ...      a ResNet
    timm                 stem.conv1.conv.weight, stages.0.0. ...        a LambdaResNet
    Caffe                conv1_w, res2_0_branch2a_w, ...bn_s, ...bn_b   R-50.pkl, R-101.pkl
    Detectron.pytorch    Conv_Body.conv_body.res2.0.conv1.weight, ...   taken out of a detector
    resnet50_caffe.pth   torchvision's names for Caffe's weights

Caffe's networks see BGR; their first convolutions are turned round, so that ours see RGB. In a file
with torchvision's names nothing shows it but "caffe" in the name of the file. Caffe's have their
stride in the blocks' first convolution: the backbone's `stride_in_1x1` goes with them, and no file
tells. Heads of classifiers stay behind.
"""

import re
from collections.abc import Mapping, Sequence

from etils import epath

from vit_jax_zoo.systems.lambda_resnet import weights_timm as lambda_resnet_timm
from vit_jax_zoo.systems.rcnn import weights_detectron as rcnn_detectron
from vit_jax_zoo.weights import key_map as table
from vit_jax_zoo.weights import resnet_torchvision
from vit_jax_zoo.weights.key_map import STATISTICS, Flat, Row, WeightsError
from vit_jax_zoo.weights.readers import read_published

_BODY = "Conv_Body.conv_body."
_BLOB = re.compile(r"conv1_w|res_conv1_bn_[sb]|res\d_\d+_branch\w+?(_w|_bn_[sb])")
_BRANCHES = {"2a": ("conv1", "bn1"), "2b": ("conv2", "bn2"), "2c": ("conv3", "bn3")}
# A bias of the first convolution is in some of Caffe's files, and Detectron leaves it out, too.
_LEFT_OUT = (r"conv1_b", r"(pred|fc1000)_[wb]", r".*_momentum", r"lr|weight_order")


def read_backbone(path: str, shapes: Mapping[str, tuple[int, ...]]) -> Flat:
  """Returns a backbone's arrays by path.

  Args:
    path: of the file.
    shapes: of the backbone's variables, by path as in `Checkpoint.table`.

  Raises:
    WeightsError: the file holds no backbone that is known, or another than `shapes` wants; all that
      does not fit is listed.
  """
  arrays, rows, ignore = _known(read_published(path).arrays, path)
  return table.read(arrays, rows, shapes, source=path, ignore=ignore)


def _known(arrays: Flat, path: str) -> tuple[Flat, Sequence[Row], Sequence[str]]:
  """Returns a file's arrays, their table, and what of them may stay unused."""
  if lambda_resnet_timm.is_of(arrays):
    rows = _in_any_norm(lambda_resnet_timm.table_of(arrays))
    return arrays, rows, (*lambda_resnet_timm.IGNORE, r"head\.fc\..*")
  if resnet_torchvision.is_of(arrays):
    if "caffe" in epath.Path(path).name.lower():
      arrays = {**arrays, "conv1.weight": arrays["conv1.weight"][:, ::-1]}
    return arrays, resnet_torchvision.table_of(arrays, path), resnet_torchvision.IGNORE
  blobs = {_detectron_key(key): array for key, array in arrays.items() if _BLOB.fullmatch(key)}
  if f"{_BODY}res1.conv1.weight" in blobs:
    rest = {key: array for key, array in arrays.items() if not _BLOB.fullmatch(key)}
    return _caffe({**blobs, **rest}, _LEFT_OUT)
  if f"{_BODY}res1.conv1.weight" in arrays:
    return _caffe(arrays, (rf"(?!{re.escape(_BODY)}).*",))
  keys = ", ".join(sorted(arrays)[:3])
  raise WeightsError(f"{path} holds no ResNet and no LambdaResNet; its keys begin with {keys}")


def _caffe(arrays: Flat, ignore: Sequence[str]) -> tuple[Flat, Sequence[Row], Sequence[str]]:
  unfolded = rcnn_detectron.unfold_norms(arrays, _BODY)
  return unfolded, _in_any_norm(rcnn_detectron.backbone_rows(ours="")), ignore


def _in_any_norm(rows: Sequence[Row]) -> list[Row]:
  """Adds to the rows of a trained norm's scale and bias those of a frozen one, and the reverse."""
  found = list(rows)
  for row in rows:
    if re.search(r"norm\w*/(scale|bias)$", row.ours):
      is_frozen = row.ours.startswith(STATISTICS)
      ours = row.ours.removeprefix(STATISTICS) if is_frozen else STATISTICS + row.ours
      found.append(Row(row.published, ours, row.transform))
  return found


def _detectron_key(blob: str) -> str:
  """Returns Detectron.pytorch's key of one of Caffe's blobs."""
  name, _, kind = blob.rpartition("_")
  is_norm = name.endswith("_bn")
  name = name.removesuffix("_bn")
  suffix = "bias" if kind == "b" else "weight"
  if not name.startswith("res") or name == "res_conv1":
    return f"{_BODY}res1.{'bn1' if is_norm else 'conv1'}.{suffix}"
  stage, block, branch = name.split("_")
  layers = _BRANCHES.get(branch.removeprefix("branch"), ("downsample.0", "downsample.1"))
  return f"{_BODY}{stage}.{block}.{layers[is_norm]}.{suffix}"
