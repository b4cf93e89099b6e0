"""Claims particular to the Triton kernels: memory, order of summation, splits, and a whole model that runs on them.

Collected where they run: on a GPU, or under the interpreter, in the process that test_jobs.py starts.
"""

import contextlib
import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch.testing import assert_close

from helpers import DEVICE, INTERPRETED, draw, tarflow
from tarflow import Decoder, Guidance
from tarflow_kernels import (
    affine_forward,
    causal_attention,
    decode_attention,
    dispatch,
    mixture_logistic,
    mixture_logistic_inverse,
    use_backend,
)
from tarflow_kernels.triton import configs, decode
from tarflow_kernels.triton.tiles import head_of, tile_pointers

pytestmark = pytest.mark.usefixtures("on_device", "poisoned")
DTYPE, TOLERANCE = (torch.float64, 1e-12) if DEVICE == "cpu" else (torch.float32, 1e-4)


@pytest.mark.parametrize(("length", "head_dim"), [(1, 16), (63, 24), (64, 128), (65, 48), (113, 80), (257, 32)])
def test_attention_writes_all_of_its_results(length, head_dim):
    q, k, v = (t.requires_grad_() for t in draw(0, 3, 1, 2, length, head_dim, dtype=DTYPE))
    tau = torch.tensor([0.7], dtype=DTYPE)
    out = {}
    for backend in ("reference", "triton"):
        with use_backend(backend):
            attended = causal_attention(q, k, v, temperature=tau)
            out[backend] = attended, *torch.autograd.grad(attended.sin().sum(), (q, k, v))
    assert_close(out["triton"], out["reference"], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    "config",
    [
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4, "num_stages": 1}
        for m, n in itertools.product((16, 32, 128), repeat=2)
    ],
    ids=str,
)
def test_attention_is_the_same_however_it_is_cut(config, monkeypatch):
    def choose(kernel, key, fallback):
        m, n = config["BLOCK_M"], config["BLOCK_N"]
        owned, walked = (n, m) if kernel.endswith("keys") else (m, n)
        return config if owned % walked == 0 else fallback

    monkeypatch.setattr(configs, "choose", choose)
    inputs = [t.requires_grad_() for t in draw(0, 3, 1, 1, 130, 16, dtype=DTYPE)]
    results = {}
    for backend in ("reference", "triton"):
        with use_backend(backend):
            out = causal_attention(*inputs)
            results[backend] = out, *torch.autograd.grad(out.sin().sum(), inputs)
    assert_close(results["triton"], results["reference"], atol=TOLERANCE, rtol=TOLERANCE)


@settings(max_examples=200 if INTERPRETED else 12)
@given(
    length=st.integers(1, 100),
    head_dim=st.sampled_from([4, 16, 24, 40, 64]),
    blocks=st.sampled_from([(16, 16), (32, 16), (64, 16), (64, 32), (128, 64), (128, 128)]),
    batch=st.integers(1, 2),
    tempered=st.booleans(),
    layout=st.sampled_from([(0, 1, 2, 3), (0, 2, 1, 3), (1, 2, 0, 3), (0, 1, 3, 2)]),
)
def test_attention_of_any_size_cut_and_layout_is_the_formula(length, head_dim, blocks, batch, tempered, layout):
    """Forward and backward, with tiles of any size that hold part of a head, a head, or more than that."""
    shape, back = (batch, 1, length, head_dim), [layout.index(dim) for dim in range(4)]
    stored = [shape[dim] for dim in layout]
    inputs = [t.permute(back).requires_grad_() for t in draw(length, 3, *stored, dtype=DTYPE)]
    tau = 0.5 + draw(1, batch, dtype=DTYPE).abs() if tempered else 1.0
    owned, walked = blocks
    options = {"num_warps": 4, "num_stages": 1}
    results = {}
    with contextlib.ExitStack() as stack:
        for phase in ("forward", "backward_queries", "backward_keys"):
            m, n = (walked, owned) if phase == "backward_keys" else (owned, walked)
            stack.enter_context(configs.use(f"causal_attention_{phase}", {"BLOCK_M": m, "BLOCK_N": n, **options}))
        for backend in ("reference", "triton"):
            with use_backend(backend):
                out = causal_attention(*inputs, temperature=tau)
                results[backend] = out, *torch.autograd.grad(out.sin().sum(), inputs)
    assert_close(results["triton"], results["reference"], atol=TOLERANCE, rtol=TOLERANCE)


