"""Random inputs for each family of `native`, of sizes that no vector unit and no block divides."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from tests.ops.cotangent import on_bfloat16_grid
from tests.ops.cpu import native

SIZES = (1, 3, 7, 17, 65, 257)
ROWS = (1, 2, 5, 8, 9, 12, 15, 17, 65, 257)  # to 8 rows a product takes another way
LOWEST = np.float32(-3.3895314e38)  # what mindpeft adds to hidden scores
Maker = Callable[["Random"], Iterator["Case"]]


class Case(NamedTuple):
    """A family's inputs: those that get a gradient, and those that get none."""

    family: str
    inputs: tuple[np.ndarray, ...]
    fixed: tuple[np.ndarray, ...] = ()
    bfloat16: bool = False  # hand over the weight, the second input or the only one, in bfloat16

    def run(self, kernels: native.Kernels) -> list[np.ndarray]:
        """Value and gradients by our kernels."""
        inputs = list(self.inputs)
        if self.bfloat16:
            place = min(1, len(inputs) - 1)
            inputs[place] = native.to_bfloat16(inputs[place])
        return native.FAMILIES[self.family](kernels, *inputs, *self.fixed)

    def __str__(self) -> str:
        shapes = [value.shape for value in (*self.inputs, *self.fixed)]
        return f"{self.family}{' bfloat16' if self.bfloat16 else ''} {shapes}"


class Random:
    """Numbers and choices of one seed."""

    def __init__(self, seed: int):
        self.generator = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
        return self.generator.normal(mean, scale, shape).astype(np.float32)

    def powers(self, *shape: int) -> np.ndarray:
        """Some of two, and zeros among them."""
        return self.generator.choice(numbers(0, 2**-9, 2**-6, 0.5), shape)

    def pick(self, choices):
        return choices[self.generator.integers(len(choices))]

    def lead(self) -> tuple[int, ...]:
        """The axes before a row's: one or two, and now and then no row at all."""
        rows = self.pick(ROWS)
        return self.pick([(rows,), (rows,), (3, rows), (2, 1, rows), (0,), (2, 0)])


