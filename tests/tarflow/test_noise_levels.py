"""A model with noise levels is a flow at each of them, is guided, decoded and trained so, and removes the noise."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import tarflow.decoding.sequential as sequential_decoder
from helpers import assert_shares_are_of_the_batch, branches, draw, randomize
from helpers import tarflow as build
from tarflow import Decoder, Denoising, FlowPP, FlowPPConfig, Guidance, TarFlow, TarFlowConfig, TokenFlow, hardware
from tarflow.datasets import ImageDataset
from tarflow.decoding import calibration
from tarflow.denoising import denoise_by_levels, tweedie
from tarflow.evaluation import class_log_posterior, evaluate, noisy_bits_per_dim
from tarflow.noise import add_gaussian_noise, bits_per_dim
from tarflow.pictures import Gallery
from tarflow.training.config import DataConfig, TrainConfig, TrainingConfig
from tarflow.training.presets import PRESETS
from tarflow.training.trainer import Trainer

LEVELS = (0.05, 0.4)
OF_EACH = torch.tensor([0.05, 0.1, 0.4], dtype=torch.float64)
LABELS = torch.tensor([0, -1, 2])


def levelled(**config):
    return build(**{"noise_levels": LEVELS, "num_classes": 3} | config)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Levels ---------------------------------------------------------------------------------------------------------------


def test_a_number_is_the_level_of_all_images():
    model, x = levelled(), draw(0, 3, 1, 4, 4)
    for level in (0.1, 1):
        of_each = torch.full((3,), float(level))
        assert_close(model(x, LABELS, noise_level=level), model(x, LABELS, noise_level=of_each))


def test_each_image_has_a_density_of_its_own_level():
    model, x = levelled(), draw(0, 3, 1, 4, 4)
    together = model.log_prob(x, LABELS, noise_level=OF_EACH)
    for i in range(3):
        alone = model.log_prob(x[[i]], LABELS[[i]], noise_level=OF_EACH[i].item())
        assert_close(together[[i]], alone)
    assert (together - model.log_prob(x, LABELS, noise_level=0.2)).abs().min() > 1e-3


def test_the_density_at_a_level_integrates_to_one():
    flow = randomize(TokenFlow(2, 1, 16, 3, 1, head_dim=8, takes_noise_level=True)).double()
    axis = torch.linspace(-12, 12, 161, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).unsqueeze(-1)
    for level in (0.01, 0.3):
        with torch.no_grad():
            total = flow.log_prob(grid, noise_level=level).exp().sum() * (axis[1] - axis[0]) ** 2
        assert abs(total - 1) < 5e-3  # the grid ends at 12


@pytest.mark.parametrize("channels", [16, 15])
def test_the_embedding_is_one_of_sinusoids_whatever_the_width(channels):
    flow = randomize(TokenFlow(3, 2, channels, 1, 1, head_dim=channels, takes_noise_level=True)).double()
    embed = flow.blocks[0].transformer.noise_embed
    angles = OF_EACH.log()[:, None] * 10_000 ** (-torch.arange(channels // 2).double() / (channels // 2))
    sinusoids = torch.cat((angles.sin(), angles.cos(), torch.zeros(3, channels % 2)), dim=1)
    assert_close(embed(OF_EACH), embed[2](embed[1](embed[0](sinusoids))))


def test_it_runs_compiled_whole_and_the_embedding_in_full_precision_under_autocast():
    model = levelled(num_blocks=2, layers_per_block=1, dtype=torch.float32)
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, backend="aot_eager")
    x, levels = draw(0, 3, 1, 4, 4, dtype=torch.float32), OF_EACH.float()
    assert_close(compiled(x, LABELS, noise_level=levels), model(x, LABELS, noise_level=levels))
    embed = model.flow.blocks[0].transformer.noise_embed
    with torch.autocast("cpu", torch.bfloat16):
        low = embed(levels)
    assert torch.equal(low, embed(levels))


# Decoding -------------------------------------------------------------------------------------------------------------


GUIDANCE = {
    "none": None,
    "sigma": Guidance(1.5),
    "alpha alone": Guidance(1.0, parameters="alpha"),
    "temperature": Guidance(1.0, temperature=0.5, drop_label=False),
    "one block": Guidance(1.5, blocks=1),
    "gaussian": Guidance(1.0, "constant", rule="gaussian"),
}
every_guidance = pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)


class Windows:
    """An allowance of two passes for a block."""

    def __init__(self):
        self.windows = [3, 4, 0]

    def window(self, remaining, before=0):
        return min(self.windows.pop(0), remaining)

    def settle(self, window, tokens):
        pass


@every_guidance
def test_every_row_is_decoded_at_its_own_level_by_every_decoder(monkeypatch, guidance):
    flow = randomize(TokenFlow(9, 2, 16, 2, 2, head_dim=8, num_classes=3, takes_noise_level=True)).double()
    z = draw(1, 3, 9, 2)
    alone = [flow.inverse(z[[i]], LABELS[[i]], guidance, "sequential", noise_level=OF_EACH[i].item()) for i in range(3)]
    for decoder in (Decoder("sequential"), Decoder("jacobi", 4, 0.0), Decoder("jacobi", None, 0.0)):
        tokens = flow.inverse(z, LABELS, guidance, decoder, noise_level=OF_EACH)
        assert_close(tokens, torch.cat(alone), atol=1e-9, rtol=1e-9)
    monkeypatch.setattr(sequential_decoder, "count_chains", lambda *sizes: 2)
    halves = flow.inverse(z, LABELS, guidance, "sequential", noise_level=OF_EACH)
    assert_close(halves, torch.cat(alone), atol=1e-9, rtol=1e-9)


@every_guidance
def test_what_parallel_passes_leave_is_decoded_at_its_level(guidance):
    flow = randomize(TokenFlow(9, 2, 16, 1, 2, head_dim=8, num_classes=3, takes_noise_level=True)).double()
    (block,), z = flow.requires_grad_(False).blocks, draw(1, 3, 9, 2)
    conditions = branches(flow, z, LABELS, guidance, OF_EACH)
    expected, _ = block.inverse(z, conditions, guidance, Decoder("sequential"))
    tokens, _ = block.inverse(z, conditions, guidance, Decoder("auto", tolerance=0.0), allowance=Windows())
    assert_close(tokens, expected, atol=1e-9, rtol=1e-9)


def test_where_sigma_would_be_negative_its_absolute_value_is_taken():
    """A reference of a much larger sigma, and a weight that overshoots."""
    from tarflow.guidance import extrapolate_scale

    mu, weights = torch.zeros(1, 2), torch.tensor([2.0])
    _, alpha = extrapolate_scale((mu, torch.tensor([[0.0, 0.0]])), (mu, torch.tensor([[2.0, -2.0]])), weights)
    assert_close(alpha.exp(), (3 - 2 * torch.tensor([[2.0, -2.0]]).exp()).abs())


@pytest.mark.parametrize("rows", [1, 2])
def test_blocks_that_are_not_guided_are_decoded_without_a_reference_branch(monkeypatch, rows):
    model, seen = levelled(num_blocks=4), []
    run = TokenFlow.trajectory

    def counted(flow, *args, **options):
        for block in flow.blocks:
            monkeypatch.setattr(block, "inverse", noted(block))
        return run(flow, *args, **options)

    def noted(block):
        inverse = type(block).inverse

        def call(z, labels, guidance, *rest, **options):
            seen.append(guidance)
            return inverse(block, z, labels, guidance, *rest, **options)

        return call

    monkeypatch.setattr(TokenFlow, "trajectory", counted)
    guidance = Guidance(1.0, blocks=3)
    model.inverse(draw(0, rows, 4, 4), LABELS[:rows], guidance, noise_level=0.1)
    assert seen == [guidance] * 3 + [None]


def test_decoders_are_timed_at_the_level_of_samples_and_with_the_rows_of_each_block():
    flow, seen = levelled(dtype=torch.float32).flow, []
    flow.blocks[0].transformer.noise_embed.register_forward_hook(lambda module, inputs, output: seen.append(*inputs))
    timings = calibration.calibrate(flow, Guidance(1.0, blocks=1), batches=[2], rounds=1, noise_level=0.3)
    assert {(t.block, t.rows) for t in timings} == {(2, 4), (1, 2), (0, 2)}
    assert_close(torch.cat(seen), torch.full((len(torch.cat(seen)),), 0.3))


# Denoising ------------------------------------------------------------------------------------------------------------


def gaussian_denoiser(spread):
    """The exact mean of clean data of N(0, spread^2), given them with noise."""
    return lambda x, level: x * spread**2 / (spread**2 + level**2)


def test_many_steps_follow_the_flow_along_which_the_densities_agree():
    x, spread, denoising = draw(0, 5, 1, 2, 2), 0.5, Denoising(4000)
    *_, clean = denoise_by_levels(gaussian_denoiser(spread), x, denoising.levels(0.4, 1e-4), denoising)
    assert_close(clean, x * spread / math.hypot(spread, 0.4), atol=0, rtol=1e-3)


@pytest.mark.parametrize("denoising", [Denoising(2000), Denoising(2000, stochastic=True)], ids=str)
def test_samples_of_a_level_become_samples_of_the_data(denoising):
    spread = 0.5
    x = draw(0, 4000, 1, 2, 2) * math.hypot(spread, 0.4)
    *_, clean = denoise_by_levels(gaussian_denoiser(spread), x, denoising.levels(0.4, 1e-3), denoising, seeded())
    assert clean.std() == pytest.approx(spread, rel=0.02)
    kept = torch.corrcoef(torch.stack((x.flatten(), clean.flatten())))[0, 1]
    assert kept < 0.95 if denoising.stochastic else kept > 0.999


def test_one_step_is_the_formula_and_clipping_bounds_the_last_estimate():
    y, sigma = draw(0, 3, 1, 4, 4), 0.2
    model = levelled()
    (clean,) = denoise_by_levels(lambda x, t: model.denoise(x, t, LABELS), y, [sigma, 0.0], Denoising(1))
    assert_close(clean, tweedie(lambda noisy: model.log_prob(noisy, LABELS, noise_level=sigma), y, sigma))
    assert clean.abs().max() > 1
    (clipped,) = denoise_by_levels(lambda x, t: model.denoise(x, t, LABELS), y, [sigma, 0.0], Denoising(1, clip=True))
    assert_close(clipped, clean.clamp(-1, 1))


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_levels_fall_in_equal_steps_and_end_with_none(steps):
    *levels, last = Denoising(steps).levels(0.4, 0.05)
    assert (len(levels), last) == (steps, 0)
    assert levels == pytest.approx(torch.linspace(0.4, 0.05, steps).tolist())


@pytest.mark.parametrize("denoising", [None, Denoising(3, stochastic=True)], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_samples_are_drawn_at_the_level_of_the_noise_that_is_removed_whatever_the_chunks(chunk_size, denoising):
    model, guidance, sigma = levelled(), Guidance(0.5, blocks=1), 0.3
    images, frames = model.sample(
        3, LABELS, guidance, sigma, generator=seeded(), return_trajectory=True, chunk_size=chunk_size,
        denoising=denoising,
    )  # fmt: skip
    generator = seeded()
    noisy = model.inverse(model.flow.sample_prior(3, generator), LABELS, guidance, noise_level=sigma)
    levels = model.denoising_levels(sigma, denoising)
    steps = denoise_by_levels(
        lambda x, t: model.denoise(x, t, LABELS), noisy, levels, denoising or Denoising(), generator
    )
    *between, clean = steps
    assert_close(images, clean)
    assert_close(frames[4:], torch.stack(between))
    assert_close(frames[3], noisy)
    assert (levels[0], levels[-2]) == pytest.approx((sigma, LEVELS[0]))


def test_noise_that_is_left_is_of_the_largest_level():
    model = levelled()
    z = model.flow.sample_prior(3, seeded())
    assert_close(model.sample(3, LABELS, generator=seeded()), model.inverse(z, LABELS, noise_level=LEVELS[1]))


def test_no_graph_is_kept_and_no_more_images_are_denoised_at_a_time_than_fit(monkeypatch):
    model, seen = levelled(), []
    denoise = TarFlow.denoise
    monkeypatch.setattr(TarFlow, "denoise", lambda model, y, *rest: seen.append(y) or denoise(model, y, *rest))
    monkeypatch.setattr(hardware, "free_bytes", lambda device: 2 * 2 * model.config.activation_bytes())
    images = model.sample(5, torch.zeros(5, dtype=torch.int64), denoise_sigma=0.3, denoising=Denoising(3))
    assert [len(y) for y in seen] == [2, 2, 1] * 3
    assert not any(t.requires_grad for t in (*seen, images))


@pytest.mark.parametrize("denoising", [None, Denoising(3)], ids=str)
def test_a_trajectory_shows_every_level(monkeypatch, tmp_path, denoising):
    shown = []
    monkeypatch.setattr("tarflow.pictures.trajectory", lambda frames, path, title, columns, kind: shown.append(columns))
    model = levelled(dtype=torch.float32)
    Gallery(denoise_sigma=0.4, denoising=denoising).save_trajectory(model, tmp_path / "t.png", "title")
    (columns,) = shown
    between = model.denoising_levels(0.4, denoising)[1:-1]
    expected = ["latent", *model.stages, *(f"noise {level:.2g}" for level in between), "denoised"]
    assert columns == expected
    assert len(between) == (9 if denoising is None else 2)


# Scores ---------------------------------------------------------------------------------------------------------------


def test_bits_per_dim_are_those_of_the_level():
    model, pixels = levelled(dtype=torch.float32), torch.arange(48, dtype=torch.uint8).view(3, 1, 4, 4)
    x = add_gaussian_noise(pixels, 0.1, seeded())
    expected = bits_per_dim(model.log_prob(x, LABELS, noise_level=0.1), 16).mean().item()
    score = noisy_bits_per_dim(model, pixels, LABELS, sigma=0.1, generator=seeded())
    assert score.mean == pytest.approx(expected, rel=1e-5)
    posterior = class_log_posterior(model, x, 0.1)
    assert_close(posterior.exp().sum(1), torch.ones(3))
    names = " ".join(evaluate(model, pixels, LABELS.abs(), sigma=LEVELS[1]))
    assert "sigma 0.05 " in names
    assert "sigma 0.4 " in names
    assert "8-bit" not in names


# Training -------------------------------------------------------------------------------------------------------------


SMALL = TarFlowConfig(14, 1, patch_size=7, channels=64, num_blocks=2, layers_per_block=(1, 2), noise_levels=LEVELS)


def trainer_of(num=64, model=SMALL, **training):
    images = torch.randint(256, (num, 1, 14, 14), generator=seeded(), dtype=torch.uint8)
    data = ImageDataset(images, torch.arange(num) % 10, tuple("0123456789"), False, "noise")
    settings = TrainingConfig(**{"precision": "float32", "batch_size": 16} | training)
    return Trainer(TrainConfig(DataConfig(), model, settings), data, torch.device("cpu")), data


def test_each_image_has_noise_of_a_level_of_its_own_uniform_between_the_two():
    trainer, data = trainer_of(4000)
    trainer.generator.manual_seed(0)
    x, _, _, levels = trainer.prepare(data.images, data.labels)
    assert LEVELS[0] <= levels.min() < 0.06
    assert 0.39 < levels.max() <= LEVELS[1]
    assert levels.mean() == pytest.approx(sum(LEVELS) / 2, abs=0.01)
    eps = (x - (data.images / 127.5 - 1)) / levels.view(-1, 1, 1, 1)
    assert_close(eps.std((1, 2, 3)), torch.ones(4000), atol=0.3, rtol=0)
    assert eps.std() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_of_an_image_is_weighted_by_its_level(accumulate):
    trainer, data = trainer_of(accumulate=accumulate)
    model, batch = copy.deepcopy(trainer.model), data.get_batch(torch.arange(16))
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda model, args, options: seen.append((*args, options["noise_level"])), with_kwargs=True
    )
    loss = trainer.train_step(*batch)["loss"].item()
    expected = 0.0
    for x, labels, levels in seen:
        z, logdet = model(x, labels, noise_level=levels)
        of_images = 0.5 * z.square().mean((1, 2)) - logdet / 196
        expected += (levels * of_images).sum().item() / 16
    assert len(seen) == accumulate
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_share_of_a_batch_gets_the_levels_that_it_would_get_in_the_batch():
    trainer, data = trainer_of()
    assert_shares_are_of_the_batch(trainer, data)


@pytest.mark.parametrize("model", [SMALL, replace(SMALL, volume_preserving=True)], ids=["affine", "volume preserving"])
def test_training_lowers_the_loss_and_goes_on_from_its_state(model):
    trainer, data = trainer_of(model=model, learning_rate=3e-3, warmup_steps=2, max_steps=30)
    losses = [trainer.train_step(*data.get_batch(torch.arange(16)))["loss"] for _ in range(25)]
    assert losses[-1] < losses[0]
    resumed, _ = trainer_of(model=model, learning_rate=3e-3, warmup_steps=2, max_steps=30)
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for one, other in itertools.repeat((trainer, resumed), 2):
        measures = [t.train_step(*data.get_batch(torch.arange(16, 32))) for t in (one, other)]
        assert_close(*measures, rtol=0, atol=0)


def test_sigma_of_a_run_is_the_largest_level():
    config = TrainConfig(model=SMALL)
    assert config.training.noise_sigma == LEVELS[1]
    for preset in ("itarflow-imagenet64", "itarflow-imagenet128", "itarflow-imagenet256", "itarflow-fashion-mnist"):
        assert PRESETS[preset].training.sigma == PRESETS[preset].model.noise_levels[1]


def test_a_saved_model_has_its_levels_again(tmp_path):
    model = levelled(dtype=torch.float32)
    model.save_pretrained(tmp_path, sigma=LEVELS[1])
    again = TarFlow.from_pretrained(tmp_path)
    assert again.noise_levels == LEVELS
    assert again.config == model.config
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


# Errors ---------------------------------------------------------------------------------------------------------------


X = torch.zeros(3, 1, 4, 4)
Z = torch.zeros(3, 4, 4)
PLAIN = {"noise_levels": None}


@pytest.mark.parametrize(
    ("config", "call", "argument"),
    [
        *(({}, lambda model, t=t: model(X, LABELS, noise_level=t), "noise_level")
          for t in (None, 0, -1.0, math.nan, math.inf, "0.1", [0.1], OF_EACH[:2], OF_EACH[:, None], 0 * OF_EACH)),
        ({}, lambda model: model.log_prob(X, LABELS), "noise_level"),
        ({}, lambda model: model.inverse(Z, LABELS), "noise_level"),
        ({}, lambda model: model.denoise(X, 0.0, LABELS), "noise_level"),
        ({}, lambda model: model.sample(3, LABELS, denoise_sigma=0.5), "denoise_sigma"),
        ({}, lambda model: model.sample(3, LABELS, denoise_sigma=0.01), "denoise_sigma"),
        (PLAIN, lambda model: model(X, LABELS, noise_level=0.1), "noise_level"),
        (PLAIN, lambda model: model.inverse(Z, LABELS, noise_level=0.1), "noise_level"),
        (PLAIN, lambda model: model.sample(3, LABELS, denoising=Denoising(clip=True)), "denoising"),
        *(({}, lambda _, steps=steps: Denoising(steps), "steps") for steps in (0, -1, 1.0, "1", 10**9)),
        *(({}, lambda _, levels=levels: TarFlowConfig(noise_levels=levels), "noise_levels")
          for levels in ((0.1,), (0.2, 0.1), (0, 0.1), (0.1, math.nan), (0.1, 11), ("a", 1), 0.1, {})),
        ({}, lambda _: TrainConfig(model=SMALL, training=TrainingConfig(noise="uniform")), "noise"),
        ({}, lambda _: Guidance(rule="mean"), "rule"),
        ({}, lambda _: Guidance(rule="gaussian", parameters="mu"), "parameters"),
        *(({}, lambda _, blocks=blocks: Guidance(blocks=blocks), "blocks") for blocks in (0, 1.0, True)),
        ({"coupling": "mixture"}, lambda model: model.sample(3, LABELS, Guidance(rule="gaussian")), "rule"),
    ],
)  # fmt: skip
def test_an_error_names_the_argument(config, call, argument):
    with pytest.raises(ValueError, match=rf"^{argument}: .*expected .*; got "):
        call(levelled(dtype=torch.float32, **config))


def test_flowpp_takes_neither_levels_nor_ways_to_denoise():
    model = FlowPP(FlowPPConfig(image_size=8, filters=8, blocks_per_coupling=1, num_mixtures=2, stack="stripe2"))
    with pytest.raises(ValueError, match=r"^noise_level: expected None"):
        model.log_prob(torch.zeros(1, 1, 8, 8), noise_level=0.1)
    with pytest.raises(ValueError, match=r"^denoising: expected None"):
        model.sample(1, denoising=Denoising())
