"""The optimizers' rows, as data: an optimizer, its tensors, its bytes and its bar."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from bench.cases import Bar, Case

Shapes = tuple[tuple[int, ...], ...]

LARGE = 16 * 1024 * 1024

GPT2_BLOCK: Shapes = (
    *((768,), (768,)),  # layer norm
    *((768, 2304), (2304,), (768, 768), (768,)),  # attention
    *((768,), (768,)),  # layer norm
    *((768, 3072), (3072,), (3072, 768), (768,)),  # perceptron
)
GPT2: Shapes = ((50257, 768), (1024, 768), *(12 * GPT2_BLOCK), (768,), (768,))

MATRICES: Shapes = ((384, 1152), (384, 384), (384, 1536), (1536, 384))  # of a block

# The norm of any of the cases' gradients is above this: each is clipped.
MAX_GRAD_NORM = 1.0
CLIP_AND_ZERO = {"max_grad_norm": MAX_GRAD_NORM, "zero_grad_after_step": True}

ADAMW = {"lr": 1e-3, "weight_decay": 0.01}
MOMENTUM = {"lr": 1e-2, "momentum": 0.9}
LAMB = {"lr": 1e-3, "max_grad_norm": None}


@dataclass(frozen=True)
class OptimizerCase(Case):
    """A step of one optimizer; its limit is the bandwidth of ``add_``, on a card of ``copy_``.

    Attributes:
        optimizer: A class of ``torch.optim`` and ``fastopt.optim``; none: only ``clip_grad_norm_``.
        shapes: The parameters.
        options: Keyword arguments of both classes.
        tail: Our options of what surrounds the step; stock's calls do the same.
        storage: Our options of how state is stored, and parameters; stock's are in their dtype.
        dtype: Of parameters, gradients and state.
        bytes_per_element: What a step has to read and write at least.
        transposed: The parameters are transposed views, the gradients contiguous.
        device: Where the tensors lie.
        backend: The one that ours has to run on.
    """

    group: ClassVar[str] = "Optimizers"

    optimizer: str
    shapes: Shapes
    options: dict[str, Any] = field(default_factory=dict)
    tail: dict[str, Any] = field(default_factory=dict)
    storage: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    bytes_per_element: int = 28
    transposed: bool = False
    device: str = "cpu"
    backend: str = "auto"

    @property
    def elements(self) -> int:
        """Elements of all parameters."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


OWN_FP32 = "fastopt fp32"


def _fused(ratio: float) -> tuple[Bar, ...]:
    return (Bar("torch fused", ratio),)


def _stored(
    name: str, bytes_per_element: int, ratio: float, dtype: torch.dtype, **storage: Any
) -> OptimizerCase:
    """AdamW with state in fewer bytes, against our own in fp32."""
    return OptimizerCase(
        f"AdamW {name}, 16.8M",
        "AdamW",
        ((LARGE,),),
        ADAMW,
        storage=storage,
        dtype=dtype,
        bytes_per_element=bytes_per_element,
        bars=(Bar(OWN_FP32, ratio),),
        rounds=40,
    )


