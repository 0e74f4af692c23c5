"""The report of `minimind zero`: one page from whatever the stages' folders hold."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minimind.apps.zero.charts import bounds, line_chart, number, ticks
from minimind.apps.zero.planning import Plan, StagePlan, State
from minimind.apps.zero.report import html, write_report
from minimind.apps.zero.results import Curve, Results, closing_lines, read_samples, results_text, smoothed, thinned
from minimind.apps.zero.stages import Chain

VOID = {"meta", "br", "hr", "img", "input", "link", "path"}


class Page(HTMLParser):
    """Raises where tags do not match; keeps the text and every address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def planned(name: str) -> StagePlan:
    return StagePlan(name, (), "nano", 2_800_000, 8192, 2, 1.0, 60.0, 1 << 30, {"A": 1.0}, {"A": 1e12}, 17e6, False)


def state(folder: Path, *names: str) -> State:
    plan = Plan("5min", "nano", "a CPU", tuple(map(planned, names)), ("preset nano: as a test says",))
    return State(folder, {}, Chain.of(names, (), None, (), ()), plan, {name: 61.0 for name in names}, [0.0])


def write_stage(folder: Path, samples: str, rows: list[dict], finished: bool = True) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"stage": "sft", "args": {"seed": 42}, "model": {"head_dim": 32}}))
    (folder / "versions.json").write_text(json.dumps({"starts": [{"device": "a CPU", "torch": "2.13"}]}))
    (folder / "samples.txt").write_text(samples)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "finished").touch()


def rows(steps: int = 5) -> list[dict]:
    found: list[dict] = [
        {"kind": "eval", "step": 0, "tokens": 0, "heldout_loss": 6.0, "heldout_exact": 0.0, "heldout_all": False}
    ]
    for step in range(1, steps + 1):
        time = {"tokens_per_second": 1000.0 + step, "seconds": 4.0 * step}
        found.append({"kind": "train", "step": step, "tokens": 4096 * step, "loss": 6 / step, "time": time})
    last = {"heldout_loss": 0.5, "heldout_exact": 0.992, "heldout_all": True}
    return [*found, {"kind": "eval", "step": steps, "tokens": 4096 * steps, **last}]


SAMPLES = """=== step 0
user: Hi! What is 8 + 6? | assistant: <b>the the</b>  [8 plus 6 is 14.]
user: 你好 | assistant: ok  [fire]

=== step 5
user: Hi! What is 8 + 6? | assistant: 8 plus 6 is 14.  [8 plus 6 is 14.]
user: 你好 | assistant: fire  [fire]

"""


def test_the_page_shows_every_stage_and_needs_nothing_else(tmp_path):
    write_stage(tmp_path / "pretrain", "=== step 0\nOnce upon | a a a\n\n=== step 5\nOnce upon | a time\n\n", rows())
    write_stage(tmp_path / "sft", SAMPLES, rows())
    page = Page(html(state(tmp_path, "pretrain", "sft"), price=2.0))
    text = " ".join(page.text)
    for told in ("99.2%", "6.000 → 0.500", "What is 8 + 6?", "<b>the the</b>", "Once upon", "a time", "torch 2.13",
                 "minimind chat --model", "1m01s", "preset nano: as a test says", "0.07"):  # fmt: skip
        assert told in text, told
    assert not page.addresses and not page.tags & {"script", "link", "img", "iframe", "object"}
    assert "after, right" in text and "pretrain, sft" in page.text, "one row for the versions that stages share"
    whole = html(state(tmp_path, "pretrain", "sft"))
    assert "http" not in whole and "url(" not in whole and "@import" not in whole


def test_evaluation_and_exports_are_on_the_page(tmp_path):
    write_stage(tmp_path / "pretrain", "", rows())
    scores = [
        {"curve": "as it is", "context": n, "tokens": 4096, "perplexity": 900.0 / n, "bits_per_byte": 2.5,
         "second_half": 800.0 / n, "seconds": 1.0} for n in (128, 256)
    ]  # fmt: skip
    results = {"ceval": {"alias": " - ceval", "acc,none": 0.25, "acc_stderr,none": 0.01, "sample_len": 3}}
    for file, content in (("perplexity.json", {"scores": scores}), ("ceval/tasks.json", {"results": results})):
        path = tmp_path / "evaluation" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    (tmp_path / "export" / "hf").mkdir(parents=True)
    (tmp_path / "export" / "hf" / "model.safetensors").write_bytes(b"x" * 2_000_000)
    text = " ".join(Page(html(state(tmp_path, "pretrain"))).text)
    for told in ("Evaluation and export", "Perplexity by context length", "7.031", "0.2500", "2.0", "- ceval"):
        assert told in text, told
    assert "stderr" not in text and "sample_len" not in text
    figures = json.loads(results_text(state(tmp_path, "pretrain")))["evaluation"]
    assert figures["perplexity"] == scores and figures["tasks"] == {"- ceval": {"acc": 0.25}}
    lines = closing_lines(state(tmp_path, "pretrain"), None, 0)
    assert "perplexity by context length: 7.031 at 128, 3.516 at 256" in lines
    assert f"exported: {tmp_path / 'export' / 'hf'}, 2.0 MB" in lines


