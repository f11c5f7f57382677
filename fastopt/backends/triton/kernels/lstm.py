"""One step of an LSTM's layer: the recurrent product and the cells, forward and backward.

Tokens are numbered step by step; gates of a token are ``[4, HIDDEN]`` in torch's order i, f, g, o.
Arithmetic is in the type of the cells.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastopt.backends.triton.kernels.elementary import hyperbolic_tangent
from fastopt.backends.triton.kernels.precision import as_factor, store_rounded


@triton.jit
def activated(pre_input, pre_forget, pre_cell, pre_output):
    """Gates of their pre-activations."""
    return (
        tl.sigmoid(pre_input),
        tl.sigmoid(pre_forget),
        hyperbolic_tangent(pre_cell),
        tl.sigmoid(pre_output),
    )


@triton.jit
def next_state(gates, cell_before):
    """Cell and hidden state."""
    input, forget, candidate, output = gates
    cell = forget * cell_before + input * candidate
    return cell, output * hyperbolic_tangent(cell)


@triton.jit
def cell_gradient(gates, cell_before, cell_now, hidden, cell):
    """Of the pre-activations and of the cell before; the last result is the hidden state.

    ``hidden`` and ``cell`` are gradients that come from outside the unit.
    """
    input, forget, candidate, output = gates
    tanh_cell = hyperbolic_tangent(cell_now)
    through_cell = cell + hidden * output * (1 - tanh_cell * tanh_cell)
    pre = (
        through_cell * candidate * input * (1 - input),
        through_cell * forget * (1 - forget) * cell_before,
        through_cell * input * (1 - candidate * candidate),
        hidden * tanh_cell * output * (1 - output),
    )
    return pre, through_cell * forget, output * tanh_cell


@triton.jit
def load_gates(pointers, mask, HIDDEN: tl.constexpr, TYPE: tl.constexpr):
    """The four of units; the pointers are those of the first."""
    return (
        tl.load(pointers, mask=mask, other=0).to(TYPE),
        tl.load(pointers + HIDDEN, mask=mask, other=0).to(TYPE),
        tl.load(pointers + 2 * HIDDEN, mask=mask, other=0).to(TYPE),
        tl.load(pointers + 3 * HIDDEN, mask=mask, other=0).to(TYPE),
    )


@triton.jit
def store_gates(pointers, gates, mask, HIDDEN: tl.constexpr):
    """The same, stored."""
    store_rounded(pointers, gates[0], mask)
    store_rounded(pointers + HIDDEN, gates[1], mask)
    store_rounded(pointers + 2 * HIDDEN, gates[2], mask)
    store_rounded(pointers + 3 * HIDDEN, gates[3], mask)


# Numbers that change from step to step, or that no address is a multiple of: one compiled kernel is
# for all of them.
_ANY_FORWARD = (
    *("tokens", "batch", "save", "begin", "rows", "before", "rows_before"),
    *("reverse_begin", "reverse_rows", "reverse_before", "reverse_rows_before"),
)


@triton.jit(do_not_specialize=_ANY_FORWARD)
def _lstm_forward_kernel(
    gates_ptr,  # [directions, tokens, 4, HIDDEN]: pre-activations without the product
    weights_ptr,  # [directions, 4, HIDDEN, HIDDEN]
    cells_ptr,  # [directions, batch, HIDDEN]: before the step, and after it
    saved_cells_ptr,  # [directions, tokens, HIDDEN], written with `save`, as the gates are
    output_ptr,  # [tokens, DIRECTIONS, HIDDEN]
    tokens,
    batch,
    save,
    begin,  # first token and rows of the step
    rows,
    before,  # first token of the step before, and how many of the rows it had
    rows_before,
    reverse_begin,
    reverse_rows,
    reverse_before,
    reverse_rows_before,
    HIDDEN: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    direction = tl.program_id(2).to(tl.int64)
    if DIRECTIONS == 2 and direction == 1:
        begin = reverse_begin
        rows = reverse_rows
        before = reverse_before
        rows_before = reverse_rows_before
    first_row = tl.program_id(1) * ROWS
    first_unit = tl.program_id(0) * UNITS
    row = (first_row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    unit = (first_unit + tl.arange(0, UNITS))[None, :]
    mask = (row < rows) & (unit < HIDDEN)
    token = direction * tokens + begin + row
    gates_at = gates_ptr + token * (4 * HIDDEN) + unit
    cells_at = cells_ptr + (direction * batch + row) * HIDDEN + unit
    pre = load_gates(gates_at, mask, HIDDEN, tl.float32)
    cell_before = tl.load(cells_at, mask=mask, other=0)

    product = tl.zeros([ROWS, 4 * UNITS], tl.float32)  # the gates of a unit beside each other
    if first_row < rows_before:
        column = tl.arange(0, 4 * UNITS)
        weight_unit = first_unit + column // 4
        weights_row = direction * (4 * HIDDEN) + column % 4 * HIDDEN + weight_unit
        weights_at = weights_ptr + weights_row[None, :] * HIDDEN
        hidden_at = output_ptr + ((before + row) * DIRECTIONS + direction) * HIDDEN
        for start in range(0, HIDDEN, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            hidden = tl.load(
                hidden_at + depth[None, :],
                mask=(row < rows_before) & (depth < HIDDEN)[None, :],
                other=0,
            )
            weights = tl.load(
                weights_at + depth[:, None],
                mask=(weight_unit < HIDDEN)[None, :] & (depth < HIDDEN)[:, None],
                other=0,
            )
            product = tl.dot(
                as_factor(hidden), as_factor(weights), product, input_precision=PRECISION
            )
    even, odd = tl.split(product.reshape(ROWS, UNITS, 2, 2))
    of_input, of_cell = tl.split(even)
    of_forget, of_output = tl.split(odd)
    gates = activated(pre[0] + of_input, pre[1] + of_forget, pre[2] + of_cell, pre[3] + of_output)
    cell, hidden_now = next_state(gates, cell_before)

    tl.store(cells_at, cell, mask=mask)
    output_at = output_ptr + ((begin + row) * DIRECTIONS + direction) * HIDDEN + unit
    store_rounded(output_at, hidden_now, mask)
    if save:
        store_gates(gates_at, gates, mask, HIDDEN)
        tl.store(saved_cells_ptr + token * HIDDEN + unit, cell, mask=mask)


_ANY_BACKWARD = (
    *("tokens", "batch", "has_output_gradient", "begin", "rows", "before", "rows_before"),
    *("after", "rows_after", "reverse_begin", "reverse_rows", "reverse_before"),
    *("reverse_rows_before", "reverse_after", "reverse_rows_after"),
)


@triton.jit(do_not_specialize=_ANY_BACKWARD)
def _lstm_backward_kernel(
    gates_ptr,  # [directions, tokens, 4, HIDDEN], after their activations
    saved_cells_ptr,  # [directions, tokens, HIDDEN]
    initial_cell_ptr,  # [directions, batch, HIDDEN]
    weights_ptr,  # [directions, 4, HIDDEN, HIDDEN]
    output_gradient_ptr,  # [tokens, DIRECTIONS, HIDDEN], or one token of zeros
    final_hidden_gradient_ptr,  # [directions, batch, HIDDEN]
    cell_gradient_ptr,  # [directions, batch, HIDDEN]: of the cells after the step, then before it
    gate_gradient_ptr,  # [directions, tokens, 4, HIDDEN], of the pre-activations
    tokens,
    batch,
    has_output_gradient,
    begin,  # as in the forward pass, and the same of the step after
    rows,
    before,
    rows_before,
    after,
    rows_after,
    reverse_begin,
    reverse_rows,
    reverse_before,
    reverse_rows_before,
    reverse_after,
    reverse_rows_after,
    HIDDEN: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    direction = tl.program_id(2).to(tl.int64)
    if DIRECTIONS == 2 and direction == 1:
        begin = reverse_begin
        rows = reverse_rows
        before = reverse_before
        rows_before = reverse_rows_before
        after = reverse_after
        rows_after = reverse_rows_after
    first_row = tl.program_id(1) * ROWS
    row = (first_row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    unit = (tl.program_id(0) * UNITS + tl.arange(0, UNITS))[None, :]
    mask = (row < rows) & (unit < HIDDEN)
    token = direction * tokens + begin + row
    state = (direction * batch + row) * HIDDEN + unit
    gates = load_gates(gates_ptr + token * (4 * HIDDEN) + unit, mask, HIDDEN, tl.float32)
    cells_at = saved_cells_ptr + token * HIDDEN + unit
    cell_now = tl.load(cells_at, mask=mask, other=0)
    before_at = saved_cells_ptr + (direction * tokens + before + row) * HIDDEN + unit
    cell_before = tl.load(before_at, mask=mask & (row < rows_before), other=0)
    cell_before += tl.load(initial_cell_ptr + state, mask=mask & (row >= rows_before), other=0).to(
        tl.float32
    )
    cell = tl.load(cell_gradient_ptr + state, mask=mask, other=0)
    output_token = (begin + row) * has_output_gradient
    output_at = output_gradient_ptr + (output_token * DIRECTIONS + direction) * HIDDEN + unit
    hidden = tl.load(output_at, mask=mask, other=0).to(tl.float32)
    hidden += tl.load(
        final_hidden_gradient_ptr + state, mask=mask & (row >= rows_after), other=0
    ).to(tl.float32)

    product = tl.zeros([ROWS, UNITS], tl.float32)
    if first_row < rows_after:
        after_at = gate_gradient_ptr + (direction * tokens + after + row) * (4 * HIDDEN)
        weights_at = weights_ptr + direction * (4 * HIDDEN * HIDDEN) + unit
        for start in range(0, 4 * HIDDEN, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            gradient_after = tl.load(
                after_at + depth[None, :],
                mask=(row < rows_after) & (depth < 4 * HIDDEN)[None, :],
                other=0,
            )
            weights = tl.load(
                weights_at + (depth * HIDDEN)[:, None],
                mask=(unit < HIDDEN) & (depth < 4 * HIDDEN)[:, None],
                other=0,
            )
            product = tl.dot(
                as_factor(gradient_after), as_factor(weights), product, input_precision=PRECISION
            )
    pre, of_cell_before, _ = cell_gradient(gates, cell_before, cell_now, hidden + product, cell)

    tl.store(cell_gradient_ptr + state, of_cell_before, mask=mask)
    store_gates(gate_gradient_ptr + token * (4 * HIDDEN) + unit, pre, mask, HIDDEN)


@triton.jit
def elements_of_step(rows, HIDDEN: tl.constexpr, ELEMENTS: tl.constexpr):
    """Elements of ``[rows, HIDDEN]``, which of them there are, and where they lie among gates."""
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    row = element // HIDDEN
    unit = element % HIDDEN
    return element, row < rows, row, unit, row.to(tl.int64) * (4 * HIDDEN) + unit


@triton.jit(do_not_specialize=("rows",))
def _lstm_cell_forward_kernel(
    rows,
    gates_ptr,  # [rows, 4, HIDDEN]: pre-activations without the product; gates with SAVE
    product_ptr,  # [rows, 4, HIDDEN]
    cells_ptr,  # [rows, HIDDEN]: before the step, and after it
    saved_cells_ptr,  # [rows, HIDDEN], or None
    hidden_ptr,  # [rows, HIDDEN]
    output_ptr,  # the same once more, or None
    output_stride,
    HIDDEN: tl.constexpr,
    SAVE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    TYPE: tl.constexpr = cells_ptr.dtype.element_ty
    element, mask, row, unit, gate = elements_of_step(rows, HIDDEN, ELEMENTS)
    pre = load_gates(gates_ptr + gate, mask, HIDDEN, TYPE)
    product = load_gates(product_ptr + gate, mask, HIDDEN, TYPE)
    cell_before = tl.load(cells_ptr + element, mask=mask, other=0)

    gates = activated(
        pre[0] + product[0], pre[1] + product[1], pre[2] + product[2], pre[3] + product[3]
    )
    cell, hidden = next_state(gates, cell_before)

    tl.store(cells_ptr + element, cell, mask=mask)
    store_rounded(hidden_ptr + element, hidden, mask)
    if output_ptr is not None:
        store_rounded(output_ptr + row.to(tl.int64) * output_stride + unit, hidden, mask)
    if SAVE:
        store_gates(gates_ptr + gate, gates, mask, HIDDEN)
        tl.store(saved_cells_ptr + element, cell, mask=mask)


@triton.jit(do_not_specialize=("rows",))
def _lstm_cell_backward_kernel(
    rows,
    gates_ptr,  # [rows, 4, HIDDEN], after their activations
    cells_ptr,  # [rows, HIDDEN]
    cells_before_ptr,  # [rows, HIDDEN]
    hidden_gradient_ptr,  # [rows, HIDDEN]
    output_gradient_ptr,  # added to it, or None
    output_gradient_stride,
    cell_gradient_ptr,  # [rows, HIDDEN]: of the cells after the step, then before it
    gate_gradient_ptr,  # [rows, 4, HIDDEN], of the pre-activations
    hidden_ptr,  # [rows, HIDDEN], the hidden state, or None
    HIDDEN: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    TYPE: tl.constexpr = cells_ptr.dtype.element_ty
    element, mask, row, unit, gate = elements_of_step(rows, HIDDEN, ELEMENTS)
    gates = load_gates(gates_ptr + gate, mask, HIDDEN, TYPE)
    cell_now = tl.load(cells_ptr + element, mask=mask, other=0)
    cell_before = tl.load(cells_before_ptr + element, mask=mask, other=0)
    of_cell = tl.load(cell_gradient_ptr + element, mask=mask, other=0)
    of_hidden = tl.load(hidden_gradient_ptr + element, mask=mask, other=0).to(TYPE)
    if output_gradient_ptr is not None:
        output_at = output_gradient_ptr + row.to(tl.int64) * output_gradient_stride + unit
        of_hidden += tl.load(output_at, mask=mask, other=0).to(TYPE)

    pre, of_cell_before, hidden = cell_gradient(gates, cell_before, cell_now, of_hidden, of_cell)

    tl.store(cell_gradient_ptr + element, of_cell_before, mask=mask)
    store_gates(gate_gradient_ptr + gate, pre, mask, HIDDEN)
    if hidden_ptr is not None:
        store_rounded(hidden_ptr + element, hidden, mask)
