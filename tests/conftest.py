"""Test settings: eight CPU devices, float32 matrix products, no implicit rank promotion."""

import ctypes
import difflib
import gc
import importlib
import json
import os
import pathlib
import platform
import resource
import signal
import tempfile
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: fastest are one LLVM module per program, loops instead of
# fusion emitters, and no LLVM optimization (see `optimized`). XLA aborts at an unknown flag; jaxlib
# 0.10 is the last version with the flag for emitters.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
  + " --xla_cpu_parallel_codegen_split_count=1"
  + (" --xla_cpu_use_fusion_emitters=false" if metadata.version("jaxlib") < "0.11" else "")
).strip()

import jax
import matplotlib as mpl
import numpy as np
import pytest
from absl import flags

mpl.use("Agg")
# Background jobs of a shell ignore SIGINT, and nohup ignores SIGHUP; subprocesses would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
jax.config.update("jax_default_matmul_precision", "float32")
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags

# Tests share compiled programs that take longer than writing them. The folder belongs to this
# process: cache files are not written atomically, so a second process could read a partial file.
_CACHE = tempfile.TemporaryDirectory(prefix="compiled_")
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
# Source lines of operations, a tenth of the time of tracing.
jax.config.update("jax_traceback_in_locations_limit", 0)


def pytest_collection_finish():
  """Leaves garbage collection, a tenth of the time of tracing, to `pytest_runtest_teardown`."""
  gc.collect()
  gc.freeze()  # the million objects of imported modules
  gc.disable()


def _resident_bytes():
  try:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
  except FileNotFoundError:  # not Linux
    return 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
  """Drops compiled programs from a worker that comes near 2 GB; it would grow to 3 GB."""
  if _resident_bytes() < 1.7e9:
    return
  jax.clear_caches()
  gc.collect()
  if platform.libc_ver()[0] == "glibc":  # which keeps freed memory of small objects
    ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module")
def optimized():
  """LLVM's optimization level 1: for files that compute more than they compile."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


GOLDENS = pathlib.Path(__file__).parent / "goldens"


def golden_folder(name):
  """Returns the folder of a fixture. A missing fixture is an error, so that no test skips it."""
  folder = GOLDENS / name
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder}: no such fixture")
  return folder


def system_module(system, module=""):
  """Returns a module of a system's folder; skips the caller in a tree without the system."""
  if not (GOLDENS.parents[1] / "vit_jax_zoo" / "systems" / system).is_dir():
    pytest.skip(f"no {system}", allow_module_level=True)
  return importlib.import_module(f"vit_jax_zoo.systems.{system}.{module}".rstrip("."))


def pytest_addoption(parser):
  parser.addoption(
    "--update-goldens",
    action="store_true",
    help="rewrite goldens and generated pages from this run",
  )


def flat(tree, prefix=""):
  """Returns the leaves of a JSON value by path; empty containers are leaves."""
  if not isinstance(tree, dict | list) or not tree:
    return {prefix: tree}
  items = tree.items() if isinstance(tree, dict) else enumerate(tree)
  return {k: v for name, below in items for k, v in flat(below, f"{prefix}/{name}").items()}


@pytest.fixture
def golden_json(request):
  """`golden_json(name, value)`: compares `value` with tests/goldens/<name>.json, or rewrites it."""

  def check(name, value):
    path = GOLDENS / f"{name}.json"
    if request.config.getoption("--update-goldens"):
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    found, expected = flat(json.loads(json.dumps(value))), flat(json.loads(path.read_text()))
    keys = found.keys() | expected.keys()
    differ = sorted(k for k in keys if found.get(k, "absent") != expected.get(k, "absent"))
    if differ:  # an assertion would report both files in full
      lines = [f"{k}: {expected.get(k, 'absent')} -> {found.get(k, 'absent')}" for k in differ[:20]]
      pytest.fail(
        f"{path.name} differs in {len(differ)} places; if intended, run pytest "
        "--update-goldens and review the diff\n" + "\n".join(lines),
        pytrace=False,
      )

  return check


@pytest.fixture
def golden_text(request):
  """`golden_text(path, text)`: compares `text` with a file, or rewrites the file."""

  def check(path, text):
    if request.config.getoption("--update-goldens"):
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text, encoding="utf-8")
    expected = path.read_text(encoding="utf-8") if path.exists() else ""
    if text != expected:
      lines = difflib.unified_diff(expected.splitlines(), text.splitlines(), n=1, lineterm="")
      pytest.fail(
        f"{path.name} differs; if intended, run pytest --update-goldens and review the diff\n"
        + "\n".join(list(lines)[2:42]),
        pytrace=False,
      )

  return check


@pytest.fixture
def load_golden():
  """`load_golden("vit_a")`: the fixture's config (dict), inputs and outputs (dicts of arrays)."""

  def load(name):
    folder = golden_folder(name)
    config = json.loads((folder / "config.json").read_text())
    inputs = dict(np.load(folder / "inputs.npz"))
    outputs = dict(np.load(folder / "outputs.npz"))
    return config, inputs, outputs

  return load
