"""On a GPU torch.compile launches the kernels itself (triton_support.kernel_op): what it launches is what the operators
launch, compiles for a card and computes the same. Each in a process of its own, as the form is chosen at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

OF_A_STEP = """
import sys

from bench.compilation import host_cases, host_stub
from bench.compilation.compiling import compile_one

visible = sys.argv[1] == "launch"
host_stub.import_ops(visible)
with host_stub.stubbed(86) as found:
    case = host_cases._make(sys.argv[2])
    case()
    found.launches = found.by_operators = 0
    case()
    print(found.launches, found.by_operators)
    asked = host_stub.requested_compilations(found, 86, "bf16")
for job in asked:
    made = compile_one(job)
    problems = [made] if isinstance(made, str) else made.problems
    print("\\n".join(f"{job.kernel}: {problem}" for problem in problems), end="")
print(" ".join(sorted({job.kernel for job in asked})))
"""

OF_ANY_SIZE = """
import torch._dynamo.testing

from bench.compilation import host_stub

host_stub.import_ops(visible=True)
from tests.kernels.contract import run
from tests.kernels.test_every_op import KERNELS

with host_stub.stubbed(86):
    for op, (function, inputs) in KERNELS.items():
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
        counts = set()
        for rows in (5, 7, 30):
            run(compiled, inputs(rows), None, grads=True)
            counts.add(counter.frame_count)
        if len(counts) != 1:
            print(f"{op} is compiled anew for another number of rows")
"""


def run(*command: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), environment.get("PYTHONPATH", "")))
    answer = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-3000:]
    return answer.stdout.splitlines()


@pytest.mark.heavy
def test_generated_code_launches_what_the_operators_launch(tmp_path):
    script = tmp_path / "step.py"
    script.write_text(OF_A_STEP, encoding="utf-8")
    launches, by_operators = map(int, run(str(script), "operator", "nano")[0].split())
    assert launches == by_operators > 0
    counted, kernels = run(str(script), "launch", "nano")
    assert counted == f"{launches} 0"
    assert len(kernels.split()) == 6  # forward and backward of the norms, the rotation and SwiGLU


@pytest.mark.heavy
def test_no_number_of_rows_is_fixed(tmp_path):
    """As tests/kernels/test_every_op.py asks, of the form that a GPU takes."""
    script = tmp_path / "sizes.py"
    script.write_text(OF_ANY_SIZE, encoding="utf-8")
    assert run(str(script)) == []


@pytest.mark.slow
@pytest.mark.parametrize("shape, how, kernels", [("experts", "keep", 14), ("dense", "recompute", 6)])
def test_what_generated_code_launches_is_right(shape, how, kernels):
    (launched,) = run("tests/kernels/compiled_launches.py", shape, how)
    assert len(launched.split()) == kernels
