"""What a reinforcement learning stage begins with: its prompts and its model, those of the built-in task by default."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console

from minimind.data.builtin.arithmetic import NAME, arithmetic_prompts
from minimind.data.prompts import PromptSet, open_prompts
from minimind.tokenization import Tokenizer
from minimind.tokenization.reasoning import ThinkingPrompts
from minimind.training.origin import begin_from
from minimind.training.parallel import world_size
from minimind.training.parts import named_form
from minimind.training.rl.arguments import RolloutArgs
from minimind.training.run_folder import newest_finished
from minimind.utils.display import say

# What teaches a model the weak version of the built-in task, as flags of train/sft.py.
WEAK = ("--data", NAME, "--epochs", "1", "--seq-len", "256", "--batch-tokens", "1024", "--evals", "2")


def open_data(
    args: RolloutArgs, tokenizer: Tokenizer, console: Console, by_tail: bool = False
) -> tuple[PromptSet, PromptSet | None]:
    """(training, held-out) prompts; by_tail: as PromptSet.split has it."""
    encoder = ThinkingPrompts(tokenizer, args.thinking)
    data, heldout = list(args.data), list(args.heldout_data)
    form = named_form(args)
    if not data:
        builtin = arithmetic_prompts(args.cache_dir, console)
        data, heldout = [str(builtin[0])], heldout or [str(builtin[1])]

    def read(paths: list[str]) -> PromptSet:
        return open_prompts(paths, encoder, args.max_prompt, args.on_bad_row, console, form)

    if heldout:
        return read(data), read(heldout)
    return read(data).split(args.heldout, by_tail=by_tail)


def find_origin(args: RolloutArgs, console: Console) -> str | None:
    """The newest finished SFT run; for the built-in task one on its weak version, made here where there is none. In a
    plan None where there is none."""
    if args.data or args.plan:
        return begin_from(args, "sft")
    try:
        return newest_finished("sft", data=(NAME,))
    except ValueError:
        if world_size() > 1:
            raise ValueError(
                f"--from: no model was taught the built-in task yet; run `python train/sft.py {' '.join(WEAK)}` first"
            ) from None
    command = [sys.executable, str(Path(sys.argv[0]).with_name("sft.py")), *WEAK]
    command += [] if args.cache_dir is None else ["--cache-dir", args.cache_dir]
    command += ["--device", args.device, "--precision", args.precision]
    say(console, f"no model was taught the built-in task yet: {' '.join(command[1:])}")
    if subprocess.run(command).returncode:
        raise ValueError(f"--from: {' '.join(command[1:])} did not finish; run it, or name a model")
    return newest_finished("sft", data=(NAME,))
