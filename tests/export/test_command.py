"""`minimind export` from the command line: its files, its output, and errors that leave nothing behind."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from minimind import ModelConfig, cli, load_model, load_tokenizer
from minimind.export import command, hf
from minimind.export import gguf as gguf_files
from minimind.lora import LoRAConfig, add_adapter, lora_linears
from minimind.lora_files import save_adapter
from minimind.modeling import Model
from minimind.training.arguments import StageArgs
from minimind.training.initial_model import InitialModel
from minimind.weights import save_weights
from tests.export.small import CONFIGS, model_of


@pytest.fixture
def folder(tmp_path) -> Path:
    return saved(tmp_path / "run", CONFIGS["qwen3"])


def saved(path: Path, config: ModelConfig) -> Path:
    save_weights(model_of(config), path)
    load_tokenizer().save(path)
    return path


def adapter(path: Path, config: ModelConfig, base: Path | None = None, **settings) -> Path:
    model = model_of(config)
    add_adapter(model, LoRAConfig(rank=2, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for _, linear in lora_linears(model):
            linear.adapter("default").B.normal_(0, 0.3)
    save_adapter(model, path, base_model=None if base is None else str(base))
    return path


def run(capsys, *arguments) -> tuple[int, list[str], str]:
    status = cli.run(["export", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out.splitlines(), said.err


def refused(capsys, tmp_path, *arguments) -> str:
    """The error's one line; checks that nothing was written."""
    before = sorted(tmp_path.rglob("*"))
    status, _, error = run(capsys, *arguments)
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert sorted(tmp_path.rglob("*")) == before
    return error


def same(model: Model, other: Model) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_hf(folder, tmp_path, capsys):
    out = tmp_path / "my model"
    status, lines, _ = run(capsys, "--model", folder, "--to", "hf", "--out", out)
    assert (
        status == 0 and lines[0].startswith(f"{out}: ") and lines[0].endswith(", fp32, for transformers, vLLM and trl")
    )
    assert lines[1] == f"next: minimind chat --model '{out}'; vllm serve '{out}'"
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1, "who may read one may read all"
    assert same(model_of(CONFIGS["qwen3"]), load_model(out))


def test_pth(folder, tmp_path, capsys):
    out = tmp_path / "m.pth"
    status, lines, _ = run(capsys, "--model", folder, "--out", out, "--dtype", "fp16")
    assert status == 0 and "since no preset has its shape" in lines[-1]
    assert {t.dtype for t in torch.load(out, weights_only=True).values()} == {torch.float16}
    nano = saved(tmp_path / "nano", ModelConfig.preset("nano"))
    _, lines, _ = run(capsys, "--model", nano, "--out", tmp_path / "nano.pth")
    assert lines[-1] == f"next: minimind chat --model {tmp_path / 'nano.pth'} --preset nano"
    assert same(load_model(nano), load_model(tmp_path / "nano.pth", "nano"))


