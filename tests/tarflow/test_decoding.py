"""Jacobi decoding is sequential decoding to a tolerance, for any guidance, window and batch; auto is one of the two."""

import contextlib
import dataclasses
import functools
import gc
import json
import random
import weakref
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from helpers import PREFIX, branches, draw, randomize, tarflow
from launches import Launches
from tarflow import Decoder, Guidance, TarFlow, TokenFlow
from tarflow.decoding import DISTANCE, TOLERANCE, calibration
from tarflow.decoding import sequential as sequential_decoder
from tarflow.decoding.decoder import LARGEST_LOSS, PASS_COSTS, Allowance, Timing, choose, device_and_precision
from tarflow.decoding.jacobi import JacobiIteration
from tarflow.decoding.sequential import count_chains
from tarflow.decoding.step import CachedStep, GraphRunner, StepWeights, count_branches
from tarflow.model import STARFLOW, unpatchify
from tarflow.transformer import Context

TRAINED = Path(__file__).parents[2] / "benchmarks" / "trained" / "fashion-mnist"
TOKENS, CLASSES = 13, 3
MIXTURE = {"coupling": "mixture", "num_mixtures": 3}
WINDOWS = [1, 2, 5, TOKENS - 1, TOKENS + 3, None]
GUIDANCE = {
    "none": None,
    "no weight": Guidance(0.0),
    "label": Guidance(1.5),
    "constant": Guidance(1.0, "constant"),
    "alpha": Guidance(1.0, parameters="alpha"),
    "mu": Guidance(1.0, parameters="mu"),
    "temperature": Guidance(1.0, temperature=0.5, drop_label=False),
    "label and temperature": Guidance(1.0, temperature=1.5),
}


def can_follow(options, guidance):
    """Without classes there is no label to drop, and a mixture is guided as a whole."""
    if guidance is None or not guidance.weight:
        return True
    if options is MIXTURE:
        return guidance.parameters == "both"
    return "num_classes" not in options or guidance.temperature != 1


every_window = pytest.mark.parametrize("window", WINDOWS)
MODELS = [
    pytest.param(options, guidance, id=f"{name}, {options}")
    for options in ({}, {"num_classes": 0}, {"volume_preserving": True}, MIXTURE, STARFLOW, PREFIX)
    for name, guidance in GUIDANCE.items()
    if can_follow(options, guidance)
]
every_guidance = pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
every_decoder = pytest.mark.parametrize("decoder", [Decoder("sequential"), Decoder("jacobi")], ids=str)
COUPLINGS = {"affine": {}, "mixture": MIXTURE, "starflow": STARFLOW, "prefix": PREFIX}
every_coupling = pytest.mark.parametrize("options", COUPLINGS.values(), ids=COUPLINGS)


SIZES = {"channels": 16, "num_blocks": 2, "layers_per_block": 2, "num_classes": CLASSES, "head_dim": 8}


def token_flow(num_tokens=TOKENS, **options):
    return randomize(TokenFlow(num_tokens, 2, **SIZES | options)).double().requires_grad_(False)


def latents_and_labels(flow, batch=4, seed=0):
    z = draw(seed, batch, *flow.prior_variance.shape)
    return z, torch.arange(batch) % CLASSES - 1 if flow.num_classes else None


def decode(flow, z, labels, guidance, decoder):
    """Tokens, and the passes of each block in the order in which they are decoded."""
    passes = []
    tokens = flow.inverse(z, labels, guidance, decoder, lambda decoded: passes.append(decoded.passes))
    return tokens, passes


@functools.cache
def trained():
    return TarFlow.from_pretrained(TRAINED).float().requires_grad_(False)


# Exactness ------------------------------------------------------------------------------------------------------------


@every_window
@pytest.mark.parametrize(("options", "guidance"), MODELS)
def test_without_tolerance_it_is_the_sequential_decoder(options, guidance, window):
    flow = token_flow(**options)
    z, labels = latents_and_labels(flow)
    tokens, passes = decode(flow, z, labels, guidance, Decoder("jacobi", window, tolerance=0.0))
    expected, steps = decode(flow, z, labels, guidance, "sequential")
    assert_close(tokens, expected, atol=1e-10, rtol=1e-10)
    assert steps == [flow.num_steps] * 2
    assert all(1 <= taken <= flow.num_steps for taken in passes)


@every_coupling
@every_window
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_block_is_inverted_exactly_at_latents_within_the_tolerance(dtype, tolerance, window, options):
    flow = token_flow(**options).to(dtype)
    z, labels = latents_and_labels(flow, batch=6)
    for block in flow.blocks:
        tokens, _ = block.inverse(z.to(dtype), branches(flow, z, labels), None, Decoder("jacobi", window, tolerance))
        latents, _ = block(tokens, flow.condition(labels, None, z))
        assert (latents - z).abs().max() <= tolerance + (1e-9 if dtype == torch.float64 else 1e-4)


