"""What an operator asks of a backend, and what a backend answers."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from fastopt.backends.state_codes import StateCoding

ParamGroup = dict[str, Any]

# Of an optimizer's state: the exponential moving average of a parameter.
AVERAGE = "ema"

# Of NAdam's state: the product of the momenta up to now.
PRODUCT = "mu_product"

# Rules of whole matrices: products, which are torch's own on every device.
MATRIX_RULES = ("muon", "muon_match_rms_adamw")

# Rules of core/layerwise_rules.h with kLayerwise: a part of a parameter cannot be stepped alone.
LAYERWISE_RULES = ("lamb",)
WHOLE_RULES = (*LAYERWISE_RULES, *MATRIX_RULES)

# State made for a step that is still to come: parameter and keys, by the parameter's id.
Created = dict[int, tuple[Tensor, list[str]]]


class WeightDecay(enum.IntEnum):
    """How a parameter is pulled towards zero; the numbers are those of core/update_rules.h."""

    L2 = 0  # gradient += decay * parameter
    DECOUPLED = 1  # parameter *= decay, which is 1 - lr * weight_decay


class UpdateRule(NamedTuple):
    """A row of ``csrc/core/update_rules.h`` with its numbers for one step of one group.

    ``hyperparameters`` come in the order of the functor's own struct. A tensor is one that lies on
    an accelerator and shall be read there.
    """

    name: str
    weight_decay: WeightDecay
    decay: float | Tensor
    maximize: bool
    hyperparameters: tuple[float | Tensor, ...]


class Tail(NamedTuple):
    """What surrounds the update of every parameter in one step.

    Attributes:
        grad_scale: Multiplies every gradient first: it unscales and clips by norm. A tensor of no
            dimensions where it shall not be read on the host.
        clip_value: Then gradients are brought into ``[-clip_value, clip_value]``.
        zero_grad: Gradients are zeros afterwards, otherwise as the update saw them.
        average_weight: Of the new parameter in its average; 1 copies it.
        found_inf: A gradient scaler's verdict where it shall not be read on the host: nonzero, and
            nothing is stepped or counted.
    """

    grad_scale: float | Tensor = 1.0
    clip_value: float = math.inf
    zero_grad: bool = False
    average_weight: float = 0.0
    found_inf: Tensor | None = None

    @property
    def changes_gradients(self) -> bool:
        """Whether the update sees other gradients than the ones given."""
        scaled = isinstance(self.grad_scale, Tensor) or self.grad_scale != 1
        return scaled or self.clip_value < math.inf


class _Request:
    """What all requests have in common: there is a tensor that is worked on.

    Attributes:
        operator: Its name.
        may_be_stock: Whether ``auto`` may prefer stock where that is faster: stock has to give the
            same, in as little memory.
    """

    __slots__ = ()
    operator: ClassVar[str]
    may_be_stock: ClassVar[bool] = True
    _subject: ClassVar[str]  # the field

    @property
    def dtype(self) -> torch.dtype:
        """Of what is worked on."""
        tensor: Tensor = getattr(self, self._subject)
        return tensor.dtype

    @property
    def device(self) -> torch.device:
        """Where the work is."""
        tensor: Tensor = getattr(self, self._subject)
        return tensor.device


@dataclass(frozen=True, slots=True)
class ParameterRequest(_Request):
    """May a backend step this parameter?

    Attributes:
        param: The parameter.
        grad: Its gradient, or None where the answer should hold for any ordinary one.
        slots: The state tensors that exist, in the order of the rule's slots; then the average.
        step: What counts its steps, where the rule keeps it.
        rule: The update rule's name.
        group: The parameter group, for its flags.
        product: What multiplies the rule's factors up, where the rule has some.
        coding: How state is stored that does not have the parameter's dtype; or None.
    """

    operator: ClassVar[str] = "optimizer_step"
    _subject: ClassVar[str] = "param"

    param: Tensor
    grad: Tensor | None
    slots: tuple[Tensor, ...]
    step: Any
    rule: str
    group: ParamGroup
    product: Any = None
    coding: StateCoding | None = None

    @property
    def task(self) -> str:
        """The work in words, for messages."""
        return step_of(self.param)

    def ask(self, backend: Backend) -> str | None:
        """What the backend answers."""
        return backend.supports(self)


def step_of(param: Tensor) -> str:
    """The step of a parameter in words, for messages."""
    return f"step a parameter of shape {list(param.shape)}, {param.dtype} on {param.device}"


@dataclass(frozen=True, slots=True)
class LstmRequest(_Request):
    """May a backend run these layers, forward and backward?

    Attributes:
        input: ``[steps, batch, input_size]``, or ``[tokens, input_size]`` with ``batch_sizes``.
        batch_sizes: Of a packed sequence: how many rows each step has, on the CPU; or None.
        initial_hidden: ``[layers * directions, batch, output_size]``.
        initial_cell: ``[layers * directions, batch, hidden_size]``.
        weights: For each layer and direction ``weight_ih``, ``weight_hh``, with biases ``bias_ih``
            and ``bias_hh``, with a projection ``weight_hr``.
        has_biases: Whether there are biases.
        num_layers: Layers on top of each other.
        bidirectional: Whether each layer also runs from the end.
    """

    operator: ClassVar[str] = "lstm"
    _subject: ClassVar[str] = "input"

    input: Tensor
    batch_sizes: Tensor | None
    initial_hidden: Tensor
    initial_cell: Tensor
    weights: Sequence[Tensor]
    has_biases: bool
    num_layers: int
    bidirectional: bool

    @property
    def task(self) -> str:
        """The work in words, for messages."""
        shape, dtype = list(self.input.shape), self.input.dtype
        return f"run an LSTM over input of shape {shape}, {dtype} on {self.device}"

    def layer(self, number: int, input: Tensor) -> LstmRequest:
        """One of the layers, over the input given."""
        directions = 2 if self.bidirectional else 1
        count = len(self.weights) // self.num_layers
        states = slice(number * directions, (number + 1) * directions)
        return LstmRequest(
            input,
            self.batch_sizes,
            self.initial_hidden[states],
            self.initial_cell[states],
            list(self.weights[number * count : (number + 1) * count]),
            self.has_biases,
            num_layers=1,
            bidirectional=self.bidirectional,
        )

    def cast(self, dtype: torch.dtype) -> LstmRequest:
        """The same in another dtype."""
        return LstmRequest(
            self.input.to(dtype),
            self.batch_sizes,
            self.initial_hidden.to(dtype),
            self.initial_cell.to(dtype),
            [weight.to(dtype) for weight in self.weights],
            self.has_biases,
            self.num_layers,
            self.bidirectional,
        )

    def ask(self, backend: Backend) -> str | None:
        """What the backend answers."""
        return backend.supports_lstm(self)


@dataclass(frozen=True, slots=True)
class AttentionRequest(_Request):
    """May a backend run this attention, forward and backward?

    Query ``i`` stands at key ``i``, or from the bottom right at key ``i + keys - queries``, and
    sees the keys from ``left`` before to ``right`` behind its place.

    Attributes:
        query: ``[batch, heads, queries, features]``.
        key: ``[batch, key_heads, keys, features]``; ``heads`` is a multiple of ``key_heads``.
        value: ``[batch, key_heads, keys, value_features]``.
        bias: Added to the scores, of the query's dtype, ``[batch, heads, queries, keys]`` or 1
            instead of any of these; or None.
        allowed: Of the same shape, bool: where it is False, the key is not seen; or None.
        slopes: Of ALiBi, fp32, ``[batch, heads]``; or None.
        sinks: The score of one more key whose value is zero, ``[heads]``; or None.
        query_starts: Sequences of different lengths lie behind each other in a batch of one: where
            each begins among the queries, and the end of the last, int32; or None.
        key_starts: The same among the keys; both or none.
        used_keys: Of each sequence, how many of its keys there are, int32 ``[batch]``; or None.
        seed: Of dropout, int64 of no dimensions on the CPU; None without dropout.
        dropout: Probability with which a weight is dropped.
        scale: Multiplies the products of queries and keys.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0: they stay.
        left: Negative: no bound.
        right: Negative: no bound.
        bottom_right: Where queries stand.
        inference: No gradient will be asked for: a faster order of the sums is as good.
    """

    operator: ClassVar[str] = "attention"
    may_be_stock: ClassVar[bool] = False
    _subject: ClassVar[str] = "query"

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    allowed: Tensor | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    query_starts: Tensor | None = None
    key_starts: Tensor | None = None
    used_keys: Tensor | None = None
    seed: Tensor | None = None
    dropout: float = 0.0
    scale: float = 1.0
    softcap: float = 0.0
    left: int = -1
    right: int = -1
    bottom_right: bool = False
    inference: bool = False

    @property
    def task(self) -> str:
        """The work in words, for messages."""
        shape, dtype = list(self.query.shape), self.query.dtype
        return f"run an attention of queries of shape {shape}, {dtype} on {self.device}"

    def ask(self, backend: Backend) -> str | None:
        """What the backend answers."""
        return backend.supports_attention(self)


@dataclass(frozen=True, slots=True)
class TwinAttentionRequest(AttentionRequest):
    """A call of torch's own function: what torch makes of it is right by definition."""

    may_be_stock: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class LinearCrossEntropyRequest(_Request):
    """May a backend run this linear layer with its cross-entropy, forward and backward?

    With ``s = softcap(input @ linear_weight^T + linear_bias)``, the loss of a row is the
    cross-entropy of ``s`` plus ``z_loss * logsumexp(s)^2``.

    Attributes:
        input: ``[rows, features]``.
        linear_weight: ``[classes, features]``, or of a K-dimensional loss
            ``[classes, d_1, ..., d_K, features]``.
        target: Classes, int64 ``[rows]``, or their probabilities ``[rows, classes]``.
        linear_bias: As ``linear_weight`` without features; or None.
        weight: Of each class, ``[classes]``; or None.
        reduction: ``none``, ``mean`` or ``sum``.
        ignore_index: Rows of this target have no part in the loss.
        label_smoothing: How much of the target is spread over all classes.
        softcap: Logits become ``softcap * tanh(logit / softcap)``; 0: they stay.
        z_loss: Not scaled by ``weight``; its mean is that of the rows that have a part.
        chunk_rows: How many rows have their logits in memory at once, at most; 0: as many as the
            backend finds best.
    """

    operator: ClassVar[str] = "linear_cross_entropy"
    may_be_stock: ClassVar[bool] = False
    _subject: ClassVar[str] = "input"

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None = None
    weight: Tensor | None = None
    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0
    z_loss: float = 0.0
    chunk_rows: int = 0

    @property
    def task(self) -> str:
        """The work in words, for messages."""
        shape, dtype = list(self.input.shape), self.input.dtype
        return f"run a linear cross-entropy of input of shape {shape}, {dtype} on {self.device}"

    def ask(self, backend: Backend) -> str | None:
        """What the backend answers."""
        return backend.supports_linear_cross_entropy(self)


