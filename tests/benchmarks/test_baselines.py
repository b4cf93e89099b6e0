"""Published code beside ours: passes and tokens are counted, distances are those of the map that was to be inverted."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

import checkout
import gs_jacobi
import itarflow
import models
import report
import sampling
from helpers import branches
from tarflow import Decoder, Guidance, TarFlowConfig
from tarflow.denoising import Denoising, denoise_by_levels

CPU = torch.device("cpu")
CONFIG = TarFlowConfig(image_size=8, patch_size=2, channels=64, num_blocks=2, layers_per_block=1, num_classes=3)
LEVELS = replace(CONFIG, noise_levels=(0.05, 0.3))
STEPS = CONFIG.num_tokens - 1
GUIDANCES = {"guided": models.GUIDANCE, "not guided": None}
every_guidance = pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)


def inputs_of(batch=2, guidance=None, model=None):
    model = model or models.build(CONFIG, CPU)
    z, labels = models.latents_and_labels(model, batch)
    return gs_jacobi.Inputs(model, z, labels, guidance, torch.float32, rounds=1)


@every_guidance
@pytest.mark.parametrize("batch", [1, 3])
def test_the_sequential_decoder_passes_each_token_but_the_last_once(batch, guidance):
    run = sampling.Decoding(Decoder("sequential"), inputs_of(batch, guidance))
    trace = gs_jacobi.trace_ours(run)
    assert trace.passes == [STEPS] * CONFIG.num_blocks
    assert trace.tokens == STEPS * CONFIG.num_blocks


@every_guidance
def test_one_row_in_one_window_takes_as_many_tokens_as_its_passes_are_long(guidance):
    trace = gs_jacobi.trace_ours(sampling.Decoding(Decoder("jacobi", STEPS), inputs_of(1, guidance)))
    assert all(1 <= passes <= STEPS for passes in trace.passes)
    assert trace.tokens <= STEPS * sum(trace.passes)
    assert trace.tokens >= sum(trace.passes)


@torch.no_grad()
@every_guidance
@pytest.mark.parametrize("reverse", [False, True])
def test_a_block_leads_its_tokens_back_to_the_latents_they_were_decoded_from(reverse, guidance):
    inputs = inputs_of(3, guidance, models.build(CONFIG, CPU).double())
    flow, z = inputs.model.flow, inputs.z.double()
    block = flow.blocks[int(reverse)]
    x, _ = block.inverse(z, branches(flow, z, inputs.labels, guidance), guidance, Decoder("sequential"))
    assert (x - z).abs().max() > 0.01
    assert_close(gs_jacobi.latents_of(block, x, inputs.labels, guidance), z)


@every_guidance
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_latents_of_our_jacobi_are_within_its_tolerance(tolerance, guidance):
    run = sampling.Decoding(Decoder("jacobi", None, tolerance), inputs_of(3, guidance))
    found = gs_jacobi.facts(gs_jacobi.trace_ours, run)
    assert 0 < found["latents"]["rms"] < found["latents"]["max"] < 1.01 * tolerance
    assert found["passes"] < found["steps"] == STEPS * CONFIG.num_blocks


FAKE = """
import torch

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_out = torch.nn.Linear(4, 8)