@every_coupling
def test_values_agree_that_have_the_latents_to_the_tolerance_or_differ_by_rounding(options):
    flow = token_flow(**options)
    tokens, labels = latents_and_labels(flow, batch=50)
    z, rounding = draw(1, *tokens.shape), 1e-2
    parameters = flow.blocks[0].transformer(tokens, flow.condition(labels, None, tokens))
    shifted = [v[:, :-1] for v in parameters]
    inverse = flow.transform.inverse(z[:, 1:], *shifted)
    x = inverse + draw(2, *inverse.shape) * 10 ** draw(3, *inverse.shape)
    latents, _ = flow.transform.forward(torch.cat((z[:, :1], x), dim=1), *parameters)
    near = (latents - z)[:, 1:].abs()
    for tolerance in (1e-2, 1e-1, 1.0):
        refined, agrees = flow.transform.refine(x, z[:, 1:], tolerance, 0.0, *shifted)
        assert_close(refined, inverse)
        assert torch.equal(agrees, near <= tolerance)
    _, agrees = flow.transform.refine(x, z[:, 1:], 0.0, rounding, *shifted)
    assert torch.equal(agrees, (x - inverse).abs() <= rounding * inverse.abs())
    assert 0.01 < agrees.double().mean() < 0.5


@pytest.mark.parametrize("window", [16, 64, None])
@pytest.mark.parametrize("guidance", [None, Guidance(2.0)], ids=["unguided", "guided"])
def test_a_trained_model_needs_few_passes_and_stays_near_the_sequential_decoder(guidance, window):
    flow, tolerance = trained().flow, 1e-2
    z, labels = flow.sample_prior(3, torch.Generator().manual_seed(0)), torch.tensor([0, 5, 8])
    expected, steps = decode(flow, z, labels, guidance, "sequential")
    tokens, passes = decode(flow, z, labels, guidance, Decoder("jacobi", window, tolerance))
    distance = (tokens - expected).abs()
    assert distance.max() <= DISTANCE * tolerance
    assert distance.square().mean().sqrt() <= tolerance
    assert distance.max() > 0, "or nothing was approximated"
    assert sum(passes) <= sum(steps) / (8 if window is None else 3)


@every_guidance
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3])
def test_a_random_model_stays_near_the_sequential_decoder(guidance, tolerance):
    flow = token_flow()
    z, labels = latents_and_labels(flow, batch=8)
    expected = flow.inverse(z, labels, guidance, "sequential")
    tokens = flow.inverse(z, labels, guidance, Decoder("jacobi", 6, tolerance))
    assert (tokens - expected).abs().max() <= DISTANCE * tolerance


# Halves of a batch ----------------------------------------------------------------------------------------------------


def decode_in_halves(monkeypatch, flow, *args):
    """Decode as if the batch were a large one on a GPU."""
    with monkeypatch.context() as patched:
        patched.setattr("tarflow.decoding.sequential.count_chains", lambda *sizes: 2)
        return decode(flow, *args, "sequential")


@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize(("options", "guidance"), MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_two_halves_of_a_batch_are_decoded_as_the_whole(monkeypatch, dtype, tolerance, options, guidance, batch):
    flow = token_flow(**options).to(dtype)
    z, labels = latents_and_labels(flow, batch)
    z = z.to(dtype)
    tokens, passes = decode_in_halves(monkeypatch, flow, z, labels, guidance)
    assert_close((tokens, passes), decode(flow, z, labels, guidance, "sequential"), atol=tolerance, rtol=tolerance)
    alone = [flow.inverse(part, of, guidance, "sequential") for part, of in halves_of(z, labels)]
    # The product that projects the prefixes is one for the whole batch.
    assert_close(tokens, torch.cat(alone), atol=1e-12 if flow.class_prefixes is not None else 0, rtol=0)


def halves_of(z, labels):
    return zip(z.chunk(2), (None, None) if labels is None else labels.chunk(2), strict=True)


@pytest.mark.parametrize(
    ("device", "samples", "rows", "num_tokens", "channels", "expected"),
    [
        ("cuda", 32, 64, 1024, 768, 2),
        ("cuda", 32, 64, 288, 768, 2),
        ("cuda", 32, 64, 287, 768, 1),  # the weights count for more
        ("cuda", 2, 4, 1024, 128, 2),
        ("cuda", 1, 2, 4096, 128, 1),  # nothing to halve
        ("cpu", 32, 64, 1024, 768, 1),
    ],
)
def test_halves_are_for_a_gpu_and_caches_of_twice_the_weights(device, samples, rows, num_tokens, channels, expected):
    assert count_chains(torch.device(device), samples, rows, num_tokens, channels) == expected


def test_halves_share_the_weights(monkeypatch):
    made, make = [], StepWeights.__init__
    monkeypatch.setattr(StepWeights, "__init__", lambda self, *args: made.append(self) or make(self, *args))
    flow = token_flow()
    decode_in_halves(monkeypatch, flow, *latents_and_labels(flow), Guidance(1.0))
    assert len(made) == len(flow.blocks)


# Rows -----------------------------------------------------------------------------------------------------------------


def mixed_batch(flow):
    """Latents that differ in how hard they are: the larger, the more tokens depend on each other."""
    z, labels = latents_and_labels(flow, batch=7)
    return z * torch.tensor([0.01, 1.2, 0.1, 1.0, 0.8, 0.3, 0.001])[:, None, None], labels


@every_coupling
@every_window
@pytest.mark.parametrize("guidance", [None, Guidance(1.5)], ids=["unguided", "guided"])
def test_a_row_depends_on_no_other_and_waits_for_none(guidance, window, options):
    flow = token_flow(**options)
    z, labels = mixed_batch(flow)
    decoder = Decoder("jacobi", window, 1e-2)
    together, passes = decode(flow, z, labels, guidance, decoder)
    alone = [decode(flow, z[b : b + 1], labels[b : b + 1], guidance, decoder) for b in range(len(z))]
    assert_close(together, torch.cat([tokens for tokens, _ in alone]), atol=1e-9, rtol=1e-9)
    slowest = [max(taken) for taken in zip(*(taken for _, taken in alone), strict=True)]
    assert passes == slowest
    fastest = [min(taken) for taken in zip(*(taken for _, taken in alone), strict=True)]
    assert window == 1 or fastest < slowest, "or all rows are equally hard"


def test_rows_that_are_finished_leave_the_batch(monkeypatch):
    flow = token_flow()
    z, labels = mixed_batch(flow)
    rows, run = [], CachedStep.__call__
    monkeypatch.setattr(CachedStep, "__call__", lambda step, tokens: rows.append(len(tokens)) or run(step, tokens))
    guidance = Guidance(1.5)
    flow.blocks[0].inverse(z, branches(flow, z, labels, guidance), guidance, Decoder("jacobi", tolerance=1e-2))
    assert rows[0] == 2 * len(z)
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] <= len(z)