Request = ParameterRequest | LstmRequest | AttentionRequest | LinearCrossEntropyRequest


class SteppedOptimizer(Protocol):
    """The side of an optimizer that the operator and its backends see."""

    param_groups: list[ParamGroup]
    state: Any
    defaults: dict[str, Any]
    max_grad_norm: float | None
    norm_type: float
    error_if_nonfinite: bool
    clip_value: float | None
    zero_grad_after_step: bool
    ema_decay: float | None
    grad_norm: Tensor | None
    _averages_began: bool
    _first_number: int
    rounding_seed: int
    min_8bit_size: int
    _has_coded: bool
    _backend: str | None
    _plan: Any

    def _coding(self, group: ParamGroup, param: Tensor) -> StateCoding | None:
        """How a parameter's state is stored; None: in the parameter's dtype."""

    def _update_rule(self, group: ParamGroup) -> UpdateRule:
        """The rule of a group with its present numbers."""

    def _state_keys(self, group: ParamGroup) -> tuple[str, ...]:
        """The keys of the state tensors, in the order of the rule's slots."""

    def _prepare(self, group: ParamGroup) -> None:
        """Runs stock's checks of the gradients and makes the state that stock makes lazily."""

    def _new_state(self, key: str, param: Tensor) -> Tensor:
        """What a state tensor is before the first step."""

    def _torch_step(self, group: ParamGroup) -> None:
        """Steps a group with torch's own implementation."""

    def _count_step(self) -> None:
        """Counts, in the groups, a step that took place."""


