"""Long short-term memory (Hochreiter and Schmidhuber, 1997) over one sequence, in torch's layout."""

from __future__ import annotations

from mindspore import Tensor, ops

from mindpeft.ops.linear import linear

_tanh, _reverse = ops.Tanh(), ops.ReverseV2([0])


def bidirectional_lstm(x: Tensor, weights: tuple[Tensor, ...], fused: bool) -> Tensor:
    """One layer in both directions.

    Args:
        x: (length, in).
        weights: ``weight_ih`` (4 * hidden, in), ``weight_hh`` (4 * hidden, hidden), ``bias_ih`` and
            ``bias_hh`` (4 * hidden,), with the input, forget, cell and output gates in this order; first
            those of the way from left to right, then those of the way back.
        fused: use the operator, which the CPU has and Ascend has not.

    Returns:
        Tensor of shape (length, 2 * hidden).
    """
    one_way = _fused_lstm if fused else _plain_lstm
    there = one_way(x, weights[0], weights[1], weights[2] + weights[3])
    back = one_way(_reverse(x), weights[4], weights[5], weights[6] + weights[7])
    return ops.concat((there, _reverse(back)), 1)


def _fused_lstm(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    length, width = x.shape
    hidden = weight_hh.shape[1]
    weights = ops.concat(
        (
            ops.reshape(weight_ih, (-1, 1, 1)),
            ops.reshape(weight_hh, (-1, 1, 1)),
            ops.reshape(bias, (-1, 1, 1)),
        )
    )
    state = ops.zeros((1, 1, hidden), x.dtype)
    operator = ops.LSTM(width, hidden, 1, True, False, 0.0)
    return ops.reshape(
        operator(ops.reshape(x, (length, 1, width)), state, state, weights)[0], (length, hidden)
    )


def _plain_lstm(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    """The same step by step."""
    hidden = weight_hh.shape[1]
    gates = linear(x, weight_ih, bias)
    state = cell = ops.zeros((1, hidden), x.dtype)
    states = ()
    for step in range(x.shape[0]):
        now = gates[step : step + 1] + linear(state, weight_hh)
        keep, forget = ops.sigmoid(now[:, :hidden]), ops.sigmoid(now[:, hidden : 2 * hidden])
        cell = forget * cell + keep * _tanh(now[:, 2 * hidden : 3 * hidden])
        state = ops.sigmoid(now[:, 3 * hidden :]) * _tanh(cell)
        states = (*states, state)
    return ops.concat(states)
