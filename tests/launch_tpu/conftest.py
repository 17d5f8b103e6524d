import pytest

from tests.launch_tpu.slice import Slice


@pytest.fixture
def tpu(tmp_path):
  made = Slice(tmp_path)
  yield made
  made.set(release="")