OPTIMIZER_CASES = (
    OptimizerCase(
        "AdamW, 1000 x 1024",
        "AdamW",
        ((1024,),) * 1000,
        ADAMW,
        bars=(Bar("torch fused", 10.0), Bar("DeepSpeed CPUAdam", 5.0)),
    ),
    OptimizerCase(
        "AdamW, 1000 x 1024, one thread",
        "AdamW",
        ((1024,),) * 1000,
        ADAMW,
        threads=1,
        bars=_fused(7.0),
    ),
    OptimizerCase(
        "SGD momentum, 1000 x 1024",
        "SGD",
        ((1024,),) * 1000,
        MOMENTUM,
        bytes_per_element=20,
        bars=_fused(5.0),
    ),
    OptimizerCase(
        "AdamW, 200 x 64",
        "AdamW",
        ((64,),) * 200,
        ADAMW,
        bars=_fused(10.0),
        rounds=150,
    ),
    OptimizerCase(
        "AdamW, 1 x 4096",
        "AdamW",
        ((4096,),),
        ADAMW,
        bars=_fused(2.5),
        rounds=800,
        compiled=True,
    ),
    OptimizerCase("AdamW, 16.8M", "AdamW", ((LARGE,),), ADAMW, bars=_fused(1.0), limit_bar=0.9),
    OptimizerCase(
        "SGD momentum, 16.8M",
        "SGD",
        ((LARGE,),),
        MOMENTUM,
        bytes_per_element=20,
        bars=_fused(1.0),
        limit_bar=0.9,
    ),
    OptimizerCase(
        "AdamW, GPT-2 124M in 148",
        "AdamW",
        GPT2,
        ADAMW,
        bars=_fused(1.0),
        limit_bar=0.9,
        rounds=5,
    ),
    OptimizerCase(
        "SGD momentum, GPT-2 124M in 148",
        "SGD",
        GPT2,
        MOMENTUM,
        bytes_per_element=20,
        bars=_fused(1.0),
        limit_bar=0.9,
        rounds=5,
    ),
    OptimizerCase(
        "AdamW bf16, 16.8M",
        "AdamW",
        ((LARGE,),),
        ADAMW,
        dtype=torch.bfloat16,
        bytes_per_element=14,
        bars=_fused(2.0),
    ),
    OptimizerCase(
        "SGD momentum bf16, 16.8M",
        "SGD",
        ((LARGE,),),
        MOMENTUM,
        dtype=torch.bfloat16,
        bytes_per_element=10,
        bars=_fused(1.3),
    ),
    OptimizerCase(
        "AdamW fp16, 16.8M",
        "AdamW",
        ((LARGE,),),
        {**ADAMW, "eps": 1e-4},
        dtype=torch.float16,
        bytes_per_element=14,
        bars=_fused(1.5),
    ),
    OptimizerCase(
        "AdamW, transposed 4 x (2048, 2048)",
        "AdamW",
        ((2048, 2048),) * 4,
        ADAMW,
        bars=(Bar("torch default", 1.0),),
        transposed=True,
    ),
    OptimizerCase(
        "clip + AdamW + zero, GPT-2 124M in 148",
        "AdamW",
        GPT2,
        ADAMW,
        CLIP_AND_ZERO,
        bytes_per_element=36,
        bars=_fused(2.0),
        rounds=5,
    ),
    OptimizerCase(
        "clip + AdamW + zero + EMA, GPT-2 124M in 148",
        "AdamW",
        GPT2,
        ADAMW,
        {**CLIP_AND_ZERO, "ema_decay": 0.999},
        bytes_per_element=44,
        bars=_fused(2.5),
        rounds=5,
    ),
    OptimizerCase(
        "clip + AdamW + zero, 1000 x 1024",
        "AdamW",
        ((1024,),) * 1000,
        ADAMW,
        CLIP_AND_ZERO,
        bytes_per_element=36,
        bars=_fused(12.0),
    ),
    OptimizerCase(
        "clip_grad_norm_, 2000 x 512",
        "",
        ((512,),) * 2000,
        bytes_per_element=12,
        bars=(Bar("torch foreach", 8.0),),
        rounds=40,
    ),
    _stored("bf16 moments", 20, 1.25, torch.float32, state_storage="bf16"),
    _stored("8-bit moments", 16, 1.25, torch.float32, state_storage="8bit"),
    _stored("bf16 with masters", 26, 1.0, torch.bfloat16, param_precision="master"),
    _stored(
        "bf16 with masters, 8-bit moments",
        14,
        1.25,
        torch.bfloat16,
        param_precision="master",
        state_storage="8bit",
    ),
    _stored(
        "bf16, Kahan, 8-bit moments",
        14,
        1.6,
        torch.bfloat16,
        param_precision="kahan",
        state_storage="8bit",
    ),
    _stored(
        "bf16, stochastic, 8-bit moments",
        10,
        1.6,
        torch.bfloat16,
        param_precision="stochastic",
        state_storage="8bit",
    ),
    OptimizerCase("Lion, 16.8M", "Lion", ((LARGE,),), {"lr": 1e-4}, bytes_per_element=20),
    OptimizerCase(
        "Lion 8-bit moment, 16.8M",
        "Lion",
        ((LARGE,),),
        {"lr": 1e-4},
        storage={"state_storage": "8bit"},
        bytes_per_element=14,
    ),
    OptimizerCase("Adagrad, 16.8M", "Adagrad", ((LARGE,),), bytes_per_element=20),
    OptimizerCase("RMSprop, 16.8M", "RMSprop", ((LARGE,),), bytes_per_element=20),
    OptimizerCase("Adamax, 16.8M", "Adamax", ((LARGE,),)),
    OptimizerCase("RAdam, 16.8M", "RAdam", ((LARGE,),)),
    OptimizerCase("NAdam, 16.8M", "NAdam", ((LARGE,),)),
    OptimizerCase("NAdam, 1000 x 1024", "NAdam", ((1024,),) * 1000),
    OptimizerCase("ScheduleFreeAdamW, 16.8M", "ScheduleFreeAdamW", ((LARGE,),), ADAMW),
    OptimizerCase("LAMB, 16.8M", "LAMB", ((LARGE,),), LAMB, bytes_per_element=44),
    OptimizerCase("LAMB, 1000 x 1024", "LAMB", ((1024,),) * 1000, LAMB, bytes_per_element=44),
    OptimizerCase("Muon, 24 matrices of a transformer", "Muon", 6 * MATRICES, rounds=10),
    OptimizerCase("Muon, 60 matrices of 64 x 64", "Muon", ((64, 64),) * 60, rounds=40),
)


