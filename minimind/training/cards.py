"""GPUs that a plan is made for: what their makers publish, and what a training step is taken to reach of it."""

from __future__ import annotations

from dataclasses import dataclass

SHARE_OF_BANDWIDTH = 0.6  # while decoding
LAUNCH_SECONDS = 2.5e-6  # of each of a decode step's kernels: five in a layer and seven behind the last
_OF_A_LAYER, _AT_THE_END = 5, 7


@dataclass(frozen=True)
class Card:
    """tflops: dense bf16 with float32 sums; bandwidth: GB/s; memory: GiB; utilisation: the share of tflops that a step
    spends on the model's own operations, which is assumed: nobody has measured it."""

    name: str
    tflops: float
    bandwidth: float
    memory: int
    utilisation: float

    def training_seconds(self, flops: float) -> float:
        return flops / (self.utilisation * self.tflops * 1e12)

    def decode_step_seconds(self, weight_bytes: float, kv_bytes: float, flops: float, layers: int) -> float:
        """Of one token for each sequence of a batch: memory or arithmetic, whichever takes longer, and launches."""
        memory = (weight_bytes + kv_bytes) / (SHARE_OF_BANDWIDTH * self.bandwidth * 1e9)
        launches = LAUNCH_SECONDS * (_OF_A_LAYER * layers + _AT_THE_END)
        return max(memory, self.training_seconds(flops)) + launches


# NVIDIA's whitepapers of GA102, AD102, A100 and H100 (SXM, 80 GB).
CARDS = (
    Card("RTX 3090", 71.0, 936, 24, 0.4),
    Card("RTX 4090", 165.2, 1008, 24, 0.4),
    Card("A100 80 GB", 312.0, 2039, 80, 0.4),
    Card("H100 SXM", 989.4, 3350, 80, 0.3),
)