@every_coupling
def test_what_no_row_has_reached_may_hold_anything(poisoned, options):
    flow = token_flow(**options)
    z, labels = mixed_batch(flow)
    for window in WINDOWS:
        tokens = flow.inverse(z, labels, Guidance(1.0), Decoder("jacobi", window, 1e-3))
        assert_close(tokens, flow.inverse(z, labels, Guidance(1.0), "sequential"), atol=DISTANCE * 1e-3, rtol=0)


@every_coupling
@pytest.mark.parametrize("shape", [(0, TOKENS), (3, 1), (3, 2), (1, TOKENS)], ids=str)
def test_batches_and_sequences_of_any_size(shape, options):
    batch, num_tokens = shape
    flow = token_flow(**{"num_classes": 0} | options, num_tokens=num_tokens)
    z = draw(0, batch, num_tokens, 2)
    tokens, passes = decode(flow, z, None, None, Decoder("jacobi", tolerance=0.0))
    assert_close(tokens, flow.inverse(z, decoder="sequential"))
    assert max(passes) <= flow.num_steps


@every_decoder
def test_what_it_took_is_freed_when_it_returns(monkeypatch, decoder):
    """Caches are gigabytes on a GPU, and nobody knows when a garbage collection comes."""
    steps, make = [], CachedStep.__init__
    monkeypatch.setattr(
        CachedStep, "__init__", lambda step, *args, **more: steps.append(weakref.ref(step)) or make(step, *args, **more)
    )
    flow = token_flow()
    z, labels = mixed_batch(flow)
    gc.collect()
    gc.disable()
    try:
        flow.inverse(z, labels, Guidance(1.0), decoder)
        assert [step() for step in steps] == [None, None]
    finally:
        gc.enable()


@every_coupling
@every_decoder
@pytest.mark.parametrize("batch", [1, 3])
def test_it_leaves_the_settings_of_the_process_alone(monkeypatch, batch, decoder, options):
    """They are those of other threads too: what two of them saved and restored in turn would stay as it was not."""
    flow = token_flow(**options).float()
    z, labels = latents_and_labels(flow, batch)
    found, run = [], CachedStep.run_layers
    monkeypatch.setattr(
        CachedStep, "run_layers", lambda step, h: found.append(torch.backends.mkldnn.enabled) or run(step, h)
    )
    flow.inverse(z.float(), labels, None, decoder)
    assert found
    assert all(found)


@pytest.mark.parametrize("batch", [1, 2, 8, 9])
@pytest.mark.parametrize("expansion", [1, 4])
@pytest.mark.parametrize("channels", [5, 16])
def test_few_rows_and_many_have_the_same_activations(channels, expansion, batch):
    flow = randomize(TokenFlow(TOKENS, 2, channels, 1, 2, head_dim=channels, expansion=expansion))
    z = draw(0, batch, TOKENS, 2, dtype=torch.float32)
    tokens = flow.inverse(z, None, None, "sequential")
    assert_close(tokens.double(), flow.double().inverse(z.double(), None, None, "sequential"), atol=1e-4, rtol=1e-4)


# Termination ----------------------------------------------------------------------------------------------------------


def chaotic_flow():
    """One block in which every token depends on the one before so strongly that no guess is ever any good."""
    flow = token_flow(num_classes=0)
    with torch.no_grad():
        for block in flow.blocks:
            weight = block.transformer.proj_out.weight
            weight[2:] *= 30  # mu
            weight[:2] = 0  # alpha
    return flow


