"""One run on several processes, started by torchrun: DDP, or FSDP2 with an optional mesh of replicas (HSDP).

Each rank computes its share of one global batch. Figures are sums over ranks, files are rank 0's alone, and what
is saved does not tell how many ranks there were.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from minimind.lora import empty_copy
from minimind.modeling import Block, Model, MoE
from minimind.utils.device import choose_device
from minimind.utils.spans import span

ParallelName = Literal["auto", "none", "ddp", "fsdp"]
ReduceDtypeName = Literal["fp32", "bf16"]
_DTYPES: dict[ReduceDtypeName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
T = TypeVar("T")


@dataclass
class Parallel:
    """This process among those of the run; by default it is the only one."""

    strategy: Literal["none", "ddp", "fsdp"] = "none"
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    replicas: int = 1
    reduce_dtype: ReduceDtypeName = "fp32"
    wrapped: nn.Module | None = None

    @staticmethod
    def from_env(name: ParallelName, replicas: int, reduce_dtype: ReduceDtypeName = "fp32") -> Parallel:
        """What --parallel, --replicas and --reduce-dtype mean under torchrun's environment, or without it. Raises
        ValueError."""
        world = world_size()
        if name == "auto":
            name = "ddp" if world > 1 else "none"
        if name == "none" and world > 1:
            raise ValueError(
                f"--parallel none: torchrun started {world} processes; take ddp or fsdp, or start one with python"
            )
        if name != "none" and "WORLD_SIZE" not in os.environ:
            raise ValueError(
                f"--parallel {name}: start it with `torchrun --standalone --nproc-per-node GPUS {sys.argv[0]} ...`"
            )
        if replicas != 1 and name != "fsdp":
            raise ValueError(f"--replicas {replicas}: needs --parallel fsdp; every process of ddp is a replica")
        if replicas < 1 or world % replicas:
            raise ValueError(f"--replicas {replicas}: must divide the {world} processes that torchrun started")
        if reduce_dtype != "fp32" and name == "none":
            raise ValueError(f"--reduce-dtype {reduce_dtype}: one process sends no gradients; drop the flag")
        return Parallel(name, rank(), int(os.environ.get("LOCAL_RANK", 0)), world, replicas, reduce_dtype)

    def __str__(self) -> str:
        if self.strategy == "none":
            return "one process"
        shards = f", {self.replicas} replicas of {self.world_size // self.replicas} shards"
        sums = f", gradients summed in {self.reduce_dtype}" if self.reduce_dtype != "fp32" else ""
        return f"{self.world_size} processes, {self.strategy}" + (shards if self.replicas > 1 else "") + sums

    @property
    def main(self) -> bool:
        """Whether this process writes the run folder and talks."""
        return self.rank == 0

    def choose_device(self, requested: str) -> torch.device:
        """As choose_device; with several processes each takes the GPU of its local rank."""
        device = choose_device(requested)
        if self.strategy == "none" or device.type == "cpu":
            return device
        if device.index is not None:
            raise ValueError(f"--device {requested}: torchrun gives each process its own GPU; use --device cuda")
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"--nproc-per-node: process {self.local_rank + 1} of this node finds {torch.cuda.device_count()} "
                "GPUs; start as many processes as there are, or use --device cpu"
            )
        return torch.device("cuda", self.local_rank)

    def join(self, device: torch.device) -> None:
        """Meet the other processes."""
        if self.strategy == "none":
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")

    def wrap(self, model: Model) -> nn.Module:
        """The module whose forward and backward train `model`; under FSDP it is `model`, sharded in place."""
        self.wrapped = model
        if self.strategy == "none":
            return model
        for module in model.modules():
            if isinstance(module, MoE):
                module.statistics_group = dist.group.WORLD
        if self.strategy == "ddp":
            self.wrapped = replica = _Replica(model, gradient_as_bucket_view=True)
            if self.reduce_dtype == "bf16":
                replica.register_comm_hook(None, _sum_in_bf16)
        else:
            _shard(model, self._mesh(model.device), _DTYPES[self.reduce_dtype])
        return self.wrapped

    def exchange(self, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch: gradients cross the network once per step, in the backward of its last one."""
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(last)
        elif isinstance(self.wrapped, _Replica) and not last:
            return self.wrapped.no_sync()
        return nullcontext()

    def sum(self, figures: Tensor) -> Tensor:
        """Added up over the ranks, in place; on every rank."""
        if self.strategy != "none":
            with span("communication"):
                dist.all_reduce(figures)
        return figures

    def gather(self, part: T) -> list[T]:
        """The Python object of every rank, by rank."""
        if self.strategy == "none":
            return [part]
        parts: list[Any] = [None] * self.world_size
        with span("communication"):
            dist.all_gather_object(parts, part)
        return parts

    def share(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank. Where it raises, rank 0 says why and the others exit."""
        if self.strategy == "none":
            return make()
        box: list[Any] = [None, False]
        try:
            if self.main:
                box = [make(), True]
        finally:
            with span("communication"):
                dist.broadcast_object_list(box, src=0)
        if not box[1]:
            sys.exit(2)
        return box[0]

    def whole(self, model: Model) -> Model | None:
        """On rank 0 the model with all its weights, free to use alone; None elsewhere. All ranks call it."""
        if self.strategy != "fsdp":
            return model if self.main else None
        # a copy: a forward of the shards would wait for ranks that may stop sampling at another token
        state = get_model_state_dict(model, options=to_rank_0())
        if not self.main:
            return None
        copy = empty_copy(model)
        copy.load_state_dict(state, assign=True)
        copy.compute_dtype = model.compute_dtype
        return copy.to(model.device).train(model.training)

    def _mesh(self, device: torch.device) -> DeviceMesh:
        if self.replicas == 1:
            return init_device_mesh(device.type, (self.world_size,))
        shape = (self.replicas, self.world_size // self.replicas)
        return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


class _Replica(DistributedDataParallel):
    @property
    def head_weight(self) -> Tensor:
        """The loss multiplies by it after the forward."""
        return self.module.head_weight


def _sum_in_bf16(group, bucket):
    """DDP refuses bf16_compress_hook by its name where there is no NCCL; gloo sums bf16 too. It compares annotations
    with types, so that there are none here."""
    return bf16_compress_hook(group, bucket)


def leave() -> None:
    """Part from the other processes, when nothing refers to a wrapped module any more.

    If DDP's reducer is the last to hold the group, it destroys it with the GIL held and waits for Gloo's thread, which
    may be waiting for the GIL to drop the last collective's tensor: one exit in a few hung (torch 2.11 and 2.13).
    Modules under FSDP refer to each other and outlive their last name: one exit in ten or so aborted.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process among them."""
    return int(os.environ.get("RANK", 0)) if "WORLD_SIZE" in os.environ else 0


def to_rank_0() -> StateDictOptions:
    """Whole tensors under the parameters' names, on rank 0's CPU."""
    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def from_rank_0(strict: bool = True) -> StateDictOptions:
    """Rank 0 hands out whole tensors; each takes the part that it keeps. Not strict: some may be missing."""
    together = dist.is_initialized()
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=together, strict=strict)


def _shard(model: Model, mesh: DeviceMesh, reduce_dtype: torch.dtype) -> None:
    """FSDP2: masters stay float32, gradients are summed in `reduce_dtype`. The matrices of a block, which are rounded
    before every product anyway, travel as they compute; what is not, norm gains, routers, embedding and head, travels
    in float32, so that every rank computes what one process would. All gains come with the embedding, once a step.
    With DoRA the blocks' matrices travel in float32 too: the lengths of rows are taken of what is not rounded. Frozen
    weights are sharded like the others; no gradient of them is sent.
    """
    dtype = model.compute_dtype if model.compute_dtype == torch.bfloat16 else None
    # the model itself says what runs in which precision: inputs are not cast
    exact = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(dtype, reduce_dtype, cast_forward_inputs=False)
    if any(part.endswith(".M") for part, _ in model.named_parameters()):
        rounded = exact
    placement = partial(_placement, shards=mesh.size(mesh.ndim - 1))
    for block in cast(Iterable[Block], model.layers):
        if isinstance(block.mlp, MoE):
            fully_shard(block.mlp.router, mesh=mesh, mp_policy=exact)  # near ties decide where a token goes
        matrices: list[nn.Module] = [block.self_attn.qkv_proj, block.self_attn.o_proj, block.mlp]
        fully_shard(matrices, mesh=mesh, mp_policy=rounded, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, mp_policy=exact)


def _placement(parameter: nn.Parameter, shards: int) -> Shard | None:
    """FSDP cuts the first dimension: of 4 stacked experts 8 processes would get one, or nothing. Their second dimension
    is cut where that is even and the first is not."""
    if parameter.ndim == 3 and parameter.shape[0] % shards and parameter.shape[1] % shards == 0:
        return Shard(1)
    return None