def test_gguf_and_ollama(folder, tmp_path, capsys):
    gguf = pytest.importorskip("gguf", reason="install minimind[export]: needs gguf")
    status, lines, _ = run(capsys, "--model", folder, "--out", tmp_path / "m.gguf")
    assert status == 0 and lines[-1] == f"next: llama-cli -m {tmp_path / 'm.gguf'}"
    out = tmp_path / "Ollama"
    status, lines, _ = run(capsys, "--model", folder, "--to", "ollama", "--out", out, "--dtype", "q8_0")
    assert status == 0 and {file.name for file in out.iterdir()} == {"Modelfile", "model.gguf"}
    assert lines[-1] == f"next: ollama create ollama -f {out / 'Modelfile'} && ollama run ollama"
    text = (out / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./model.gguf\n") and 'PARAMETER stop "<|im_end|>"\n' in text
    assert "PARAMETER num_ctx 512\n" in text
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out / "model.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["output_norm.weight"] == "F32"


def test_q4_k_m(folder, tmp_path, capsys):
    pytest.importorskip("gguf", reason="install minimind[export]: needs gguf")
    if importlib.util.find_spec("llama_cpp") is None:  # looked for, not loaded: it may crash
        pytest.skip("needs llama.cpp: pip install llama-cpp-python")
    status, lines, _ = run(capsys, "--model", folder, "--out", tmp_path / "m.gguf", "--dtype", "q4_k_m")
    assert status == 0 and "q4_k_m" in lines[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.gguf", "run"]


def test_an_adapter_is_merged_for_every_target(folder, tmp_path, capsys):
    lora = adapter(tmp_path / "lora", CONFIGS["qwen3"])
    base, wanted = model_of(CONFIGS["qwen3"]), model_of(CONFIGS["qwen3"])
    from minimind.lora import merge_adapter, remove_adapters
    from minimind.lora_files import load_adapter

    load_adapter(wanted, lora)
    merge_adapter(wanted)
    remove_adapters(wanted)
    for target, out in (("hf", tmp_path / "hf"), ("pth", tmp_path / "m.pth")):
        status, _, _ = run(capsys, "--model", folder, "--lora", lora, "--merge-lora", "--to", target, "--out", out)
        found = load_model(out, None if target == "hf" else wanted.config)
        assert status == 0 and same(wanted, found) and not same(base, found)
    assert not (tmp_path / "hf" / "adapter").exists()


def test_a_lora_run_is_its_base_with_the_adapter_beside(folder, tmp_path, capsys):
    """A run as train/lora.py writes it: the adapter in a checkpoint, with the path of its base."""
    run_folder = tmp_path / "lora-run"
    adapter(run_folder / "checkpoints" / "step-00000010", CONFIGS["qwen3"], base=folder)
    (run_folder / "config.json").write_text(json.dumps({"stage": "lora"}))
    out = tmp_path / "hf"
    status, lines, _ = run(capsys, "--model", run_folder, "--to", "hf", "--out", out)
    assert status == 0 and lines[1] == f"{out / 'adapter'}: its adapter, in peft's form"
    assert same(model_of(CONFIGS["qwen3"]), load_model(out)), "the base itself"

    with pytest.raises(ValueError, match="an adapter without its model; run minimind export"):
        InitialModel.from_args(StageArgs(from_=str(run_folder)), None)  # type: ignore[arg-type]

    peft = pytest.importorskip("peft", reason="install minimind[dev]: reads the adapter")
    transformers = pytest.importorskip("transformers", reason="install minimind[export]")
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(out), out / "adapter")
    merged = tmp_path / "merged"
    assert run(capsys, "--model", run_folder, "--merge-lora", "--to", "hf", "--out", merged)[0] == 0
    again = tmp_path / "again"  # the adapter's own folder says where its base is
    assert run(capsys, "--model", out / "adapter", "--merge-lora", "--to", "hf", "--out", again)[0] == 0
    assert same(load_model(merged), load_model(again))
    ids = torch.arange(20, 60).unsqueeze(0)
    with torch.no_grad():
        found, ours = theirs(ids).logits, load_model(merged)(ids).logits
        base, truth = model_of(CONFIGS["qwen3"])(ids).logits, load_model(merged).double()(ids).logits
    eps = torch.finfo(torch.float32).eps
    # beside the rounding of plain float32, W + B A is rounded once where the adapter's own products are not
    bound = 2 * (ours - truth).abs().max() + 64 * eps * truth.abs().max()
    assert (found - ours).abs().max() <= bound < (base - ours).abs().max()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--to", "onnx", "--out", "x"], "--to onnx: unknown; choose from hf, gguf, ollama, pth"),
        (["--out", "x"], "its ending names no format; add --to hf"),
        (["--to", "gguf", "--out", "x"], "--to gguf writes a file; name it *.gguf"),
        (["--to", "hf", "--out", "x.gguf"], "--to hf writes a folder; name one"),
        (["--to", "hf", "--out", "x", "--dtype", "q8_0"], "--dtype q8_0: --to hf takes fp32, fp16, bf16"),
        (["--to", "hf", "--out", "x", "--merge-lora"], "--merge-lora: there is no adapter"),
    ],
)
def test_flags_that_do_not_fit(arguments, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, tmp_path, "--model", folder, *arguments)