def _on_card(name: str, optimizer: str, shapes: Shapes, **more: Any) -> OptimizerCase:
    return OptimizerCase(name, optimizer, shapes, device="cuda", backend="cuda", **more)


HUNDRED_MILLION = 100 * 1000 * 1000

GPU_CASES = (
    _on_card(
        "AdamW, 100M",
        "AdamW",
        ((HUNDRED_MILLION,),),
        options=ADAMW,
        bars=_fused(1.0),
        limit_bar=0.92,
    ),
    _on_card(
        "SGD momentum, 100M",
        "SGD",
        ((HUNDRED_MILLION,),),
        options=MOMENTUM,
        bytes_per_element=20,
        bars=_fused(1.0),
    ),
    _on_card(
        "AdamW bf16, 100M",
        "AdamW",
        ((HUNDRED_MILLION,),),
        options=ADAMW,
        dtype=torch.bfloat16,
        bytes_per_element=14,
        bars=_fused(1.0),
    ),
    _on_card(
        "AdamW, 1000 x 1024", "AdamW", ((1024,),) * 1000, options=ADAMW, bars=_fused(3.0), rounds=50
    ),
    _on_card("AdamW, GPT-2 124M in 148", "AdamW", GPT2, options=ADAMW, bars=_fused(1.0)),
    _on_card(
        "clip + AdamW + zero, GPT-2 124M in 148",
        "AdamW",
        GPT2,
        options=ADAMW,
        tail=CLIP_AND_ZERO,
        bytes_per_element=36,
        bars=_fused(2.0),
    ),
    _on_card(
        "clip + AdamW + zero + EMA, GPT-2 124M in 148",
        "AdamW",
        GPT2,
        options=ADAMW,
        tail={**CLIP_AND_ZERO, "ema_decay": 0.999},
        bytes_per_element=44,
        bars=_fused(2.0),
    ),
)
