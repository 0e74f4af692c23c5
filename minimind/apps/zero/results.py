"""Results of the stages, read from their folders: curves, figures, samples, and the closing lines of the command.

An interrupted stage has results up to that point.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimind.apps.zero.planning import State
from minimind.apps.zero.stages import script, shown
from minimind.utils.display import duration
from minimind.utils.files import read_json

# Names of held-out figures that are shares of answers, by the end of the name.
_SHARE = re.compile(r"(.*?)_?(exact|format|accuracy|ranking)$")
_SHARES = {
    "exact": "exact answers",
    "format": "answers in the format",
    "accuracy": "chosen answer rewarded more",
    "ranking": "chosen answer likelier",
}
_POINTS = 400  # most points of a curve; a screen shows fewer
_LINES = 5  # most lines of a chart that can be told apart


@dataclass(frozen=True)
class Curve:
    """A line of a chart. points: (x, y) in order; dots: whether to mark each point, as a separate measurement."""

    name: str
    points: list[tuple[float, float]]
    dots: bool = False
    faint: bool = False


@dataclass(frozen=True)
class SamplePair:
    """The model's answers to one prompt before and after a stage; wanted: the answer in the data, "" if it has none."""

    prompt: str
    before: str
    after: str
    wanted: str = ""


@dataclass(frozen=True)
class Results:
    """The contents of a stage's folder. config: config.json; starts: of versions.json; train, evals, rollouts: rows of
    metrics.jsonl by kind."""

    folder: Path
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    samples: list[SamplePair] = field(default_factory=list)

    @staticmethod
    def of(folder: Path) -> Results | None:
        """Read a stage's folder. None if the stage has not begun."""
        config = read_json(folder / "config.json")
        if config is None:
            return None
        starts = (read_json(folder / "versions.json") or {}).get("starts", [])
        rows = list(rows_of(folder / "metrics.jsonl"))
        kinds = {kind: [row for row in rows if row.get("kind") == kind] for kind in ("train", "eval", "rollout")}
        samples = read_samples(folder / "samples.txt")
        return Results(folder, config, starts, kinds["train"], kinds["eval"], kinds["rollout"], samples)

    @property
    def finished(self) -> bool:
        return (self.folder / "finished").exists()

    @property
    def tokens(self) -> int:
        return int(self.train[-1]["tokens"]) if self.train else 0

    @property
    def rate(self) -> float:
        """Tokens per second over the whole training."""
        seconds = self.train[-1]["time"]["seconds"] if self.train else 0.0
        return self.tokens / seconds if seconds else 0.0

    def losses(self) -> list[Curve]:
        """Training and held-out loss over millions of tokens."""
        train = [(row["tokens"] / 1e6, row["loss"]) for row in self.train]
        curves = [Curve("training", thinned(train), faint=True), Curve("training, smoothed", thinned(smoothed(train)))]
        if self.rollouts:  # the loss of a policy measures no progress
            curves = []
        names = sorted(
            {key for row in self.evals for key in row if key.startswith("heldout") and key.endswith("_loss")}
        )
        for key in names:
            name = key.removeprefix("heldout").removesuffix("_loss").strip("_")
            curves.append(Curve(f"held-out {name}".strip(), self._measured(key), dots=True))
        return [curve for curve in curves if curve.points]

    def shares(self) -> list[Curve]:
        """Shares of held-out answers that are exact, in the format, or preferred; of many curves, only exact ones."""
        keys = sorted({key for row in self.evals for key in row if is_share(key)})
        if len(keys) > _LINES:
            keys = [key for key in keys if key.endswith("exact")]
        return [Curve(share_name(key), self._measured(key), dots=True) for key in keys]

    def rewards(self) -> list[Curve]:
        """Rewards of rollouts and of held-out prompts."""
        curves = [Curve("of rollouts", thinned([(row["step"], row["reward"]) for row in self.rollouts]))]
        for key, name in (("heldout_reward", "held-out, sampled"), ("heldout_greedy_reward", "held-out, greedy")):
            curves.append(Curve(name, [(row["step"], row[key]) for row in self.evals if key in row], dots=True))
        return [curve for curve in curves if curve.points]

    def speed(self) -> list[tuple[float, float]]:
        """(minutes of training, tokens per second) at each measurement."""
        rates = {row["time"]["seconds"]: row["time"]["tokens_per_second"] for row in self.train}
        return thinned([(seconds / 60, rate) for seconds, rate in rates.items()])

    def _measured(self, key: str) -> list[tuple[float, float]]:
        return [(row["tokens"] / 1e6, row[key]) for row in self.evals if key in row]

    def figures(self) -> dict[str, tuple[float, float]]:
        """(before, after) of every held-out loss, share and reward."""
        figures: dict[str, tuple[float, float]] = {}
        for key in dict.fromkeys(key for row in self.evals for key in row):
            if is_share(key) or key in ("heldout_reward", "heldout_greedy_reward") or key.endswith("heldout_loss"):
                values = [row[key] for row in self.evals if key in row]
                figures[key] = values[0], values[-1]
        return figures


