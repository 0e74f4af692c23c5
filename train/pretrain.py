"""Pretrain a model from scratch: `python train/pretrain.py` works as it is, on text found on this machine.

Next-token prediction over packed documents. After an interruption the same command continues from the last checkpoint.
A run leaves its metrics, plot, samples and weights in a folder under runs/.
"""

from __future__ import annotations

if __name__ == "__main__":
    from minimind.utils.startup import leave_on_interrupt

    leave_on_interrupt()  # during the imports below

from dataclasses import dataclass
from functools import partial

from rich.console import Console

from minimind.data import PackedLoader, builtin_corpus
from minimind.objectives.next_token import next_token_loss
from minimind.training.arguments import StageArgs, pretraining_lr
from minimind.training.batches import pretraining_batch, pretraining_depth, usual_batch
from minimind.training.data_split import NamedFiles, all_losses, open_split, read_texts, save_heldout
from minimind.training.depth import close_upper_layers
from minimind.training.evaluation import describe_batch
from minimind.training.initial_model import scale_outputs
from minimind.training.job import Job, run_script
from minimind.training.muon import CPU_BLOCK, CPU_ITERATIONS, TORCHS_ITERATIONS
from minimind.training.parallel import world_size
from minimind.training.stages.chats import continue_texts
from minimind.training.trainer import Stage

# Peak rates by preset: of AdamW, and of Muon in runs that an earlier version began.
PEAK_LR = {"nano": 4e-3, "minimind2-small": 2e-3}


@dataclass(frozen=True)
class Args(StageArgs):
    """Pretrain a language model. All defaults work."""

    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl ({"text": ...} rows) and .txt, plain, .gz or .zst. FILE:2 draws rows of this
    file twice as often as FILE:1; FILE:0..3 raises its weight from 0 to 3 over the run (docs/data.md). Empty: the
    docstrings of the installed Python packages."""
    seq_len: int = 512
    """Tokens in a row; longer documents are cut into pieces, all of which are trained on."""
    muon_iterations: int | None = None
    """With --optimizer muon: iterations that bring the singular values of an update near 1. Each costs the same; with
    fewer, small ones stay smaller. None: 3 on a CPU (docs/recipe.md), else 5."""
    muon_block: int | None = None
    """With --optimizer muon: cut the shorter side of each matrix into equal blocks of at least this size, and bring the
    singular values of each block near 1 instead of the whole matrix's, which takes less time. 0: whole matrices. None:
    256 on a CPU in runs with --depth-warmup (docs/recipe.md), else 0."""
    output_init: float = 1.0
    """Factor of the initial projections into the residual stream; 0 makes every block the identity at first."""
    depth_warmup: float | None = None
    """Share of the steps that trains the lowest layers alone; the others are the identity until then. None: on a CPU,
    in one process, 0.9375 for runs with at most one token for 112 parameters (docs/recipe.md); else 0."""
    depth_layers: float | None = None
    """With --depth-warmup: share of the layers that its steps train, at least one layer. None: an eighth."""
    heldout_data: tuple[str, ...] = ()
    """Files of text to evaluate on instead of --heldout. NAME=FILE adds a further held-out set with figures of its
    own."""

    def check(self) -> None:
        super().check()
        if self.output_init != 1 and self.from_ is not None:
            raise ValueError(f"--output-init {self.output_init}: scales random weights, not those of --from; drop it")
        if self.depth_layers is not None and not 0 < self.depth_layers <= 1:
            raise ValueError(f"--depth-layers {self.depth_layers}: a share of the layers, from 0 to 1")
        if not self.depth_warmup:
            return
        flag = f"--depth-warmup {self.depth_warmup}"
        if not 0 < self.depth_warmup <= 1:
            raise ValueError(f"{flag}: a share of the steps, from 0 to 1")
        if self.from_ is not None:
            raise ValueError(f"{flag}: is for random weights, not those of --from; drop it")
        if world_size() > 1 or self.cuda_graph:
            raise ValueError(f"{flag}: goes with one process and without --cuda-graph")


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when training was interrupted. Raises ValueError, in one line, for bad input."""
    job = Job.begin("pretrain", args, console)
    usual_lr = job.legacy["lr"] = PEAK_LR.get(job.initial.preset, 1e-3)
    job.legacy |= {"batch_tokens": usual_batch(job), "muon_iterations": TORCHS_ITERATIONS, "muon_block": 0,
                   "depth_warmup": 0.0, "depth_layers": 0.25}  # fmt: skip
    builtin = () if args.data else (builtin_corpus(args.cache_dir, console),)
    files = NamedFiles.from_flags(args.data, args.heldout_data, builtin)
    split = open_split(job, files, partial(read_texts, job))
    train, heldout = split.train, split.heldout
    tokens = args.tokens or job.args.passes * job.args.scaled(train.num_tokens)
    job.settle("batch_tokens", lambda: pretraining_batch(job, tokens))
    on_cpu = job.default_device == "cpu"
    job.settle("muon_iterations", lambda: (CPU_ITERATIONS if on_cpu else TORCHS_ITERATIONS, ""))
    shallow, layers = pretraining_depth(job, tokens)
    if args.depth_layers is not None and not shallow:
        raise ValueError(f"--depth-layers {args.depth_layers}: this run has no --depth-warmup; give one, or drop it")
    job.settle("muon_block", lambda: (CPU_BLOCK if on_cpu and shallow else 0, ""))
    plan = job.plan(partial(PackedLoader, train, args.row, seed=args.seed, mixture=split.mixture))
    most = layers if shallow > 0.5 else None
    lr = job.settle("lr", lambda: pretraining_lr(job.args.optimizer, job.config, plan.steps, usual_lr, most))
    job.open_run()
    save_heldout(job, heldout)
    model, trained = job.build_model(partial(scale_outputs, factor=args.output_init))
    if shallow and job.initial.weights is None:
        close_upper_layers(model, layers)
        plan = job.with_shallow_steps(plan, model, shallow, layers)
    stage = Stage(
        loss=lambda batch: next_token_loss(trained, batch),
        evaluate=lambda final: all_losses(model, split, job, final),
        sample=lambda: continue_texts(job.parallel.whole(model), job.tokenizer, heldout or train),
        describe=lambda batch: describe_batch(batch, train, job.tokenizer),
        data_fingerprint=f"{split.whole.identity:016x}",
        peak_lr=lr,
    )
    size = f"data: {train.num_documents:,} documents, {plan.loader.tokens_per_epoch:,} tokens to train on"
    held = f"; held out {heldout.num_documents:,} documents" if heldout else ""
    return job.fit(plan, model, stage, [size + held, *split.lines(plan)])


if __name__ == "__main__":
    run_script(main, Args, __doc__)