class Refusal(NamedTuple):
    """A gradient that a plan does not take this time.

    ``shares_memory``: it would, were it to write the gradient's elements one by one: they, or those
    of another tensor, lie in the same place.
    """

    group: int
    place: int
    reason: str
    shares_memory: bool = False


class OptimizerPlan(Protocol):
    """What a backend keeps between the steps of one optimizer, but for the optimizer itself.

    A reference back would keep a dropped optimizer's state alive until the garbage collector runs.
    """

    def collect(self, optimizer: SteppedOptimizer, writing: bool) -> Sequence[Refusal] | None:
        """Fetches the gradients; with ``writing`` they are going to be written. Changes nothing.

        Returns:
            The gradients that the backend does not take this time, or None where the plan no longer
            describes the optimizer.
        """

    def grad_norm(self, optimizer: SteppedOptimizer, order: float) -> float | Tensor | None:
        """The norm of what ``collect`` fetched; None where that is nothing.

        A number of 64 bits, or a tensor of no dimensions where reading it would wait for a device.
        """

    def run(self, optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...], tail: Tail) -> None:
        """Steps what ``collect`` fetched, and moves the averages of all its parameters."""

    def release(self) -> None:
        """Drops what ``collect`` fetched."""


class Backend(Protocol):
    """One implementation of the operators."""

    name: str

    def supports(self, request: ParameterRequest) -> str | None:
        """None where the backend takes the request, otherwise the reason in words."""

    def supports_lstm(self, request: LstmRequest) -> str | None:
        """The same for the layers of an LSTM."""

    def supports_attention(self, request: AttentionRequest) -> str | None:
        """The same for an attention."""

    def supports_linear_cross_entropy(self, request: LinearCrossEntropyRequest) -> str | None:
        """The same for a linear layer with its cross-entropy."""

    def plan_optimizer_step(
        self,
        optimizer: SteppedOptimizer,
        served: Sequence[Sequence[bool]],
        created: Created,
    ) -> OptimizerPlan:
        """Makes a plan for the parameters marked, by group and index.

        ``created`` has, by id, the parameters whose state was made for this step.
        """