def rows_of(file: Path) -> Iterable[dict[str, Any]]:
    """The rows of a .jsonl file, without one that a killed process wrote in part."""
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def is_share(key: str) -> bool:
    """Whether the held-out figure `key` is a share, from 0 to 1, where more is better."""
    return _SHARE.match(key) is not None


def share_name(key: str) -> str:
    """The name of a share in words: "exact answers" for heldout_exact, "NAME: exact answers" for NAME_exact."""
    match = _SHARE.match(key)
    assert match is not None
    of = match[1].removeprefix("heldout").strip("_").replace("_", " ")
    return f"{of}: {_SHARES[match[2]]}" if of else _SHARES[match[2]]


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A moving average over about 2% of the points, without bias at the start."""
    decay, mean, weight, averages = 1 - 1 / max(2, len(points) / 50), 0.0, 0.0, []
    for x, y in points:
        if y == y and abs(y) != float("inf"):
            mean, weight = decay * mean + (1 - decay) * y, decay * weight + (1 - decay)
            averages.append((x, mean / weight))
    return averages


def thinned(points: Sequence[tuple[float, float]], most: int = _POINTS) -> list[tuple[float, float]]:
    """At most `most` of the points, evenly spaced, including the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def read_samples(file: Path) -> list[SamplePair]:
    """The first and the newest samples of a run's samples.txt, paired by prompt."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8", errors="replace")
    blocks = [block.partition("\n")[2].strip("\n").splitlines() for block in re.split(r"^=== ", text, flags=re.M)[1:]]
    if not blocks:
        return []
    return [_pair(before, after) for before, after in zip(blocks[0], blocks[-1], strict=False) if before and after]


def _pair(before: str, after: str) -> SamplePair:
    """Split two lines of samples.txt about one prompt into the prompt, which both begin with, and the answers."""
    same = 0
    for a, b in zip(before, after, strict=False):
        if a != b:
            break
        same += 1
    begin = before[:same]
    for mark in ("| assistant: ", "assistant: ", " | "):
        if (at := begin.rfind(mark)) >= 0:
            cut = at + len(mark)
            break
    else:
        cut = 0
    prompt = before[:cut].removesuffix("| assistant: ").removesuffix(" | ").strip()
    (first, wanted), (second, _) = _answer(before[cut:]), _answer(after[cut:])
    return SamplePair(unescaped(prompt), unescaped(first), unescaped(second), unescaped(wanted))


def _answer(text: str) -> tuple[str, str]:
    """(the model's answer, the answer in the data, which stands behind it in brackets). A reward in brackets stays with
    the model's answer."""
    answer, mark, rest = text.rpartition("  [")
    known = mark and rest.endswith("]") and not rest.startswith("reward ")
    return (answer, rest.removesuffix("]")) if known else (text, "")


def unescaped(text: str) -> str:
    return text.replace("\\n", "\n")


@dataclass(frozen=True)
class FinalResults:
    """What `minimind evaluate` and `minimind export` left after the stages. perplexity: rows of perplexity.json; tasks:
    (task, metric): value; exports: (path, bytes)."""

    perplexity: list[dict[str, Any]]
    tasks: dict[tuple[str, str], float]
    exports: list[tuple[Path, int]]

    @staticmethod
    def of(folder: Path) -> FinalResults:
        """The evaluation in the folder of all stages; empty where there is none yet."""
        scores = (read_json(folder / "evaluation" / "perplexity.json") or {}).get("scores", [])
        tasks: dict[tuple[str, str], float] = {}
        for file in sorted(folder.glob("evaluation/*/tasks.json")):
            for task, figures in (read_json(file) or {}).get("results", {}).items():
                for metric, value in figures.items():
                    if isinstance(value, int | float) and "stderr" not in metric and "sample" not in metric:
                        tasks[figures.get("alias", task).strip(), metric.removesuffix(",none")] = value
        exports = [(path, _size(path)) for path in sorted(folder.glob("export/*")) if not path.name.startswith(".")]
        return FinalResults(scores, tasks, exports)

    def lines(self) -> list[str]:
        """For the command's end."""
        scores = [f"{score['perplexity']:.4g} at {score['context']:,}" for score in self.perplexity]
        lines = [f"perplexity by context length: {', '.join(scores)}"] if scores else []
        lines += [f"{task}: {metric} {value:.4f}" for (task, metric), value in self.tasks.items()]
        return [*lines, *(f"exported: {path}, {size / 1e6:,.1f} MB" for path, size in self.exports)]

    def figures(self) -> dict[str, Any]:
        """For results.json."""
        tasks: dict[str, dict[str, float]] = {}
        for (task, metric), value in self.tasks.items():
            tasks.setdefault(task, {})[metric] = value
        return {"perplexity": self.perplexity, "tasks": tasks, "exports": [str(path) for path, _ in self.exports]}


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def closing_lines(state: State, page: Path | None, status: int) -> list[str]:
    """The lines that the command prints at its end."""
    assert state.plan is not None
    lines = []
    for stage in state.plan.stages:
        results = Results.of(state.folder / stage.name)
        if results is not None and results.finished:
            figures = "; ".join(f"{name_of(key)} {spell(key, *values)}" for key, values in results.figures().items())
            lines.append(f"{stage.name}: {duration(state.seconds.get(stage.name, 0.0))}; {figures}")
    lines += FinalResults.of(state.folder).lines()
    if status == 2:
        lines.append(f"stopped by the error above; {state.folder / 'zero.log'} has the whole output. Once the cause is "
                     "removed, the same command continues")  # fmt: skip
    elif status:
        lines.append("interrupted; the same command continues")
    if page is not None:
        lines.append(f"report: {page}")
    if status == 0:
        lines.append(f"chat with it: minimind chat --model {model_folder(state)}")
    return lines


def name_of(key: str) -> str:
    """A held-out figure in words."""
    return share_name(key) if is_share(key) else key.replace("heldout", "held-out").replace("_", " ")


def spell(key: str, before: float, after: float) -> str:
    """A held-out figure before and after a stage."""
    return f"{before:.1%} → {after:.1%}" if is_share(key) else f"{before:.3f} → {after:.3f}"


def model_folder(state: State) -> Path:
    """The run folder of the last stage that leaves a chat model."""
    assert state.chain is not None
    return state.folder / state.chain.answers()


def commands(state: State) -> list[tuple[str, str]]:
    """(command, its purpose) for each next step."""
    model = model_folder(state)
    return [
        (f"minimind chat --model {model}", "chat with the model in the terminal"),
        (f"minimind web --model {model}", "chat with it in the browser"),
        (f"minimind serve --model {model}", "serve it with OpenAI's API"),
        (f"minimind export --model {model} --to gguf --out model.gguf", "export for llama.cpp, LM Studio and ollama"),
        (f"minimind export --model {model} --to hf --out model", "export for transformers, vLLM and trl"),
        (f"{shown([str(script('dpo'))])} --from {model} --data pairs.jsonl", "train it on your preferences"),
        (f"{shown([str(script('grpo'))])} --from {model} --data prompts.jsonl --reward exact", "train it on rewards"),
    ]


def figures(state: State) -> dict[str, Any]:
    """The content of results.json: figures of every stage that has begun."""
    assert state.plan is not None
    content: dict[str, Any] = {}
    for stage in state.plan.stages:
        results = Results.of(state.folder / stage.name)
        if results is None:
            continue
        content[stage.name] = {
            "finished": results.finished,
            "seconds": round(state.seconds.get(stage.name, 0.0), 1),
            "tokens": results.tokens,
            "tokens_per_second": round(results.rate, 1),
            "before": {key: values[0] for key, values in results.figures().items()},
            "after": {key: values[1] for key, values in results.figures().items()},
        }
    return content | {"evaluation": FinalResults.of(state.folder).figures()}


def results_text(state: State) -> str:
    return json.dumps(figures(state), indent=1) + "\n"