@every_window
def test_the_worst_case_ends_after_as_many_passes_as_the_sequential_decoder(window):
    flow = chaotic_flow()
    z, _ = latents_and_labels(flow)
    tokens, passes = decode(flow, z, None, None, Decoder("jacobi", window, tolerance=0.0))
    assert passes == [TOKENS - 1] * 2
    assert_close(tokens, flow.inverse(z, decoder="sequential"))


def explosive_flow():
    """One block with ``alpha_i = 4 x_{i-1}`` and ``mu = 0``."""
    flow = TokenFlow(TOKENS, 1, 16, 1, 1, head_dim=8)
    for parameter in flow.parameters():
        parameter.data.zero_()
    transformer = flow.blocks[0].transformer
    transformer.proj_in.weight.data[0] = 1
    transformer.proj_out.weight.data[0, 0] = 4
    return flow.requires_grad_(False)


@every_window
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_iterates_that_diverge_do_no_harm(dtype, window):
    """The latents of every other token are large, the tokens are not: exp(4 z) overflows where exp(4 x) does not."""
    flow = explosive_flow().to(dtype)
    z = torch.tensor([-3.0, 300.0], dtype=dtype).repeat(2, TOKENS)[:, :TOKENS, None]
    assert not (z * (4 * z).exp()).isfinite().all()
    expected = flow.inverse(z, decoder="sequential")
    assert expected.abs().max() < 4
    tokens, passes = decode(flow, z, None, None, Decoder("jacobi", window, 0.0))
    assert_close(tokens, expected)
    assert passes <= [TOKENS - 1]


@every_window
def test_a_token_that_overflows_is_not_passed_over(window):
    flow = explosive_flow()
    z = torch.full((2, TOKENS, 1), 300.0)
    assert flow.inverse(z, decoder="sequential")[:, 1].isinf().all()
    tokens = flow.inverse(z, None, None, Decoder("jacobi", window, 1e-2))
    assert tokens[:, 1].isinf().all()


@pytest.mark.parametrize("largest", [0.5, 2.0])
def test_where_an_iterate_starts_over_does_not_change_the_result(monkeypatch, largest):
    monkeypatch.setitem(Decoder.__call__.__globals__["jacobi"].__globals__, "LARGEST", largest)
    flow = token_flow()
    z, labels = latents_and_labels(flow)
    tokens, passes = decode(flow, z, labels, None, Decoder("jacobi", tolerance=0.0))
    assert_close(tokens, flow.inverse(z, labels, decoder="sequential"))
    assert max(passes) <= TOKENS - 1


@every_coupling
def test_a_row_without_an_inverse_ends_and_leaves_the_others_alone(options):
    flow = token_flow(**options)
    z, labels = latents_and_labels(flow)
    z[1, 4] = torch.inf
    expected = flow.inverse(z, labels, decoder="sequential")
    tokens = flow.inverse(z, labels, None, Decoder("jacobi", 5, 0.0))
    assert not torch.isfinite(tokens[1]).all()
    others = torch.tensor([0, 2, 3])
    assert_close(tokens[others], expected[others])