@settings(max_examples=100 if INTERPRETED else 12)
@given(
    capacity=st.integers(1, 200),
    new=st.integers(1, 20),
    splits=st.sampled_from([1, 2, 4, 8]),
    block=st.sampled_from([16, 32, 64]),
    data=st.data(),
)
def test_decoding_at_any_position_with_any_splits_is_the_formula(capacity, new, splits, block, data):
    """Caches hold NaN where nothing was written, and splits may be more than there are tiles."""
    new = min(new, capacity)
    positions = torch.tensor(
        data.draw(st.lists(st.integers(0, capacity - new), min_size=2, max_size=2)), dtype=torch.int32
    )
    q, k, v = draw(capacity, 3, 2, 1, new, 16, dtype=DTYPE)
    unwritten = torch.arange(capacity)[:, None] >= positions.view(-1, 1, 1, 1)
    caches = draw(1, 2, 2, 1, capacity, 16, dtype=DTYPE).masked_fill(unwritten, math.nan)
    config = {"BLOCK_N": block, "num_warps": 4, "num_stages": 1}
    results = {}
    with pytest.MonkeyPatch.context() as patch, configs.use("decode_attention", config):
        patch.setattr(decode, "count_splits", lambda blocks, capacity: splits)
        for backend in ("reference", "triton"):
            own = caches.clone()
            with use_backend(backend):
                results[backend] = decode_attention(q, k, v, *own, positions), own
    assert_close(results["triton"], results["reference"], atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("new", [1, 5, 70])
@pytest.mark.parametrize("splits", [2, 5])
def test_a_cache_cut_in_splits_is_the_same_cache(splits, new, monkeypatch):
    """Some rows are so short that most splits have nothing to read."""
    monkeypatch.setattr(decode, "count_splits", lambda blocks, capacity: splits)
    positions = torch.tensor([0, 3, 150], dtype=torch.int32)
    q, k, v = draw(0, 3, 3, 1, new, 24, dtype=DTYPE)
    unwritten = torch.arange(220)[:, None] >= positions.view(-1, 1, 1, 1)
    caches = draw(1, 2, 3, 1, 220, 24, dtype=DTYPE).masked_fill(unwritten, math.nan)
    tau = torch.tensor([0.5, 1.0, 2.0], dtype=DTYPE)
    results = {}
    for backend in ("reference", "triton"):
        own = caches.clone()
        with use_backend(backend):
            results[backend] = decode_attention(q, k, v, *own, positions, temperature=tau), own
    assert_close(results["triton"], results["reference"], atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize(
    ("blocks", "capacity", "splits"), [(768, 4096, 1), (132, 4096, 1), (12, 4096, 32), (12, 100, 1)]
)
def test_a_cache_is_split_where_heads_do_not_fill_the_card(blocks, capacity, splits, monkeypatch):
    monkeypatch.setattr(configs, "num_multiprocessors", lambda: 132)
    assert decode.count_splits(blocks, capacity) == splits


@pytest.mark.parametrize("position", [-3, -1, 4, 5, 100])
def test_positions_outside_the_cache_write_nothing_outside_it(position):
    """A GPU does not raise, as a CPU does: the result is no promise, but neighbours keep their values."""
    room = torch.zeros(2, 3, 1, 6, 16, dtype=DTYPE)
    q, k, v = 1 + draw(0, 3, 1, 1, 2, 16, dtype=DTYPE).abs()
    with use_backend("triton"):
        decode_attention(q, k, v, room[0, 1:2], room[1, 1:2], torch.tensor([position], dtype=torch.int32))
    inside = torch.arange(6)[:, None].expand(6, 16)
    written = (inside >= position) & (inside < position + 2)
    assert not room[:, ::2].any()
    assert torch.equal(room[:, 1, 0] != 0, written.expand(2, 6, 16))


def test_offsets_reach_beyond_two_to_the_31():
    strides = (2**33, 2**32 + 8, 2**31 + 4, 2**30)
    offsets = torch.empty(16, 16, dtype=torch.int64)
    anchor = torch.zeros(1)
    _offsets_kernel[(1,)](anchor, offsets, strides, 3, 5, 2**20)
    tokens, channels = 2**20 + torch.arange(16), torch.arange(16)
    expected = 3 * strides[0] + 5 * strides[1] + tokens[:, None] * strides[2] + channels * strides[3]
    assert_close(offsets, 4 * expected, atol=0, rtol=0)


@triton.jit
def _offsets_kernel(Anchor, Out, strides, batch, head, start):
    """Store how many bytes behind the anchor the tile of a head lies."""
    head_pointer = head_of(Anchor, strides, batch.to(tl.int64), head.to(tl.int64))
    pointers = tile_pointers(head_pointer, strides, start, 16, 16)
    places = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(Out + places, pointers.to(tl.int64) - Anchor.to(tl.int64))


def test_kernels_are_registered_as_they_behave():
    """Compilers are told the right shapes, strides, dtypes and mutations."""
    heads = draw(0, 4, 2, 3, 5, 16, dtype=DTYPE)
    tokens, (alpha, mu) = draw(1, 2, 5, 6, dtype=DTYPE), draw(2, 2, 5, 12, dtype=DTYPE).chunk(2, dim=-1)
    theta = draw(5, 3, 2, 5, 6, 4, dtype=DTYPE)
    lse, logdet, tau = draw(3, 2, 3, 5, dtype=DTYPE), draw(4, 2, dtype=DTYPE), torch.ones(2)
    exp = ("exp", 0.0, 0.0)
    for name, args in {
        "causal_attention_forward": (*heads[:3], tau, 0.3),
        "causal_attention_backward": (*heads, heads[0], lse, None, 0.3),
        "affine_map": (tokens, mu, alpha, True, False, *exp),
        "affine_map_backward": (tokens, logdet, tokens, alpha, DTYPE, DTYPE, True, False, *exp),
        "mixture_map": (tokens, *theta, -7.0, True),
        "mixture_map_backward": (tokens, logdet, tokens, *theta, DTYPE, -7.0, False),
    }.items():
        library.opcheck(getattr(torch.ops.tarflow, name).default, args)


def test_results_are_the_same_bit_for_bit_every_time():
    inputs = [t.requires_grad_() for t in draw(0, 3, 2, 2, 100, 32, dtype=torch.float32)]
    q, k, v = inputs
    few = [t[:, :, :20] for t in inputs]

    def run():
        out = causal_attention(q, k, v)
        maps = [
            affine_forward(q, k, v),
            *(op(few[0][..., 0], *few) for op in (mixture_logistic, mixture_logistic_inverse)),
        ]
        outputs = [out, *(t for results in maps for t in results)]
        return [*outputs, *torch.autograd.grad([t.sin().sum() for t in outputs], inputs)]

    with use_backend("triton"):
        assert_close(run(), run(), atol=0, rtol=0)


def test_a_head_that_does_not_fit_has_no_kernel():
    q = torch.zeros(1, 1, 2, 512)
    with use_backend("triton"), pytest.raises(NotImplementedError, match=r"no kernel for \(1, 1, 2, 512\)"):
        causal_attention(q, q, q)


@pytest.mark.parametrize(
    "guidance",
    [None, Guidance(2.0, "linear", temperature=1.5)],
    ids=["unguided", "guided"],
)
def test_a_model_trains_and_samples_as_on_the_reference(guidance):
    """Three steps of Adam, then samples: what users of the kernels see of them."""
    results = {}
    x, labels = draw(0, 3, 1, 4, 4, dtype=torch.float32), torch.tensor([0, 1, -1])
    for backend in ("reference", "triton"):
        model = tarflow(num_classes=2, num_blocks=2, dtype=torch.float32).to(DEVICE)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        losses = []
        with use_backend(backend):
            for _ in range(3):
                loss = -model.log_prob(x, labels).mean() / model.config.num_dims
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
            z, logdet = model(x, labels)
            decoders = "sequential", Decoder("jacobi", 2, tolerance=0.0), Decoder("jacobi", tolerance=0.0)
            samples = [model.inverse(z.detach(), labels, guidance, decoder) for decoder in decoders]
        results[backend] = losses, z, logdet, samples
    assert_close(results["triton"], results["reference"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("forced", [True, False], ids=["forced", "picked by the device"])
def test_a_model_compiles_whole_on_the_kernels(forced, monkeypatch):
    """A backend asked for by name is traced into; the compiler meets registered ops otherwise."""
    monkeypatch.setattr(dispatch, "pick", lambda name, args: "triton")
    x, labels = draw(0, 2, 1, 4, 4, dtype=torch.float32), torch.tensor([0, 1])
    results = []
    with use_backend("triton") if forced else contextlib.nullcontext():
        for compile in (lambda model: model, lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")):
            model = tarflow(num_classes=2, num_blocks=2, dtype=torch.float32).to(DEVICE)
            z, logdet = compile(model)(x, labels)
            (z.square().sum() - logdet.sum()).backward()
            results.append([z, logdet, *(p.grad for p in model.parameters())])
    assert_close(*results)