def test_nothing_is_overwritten(folder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "m.pth").write_text("mine")
    base = ("--model", folder)
    assert "exists and is not empty" in refused(capsys, tmp_path, *base, "--to", "hf", "--out", tmp_path / "full")
    assert "m.pth: exists;" in refused(capsys, tmp_path, *base, "--out", tmp_path / "m.pth")
    below = tmp_path / "m.pth" / "m.gguf"
    assert f"--out {below}: cannot be written" in refused(capsys, tmp_path, *base, "--out", below)
    (tmp_path / "empty").mkdir()
    assert run(capsys, *base, "--to", "hf", "--out", tmp_path / "empty")[0] == 0


def test_adapters_that_do_not_fit(folder, tmp_path, capsys):
    base = ("--model", folder, "--lora")
    own = adapter(tmp_path / "own", CONFIGS["qwen3"])
    error = refused(capsys, tmp_path, *base, own, "--out", tmp_path / "m.pth")
    assert f"--to pth cannot keep the adapter {own} separate; add --merge-lora" in error
    lengths = adapter(tmp_path / "dora", CONFIGS["qwen3"], dora=True)
    assert "no DoRA; add --merge" in refused(capsys, tmp_path, *base, lengths, "--out", tmp_path / "m.gguf")
    (tmp_path / "full-lora.gguf").write_text("mine")
    assert "full-lora.gguf: exists" in refused(capsys, tmp_path, *base, own, "--out", tmp_path / "full.gguf")
    other = adapter(tmp_path / "other", ModelConfig.preset("nano"))
    error = refused(capsys, tmp_path, *base, other, "--to", "hf", "--out", tmp_path / "hf")
    assert "the adapter was made for another model" in error
    lost = adapter(tmp_path / "lost", CONFIGS["qwen3"], base=tmp_path / "gone")
    error = refused(capsys, tmp_path, "--model", lost, "--to", "hf", "--out", tmp_path / "hf")
    assert f"its base model ({tmp_path / 'gone'}) is not here; give --model BASE --lora {lost}" in error
    shared = saved(tmp_path / "granite", CONFIGS["granitemoe"])
    lora = adapter(tmp_path / "g", CONFIGS["granitemoe"])
    to_gguf = ("--model", shared, "--lora", lora, "--out", tmp_path / "g.gguf")
    assert "adapts shared experts" in refused(capsys, tmp_path, *to_gguf)
    to_hf = ("--model", shared, "--lora", lora, "--to", "hf", "--out", tmp_path / "hf")
    assert "shared experts" in refused(capsys, tmp_path, *to_hf)
    assert run(capsys, *to_hf, "--merge-lora")[0] == 0


def test_an_adapter_of_grouped_attention_works_on_granite(tmp_path, capsys):
    """Attention has the same names in Granite, so its adapter need not be merged."""
    shared = saved(tmp_path / "granite", CONFIGS["granitemoe"])
    lora = adapter(tmp_path / "g", CONFIGS["granitemoe"], targets=("q_proj", "v_proj"))
    out = tmp_path / "hf"
    assert run(capsys, "--model", shared, "--lora", lora, "--to", "hf", "--out", out)[0] == 0
    peft = pytest.importorskip("peft", reason="install minimind[dev]: reads the adapter")
    transformers = pytest.importorskip("transformers", reason="install minimind[export]")
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(out), out / "adapter")
    assert sum("lora_B" in name for name, _ in model.named_parameters()) == 4  # q and v of two layers


