"""What all tests share: few threads, no display, no settings of the user's, and skips that name what is missing."""

import os
import tempfile

# Before anything imports torch or matplotlib; inherited by the processes and kernels that tests start.
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "evsam-hypothesis"))  # noqa: PTH118

import pytest


@pytest.fixture(scope="session", autouse=True)
def private_jupyter_folders():
    """Points Jupyter and IPython at a throw-away folder, so that nobody's profile or extensions take part."""
    with tempfile.TemporaryDirectory(prefix="evsam-jupyter-") as folder, pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            patch.setenv(name, os.path.join(folder, name.lower()))  # noqa: PTH118
        yield


def pytest_collection_modifyitems(items):
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_tests:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def mini():
    """The mini model, and where its weights are from."""
    from evsam_lib.deploy.onnx import load_weights

    return load_weights("efficientvit-sam-mini", "mini")


@pytest.fixture(scope="session")
def mini_onnx(mini, tmp_path_factory):
    """The mini model exported: the encoder for bytes, and the decoder with all it can have. Not to be changed."""
    from evsam_lib.deploy.onnx import export

    model, known = mini
    folder = tmp_path_factory.mktemp("onnx") / "mini"
    export(model, folder, uint8_input=True, mask_input=True, upsample=True, **known)
    return folder