# Graphs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "guidance"), MODELS)
def test_a_pass_never_waits_for_the_device(monkeypatch, options, guidance):
    """Where a graph is captured nothing can be read back: tensors without values have nothing to read."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which the meta device cannot tell
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    with torch.device("meta"), torch.inference_mode():
        flow = TokenFlow(TOKENS, 2, **SIZES | {"num_blocks": 1} | options)
        z, labels = torch.empty(4, TOKENS, 2), torch.empty(4, dtype=torch.int64) if flow.num_classes else None
        tokens = flow.inverse(z, labels, guidance, "sequential")
        transformer, (condition, *_) = flow.blocks[0].transformer, branches(flow, z, labels)
        repeated = [
            None if part is None else torch.stack([part] * count_branches(guidance), dim=1)
            for part in transformer.embed_context(condition)
        ]
        iteration = JacobiIteration(transformer, z, Context(*repeated), guidance, 5, 1e-2)
        iteration.advance()
        assert tokens.shape == iteration.x.shape == z.shape
        with pytest.raises(RuntimeError, match="meta"):
            iteration.retire_finished(z)


@pytest.mark.parametrize(
    ("options", "of_layer", "around"),
    [({}, 8, 3), (MIXTURE, 8, 20), (STARFLOW, 9, 10)],
    ids=["affine", "mixture", "starflow"],
)
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("chains", [1, 2])
def test_a_step_launches_as_few_kernels_as_it_says(monkeypatch, chains, num_layers, options, of_layer, around):
    counts = []

    def count(runner, *runs):
        before = launches.count
        for run in runs:
            run()
        counts.append(launches.count - before)

    monkeypatch.setattr(GraphRunner, "__call__", count)
    monkeypatch.setattr("tarflow.decoding.sequential.count_chains", lambda *sizes: chains)
    flow = TokenFlow(TOKENS, 2, 16, 1, num_layers, head_dim=8, num_classes=CLASSES, **options)
    flow.requires_grad_(False)
    with Launches(monkeypatch) as launches:
        flow.inverse(torch.randn(2, TOKENS, 2), torch.tensor([0, 1]), Guidance(1.0), "sequential")
    assert counts == [chains * (of_layer * num_layers + around)] * flow.num_steps


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [None, Guidance(2.0)], ids=["unguided", "guided"])
def test_under_autocast_it_agrees_with_the_sequential_decoder_as_far_as_bfloat16_does(guidance):
    flow = trained().flow
    z, labels = flow.sample_prior(2, torch.Generator().manual_seed(0)), torch.tensor([0, 5])
    exact = flow.inverse(z, labels, guidance, "sequential")
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = decode(flow, z, labels, guidance, "sequential")
        tokens, passes = decode(flow, z, labels, guidance, Decoder("jacobi"))
    assert tokens.dtype == torch.float32
    rounding = (low - exact).square().mean().sqrt()
    assert (tokens - exact).square().mean().sqrt() <= 2 * rounding + TOLERANCE
    assert sum(passes) <= 4 * 195 / 8, "the rounding of bfloat16 is not iterated upon"


@every_coupling
@pytest.mark.parametrize("decoder", [Decoder("sequential"), Decoder("jacobi", 5, 1e-3)], ids=str)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("latents", [torch.bfloat16, torch.float32, torch.float64])
def test_latents_and_weights_of_any_precision(latents, weights, decoder, options):
    flow = token_flow(**options)
    z, labels = latents_and_labels(flow)
    z = z.to(latents)
    expected = flow.inverse(z.double(), labels, Guidance(0.5), "sequential")
    tokens = flow.to(weights).inverse(z, labels, Guidance(0.5), decoder)
    assert tokens.dtype == torch.promote_types(latents, torch.float32)
    rounding = 1e-4 if weights == torch.float32 else 0.2
    assert_close(tokens.double(), expected, atol=rounding + DISTANCE * 1e-3, rtol=0)


# The choice between them ----------------------------------------------------------------------------------------------


HERE = torch.zeros(1, dtype=torch.float64)  # a weight of the models above


def timing(rows, block, decoder, seconds, window=None, **place):
    here = dict(zip(("device", "dtype"), device_and_precision(HERE), strict=True)) | place
    return Timing(**here, rows=rows, block=block, decoder=decoder, window=window, passes=1, seconds=seconds)


TIMINGS = [
    timing(2, 0, "sequential", 1.0),
    timing(2, 0, "jacobi", 0.5),
    timing(2, 0, "jacobi", 0.4, window=16),
    timing(8, 0, "sequential", 1.0),
    timing(8, 0, "jacobi", 0.97),
    timing(2, 1, "sequential", 1.0),
    timing(2, 1, "jacobi", 2.0),
    timing(2, 2, "jacobi", 1.0, device="another"),
    timing(2, 2, "jacobi", 1.0, dtype="bfloat16"),
]


@pytest.mark.parametrize(
    ("block", "rows", "expected"),
    [
        (0, 1, Decoder("jacobi", 16)),
        (0, 2, Decoder("jacobi", 16)),
        (0, 3, Decoder("sequential")),  # the gain at 8 rows is noise
        (0, 9, Decoder("sequential")),  # more than were timed
        (1, 2, Decoder("sequential")),
        (2, 2, Decoder("sequential")),  # timed elsewhere
    ],
)
def test_auto_is_the_fastest_where_it_was_timed(block, rows, expected):
    assert choose(TIMINGS, Decoder("auto"), block, rows, HERE) == expected


@pytest.mark.parametrize("decoder", [Decoder("sequential"), Decoder("jacobi", 3, 0.5)], ids=str)
def test_a_decoder_that_is_asked_for_is_taken(decoder):
    assert choose(TIMINGS, decoder, 0, 2, HERE) is decoder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_timings_hold_for_the_precision_of_the_weights_or_of_autocast(dtype):
    flow = token_flow().to(dtype)
    assert {t.dtype for t in calibration.calibrate(flow, batches=[1])} == {str(dtype).removeprefix("torch.")}
    flow.calibration = [timing(4, t, "jacobi", 0.1, dtype="bfloat16") for t in (0, 1)]
    z, labels = latents_and_labels(flow)
    for context, low in ((contextlib.nullcontext(), dtype), (torch.autocast("cpu", torch.bfloat16), torch.bfloat16)):
        reports = []
        with context:
            flow.inverse(z.float(), labels, None, "auto", reports.append)
        assert {done.decoder.name for done in reports} == {"jacobi" if low == torch.bfloat16 else "sequential"}


# Without a calibration ------------------------------------------------------------------------------------------------


class Windows:
    """An allowance that is told the windows of a block."""

    def __init__(self, *windows):
        self.windows, self.settled = [*windows, 0], []

    def window(self, remaining, before=0):
        return min(self.windows.pop(0), remaining)

    def settle(self, window, tokens):
        self.settled.append((window, tokens))


@pytest.mark.parametrize("windows", [(), (5,), (2, 4, 4), (TOKENS,) * TOKENS], ids=str)
@pytest.mark.parametrize(("options", "guidance"), MODELS)
def test_what_parallel_passes_leave_is_decoded_one_by_one(options, guidance, windows):
    flow = token_flow(**options)
    z, labels = mixed_batch(flow)
    for block in flow.blocks:
        allowance = Windows(*windows)
        conditions = branches(flow, z, labels, guidance)
        tokens, passes = block.inverse(z, conditions, guidance, Decoder("auto", tolerance=0.0), None, allowance)
        expected, steps = block.inverse(z, conditions, guidance, Decoder("sequential"))
        assert_close(tokens, expected, atol=1e-10, rtol=1e-10)
        brought = [tokens for _, tokens in allowance.settled]
        assert passes == len(brought) + steps - sum(brought) <= steps
        assert all(least >= 1 for least in brought)


def cost_of(windows, cost):
    return sum(cost.of(window) for window in windows)


@pytest.mark.parametrize("cost", [cost for costs in PASS_COSTS.values() for cost in costs], ids=str)
@pytest.mark.parametrize("luck", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_passes_never_lose_more_than_a_twentieth_whatever_they_bring(cost, luck):
    """A pass brings one token or all of its window, by chance; in some blocks never more than one."""
    chance = random.Random(0)
    for num_blocks, steps in ((1, 10), (2, 255), (4, 195), (8, 1023)):
        allowance, spent = Allowance(cost, num_blocks, steps), 0.0
        for _ in range(num_blocks):
            remaining, window = steps, 0
            lucky = chance.random() < luck
            while window := allowance.window(remaining, window):
                brought = window if lucky and chance.random() < luck else 1
                allowance.settle(window, brought)
                remaining, spent = remaining - brought, spent + cost.of(window)
            spent += remaining
        assert spent <= (1 + LARGEST_LOSS) * num_blocks * steps + 1e-6


@pytest.mark.parametrize("costs", [(1.0, 1.0, 1.0, 1.0), (0.2, 0.2, 0.2, 3.4), (3.4, 0.2, 0.2, 0.2)], ids=str)
def test_passes_that_bring_one_token_lose_a_twentieth_of_the_time_whatever_the_sizes_of_the_blocks(costs):
    cost, steps, spent = PASS_COSTS["cpu", "float32"][0], 1023, 0.0
    allowance = Allowance(cost, len(costs), steps)
    for allowance.step_cost in costs:
        remaining, window = steps, 0
        while window := allowance.window(remaining, window):
            allowance.settle(window, 1)
            remaining, spent = remaining - 1, spent + allowance.step_cost * cost.of(window)
        spent += allowance.step_cost * remaining
    assert sum(costs) * steps < spent <= (1 + LARGEST_LOSS) * sum(costs) * steps + 1e-6


class Costs:
    """The time of blocks that ``auto`` decodes, by the table of costs, in steps of the sequential decoder."""

    def __init__(self, monkeypatch, cost):
        self.total = 0.0
        advance, go_on = JacobiIteration.advance, sequential_decoder.resume

        def counted(iteration):
            self.total += cost.of(iteration.window)
            advance(iteration)

        def resumed(transformer, step, x, z, context, guidance, position, memory=None):
            self.total += z.shape[1] - 1 - position
            go_on(transformer, step, x, z, context, guidance, position, memory)

        monkeypatch.setattr(JacobiIteration, "advance", counted)
        monkeypatch.setattr("tarflow.decoding.jacobi.resume", resumed)


@pytest.mark.parametrize(("batch", "guidance"), [(1, None), (1, Guidance(2.0)), (2, None)], ids=str)
def test_few_samples_of_a_trained_model_are_decoded_in_two_thirds_of_the_time(monkeypatch, batch, guidance):
    """By the table of costs, which is cautious, and with no gain in the block that is generated first."""
    flow, reports = trained().flow, []
    rows = batch * (1 if guidance is None else 2)
    z, labels = flow.sample_prior(batch, torch.Generator().manual_seed(0)), torch.tensor([2, 5])[:batch]
    expected, steps = decode(flow, z, labels, guidance, "sequential")
    costs = Costs(monkeypatch, next(cost for cost in PASS_COSTS["cpu", "float32"] if cost.rows >= rows))
    tokens = flow.inverse(z, labels, guidance, "auto", reports.append)
    assert [report.decoder.name for report in reports] == ["sequential", "auto", "auto", "auto"]
    assert steps[0] + costs.total < sum(steps) * 2 / 3
    distance = (tokens - expected).abs()
    assert 0 < distance.max() <= DISTANCE * TOLERANCE
    assert distance.square().mean().sqrt() <= TOLERANCE
    passes = [report.passes for report in reports]
    again, passes_again = decode(flow, z, labels, guidance, "auto")
    assert torch.equal(again, tokens)
    assert passes_again == passes


def chaotic_flow_of(num_tokens, num_blocks):
    """Blocks in which a token depends on those before so strongly that no guess is good, and none runs away."""
    flow = randomize(TokenFlow(num_tokens, 2, 16, num_blocks, 1, head_dim=8)).requires_grad_(False)
    for block in flow.blocks:
        transformer = block.transformer
        transformer.proj_out.weight[2:] *= 30  # mu
        transformer.proj_out.weight[:2] = 0  # alpha
        transformer.proj_out.bias[:2] = 0
        for first in (transformer.proj_in.weight, transformer.proj_in.bias, transformer.pos_embed):
            first *= 1e-3  # so that tokens reach mu through norms alone
    return flow


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_where_no_guess_is_any_good_a_twentieth_is_lost_at_most(monkeypatch, batch):
    flow, reports = chaotic_flow_of(196, num_blocks=4), []
    z = flow.sample_prior(batch, torch.Generator().manual_seed(0))
    expected, steps = decode(flow, z, None, None, "sequential")
    costs = Costs(monkeypatch, next(cost for cost in PASS_COSTS["cpu", "float32"] if cost.rows >= batch))
    tokens = flow.inverse(z, None, None, "auto", reports.append)
    one_by_one = sum(report.steps for report in reports if report.decoder.name == "sequential")
    assert sum(steps) < one_by_one + costs.total <= (1 + LARGEST_LOSS) * sum(steps)
    assert (tokens - expected).abs().max() <= DISTANCE * TOLERANCE


@pytest.mark.parametrize(
    ("batch", "guidance", "dtype", "options"),
    [
        (5, None, torch.float32, {}),
        (3, Guidance(1.0), torch.float32, {}),
        (0, None, torch.float32, {}),
        (1, None, torch.float64, {}),
        (1, None, torch.bfloat16, {}),
        (1, None, torch.float32, MIXTURE),
    ],
    ids=str,
)
def test_more_rows_than_passes_pay_for_and_what_was_not_measured_are_decoded_one_by_one(
    batch, guidance, dtype, options
):
    flow, reports = TokenFlow(150, 2, 16, 2, 1, head_dim=8, num_classes=CLASSES, **options).to(dtype), []
    z, labels = flow.sample_prior(batch).float(), torch.zeros(batch, dtype=torch.int64)
    tokens = flow.inverse(z, labels, guidance, "auto", reports.append)
    assert {report.decoder for report in reports} == {Decoder("sequential")}
    assert torch.equal(tokens, flow.inverse(z, labels, guidance, "sequential"))


def test_a_calibration_goes_before_the_rule_and_the_rule_before_nothing():
    cost, here = PASS_COSTS["cpu", "float32"][0], torch.zeros(1)
    allowance, spent = Allowance(cost, 4, 149), Allowance(cost, 1, 12)
    place = dict(zip(("device", "dtype"), device_and_precision(here), strict=True))
    timings = [timing(1, 0, "sequential", 1.0, **place), timing(1, 0, "jacobi", 2.0, **place)]
    auto = Decoder("auto", tolerance=1e-3)
    assert choose(timings, auto, 0, 1, here, allowance) == Decoder("sequential")
    assert choose(timings, auto, 0, 2, here, allowance) is auto
    assert choose(timings, auto, 1, 1, here, allowance) is auto
    assert choose(timings, auto, 1, 1, here, None) == Decoder("sequential")
    assert choose(timings, auto, 1, 1, here, spent) == Decoder("sequential"), "too little for a single pass"


def test_auto_decodes_block_by_block_as_calibrated_and_within_the_tolerance():
    flow = token_flow()
    z, labels = latents_and_labels(flow)
    expected, _ = decode(flow, z, labels, None, "sequential")
    flow.calibration = [timing(4, 1, "jacobi", 0.1, window=4), timing(4, 1, "sequential", 1.0)]
    reports = []
    tokens = flow.inverse(z, labels, None, Decoder("auto", tolerance=1e-3), reports.append)
    assert [(d.block, d.decoder, d.batch, d.steps) for d in reports] == [
        (1, Decoder("jacobi", 4, 1e-3), 4, TOKENS - 1),
        (0, Decoder("sequential"), 4, TOKENS - 1),
    ]
    assert reports[0].passes < reports[1].passes == TOKENS - 1
    assert 0 < (tokens - expected).abs().max() <= DISTANCE * 1e-3


@every_coupling
@pytest.mark.parametrize("guidance", [None, Guidance(1.0)], ids=["unguided", "guided"])
def test_calibration_times_every_decoder_and_is_read_back(tmp_path, guidance, options):
    flow = token_flow(**options)
    timings = calibration.calibrate(flow, guidance, batches=(3, 1))
    # Of the blocks of a flow with a prefix the one that is generated first alone is guided.
    rows = [1 if guidance is None or (t == 0 and options is PREFIX) else 2 for t in range(2)]
    small = [(t.block, t.decoder, t.window) for t in timings if t.rows == rows[t.block]]
    assert small == [(t, name, None) for t in (1, 0) for name in ("sequential", "jacobi")]
    assert {t.rows for t in timings} == {batch * row for row in rows for batch in (1, 3)}
    assert all(t.seconds > 0 and 1 <= t.passes <= flow.num_steps for t in timings)
    calibration.save(tmp_path, TIMINGS[-2:])
    calibration.save(tmp_path, TIMINGS[:1])
    calibration.save(tmp_path, timings)
    assert calibration.load(tmp_path) == (*TIMINGS[-2:], *timings), "those of other devices stay"


def test_what_is_hopeless_on_a_small_batch_is_not_tried_on_a_larger_one(monkeypatch):
    def timed(block, tokens, branches, guidance, decoder):
        return tokens, 1, {"sequential": 1.0, "jacobi": 1.4 if block is flow.blocks[0] else 1.6}[decoder.name]

    monkeypatch.setattr(calibration, "time_block", timed)
    flow = token_flow()
    timings = calibration.calibrate(flow, batches=(1, 5))
    tried = {rows: {t.block for t in timings if t.decoder == "jacobi" and t.rows == rows} for rows in (1, 5)}
    assert tried == {1: {0, 1}, 5: {0}}


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.0, {1}), (39.0, {1}), (40.0, {1, 4}), (119.0, {1, 4}), (120.0, {1, 4, 10})]
)
def test_batches_are_left_out_that_would_take_longer_than_is_left(monkeypatch, seconds, expected):
    """A clock by which an image takes 8 seconds: one for each of two decoders, blocks and rounds."""
    now = [0.0]

    def timed(block, tokens, branches, guidance, decoder):
        now[0] += len(tokens)
        return tokens, 1, 1.0

    monkeypatch.setattr(calibration, "time_block", timed)
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: now[0])
    timings = calibration.calibrate(token_flow(), batches=(10, 1, 4), rounds=2, seconds=seconds)
    assert {timing.rows for timing in timings} == expected


def test_a_calibration_that_is_none_is_refused(tmp_path):
    assert calibration.load(tmp_path) == ()
    for text in ("{", "{}", "1", "[1]", '[{"device": "cpu"}]', "[" * 10**5):
        (tmp_path / calibration.FILE).write_text(text)
        with pytest.raises(ValueError, match=r"calibration\.json: expected what `tarflow calibrate` writes; "):
            calibration.load(tmp_path)


WRONG = [
    (field.name, wrong)
    for field in dataclasses.fields(Timing)
    for wrong in (None, [], {}, True, -1, 0.5, float("nan"), float("inf"), "auto")
    if (field.name, wrong) not in [("window", None), ("seconds", 0.5), ("device", "auto"), ("dtype", "auto")]
]


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_a_calibration_with_a_value_that_cannot_be_is_refused_by_its_name(tmp_path, name, wrong):
    row = dataclasses.asdict(timing(2, 0, "jacobi", 0.4, window=16)) | {name: wrong}
    (tmp_path / calibration.FILE).write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=rf"calibration\.json: .*; {name}: expected .*; got "):
        calibration.load(tmp_path)


def test_a_window_of_the_sequential_decoder_is_refused(tmp_path):
    row = dataclasses.asdict(timing(2, 0, "sequential", 0.4)) | {"window": 4}
    (tmp_path / calibration.FILE).write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=r"calibration\.json: .*; window: expected none with the sequential decoder"):
        calibration.load(tmp_path)


def test_a_model_that_is_saved_over_another_leaves_no_timings_of_it(tmp_path):
    models = [tarflow(seed, torch.float32) for seed in (0, 1)]
    models[0].flow.calibration = TIMINGS
    for model in models:
        model.save_pretrained(tmp_path)
        assert tuple(TarFlow.from_pretrained(tmp_path).flow.calibration) == tuple(model.flow.calibration)
    models[0].flow.calibration = TIMINGS[:1]
    calibration.save(tmp_path, TIMINGS[-1:])
    models[0].save_pretrained(tmp_path)
    assert calibration.load(tmp_path) == tuple(TIMINGS[:1])


def test_a_model_is_inverted_and_drawn_from_by_the_same_decoder_unless_told_otherwise():
    model = tarflow()
    model.flow.calibration = [timing(4, t, "jacobi", 0.1) for t in range(3)]
    z = model.flow.sample_prior(4, torch.Generator().manual_seed(0))
    images = model.inverse(z)
    assert torch.equal(images, model.sample(4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(images, unpatchify(model.flow.inverse(z), model.config.patch_size, model.config.image_size))
    assert not torch.equal(images, model.inverse(z, decoder="sequential"))


def test_the_tolerance_of_a_decoder_is_a_hundredth_or_as_told_and_that_of_the_sequential_one_is_zero():
    assert [Decoder(name).tolerance for name in ("auto", "jacobi", "sequential")] == [1e-2, 1e-2, 0]
    assert Decoder("jacobi", tolerance=0.5).tolerance == 0.5
    for decoder in (Decoder("sequential"), Decoder("jacobi", 3, 0.5)):
        assert dataclasses.replace(decoder) == decoder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fast",), "decoder: expected one of auto, sequential, jacobi; got 'fast'"),
        (("jacobi", 0), "window: expected at least 1; got 0"),
        (("sequential", 4), "window: expected none with the sequential decoder, only with jacobi; got 4"),
        (("jacobi", None, -1e-3), "tolerance: expected a finite number >= 0; got -0.001"),
        (("jacobi", None, float("nan")), "tolerance: expected a finite number >= 0; got nan"),
        (("sequential", None, 0.5), "tolerance: expected none with the sequential decoder; got 0.5"),
    ],
)
def test_decoders_that_do_not_exist(arguments, message):
    with pytest.raises(ValueError, match=message):
        Decoder(*arguments)