@pytest.mark.parametrize("name, rslora", [("llama", True), ("qwen3", False)])
def test_a_gguf_adapter_lies_beside_its_base(name, rslora, tmp_path, capsys):
    """llama.cpp's names, W + alpha / rank * B A, and for Llama its order of the rows of q and k."""
    gguf = pytest.importorskip("gguf", reason="install minimind[export]: needs gguf")
    folder = saved(tmp_path / "run", CONFIGS[name])
    lora = adapter(tmp_path / "lora", CONFIGS[name], rslora=rslora)
    out, beside = tmp_path / "m.gguf", tmp_path / "m-lora.gguf"
    status, lines, _ = run(capsys, "--model", folder, "--lora", lora, "--out", out, "--dtype", "fp32")
    assert status == 0 and lines[-1] == f"next: llama-cli -m {out} --lora {beside}"
    merged = tmp_path / "merged.gguf"
    assert run(capsys, "--model", folder, "--lora", lora, "--merge-lora", "--out", merged, "--dtype", "fp32")[0] == 0
    read = gguf.GGUFReader(beside)
    fields = {key: field.contents() for key, field in read.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == name
    assert fields["adapter.lora.alpha"] == pytest.approx(16 * (2**0.5 if rslora else 1), rel=1e-6)
    base, wanted, found = (
        {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(file).tensors}
        for file in (out, merged, beside)
    )
    changed = {key for key in base if not torch.equal(base[key], wanted[key])}
    assert {f"{key}.lora_{part}" for key in changed for part in "ab"} == found.keys() and len(changed) == 14
    for key in changed:
        change = found[f"{key}.lora_b"].double() @ found[f"{key}.lora_a"].double() * fields["adapter.lora.alpha"] / 2
        error = (base[key] + change - wanted[key]).abs().max()
        assert error <= 4 * torch.finfo(torch.float32).eps * wanted[key].abs().max() < change.abs().max()


def test_an_assumed_base_model_is_reported(folder, tmp_path, capsys, monkeypatch):
    """peft's adapters do not distinguish their base from another model with the same relative name."""
    foreign = adapter(tmp_path / "adapter", CONFIGS["qwen3"], base=folder)
    (foreign / "base_model.json").unlink(missing_ok=True)
    settings = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "my/base"}))
    shutil.copytree(folder, tmp_path / "my" / "base")
    monkeypatch.chdir(tmp_path)
    status, lines, _ = run(capsys, "--model", foreign, "--merge-lora", "--out", tmp_path / "m.pth")
    base = tmp_path / "my" / "base"
    assert (
        status == 0 and lines[0] == f"{foreign}: gives only its base model's name; {base} is assumed to be that model"
    )


def test_a_vocabulary_that_does_not_fit(tmp_path, capsys):
    small = saved(tmp_path / "small", ModelConfig(64, 2, 4, 2, 16, 96, 100))
    error = refused(capsys, tmp_path, "--model", small, "--to", "hf", "--out", tmp_path / "hf")
    assert f"--model {small}: the tokenizer has 6400 ids, the model 100 rows for them" in error


def test_a_missing_quantizer(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gguf_files.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    arguments = ("--model", folder, "--out", tmp_path / "m.gguf", "--dtype", "q4_k_m")
    error = refused(capsys, tmp_path, *arguments)
    assert "--dtype q4_k_m: llama.cpp's quantizer is missing; pip install llama-cpp-python" in error


def test_a_quantizer_on_the_path(tmp_path, monkeypatch):
    tool = tmp_path / "llama-quantize"
    tool.write_text('#!/bin/sh\necho "$3" > "$2"\n')
    tool.chmod(0o755)
    monkeypatch.setattr(gguf_files.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gguf_files.quantize(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "Q4_K_M\n"


@pytest.mark.parametrize("target", ["hf", "pth", "gguf", "ollama"])
def test_a_full_disk_leaves_nothing(target, folder, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if target in ("gguf", "ollama"):
        gguf = pytest.importorskip("gguf", reason="install minimind[export]: needs gguf")
        monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    monkeypatch.setattr(hf, "save_file", full)
    monkeypatch.setattr("minimind.export.command.torch.save", full)
    out = tmp_path / {"pth": "m.pth", "gguf": "m.gguf"}.get(target, "out")
    error = refused(capsys, tmp_path, "--model", folder, "--to", target, "--out", out)
    assert f"--out {out}" in error and "No space left on device" in error


def test_every_target_has_a_default_dtype():
    assert command._DEFAULT.keys() == command.WRITERS.keys()