def numbers(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


PRODUCTS = tuple(
    name + bias for name in ("linear", "linear_turned", "lora", "lora_turned") for bias in ("", "_bias")
)


DELTA_PRODUCTS = tuple(
    name + bias for name in ("delta_linear", "sparse_delta_linear") for bias in ("", "_bias")
)


def product(name: str, bfloat16: bool = False) -> Maker:
    """Of a dense layer, with LoRA or without; its name tells of a bias and of a weight (in, out)."""

    def make(random: Random) -> Iterator[Case]:
        while True:
            lead, into, out = random.lead(), random.pick(SIZES), random.pick(SIZES)
            x, weight = random.normal(*lead, into), random.normal(out, into)
            if bfloat16:
                x, weight = on_bfloat16_grid(x), on_bfloat16_grid(weight)
            if "turned" in name:
                weight = np.ascontiguousarray(weight.T)
            inputs, fixed = [x, weight], []
            if name.startswith("lora"):
                rank = random.pick((1, 3, 8, 17))
                inputs += [random.normal(rank, into), random.normal(out, rank)]
                fixed = [numbers(random.pick((0.5, 2.0)))]
            if name.endswith("bias"):
                inputs.append(random.normal(out))
            yield Case(name, tuple(inputs), tuple(fixed), bfloat16)

    return make


def delta_product(name: str) -> Maker:
    """Of a dense layer whose weight has a dense or a sparse delta; with a bias if its name says so."""

    def make(random: Random) -> Iterator[Case]:
        while True:
            yield delta_case(random, name, random.lead(), random.pick(SIZES), random.pick(SIZES))

    return make


def delta_case(random: Random, name: str, lead: tuple[int, ...], into: int, out: int) -> Case:
    """One of given sizes; a sparse delta may have no number, few of them or one for each place."""
    inputs, fixed = [random.normal(*lead, into), random.normal(out, into)], ()
    if name.startswith("sparse"):
        flat = random.generator.permutation(out * into)[:: random.pick((1, 3, 30))]
        flat = flat[: random.pick((0, flat.size, flat.size, flat.size))]
        inputs.append(random.normal(flat.size))
        fixed = (np.stack(np.divmod(flat, into)).astype(np.int32),)
    else:
        inputs.append(random.normal(out, into))
    if name.endswith("bias"):
        inputs.append(random.normal(out))
    return Case(name, tuple(inputs), fixed)


def kron(random: Random) -> Iterator[Case]:
    while True:
        (p, k), (m, n) = ((random.pick((1, 2, 5, 16)), random.pick((1, 3, 17))) for _ in range(2))
        yield Case(
            "kron_linear", (random.normal(*random.lead(), m * n), random.normal(p, m), random.normal(k, n))
        )


def int8_product(name: str) -> Maker:
    """Of a frozen layer of int8; with a bias if its name says so."""

    def make(random: Random) -> Iterator[Case]:
        while True:
            yield int8_case(random, name, random.lead(), random.pick(SIZES), random.pick(SIZES))

    return make


def int8_case(random: Random, name: str, lead: tuple[int, ...], into: int, out: int) -> Case:
    """One whose x has 8 bits in each row, and whose scales are powers of two: no kernel rounds any of it."""
    x = random.generator.integers(-127, 128, (*lead, into)).astype(np.float32)
    x[..., :1] = 127
    x *= random.powers(*lead, 1)
    weight = random.generator.integers(-127, 128, (out, into)).astype(np.int8)
    bias = [random.normal(out)] if name.endswith("bias") else []
    return Case(name, (x, *bias), (weight, random.powers(out)))


def qkv(random: Random, batch: int, heads: int, group: int, length: int, keys: int) -> tuple[np.ndarray, ...]:
    size, value_size = random.pick((1, 3, 16, 65)), random.pick((1, 3, 16, 65))
    return (
        random.normal(batch, heads * group, length, size),
        random.normal(batch, heads, keys, size),
        random.normal(batch, heads, keys, value_size),
    )


def settings(random: Random, size: int) -> np.ndarray:
    return numbers(size**-0.5, random.pick((0.0, 0.0, 2.0, 50.0)))


def attention(random: Random) -> Iterator[Case]:
    while True:
        length, keys = random.pick(SIZES), random.pick((*SIZES[1:], 256, 513))
        inputs = qkv(
            random, random.pick((0, 1, 2, 3)), random.pick((1, 3)), random.pick((1, 2)), length, keys
        )
        yield Case("attention", inputs, (settings(random, inputs[0].shape[-1]),))


def masked_attention(random: Random) -> Iterator[Case]:
    for kind, broadcast in itertools.cycle(itertools.product(MASKS, itertools.product((0, 1), repeat=3))):
        length, keys = random.pick(SIZES), random.pick((*SIZES[1:], 300, 513))
        heads, group = random.pick((1, 3)), random.pick((1, 2))
        inputs = qkv(random, 2, heads, group, length, keys)
        full = (2, heads * group, length)
        axes = [1 if one else size for one, size in zip(broadcast, full, strict=True)]
        mask = MASKS[kind](random, (*axes, keys)).astype(np.float32)
        yield Case("masked_attention", inputs, (mask, settings(random, inputs[0].shape[-1])))


def described_attention(random: Random) -> Iterator[Case]:
    """Rules in place of a mask: order, windows, samples, padding, places that count, a past."""
    while True:
        causal, alibi = random.pick((0, 1, 1)), random.pick((0, 0, 1))
        length, past = random.pick(SIZES), random.pick((0, 0, 3, 270))
        first, window = (random.pick((0, 0, 5, 300)), random.pick((0, 1, 7, 300))) if causal else (0, 0)
        own = first + length + random.pick((0, 0, 40))
        heads, group = random.pick((1, 3)), random.pick((1, 2))
        inputs = qkv(random, 2, heads, group, length, past + own)
        batch = random.pick((0, 2, 2, 2))
        inputs = tuple(value[:batch] for value in inputs)
        rules = np.array([[causal, first, window, alibi, past]], np.float32)
        samples = SAMPLES[random.pick(tuple(SAMPLES))](random, own)
        if samples is not None:
            rules = np.concatenate((np.tile(rules, (len(samples), 1)), samples), 1).astype(np.float32)
            rules = rules if len(rules) == 1 else rules[:batch]
        yield Case("described_attention", inputs, (rules, settings(random, inputs[0].shape[-1])))


def padding(random: Random, keys: int) -> np.ndarray:
    """In front or behind, perhaps all of a text."""
    lengths = random.generator.integers(0, keys + 1, (2, 1))
    real = np.arange(keys) < lengths
    return real[:, ::-1] if random.pick((0, 1)) else real


def packed(random: Random, keys: int) -> np.ndarray:
    """Samples one after the other, with padding behind the last."""
    numbers = 1 + np.cumsum(random.generator.random((2, keys)) < 0.1, 1)
    return np.where(np.arange(keys) < keys - random.pick((0, 2)), numbers, 0)


SAMPLES = {
    "none": lambda *_: None,
    "one": lambda _, keys: np.ones((1, keys)),
    "padding": padding,
    "packed": packed,
    "scattered": lambda random, keys: random.generator.integers(0, 3, (2, keys)),
}


def some_hidden(random: Random, shape) -> np.ndarray:
    return np.where(random.generator.random(shape) < 0.5, LOWEST, 0)


def infinitely_hidden(random: Random, shape) -> np.ndarray:
    mask = np.where(random.generator.random(shape) < 0.5, -np.inf, 0)
    mask[..., random.generator.integers(shape[-1])] = 0  # a row of nothing else is NaN in torch
    return mask


def causal(random: Random, shape) -> np.ndarray:
    """The last query sees all keys, as with a cache; the first ones may see none."""
    ahead = np.arange(shape[-1]) > np.arange(shape[-2])[:, None] + shape[-1] - shape[-2]
    return np.where(np.broadcast_to(ahead, shape), LOWEST, 0)


def padded(random: Random, shape) -> np.ndarray:
    """Texts of unequal length, some of length 0."""
    lengths = random.generator.integers(0, shape[-1] + 1, (shape[0], 1, 1, 1))
    return np.where(np.broadcast_to(np.arange(shape[-1]) >= lengths, shape), LOWEST, 0)


def hidden_twice(random: Random, shape) -> np.ndarray:
    """Two masks added up: -inf where both hide; some rows see nothing, but not all of it is -inf."""
    with np.errstate(over="ignore"):
        mask = (causal(random, shape) + padded(random, shape)).astype(np.float32)
    blind = np.isneginf(mask).all(-1)
    mask[..., 0] = np.where(blind, LOWEST, mask[..., 0])
    return mask


def biases(random: Random, shape) -> np.ndarray:
    return random.normal(*shape)


MASKS = {
    "some": some_hidden,
    "infinite": infinitely_hidden,
    "causal": causal,
    "padded": padded,
    "twice": hidden_twice,
    "biases": biases,
}


NORMS = tuple(norm + kind for norm in ("rms_norm", "layer_norm") for kind in ("", "_of_sum", "_and_sum"))


def norm(name: str) -> Maker:
    def make(random: Random) -> Iterator[Case]:
        while True:
            # Few columns may be nearly equal, and their mean then costs all digits of what is left.
            lead, width = random.lead(), random.pick(SIZES[2:])
            x = random.normal(*lead, width, scale=random.pick((0.1, 1.0, 30.0)), mean=random.pick((0.0, 3.0)))
            residual = [random.normal(*x.shape)] if name.endswith("sum") else []
            inputs = [x, *residual, *norm_parameters(random, name, width)]
            yield Case(name, tuple(inputs), (numbers(random.pick((1e-5, 1e-6, 1e-2))),))

    return make


def norm_parameters(random: Random, name: str, width: int) -> list[np.ndarray]:
    """A weight, and a LayerNorm's bias."""
    return [random.normal(width) for _ in range(2 if name.startswith("layer_norm") else 1)]


def columns(random: Random) -> Iterator[Case]:
    while True:
        width = random.pick(SIZES)
        yield Case("scale_columns", (random.normal(*random.lead(), width), random.normal(width)))


def elementwise(name: str, count: int) -> Maker:
    def make(random: Random) -> Iterator[Case]:
        while True:
            shape = (*random.lead(), random.pick(SIZES[3:]))  # not of tails alone, where few digits are left
            yield Case(name, tuple(random.normal(*shape, scale=3) for _ in range(count)))

    return make


def heads_apart(random: Random) -> Iterator[Case]:
    while True:
        heads, size = random.pick((1, 2, 3, 8)), random.pick((1, 3, 16, 65))
        x = random.normal(random.pick((0, 1, 2, 3)), random.pick(SIZES), heads * size)
        yield Case("split_heads", (x,), (np.array(heads),))


def heads_together(random: Random) -> Iterator[Case]:
    while True:
        batch, heads = random.pick((0, 1, 2, 3)), random.pick((1, 2, 3, 8))
        yield Case("merge_heads", (random.normal(batch, heads, random.pick(SIZES), random.pick(SIZES)),))


def rotary(name: str) -> Maker:
    def make(random: Random) -> Iterator[Case]:
        while True:
            batch, heads, length = random.pick((0, 1, 2, 3)), random.pick((1, 3)), random.pick(SIZES)
            size, rest = random.pick((2, 6, 34, 64)), random.pick((0, 1, 5))
            x = random.normal(batch, length, heads * (size + rest))
            cos, sin = tables(random, random.pick((1, batch)), random.pick((1, heads)), length, size)
            yield Case(name, (x,), (cos, sin, np.array(heads)))

    return make


def tables(random: Random, batch: int, heads: int, length: int, size: int) -> list[np.ndarray]:
    """Cosines and sines, the same for all heads; a rotation's are related, which a gradient need not know."""
    return [np.tile(random.normal(batch, 1, length, size), (1, heads, 1, 1)) for _ in range(2)]


def loss(bfloat16: bool = False) -> Maker:
    def make(random: Random) -> Iterator[Case]:
        while True:
            # More than 8 rows of hidden states are rounded to bfloat16, and the gradients of all logits.
            rows = random.pick((0, 1, 5, 8, 9, 65, 300, 600))
            width, vocabulary = random.pick(SIZES), random.pick(SIZES)
            hidden, weight = (
                random.normal(rows, width),
                random.normal(vocabulary, width, scale=2 * width**-0.5),
            )
            labels = random.generator.integers(0, vocabulary, rows).astype(np.int32)
            labels[random.generator.random(rows) < random.pick((0, 0.3, 1))] = -100
            if bfloat16:
                hidden, weight = on_bfloat16_grid(hidden), on_bfloat16_grid(weight)
            yield Case("loss", (hidden, weight), (labels,), bfloat16)

    return make


def embedding(bfloat16: bool = False) -> Maker:
    def make(random: Random) -> Iterator[Case]:
        while True:
            weight = random.normal(random.pick(SIZES), random.pick(SIZES))
            ids = random.generator.integers(0, len(weight), random.lead()).astype(np.int32)
            yield Case("embedding", (on_bfloat16_grid(weight),), (ids,), bfloat16)

    return make


EXACT: dict[str, Maker] = {
    **{name: product(name) for name in PRODUCTS},
    **{f"{name} bfloat16": product(name, True) for name in PRODUCTS},
    "attention": attention,
    "masked_attention": masked_attention,
    "described_attention": described_attention,
    **{name: norm(name) for name in NORMS},
    "scale_columns": columns,
    **{name: int8_product(name) for name in ("int8_linear", "int8_linear_bias")},
    **{name: delta_product(name) for name in DELTA_PRODUCTS},
    "kron_linear": kron,
    **{name: elementwise(name, 1) for name in native.ACTIVATIONS},
    **{f"{name}_gate": elementwise(f"{name}_gate", 2) for name in native.ACTIVATIONS},
    "split_heads": heads_apart,
    "merge_heads": heads_together,
    "split_and_turn": rotary("split_and_turn"),
    "split_and_turn_neighbours": rotary("split_and_turn_neighbours"),
    "loss": loss(),
    "embedding": embedding(),
    "embedding bfloat16": embedding(True),
}
ALL = {**EXACT, "loss bfloat16": loss(True)}  # its logits' gradients are rounded to bfloat16 on the way


def noisy(random: Random) -> np.ndarray:
    share = random.pick((0.1, 0.5))
    return numbers(share, 1 / (1 - share), *random.normal(2))


def lora_with_dropout(random: Random) -> Iterator[Case]:
    for case in product("lora")(random):
        yield Case("lora_with_dropout", (noisy(random), *case.inputs), case.fixed)


def attention_with_dropout(random: Random) -> Iterator[Case]:
    for case in masked_attention(random):
        yield Case("attention_with_dropout", (noisy(random), *case.inputs), case.fixed)


def cached_attention(random: Random) -> Iterator[Case]:
    """One token or more behind some that are in the caches already."""
    while True:
        length, before, room = random.pick((1, 3)), random.pick((0, 5, 300)), random.pick((310, 513))
        q, k, v = qkv(random, 2, random.pick((1, 3)), random.pick((1, 2)), length, length)
        caches = [random.normal(2 * k.shape[1] * room, value.shape[-1]) for value in (k, v)]
        mask = np.where(np.arange(room) > before + np.arange(length)[:, None], LOWEST, 0)[None, None]
        place = np.array([before], np.int32)
        fixed = (mask.astype(np.float32), settings(random, q.shape[-1]), *caches, place)
        yield Case("cached_attention", (q, k, v), fixed)


def adamw(random: Random) -> Iterator[Case]:
    while True:
        shapes = [random.pick(((3,), (130, 257), (1,), (0, 5))) for _ in range(random.pick((1, 4)))]
        gradients, parameters = ([random.normal(*shape) for shape in shapes] for _ in range(2))
        moments = [np.abs(random.normal(sum(value.size for value in parameters))) for _ in range(2)]
        scalars = [np.array(value, np.float32) for value in (1e-3, 2e-3, 3.0)]
        options = numbers(0.9, 0.99, 1e-8, 1.0, *random.normal(2 * len(shapes)))
        loss = np.array(0.5, np.float32)
        yield Case("adamw", (*gradients, *parameters, *moments, *scalars, options, loss))


def adalora_shapes(random: Random, rank: int, room: int) -> tuple[tuple[int, int], ...]:
    """Of A, E and B of a layer with room for some more ranks."""
    return (rank + room, random.pick(SIZES)), (rank + room, 1), (random.pick(SIZES), rank + room)


def adalora_penalty(random: Random) -> Iterator[Case]:
    while True:
        ranks = [random.pick((1, 3, 12)) for _ in range(random.pick((1, 4)))]
        shapes = [adalora_shapes(random, rank, random.pick((0, 2))) for rank in ranks]
        factors = [random.normal(*shape) for a, _, b in shapes for shape in (a, b)]
        yield Case("adalora_penalty", (*factors, numbers(0.5, *ranks)))


def adalora_prune(random: Random) -> Iterator[Case]:
    """Updates before, while and after ranks are pruned, of which the last is the fourth."""
    while True:
        ranks = [random.pick((1, 3, 12)) for _ in range(random.pick((1, 4)))]
        layers = [adalora_shapes(random, rank, random.pick((0, 2))) for rank in ranks]
        shapes = [shape for layer in layers for shape in layer]
        gradients, parameters = ([random.normal(*shape) for shape in shapes] for _ in range(2))
        size = sum(rank * (a[1] + 1 + b[0]) for rank, (a, _, b) in zip(ranks, layers, strict=True))
        kept = np.full(sum(ranks), -1, np.float32)
        state = *(np.abs(random.normal(size)) for _ in range(2)), kept
        budget = np.array([-1, 0, -1, 1, len(ranks)], np.int32)
        step = np.array(random.pick((1, 2, 3, 4, 7)), np.int32)
        rest = numbers(0.9), numbers(0.5), numbers(0.85, 0.8, *ranks)
        yield Case("adalora_prune", (*gradients, *parameters, *state, budget, step, *rest))


# Those whose expectation is worked out in their own tests.
OTHERS: dict[str, Maker] = {
    family.__name__: family
    for family in (
        *(lora_with_dropout, attention_with_dropout, cached_attention),
        *(adamw, adalora_penalty, adalora_prune),
    )
}


def large() -> list[Case]:
    """One of each way to share the work, large enough for 64 threads."""
    random = Random(11)
    x, weight, grid = (
        random.normal(1300, 67),
        random.normal(1100, 67),
        on_bfloat16_grid(random.normal(1100, 67)),
    )
    low_rank = random.normal(5, 67), random.normal(1100, 5)
    wide = random.normal(3000, 257)
    q, k, v = random.normal(1, 2, 513, 17), random.normal(1, 1, 1500, 17), random.normal(1, 1, 1500, 5)
    labels = random.generator.integers(-9, 1100, 1300).astype(np.int32)
    diagonal = np.stack((np.arange(1100), np.arange(1100) % 67)).astype(np.int32)
    return [
        Case("linear", (on_bfloat16_grid(x), grid), (), True),
        Case("linear", (x[:8], weight)),
        *deep(random),
        *few_rows(random, exact=8),
        int8_case(random, "int8_linear_bias", (1300,), 67, 1100),
        int8_case(random, "int8_linear", (700,), 67, 1100),
        delta_case(random, "delta_linear_bias", (1300,), 67, 1100),
        Case("sparse_delta_linear", (x, weight, random.normal(1100)), (diagonal,)),
        Case("kron_linear", (random.normal(1300, 16 * 17), random.normal(16, 16), random.normal(40, 17))),
        Case("lora_bias", (x, weight, *low_rank, random.normal(1100)), (numbers(0.5),)),
        Case("gelu_gate", (random.normal(1 << 20), random.normal(1 << 20))),
        Case("layer_norm", (wide, random.normal(257), random.normal(257)), (numbers(1e-5),)),
        Case("rms_norm", (wide, random.normal(257)), (numbers(1e-5),)),
        Case("rms_norm_and_sum", (wide, wide[::-1].copy(), random.normal(257)), (numbers(1e-5),)),
        Case(
            "masked_attention",
            (q, k, v),
            (causal(random, (1, 1, 513, 1500)).astype(np.float32), numbers(0.3, 0)),
        ),
        Case("attention", (q[:, :, :1].copy(), k, v), (numbers(0.3, 2),)),
        Case(
            "split_and_turn",
            (random.normal(2, 1500, 198),),
            (*tables(random, 2, 1, 1500, 64), np.array(3)),
        ),
        Case("loss", (x, weight), (labels,)),
        Case("embedding", (wide,), (random.generator.integers(0, 3000, 1300).astype(np.int32),)),
    ]


def deep(random: Random) -> list[Case]:
    """Products of more rows, and deeper ones, than a core's second cache holds."""
    x, weight, bias = random.normal(600, 1700), random.normal(130, 1700), random.normal(130)
    turned = np.ascontiguousarray(on_bfloat16_grid(weight).T)
    return [
        Case("linear_bias", (x, weight, bias)),
        Case("linear_bias", (on_bfloat16_grid(x), on_bfloat16_grid(weight), bias), (), True),
        Case("linear_turned", (on_bfloat16_grid(x), turned), (), True),
    ]


def few_rows(random: Random, exact: int = 16) -> list[Case]:
    """Rows of floats beside a weight of bfloat16, in sizes that matrix units take.

    More than ``exact`` are on bfloat16's grid: from 9 on, or 17 with matrix units, rows are rounded to it.
    """

    def case(rows: int, n: int, depth: int) -> Case:
        x, weight, bias = random.normal(rows, depth), random.normal(n, depth), random.normal(n)
        x = x if rows <= exact else on_bfloat16_grid(x)
        return Case("linear_bias", (x, on_bfloat16_grid(weight), bias), (), True)

    sizes = [(3, 16, 32), (5, 1000, 96), (8, 50, 1600), (9, 33, 64), (16, 4000, 160)]
    return [case(*size) for size in sizes]


def some(name: str, count: int, seed: int = 0) -> list[Case]:
    """``count`` cases of a name of ``ALL`` or ``OTHERS``."""
    return list(itertools.islice((ALL | OTHERS)[name](Random(seed)), count))
