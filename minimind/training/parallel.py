"""A run on several processes started by torchrun: DDP, or FSDP2 with optional replicas (HSDP).

Each rank computes its share of one global batch. Figures are sums over ranks, only rank 0 writes files, and a
checkpoint does not depend on the number of ranks.
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
    """This process among the processes of a run; by default the only one."""

    strategy: Literal["none", "ddp", "fsdp"] = "none"
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    replicas: int = 1
    reduce_dtype: ReduceDtypeName = "fp32"
    wrapped: nn.Module | None = None

    @staticmethod
    def from_env(name: ParallelName, replicas: int, reduce_dtype: ReduceDtypeName = "fp32") -> Parallel:
        """The strategy that --parallel, --replicas and --reduce-dtype name, with or without torchrun. Raises
        ValueError, naming the flag."""
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
        """Whether this process writes the run folder and prints."""
        return self.rank == 0

    def choose_device(self, requested: str) -> torch.device:
        """The device that --device names; of several processes each gets the GPU of its local rank."""
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
        """Initialize the process group."""
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
        """Context of a micro-batch: gradients are exchanged once per step, in the backward of the last one."""
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(last)
        elif isinstance(self.wrapped, _Replica) and not last:
            return self.wrapped.no_sync()
        return nullcontext()

    def sum(self, figures: Tensor) -> Tensor:
        """Sum `figures` over the ranks in place; all ranks get the result."""
        if self.strategy != "none":
            with span("communication"):
                dist.all_reduce(figures)
        return figures

    def gather(self, part: T) -> list[T]:
        """The objects of all ranks, by rank."""
        if self.strategy == "none":
            return [part]
        parts: list[Any] = [None] * self.world_size
        with span("communication"):
            dist.all_gather_object(parts, part)
        return parts

    def share(self, make: Callable[[], T]) -> T:
        """The result of make() on rank 0, on all ranks. Where it raises, rank 0 raises and the others exit."""
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
        """On rank 0 the model with all its weights, usable without the other ranks; None elsewhere. All ranks call
        it."""
        if self.strategy != "fsdp":
            return model if self.main else None
        # a copy: a forward of the shards would wait for other ranks, which do not sample
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
        """The loss uses it after the forward."""
        return self.module.head_weight


def _sum_in_bf16(group, bucket):
    """bf16_compress_hook under another name: DDP refuses that name without NCCL, though gloo sums bf16 too. No
    annotations, as DDP compares them with types."""
    return bf16_compress_hook(group, bucket)


def leave() -> None:
    """Destroy the process group, after the last reference to a wrapped module is gone.

    If DDP's reducer holds the last reference to the group, it destroys it with the GIL held and waits for Gloo's
    thread, which may need the GIL to free the last collective's tensor: one exit in a few hung (torch 2.11 and 2.13).
    Modules under FSDP are in reference cycles, hence the collection: one exit in ten or so aborted without it.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The rank of this process among those that torchrun started; 0 without it."""
    return int(os.environ.get("RANK", 0)) if "WORLD_SIZE" in os.environ else 0


def to_rank_0() -> StateDictOptions:
    """Options for whole tensors by parameter name, on rank 0's CPU."""
    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def from_rank_0(strict: bool = True) -> StateDictOptions:
    """Options for loading whole tensors from rank 0, of which each rank takes its part. strict: none may be missing."""
    together = dist.is_initialized()
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=together, strict=strict)


def _shard(model: Model, mesh: DeviceMesh, reduce_dtype: torch.dtype) -> None:
    """Shard `model` with FSDP2: master weights stay float32, gradients are summed in `reduce_dtype`.

    The matrices of a block are gathered in the compute dtype, to which every product rounds them anyway. Norm gains,
    routers, embedding and head are gathered in float32, so that every rank computes what one process would; all gains
    come with the embedding, once a step. With DoRA the matrices are gathered in float32 too: the lengths of rows need
    unrounded weights. Frozen weights are sharded like the others, without gradients.
    """
    dtype = model.compute_dtype if model.compute_dtype in (torch.bfloat16, torch.float16) else None
    # inputs are not cast: the model decides what runs in which precision
    exact = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(dtype, reduce_dtype, cast_forward_inputs=False)
    if any(part.endswith(".M") for part, _ in model.named_parameters()):
        rounded = exact
    placement = partial(_placement, shards=mesh.size(mesh.ndim - 1))
    for block in cast(Iterable[Block], model.layers):
        if isinstance(block.mlp, MoE):
            fully_shard(block.mlp.router, mesh=mesh, mp_policy=exact)  # near ties decide a token's expert
        matrices: list[nn.Module] = [block.self_attn.qkv_proj, block.self_attn.o_proj, block.mlp]
        fully_shard(matrices, mesh=mesh, mp_policy=rounded, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, mp_policy=exact)


def _placement(parameter: nn.Parameter, shards: int) -> Shard | None:
    """Shard stacked experts along their second dimension where that divides evenly and the first does not; by default
    FSDP shards the first, and of 4 experts 8 processes would get one or none."""
    if parameter.ndim == 3 and parameter.shape[0] % shards and parameter.shape[1] % shards == 0:
        return Shard(1)
    return None