class Model(torch.nn.Module):
    def __init__(self, in_channels, img_size, **options):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.options, self.img_size = options, img_size

    def load_state_dict(self, state):
        self.loaded = set(state)

    def forward(self, x, y):
        return x, [], 0, [[1.0, 2.0], [3.0, 2.0]], [[0, 0, 0, 1.0], [0, 0, 0, 3.0]]

    def reverse(self, z, y, guidance=0, return_sequence=False, **options):
        self.told = options | {"guidance": guidance}
        frames = [z]
        for block, passes in zip(reversed(self.blocks), options.get("max_jacobi_list", [1, 1])):
            for _ in range(passes * (2 if guidance else 1)):
                block.proj_out(z[:, :5])
            frames.append(frames[-1] + 0.5)
        images = [torch.nn.functional.fold(frame.mT, self.img_size, 2, stride=2) for frame in frames]
        return images if return_sequence else images[-1]
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A checkout of each repository, in which a pass is over five tokens and a block adds one half."""
    for code in checkout.CODES:
        (tmp_path / code.name).mkdir()
        (tmp_path / code.name / code.file).write_text(FAKE)
        monkeypatch.setenv(code.variable, str(tmp_path / code.name))
    difficulty = gs_jacobi.Difficulty([0.7, 0.3], [0, 1])
    monkeypatch.setattr(gs_jacobi, "difficulty_of_trained", lambda: difficulty)


@every_guidance
def test_passes_tokens_and_distances_of_their_code_are_those_that_it_took(fake, guidance):
    model = models.build(CONFIG, CPU)
    for block in model.flow.blocks:  # the identity: what a block adds is what it is off by
        block.transformer.proj_out.weight.data.zero_()
        block.transformer.proj_out.bias.data.zero_()
    run = gs_jacobi.GSJacobi(8, 4, 3, inputs_of(3, guidance, model))
    found = gs_jacobi.facts(gs_jacobi.trace_theirs, run)
    assert found["by_block"] == [f"4/{STEPS}", f"3/{STEPS}"]
    assert found["tokens"] == 5 * (4 + 3)
    assert found["latents"] == pytest.approx({"max": 0.5, "rms": 0.5})
    assert found["pixels"] == pytest.approx({"max": 1.0, "rms": 1.0})


@pytest.mark.parametrize(
    ("settings", "segments", "iterations"),
    [
        ((8, 13, 6), [8, 1], [13, 6]),
        ((3, 99, 99), [2, 1], [STEPS, STEPS]),
        ((0, 1, 1), [0, 0], [1, 1]),
    ],
)
def test_only_the_tough_block_is_cut_and_only_into_equal_segments(fake, settings, segments, iterations):
    options = gs_jacobi.GSJacobi(*settings, inputs_of()).options
    assert options["num_GS_list"] == segments
    assert options["max_jacobi_list"] == iterations


def test_difficulty_is_told_in_the_order_in_which_blocks_are_generated(fake):
    theirs = gs_jacobi.build(models.build(CONFIG, CPU))
    measured = gs_jacobi.measure_difficulty(theirs, torch.zeros(2, 1, 8, 8))
    assert measured == gs_jacobi.Difficulty([0.75, 0.25], [1, 0])
    assert measured.tough == [True, False]


@pytest.mark.parametrize("config", [CONFIG, LEVELS], ids=["TarFlow", "iTarFlow"])
def test_a_model_is_built_by_the_code_of_its_kind_with_all_its_weights(fake, config):
    theirs = checkout.published(models.build(config, CPU))
    assert ("patch_sizes" in theirs.options) == (config is LEVELS)
    assert any("time_embed.mlp" in name for name in theirs.loaded) == (config is LEVELS)
    assert not any("noise_embed" in name or "layers" in name for name in theirs.loaded)


def test_their_code_is_told_of_guidance_and_noise_level(fake):
    theirs = checkout.published(models.build(LEVELS, CPU))
    z, labels = torch.zeros(2, 16, 4), torch.zeros(2, dtype=torch.int64)
    checkout.sample(theirs, z, labels, Guidance(3.0, blocks=1, rule="gaussian"), 0.2)
    expected = {"guidance": 3.0, "annealed_guidance": True, "guide_flows": 1, "lerp_style": "starflow"}
    assert expected.items() <= theirs.told.items()
    assert theirs.told["t"].tolist() == [[pytest.approx(0.2)]] * 2


@pytest.mark.parametrize("code", checkout.CODES, ids=lambda code: code.name)
def test_without_a_checkout_it_is_said_which_option_names_one(monkeypatch, code):
    monkeypatch.delenv(code.variable, raising=False)
    with pytest.raises(NotImplementedError, match=f"see --{code.name}"):
        code.load()
    code.use(None)
    assert code.variable not in checkout.os.environ


def test_what_is_denoised_is_drawn_from_the_latents_of_all_contenders():
    model = models.build(LEVELS, CPU)
    subject = sampling.Subject("small", LEVELS, partial(models.build, LEVELS))
    row = itarflow.denoised(sampling.sampling_row(subject, 2, Guidance(1.0), ("sequential", "published")))
    inputs = row.draw(CPU)
    (images,) = row.contenders["sequential"].prepare(inputs)()
    drawn = model.inverse(inputs.z, inputs.labels, Guidance(1.0), "sequential", noise_level=0.3)
    levels = model.denoising_levels(0.3)
    assert len(levels) == 11
    *_, expected = denoise_by_levels(lambda x, t: model.denoise(x, t, inputs.labels), drawn, levels, Denoising())
    assert_close(images, expected)


def test_a_page_has_a_line_of_passes_and_distances_for_each_decoder():
    off = {"max": 0.5, "rms": 0.25}
    decoder = {"p50": 0.1, "by_block": ["7/15", "3/15"], "passes": 10, "tokens": 50.0, "latents": off, "pixels": off}
    machine = dict.fromkeys(("device", "driver", "torch", "triton", "commit"), "2 threads")
    row = {"op": next(iter(gs_jacobi.OPS)), "shape": {"B": 2}, "machine": machine, "contenders": {"jacobi": decoder}}
    text = report.decoding_page(
        "<!-- jacobi decoders -->\nold\n<!-- /jacobi decoders -->", {"cpu": {"rows": {"": row}}}
    )
    assert "| jacobi | 7 + 3 = 10 | 50 | 100 ms | 5.0e-01 | 2.5e-01 | 5.0e-01 | 2.5e-01 |" in text
    assert "old" not in text
    assert report.decoding_page(text, {}).count("Nothing has been measured yet.") == 1


def test_a_page_has_the_ratio_of_the_published_time_to_ours():
    seconds = {"published": 1.2, "sequential": 0.4, "auto": 0.3}
    contenders = {name: {"p50": taken} for name, taken in seconds.items()}
    machine = dict.fromkeys(("device", "driver", "torch", "triton", "commit"), "2 threads")
    row = {"op": "guided sampling", "model": itarflow.TRAINED.name, "shape": {"B": 1}}
    results = {"cpu": {"rows": {"": row | {"machine": machine, "contenders": contenders}}}}
    text = report.family_page("<!-- itarflow -->\n<!-- /itarflow -->", results)
    assert "| guided sampling, batch 1 | 1200 ms | 400 ms | 300 ms | 3.0, 4.0 |" in text


def test_rows_of_published_code_are_measured_at_batch_1_and_16_and_checked_against_one_of_them():
    rows = [*gs_jacobi.gs_jacobi_rows(CPU), *itarflow.itarflow_rows(CPU)]
    assert len({row.name for row in rows}) == len(rows)
    assert {row.shape["B"] for row in rows} == {1, 16}
    assert all(row.plain in row.contenders for row in rows)