class Kernels(Protocol):
    """The operators on activations that a backend runs itself, by the schemas in ``ops``."""

    def lstm_forward(
        self, layer: LstmRequest, packed: Tensor | None, save: bool
    ) -> tuple[Tensor, ...]:
        """One layer: output, final states, and what its backward needs, empty without ``save``."""

    def lstm_backward(
        self,
        layer: LstmRequest,
        gradients: Sequence[Tensor | None],
        saved: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        """Gradients of those of input, initial states and weights that are wanted.

        ``gradients`` are those of output and final states; ``saved`` are output, gates and cells.
        """

    def attention_forward(
        self, request: AttentionRequest, inference: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Output and logsumexp; ``inference``: as in the request."""

    def attention_backward(
        self,
        request: AttentionRequest,
        output_gradient: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        bias_wanted: bool,
        sinks_wanted: bool,
    ) -> tuple[Tensor, ...]:
        """Gradients of query, key, value, bias and sinks; empty where the last are not wanted."""

    def linear_cross_entropy_forward(
        self, request: LinearCrossEntropyRequest, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss in the type of the arithmetic, and gradients as if its own were 1.

        They are those of input, weight and bias; empty where not ``wanted``.
        """

    def linear_cross_entropy_backward(
        self, request: LinearCrossEntropyRequest, gradient: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same gradients, of a loss that has the gradient given."""
