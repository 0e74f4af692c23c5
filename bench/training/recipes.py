"""The recipes of others that bench/time_to_loss.py runs, each a process of its own: `python recipes.py SETTING.json`.

upstream-style  this project's plain model, trained as upstream MiniMind's scripts do: a document in each row, padded to
                340, float32 on a CPU and bf16 autocast on a GPU, AdamW with PyTorch's defaults, no warm-up, the rate
                lr (0.1 + 0.45 (1 + cos(pi step / steps))), gradients clipped to 1
hf              transformers' LlamaForCausalLM (or Qwen3ForCausalLM) as a careful user would train it: packed rows
                without masks between documents, bf16 autocast, SDPA, torch.compile, fused AdamW with betas 0.9 and 0.95
                and a decay of 0.1, 2% of warm-up, a cosine down to a tenth

It writes metrics.jsonl as this project's scripts do, and at the end the weights. Held-out figures of all recipes are
those of minimind/training/evaluation.py, document by document.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])

import torch
import torch.nn.functional as F
from rich.console import Console

from bench.common.models import transformers_model
from bench.training.stages import STAGES, padded_batches, upstream_loss
from minimind import ops
from minimind.config import ModelConfig
from minimind.data import Corpus, open_conversations, open_corpus
from minimind.modeling import Model
from minimind.tokenization import ChatEncoder, Tokenizer, load_tokenizer
from minimind.training.batches import to_device
from minimind.training.evaluation import heldout_loss
from minimind.training.metrics import MetricsLog
from minimind.training.optim import lr_factor
from minimind.training.parallel import Parallel
from minimind.training.stages.chats import exact_match, read_questions
from minimind.utils.device import choose_device, choose_precision
from minimind.weights import from_stock, load_model, save_weights, to_stock

EVALUATION_ROW = 512  # tokens; longer documents are cut


@dataclass(frozen=True)
class RecipeSetting:
    """One run. rows x seq_len: positions of a forward and backward; accumulation: of them in a step. evals:
    evaluations, the last at the end. questions: held-out questions answered in an evaluation before the last, which
    answers all. tokenizer: a folder, None for this project's. init: a folder of weights, None for random ones."""

    recipe: str
    stage: str
    preset: str
    data: str
    heldout: str
    out: str
    lr: float
    steps: int
    seed: int
    rows: int
    seq_len: int
    accumulation: int = 1
    evals: int = 8
    questions: int = 0
    tokenizer: str | None = None
    init: str | None = None
    device: str = "auto"
    compile: bool = True

    @property
    def step_tokens(self) -> int:
        return self.rows * self.seq_len * self.accumulation

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


@dataclass
class RecipeSteps:
    """step(number from 0) trains; weights() is the trained model, to be evaluated and saved."""

    step: Callable[[int], None]
    weights: Callable[[], Model]


def upstream_rate(lr: float, step: int, steps: int) -> float:
    """The rate of upstream's get_lr at `step` in 1..steps."""
    return lr * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def upstream_style(s: RecipeSetting, corpus: Corpus, vocab_size: int) -> RecipeSteps:
    ops.set_mode("reference")
    device, kind = choose_device(s.device), STAGES[s.stage]
    model = _initial(s, vocab_size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr)
    batches = padded_batches(kind, corpus, s.rows, s.seq_len, device, s.seed)

    def step(number: int) -> None:
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = upstream_rate(s.lr, number + 1, s.steps)
        for _ in range(s.accumulation):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = upstream_loss(kind, model, None, next(batches)) / s.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return RecipeSteps(step, lambda: model)


def hf(s: RecipeSetting, corpus: Corpus, vocab_size: int) -> RecipeSteps:
    device = choose_device(s.device)
    dtype = choose_precision(device).compute_dtype
    initial = _initial(s, vocab_size)
    model = transformers_model(initial.config)
    if s.init is not None:
        model.load_state_dict(to_stock(initial.state_dict(), initial.config), strict=False)  # the head is tied
    model = model.to(device)
    trained = torch.compile(model) if s.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loader = STAGES[s.stage].loader(corpus, s.rows, s.seq_len, s.seed)
    warmup = max(1, round(0.02 * s.steps))

    def step(number: int) -> None:
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = s.lr * lr_factor("cosine", number, s.steps, warmup)
        batches = [to_device(loader.next_batch(), device) for _ in range(s.accumulation)]
        targets = sum(batch.num_targets for batch in batches)
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = trained(input_ids=batch.input_ids, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="sum") / targets
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def weights() -> Model:
        own = Model(initial.config).to(device)
        own.load_state_dict(from_stock(model.state_dict(), initial.config))
        own.compute_dtype = dtype
        return own

    return RecipeSteps(step, weights)


RECIPES: dict[str, Callable[[RecipeSetting, Corpus, int], RecipeSteps]] = {"upstream-style": upstream_style, "hf": hf}


def _initial(s: RecipeSetting, vocab_size: int) -> Model:
    """The initial weights on the CPU: those of `init`, or random ones of the preset's shape."""
    torch.manual_seed(s.seed)
    if s.init is not None:
        return load_model(s.init)
    shape = ModelConfig.preset(s.preset).to_dict() | {"vocab_size": vocab_size}
    return Model(ModelConfig.from_dict(shape))


def open_data(stage: str, path: str, tokenizer: Tokenizer) -> Corpus:
    """A file of text, or of conversations where the stage is sft."""
    quiet = Console(quiet=True)
    if stage == "pretrain":
        return open_corpus([path], tokenizer, console=quiet)
    return open_conversations([path], ChatEncoder(tokenizer), console=quiet)


def heldout_figures(model: Model, heldout: Corpus, tokenizer: Tokenizer, questions: int | None) -> dict[str, Any]:
    """The held-out loss, and for conversations the share of exact answers to the first `questions` of them (None: all,
    0: no answers)."""
    figures = heldout_loss(model, heldout, EVALUATION_ROW, None, Parallel())
    if heldout.weighted and questions != 0:
        asked = read_questions(heldout, EVALUATION_ROW, questions)
        figures |= {"heldout_exact": exact_match(model.eval(), tokenizer, asked), "heldout_questions": len(asked)}
    return figures


def train(s: RecipeSetting) -> None:
    """Train to the last step; metrics.jsonl and the weights are in `out` afterwards."""
    out = Path(s.out)
    tokenizer = load_tokenizer(s.tokenizer)
    corpus, heldout = (open_data(s.stage, path, tokenizer) for path in (s.data, s.heldout))
    recipe = RECIPES[s.recipe](s, corpus, tokenizer.vocab_size)
    metrics = MetricsLog(out / "metrics.jsonl")
    began, evaluating = time.perf_counter(), 0.0
    for number in range(s.steps):
        recipe.step(number)
        tokens, last = (number + 1) * s.step_tokens, number + 1 == s.steps
        metrics.write("train", number + 1, {"tokens": tokens}, {"seconds": time.perf_counter() - began - evaluating})
        if (number + 1) * s.evals // s.steps > number * s.evals // s.steps:
            started = time.perf_counter()
            questions = None if last and s.questions else s.questions
            figures = heldout_figures(recipe.weights(), heldout, tokenizer, questions)
            taken = time.perf_counter() - started
            evaluating += taken
            metrics.write("eval", number + 1, {"tokens": tokens, **figures}, {"seconds": taken})
            metrics.flush()
    metrics.close()
    save_weights(recipe.weights(), out / "weights")
    tokenizer.save(out / "weights")


if __name__ == "__main__":
    train(RecipeSetting(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
