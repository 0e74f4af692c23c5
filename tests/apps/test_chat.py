"""The chat session, its terminal, and opening a model."""

import contextlib
import io
import json
import os
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from minimind import ModelConfig, cli
from minimind.apps.chat import Args, ChatSession, Terminal, _one_shot, main, open_session, printable
from minimind.inference.engine import Engine
from minimind.inference.loading import ModelArgs, open_model, stretched
from minimind.inference.requests import Request, SamplingParams
from minimind.lora import LoRAConfig, add_adapter, lora_linears
from minimind.lora_files import save_adapter
from minimind.modeling import Model
from minimind.utils.device import Precision
from minimind.weights import save_weights, to_stock
from tests.inference.small import small_model, small_tokenizer

GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)


def conversation(**options) -> ChatSession:
    model = small_model(max_position_embeddings=options.pop("positions", 512))
    engine = Engine(model, small_tokenizer(), max_batch=1, backend="reference")
    options = {"params": GREEDY, "context": engine.max_context, **options}
    return ChatSession(engine, small_tokenizer(), **options)


def expected_answer(messages: list[dict], **variables) -> str:
    """The engine's own answer to the rendered `messages`."""
    rendered = small_tokenizer().apply_chat_template(messages, add_generation_prompt=True, **variables)
    engine = Engine(small_model(), small_tokenizer(), max_batch=1, backend="reference")
    return engine.generate([Request(rendered, GREEDY)])[0].text


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with weights, config and tokenizer."""
    path = tmp_path_factory.mktemp("model") / "m"
    save_weights(small_model(), path)
    small_tokenizer().save(path)
    return path


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def test_answers_build_on_the_rounds_before():
    talk = conversation(system="Be kind.")
    system = {"role": "system", "content": "Be kind."}
    first = "".join(talk.answer("Hello"))
    assert first and first == expected_answer([system, user("Hello")])
    history = [system, user("Hello"), {"role": "assistant", "content": first}, user("there")]
    second = "".join(talk.answer("there"))
    assert second == expected_answer(history)
    assert talk.last is not None and talk.last.cached_tokens > 0, "the first round is not computed again"
    assert talk.first_after > 0 and talk.dropped == 0
    talk.reset()
    assert "".join(talk.answer("Hello")) == first


def test_reasoning_is_shown_and_kept_apart():
    talk = conversation(thinking=True)
    answer = "".join(talk.answer("Hello"))
    assert answer == "<think>\n" + expected_answer([user("Hello")], enable_thinking=True)
    talk._remember("why", "<think>\nbecause\n</think>\n\nso")
    assert talk.messages[-1] == {"role": "assistant", "content": "so", "reasoning_content": "because"}
    off = conversation(thinking=False)
    assert "".join(off.answer("Hello")) == expected_answer([user("Hello")], enable_thinking=False)


def test_history_limits_the_remembered_rounds():
    talk = conversation(rounds=1)
    first = "".join(talk.answer("one"))
    second = "".join(talk.answer("two"))
    assert [m["content"] for m in talk.messages] == ["one", first, "two", second]
    third = "".join(talk.answer("three"))
    kept = [user("two"), {"role": "assistant", "content": second}, user("three")]
    assert third == expected_answer(kept)
    forgetful = conversation(rounds=0)
    for _ in range(2):
        assert "".join(forgetful.answer("one")) == first


def test_the_oldest_rounds_are_dropped():
    talk = conversation(positions=100)
    dropped = []
    for _ in range(6):
        list(talk.answer("Hello world"))
        dropped.append(talk.dropped)
        assert talk.last is not None and talk.last.finish_reason == "length", "every answer had room"
        assert [m["role"] for m in talk.messages] == ["user", "assistant"] * (len(talk.messages) // 2)
    assert dropped[0] == 0 and sum(dropped) >= 3
    rounds = len(talk.messages)
    with pytest.raises(ValueError, match="tokens, the context 100; shorten it, or use --yarn"):
        list(talk.answer("你好" * 100))
    assert len(talk.messages) <= rounds and all(len(m["content"]) < 100 for m in talk.messages)


def test_a_stopped_answer_keeps_its_text():
    talk = conversation()
    pieces = talk.answer("Hello")
    begun = next(pieces)
    pieces.close()
    assert talk.messages == [user("Hello"), {"role": "assistant", "content": begun}]
    assert not talk.engine.has_work or not talk.engine.stats().running
    assert talk.last is None
    list(talk.answer("there"))
    assert talk.last is not None and len(talk.messages) == 4


def test_raw_text_is_continued_without_template_or_history():
    talk = conversation(raw=True, thinking=True)
    engine = Engine(small_model(), small_tokenizer(), max_batch=1, backend="reference")
    ids = [small_tokenizer().bos_token_id, *small_tokenizer().encode("Hello <|im_end|>", allow_special=False)]
    for _ in range(2):
        assert "".join(talk.answer("Hello <|im_end|>")) == engine.generate([Request(ids, GREEDY)])[0].text
    assert talk.messages == []


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\n\tc\x00\x7f\x9b你🙂") == "a�[2Jb\n\tc���你🙂"


def test_commands(capsys):
    out = io.StringIO()
    terminal = Terminal(conversation(), out, out)
    terminal.say("Hello")
    assert "12 tokens" in out.getvalue() and "cut at --max-new-tokens" in out.getvalue()
    for line in ("/system Be brief.", "/think on", "/help", "/nonsense", "/think maybe"):
        terminal.command(line)
    talk = terminal.session
    assert (talk.system, talk.thinking, talk.messages) == ("Be brief.", True, [])
    text = out.getvalue()
    assert "/reset" in text and "unknown command '/nonsense'" in text and "unknown command '/think maybe'" in text
    terminal.say("Hello")
    for line in ("/think", "/system", "/reset"):
        terminal.command(line)
    assert (talk.system, talk.thinking, talk.messages) == (None, None, [])


def test_one_shot_writes_the_answer_alone_to_stdout(folder, capsys, monkeypatch):
    flags = ["--temperature", "0", "--max-new-tokens", "12", "--dtype", "fp32", "--backend", "reference"]
    assert cli.run(["chat", "--model", str(folder), "--prompt", "Hello", *flags]) == 0
    said = capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert cli.run(["chat", "--load", str(folder), *flags]) == 0
    piped = capsys.readouterr()
    params = SamplingParams(max_new_tokens=12, temperature=0.0)
    rendered = small_tokenizer().apply_chat_template([user("Hello")], add_generation_prompt=True)
    engine = Engine(small_model(), small_tokenizer(), max_batch=1, backend="reference")
    assert said.out == piped.out == engine.generate([Request(rendered, params)])[0].text + "\n"
    assert "tokens/s, first after" in said.err


def test_the_same_seed_gives_the_same_answer(folder, capsys):
    flags = ["chat", "--model", str(folder), "--prompt", "Hello", "--max-new-tokens", "20", "--temperature", "2"]
    texts = []
    for seed in ("1", "1", "2"):
        assert cli.run([*flags, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_pretrained_models_continue_the_text(folder, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step-00000001").symlink_to(folder)
    (run / "config.json").write_text(json.dumps({"stage": "pretrain", "args": {}, "model": {}}))
    talk, notes = open_session(Args(model=str(run)))
    assert talk.raw and "continues your text instead of answering it: it was only pretrained" in "".join(notes)
    assert not open_session(Args(model=str(run), force_chat=True))[0].raw
    (run / "config.json").write_text(json.dumps({"stage": "sft"}))
    assert not open_session(Args(model=str(run)))[0].raw


def test_a_tokenizer_without_template_continues_the_text(folder, tmp_path):
    bare = tmp_path / "bare"
    save_weights(small_model(), bare)
    small_tokenizer().save(bare)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    talk, notes = open_session(Args(model=str(bare)))
    assert talk.raw and "its tokenizer has no chat template" in "".join(notes)
    with pytest.raises(ValueError, match="--force-chat: its tokenizer has no chat template"):
        main(Args(model=str(bare), force_chat=True, prompt="x"))


def test_upstream_files_open_with_a_preset(tmp_path):
    torch.manual_seed(0)
    model = Model(ModelConfig.preset("nano"))
    path = tmp_path / "nano_512.pth"
    torch.save(to_stock(model.state_dict(), model.config), path)
    opened = open_model(ModelArgs(model=str(path), preset="nano"))
    assert torch.equal(opened.model.embed_tokens.weight, model.embed_tokens.weight)
    assert "has no tokenizer: the shipped one is used" in opened.notes[0] and opened.folder is None
    with pytest.raises(ValueError, match="name it with --preset"):
        open_model(ModelArgs(model=str(path)))


def test_an_engine_in_float32_says_why(folder, monkeypatch):
    found = Precision(torch.float32, "PyTorch reports no bf16 instructions on this CPU")
    monkeypatch.setattr("minimind.inference.loading.choose_precision", lambda *_: found)
    said = "--dtype fp32: PyTorch reports no bf16 instructions on this CPU"
    assert said in open_model(ModelArgs(model=str(folder))).notes
    assert said not in open_model(ModelArgs(model=str(folder), dtype="fp32")).notes


def test_an_adapter_is_merged(folder, tmp_path):
    adapted = small_model()
    add_adapter(adapted, LoRAConfig(rank=2))
    torch.manual_seed(1)
    with torch.no_grad():
        for _, linear in lora_linears(adapted):
            adapter = linear.adapter("default")
            adapter.B.normal_(0, 0.3)
    save_adapter(adapted, tmp_path)
    opened = open_model(ModelArgs(model=str(folder), lora=str(tmp_path), dtype="fp32"))
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        wanted, found, base = (m(ids).logits for m in (adapted, opened.model, small_model()))
    error = torch.finfo(torch.float32).eps * 200 * wanted.abs().max()
    assert (found - wanted).abs().max() < error < (found - base).abs().max()
    assert not lora_linears(opened.model), "a plain model again"


def test_yarn_stretches_the_context(folder):
    plain = ModelConfig(max_position_embeddings=512)
    found = stretched(plain, ModelArgs(yarn=4.0, yarn_original=512)).rope_scaling
    assert found is not None and (found.factor, found.original_max_position_embeddings) == (4.0, 512)
    talk, _ = open_session(Args(model=str(folder), yarn=4.0, yarn_original=512))
    assert talk.context == 2048


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "nowhere"], "--model nowhere: no such file or folder"),
        (["--model", "FOLDER", "--preset", "nano"], "drop --preset"),
        (["--model", "FOLDER", "--preset", "tiny"], "--preset tiny: unknown; choose from nano"),
        (["--model", "FOLDER", "--yarn", "0.5"], "--yarn 0.5: must be between 1 and 1024"),
        (["--model", "FOLDER", "--yarn", "nan"], "--yarn nan: must be between 1 and 1024"),
        (["--model", "FOLDER", "--yarn", "1e30"], "--yarn 1e+30: must be between 1 and 1024"),
        (["--model", "FOLDER", "--yarn", "4", "--yarn-original", "0"], "--yarn-original 0: must be at least 1"),
        (["--model", "FOLDER", "--yarn-original", "5"], "--yarn-original: needs --yarn"),
        (["--model", "FOLDER", "--temperature", "-1"], "temperature=-1.0 must be a number"),
        (["--model", "FOLDER", "--history", "-1"], "--history -1: must be at least 0"),
        (["--model", "FOLDER", "--raw", "--force-chat"], "give one of them"),
        (["--model", "FOLDER", "--tokenizer", "nowhere"], "no tokenizer here"),
        (["--model", "FOLDER", "--lora", "nowhere"], "nowhere"),
        (["--model", "FOLDER", "--device", "abacus"], "--device abacus"),
        (["--model", "FOLDER", "--prompt", "你好" * 400], "the context 512"),
        ([], "there is no run under runs/"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [str(folder) if flag == "FOLDER" else flag for flag in flags]
    assert cli.run(["chat", "--prompt", "x", *given]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line


def test_a_byte_order_mark_is_removed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffhi\n"))
    assert _one_shot(Args()) == "hi"


def test_standard_input_that_is_empty(folder, capsys, monkeypatch):
    for stdin in (io.StringIO(""), None):  # None: closed
        monkeypatch.setattr(sys, "stdin", stdin)
        assert cli.run(["chat", "--model", str(folder)]) == 2
        assert "standard input is empty" in capsys.readouterr().err


def test_the_command_lists_its_subcommands(capsys):
    assert cli.run([]) == 2 and cli.run(["--help"]) == 0
    assert cli.run(["--version"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS) and out.splitlines()[-1] == "0.1.0"
    assert cli.run(["dance"]) == 2
    assert capsys.readouterr().err == (f"error: unknown command 'dance'; choose from {', '.join(cli.COMMANDS)}\n")


@pytest.fixture(scope="module")
def talkative(tmp_path_factory) -> Path:
    """A checkpoint whose greedy answers end only at their limit: the end token has the logit 0, others are higher."""
    model, tokenizer = small_model(max_position_embeddings=4096), small_tokenizer()
    with torch.no_grad():
        model.embed_tokens.weight[tokenizer.eos_token_id] = 0
    path = tmp_path_factory.mktemp("talkative") / "m"
    save_weights(model, path)
    tokenizer.save(path)
    return path


@pytest.mark.slow  # a signal and an answer race each other where the machine is busy
@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals: run it on Linux or macOS")
def test_a_session_in_a_terminal(talkative):
    """Typed and pasted questions, Ctrl-C during an answer and at the prompt, /quit."""
    import pty

    pid, fd = pty.fork()
    if pid == 0:
        os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
        flags = ["--model", str(talkative), "--temperature", "0", "--max-new-tokens", "1500"]
        os.chdir(Path(__file__).parents[2])
        os.execv(sys.executable, [sys.executable, "-m", "minimind.cli", "chat", *flags, "--backend", "reference"])
    try:
        _until(fd, "> ")
        os.write(fd, b"/help\n")
        assert "forget the conversation" in _until(fd, "\n> ")
        os.write(fd, b"\x1b[200~Hello\nworld\x1b[201~\n")  # as terminals send what is pasted
        answer = _until(fd, "]\r\n")
        time.sleep(0.2)
        os.write(fd, b"\x03")
        assert "/quit or Ctrl-D leaves" in _until(fd, "leaves")
        assert answer.count("[1500 tokens, ") == 1, "one answer to both lines, as long as it may be"
        os.write(fd, b"Hello there\n")
        _until(fd, "there\r\n")
        while not ANSI.sub("", os.read(fd, 65536).decode(errors="replace")).strip():
            pass  # the answer has begun
        os.kill(pid, signal.SIGINT)
        _until(fd, "[stopped]")
        os.write(fd, b"/quit\n")
        _drain(fd)
        assert os.waitpid(pid, 0)[1] == 0
        pid = 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(fd)


ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _until(fd: int, wanted: str, seconds: float = 90.0) -> str:
    """The output of the terminal until it contains `wanted`, without cursor movements and colours."""
    shown, end = "", time.monotonic() + seconds
    while wanted not in shown:
        assert time.monotonic() < end, f"no {wanted!r} in {shown!r}"
        if select.select([fd], [], [], 0.5)[0]:
            shown = ANSI.sub("", shown + os.read(fd, 65536).decode(errors="replace"))
    return shown


def _drain(fd: int) -> None:
    """Read until the program has closed its side, which Linux reports as an error."""
    with contextlib.suppress(OSError):
        while os.read(fd, 65536):
            pass