def test_a_page_about_what_there_is(tmp_path):
    """The page before the first result, and with one stage that was killed while it wrote a row and one that has not
    begun."""
    Page(html(state(tmp_path, "pretrain", "sft")))
    write_stage(tmp_path / "pretrain", "", rows(), finished=False)
    with (tmp_path / "pretrain" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "ste')
    text = " ".join(Page(html(state(tmp_path, "pretrain", "sft"))).text)
    assert "not finished" in text and "not begun" in text
    write_stage(tmp_path / "sft", SAMPLES, [], finished=False)
    Page(html(state(tmp_path, "pretrain", "sft")))


def test_utilisation_is_a_share_of_a_known_card_and_else_what_was_computed(tmp_path):
    write_stage(tmp_path / "pretrain", "", rows())
    assert "peak is not known" in html(state(tmp_path, "pretrain"))
    (tmp_path / "pretrain" / "versions.json").write_text(json.dumps({"starts": [{"device": "NVIDIA A, 24 GiB"}]}))
    page = html(state(tmp_path, "pretrain"))
    assert "share of the 1 bf16 TFLOP/s of A" in page and "<b>1.7%</b>" in page  # 1005 tokens/s of 17 MFLOP


def test_reinforcement_learning_shows_rewards_and_no_loss(tmp_path):
    values = {"heldout_reward": 0.3, "heldout_greedy_reward": 0.8, "heldout_all": False}
    rollout = {"kind": "rollout", "step": 1, "reward": 0.25, "time": {"rollout": 1.0}}
    time = {"tokens_per_second": 5.0, "seconds": 1.0}
    train = {"kind": "train", "step": 1, "tokens": 9, "loss": -0.05, "time": time}
    write_stage(tmp_path / "grpo", "=== step 0\nuser: 1+1=? | assistant: 2  [reward 1.000]\n\n",
                [{"kind": "eval", "step": 0, "tokens": 0, **values}, rollout, train])  # fmt: skip
    found = Results.of(tmp_path / "grpo")
    assert found is not None and not found.losses()
    assert [curve.name for curve in found.rewards()] == ["of rollouts", "held-out, sampled", "held-out, greedy"]
    assert found.samples[0].after == "2  [reward 1.000]" and not found.samples[0].wanted


def test_a_report_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    write_stage(tmp_path / "pretrain", "", rows())
    (tmp_path / "report").write_text("a file in its way")
    assert write_report(state(tmp_path, "pretrain"), None) is None
    assert "not written" in capsys.readouterr().err
    (tmp_path / "report").unlink()
    (tmp_path / "pretrain" / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')  # of another version
    assert write_report(state(tmp_path, "pretrain"), None) is None
    assert "not written" in capsys.readouterr().err


def test_samples_are_paired_by_prompt(tmp_path):
    file = tmp_path / "samples.txt"
    file.write_text(SAMPLES + "=== step 9\nuser: Hi! What is 8 + 6? | assistant: 8 plus\\n6  [8 plus 6 is 14.]\n\n")
    (sample,) = read_samples(file)
    assert sample.prompt == "user: Hi! What is 8 + 6?"
    assert (sample.before, sample.after, sample.wanted) == ("<b>the the</b>", "8 plus\n6", "8 plus 6 is 14.")


def test_the_question_of_a_sample_is_set_apart_from_what_comes_before(tmp_path):
    turns = "system: <tools> {...} | user: Weather in Cairo? | assistant: "
    write_stage(tmp_path / "pretrain", f"=== step 0\n{turns}a  [c]\n\n=== step 5\n{turns}b  [c]\n\n", rows())
    page = html(state(tmp_path, "pretrain"))
    assert (
        '<p class="earlier text">system: &lt;tools&gt; {...}</p><p class="prompt text">user: Weather in Cairo?' in page
    )
    assert "<dt>after</dt>" in page and "<dt>wanted</dt>" in page


def test_samples_that_begin_alike_are_cut_behind_the_prompt(tmp_path):
    file = tmp_path / "samples.txt"
    file.write_text("=== step 0\nA cat sat on the | mat and mat\n\n=== step 5\nA cat sat on the | mat and slept\n\n")
    (sample,) = read_samples(file)
    assert (sample.prompt, sample.before, sample.after) == ("A cat sat on the", "mat and mat", "mat and slept")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 19_300, [0, 5000, 10_000, 15_000]), (-0.06, 0.1, [-0.05, 0, 0.05, 0.1])],
)
def test_ticks_are_round_and_within(low, high, expected):
    assert ticks(low, high, 5) == pytest.approx(expected)


def test_charts_of_odd_values():
    assert line_chart("Loss", "", "", [Curve("none", [])]) == ""
    assert line_chart("Loss", "", "", [Curve("nan", [(0.0, float("nan"))])]) == ""
    Page(line_chart("Loss <1>", "", "", [Curve("a & b", [(0.0, 0.0)], dots=True)]))
    Page(line_chart("Loss", "", "", [Curve("flat", [(0.0, 5.0), (1.0, 5.0), (2.0, float("inf"))])]))
    low, high = bounds([*[1.0] * 999, 1e9])
    assert low == 0 and high >= 1
    assert [number(v) for v in (0.00371, 19_300, 2.5e6, 800)] == ["0.00371", "19.3k", "2.5M", "800"]


def test_long_curves_are_thinned_and_keep_their_ends():
    points = [(float(i), float(i)) for i in range(10_000)]
    assert len(thinned(points)) == 400 and thinned(points)[0] == points[0] and thinned(points)[-1] == points[-1]
    assert smoothed([(0.0, 3.0), (1.0, float("nan")), (2.0, 3.0)]) == [(0.0, 3.0), (2.0, pytest.approx(3.0))]
