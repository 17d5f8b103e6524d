import os
import subprocess
import sys

import pytest

from vit_jax_zoo.training import libtpu, malloc

COUNT_FAULTS = """
import resource
import jax, jax.numpy as jnp
from vit_jax_zoo.training.malloc import keep_freed_memory
{call}
f = jax.jit(lambda x: x + 1)
x = jnp.ones(2**24)  # glibc maps allocations of more than 32 MB
faults = []
for _ in range(60):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  f(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults[-11:])[5])  # the heap has grown to its size; once in a while it still does
"""

HAS_GLIBC = sys.platform == "linux" and "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")


@pytest.mark.skipif(not HAS_GLIBC, reason="settings of glibc")
def test_freed_memory_reused_without_page_faults():
  def faults_of(call):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", COUNT_FAULTS.format(call=call)]
    return int(subprocess.run(command, env=env, capture_output=True, check=True).stdout)

  assert 10 * faults_of("assert keep_freed_memory()") < faults_of("")


def test_accelerators_not_configured(monkeypatch):
  monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: pytest.fail("mallopt is called"))
  monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
  assert not malloc.keep_freed_memory()
  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setenv("TPU_NAME", "slice")
  assert libtpu.has_tpu()
  assert not malloc.keep_freed_memory()
