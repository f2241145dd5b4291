"""compat: torchvision becomes importable where it was not, and is left alone everywhere else."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from evsam_lib import compat

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)


def run_python(code: str) -> str:
    """Runs code in a fresh interpreter, since what it tests happens once per process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_torchvision
def test_timm_imports_and_torchvision_suppresses_boxes():
    run_python("""
from evsam_lib.compat import ensure_torchvision
ensure_torchvision()
assert ensure_torchvision() is False          # a second call finds nothing to do
import timm, torch, torchvision
from torchvision.ops import batched_nms, nms
assert timm.create_model("test_vit", pretrained=False) is not None

# A and B share 50 of 150 (IoU 1/3), C stands apart, D equals A.
boxes = torch.tensor([[0., 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [0, 0, 10, 10]])
scores = torch.tensor([0.6, 0.9, 0.3, 0.5])
assert nms(boxes, scores, 0.3).tolist() == [1, 2]        # B drops A and D
assert nms(boxes, scores, 0.5).tolist() == [1, 0, 2]     # A stays, and drops its double
assert nms(boxes[:0], scores[:0], 0.5).tolist() == []
assert batched_nms(boxes, scores, torch.tensor([0, 1, 0, 2]), 0.3).tolist() == [1, 0, 3, 2]   # classes apart
""")


@needs_torchvision
def test_call_after_import_of_torchvision_does_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())
    assert compat.ensure_torchvision() is False


@pytest.fixture
def cuda_built_torchvision(tmp_path, monkeypatch):
    """A stand-in, not imported, whose version file says CUDA; torch is one for the CPU."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "version.py").write_text("__version__ = '0.28.0+cu130'\n")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    importlib.invalidate_caches()
    return package


def test_only_a_cuda_torchvision_beside_a_cpu_torch_is_touched(cuda_built_torchvision, monkeypatch):
    assert compat._operators_missing()
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", "13.0")
        assert compat.ensure_torchvision() is False
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.4")
        assert compat.ensure_torchvision() is False
    (cuda_built_torchvision / "version.py").write_text("__version__ = '0.28.0+cpu'\n")
    assert compat.ensure_torchvision() is False
    assert "torchvision" not in sys.modules


def test_without_torchvision_nothing_happens(monkeypatch):
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert compat.ensure_torchvision() is False


def test_nms_keeps_ties_in_order_and_measures_in_single_precision():
    twins = torch.tensor([[0.0, 0, 4, 4], [8, 8, 12, 12], [0, 0, 4, 4]])
    assert compat._nms(twins, torch.tensor([0.5, 0.5, 0.5]), 0.5).tolist() == [0, 1]
    # Areas of a million pixels overflow float16 (largest 65504); IoU here is 0.5, not above it.
    large = torch.tensor([[0.0, 0, 1000, 1000], [0, 0, 1000, 500]], dtype=torch.float16)
    assert compat._nms(large, torch.tensor([0.9, 0.8], dtype=torch.float16), 0.5).tolist() == [0, 1]
    assert compat._nms(large, torch.tensor([0.9, 0.8], dtype=torch.float16), 0.49).tolist() == [0]
    assert compat._nms(torch.zeros(1, 4), torch.ones(1), 0.5).tolist() == [0]  # a box without area is kept, not NaN


class TestRoiAlign:
    """Boxes are pooled as torchvision's own Python function pools them, which takes every sample of every cell."""

    @pytest.mark.parametrize(("ratio", "aligned", "scale"), [(-1, False, 1.0), (-1, True, 0.5), (2, False, 0.5)])
    @needs_torchvision
    def test_against_torchvision(self, ratio, aligned, scale):
        compat.ensure_torchvision()
        spec = importlib.util.find_spec("torchvision.ops.roi_align")
        module = importlib.util.module_from_spec(spec)  # a fresh one, with its own function
        spec.loader.exec_module(module)
        generator = torch.Generator().manual_seed(0)
        maps = torch.randn(2, 3, 12, 10, dtype=torch.float64, generator=generator)
        corners = torch.rand(9, 2, 2, generator=generator, dtype=torch.float64) * torch.tensor([10.0, 12])
        boxes = torch.cat([corners.min(1).values, corners.max(1).values], 1)
        boxes = torch.cat([boxes, torch.tensor([[3.0, 3, 3, 3], [0, 0, 10, 12]])])  # without area; all of the map
        boxes = torch.cat([torch.arange(len(boxes))[:, None] % 2, boxes], 1)
        rest = (boxes, scale, 4, 5, ratio, aligned)
        torch.testing.assert_close(compat._roi_align(maps, *rest), module._roi_align.__wrapped__(maps, *rest))
        assert compat._roi_align(maps, boxes[:0], *rest[1:]).shape == (0, 3, 4, 5)

    def test_by_hand(self):
        ramp = torch.arange(6.0).expand(1, 1, 4, 6)
        boxes = torch.tensor([[0.0, 1, 1, 5, 3], [0, 20, 1, 30, 3]])
        found = compat._roi_align(ramp, boxes, 1.0, 1, 2, -1, False)
        assert found[0, 0, 0].tolist() == [2.0, 4.0]  # the middles of 1..3 and 3..5
        assert not found[1].any()  # beyond the map is nothing

    def test_a_gradient_flows_to_the_map(self):
        maps = torch.zeros(1, 1, 5, 5, requires_grad=True)
        compat._roi_align(maps, torch.tensor([[0.0, 1, 1, 3, 3]]), 1.0, 2, 2, -1, False).sum().backward()
        assert maps.grad.sum().item() == pytest.approx(4)  # each of the four bins hands out weights of sum 1
        assert not maps.grad[0, 0, 4].any()
