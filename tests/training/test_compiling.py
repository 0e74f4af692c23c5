"""torch.compile in training: the cache depends on the kernels' sources; an impossible CUDA graph is an error."""

import shutil
from pathlib import Path

import pytest
import torch
import torch._inductor.config

from minimind.kernels import triton_support
from minimind.training.job import compile_model


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    import torch.compiler.config as settings

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    with settings.patch(cache_key_tag=""):
        yield


def test_another_tile_size_is_compiled_anew(tmp_path, monkeypatch):
    """The graphs that torch.compile looks up in its cache do not contain the table of tile sizes."""
    import torch.compiler.config as settings

    compile_model(torch.nn.Linear(2, 2))
    before = settings.cache_key_tag
    copy = tmp_path / "kernels"
    shutil.copytree(Path(triton_support.__file__).parent, copy)
    monkeypatch.setattr(triton_support, "__file__", str(copy / "triton_support.py"))
    assert triton_support.kernels_fingerprint() == before
    table = copy / "swiglu.py"
    table.write_text(table.read_text(encoding="utf-8").replace("num_warps=4", "num_warps=8"), encoding="utf-8")
    compile_model(torch.nn.Linear(2, 2))
    assert settings.cache_key_tag != before


def test_a_model_that_no_cuda_graph_can_record_is_an_error(monkeypatch):
    """PyTorch would leave the graph out, with a line in a log."""
    told = {}
    monkeypatch.setattr(torch, "compile", lambda model, **how: told.update(how) or model)
    compile_model(torch.nn.Linear(2, 2), cuda_graph=True)
    known = torch._inductor.config.get_config_copy()
    assert told["options"] == {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
    assert told["options"].keys() <= known.keys()
    compile_model(torch.nn.Linear(2, 2))
    assert told["options"] is None
