"""One step of training does what it says: its noise, its gradient, its rate, its average; and none where it is bad."""

import copy
import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.testing import assert_close

from helpers import assert_shares_are_of_the_batch
from tarflow import DequantizerConfig, FlowPP, FlowPPConfig, TarFlow, TarFlowConfig, datasets, evaluation
from tarflow.datasets import ImageDataset
from tarflow.hardware import uses_bfloat16
from tarflow.noise import add_gaussian_noise, bits_per_dim, derive_seed
from tarflow.training.config import DataConfig, TrainConfig, TrainingConfig
from tarflow.training.muon import LayerMuon
from tarflow.training.presets import PRESETS
from tarflow.training.trainer import MEASURES, Trainer

TARFLOW = TarFlowConfig(14, 1, patch_size=7, channels=64, num_blocks=2, layers_per_block=1)
MIXTURE = replace(TARFLOW, coupling="mixture")
VOLUME_PRESERVING = replace(TARFLOW, volume_preserving=True)
SMALL = {"image_size": 14, "num_mixtures": 2, "filters": 8, "blocks_per_coupling": 1, "stack": "squeeze channel2"}
FLOWPP = {"model": FlowPPConfig(**SMALL), "conditional": False, "noise": "variational"}
EXACTLY = {"rtol": 0, "atol": 0}


def build(dataset=None, model=TARFLOW, conditional=True, flip=None, **training):
    """A trainer, and two batches for it."""
    dataset = dataset or pictures()
    settings = TrainingConfig(**{"batch_size": 16, "precision": "float32"} | training)
    config = TrainConfig(DataConfig(conditional=conditional, flip=flip), model, settings)
    trainer = Trainer(config, dataset, torch.device("cpu"))
    return trainer, [dataset.get_batch(torch.arange(start, start + 16)) for start in (0, 16)]


def pictures(size=32, flip=False):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (size, 1, 14, 14), generator=generator, dtype=torch.uint8)
    return ImageDataset(images, torch.arange(size) % 10, tuple("0123456789"), flip, "noise")


def prepared(dataset, **settings):
    """The whole dataset, as the model would be trained on it."""
    trainer, _ = build(dataset, **settings)
    trainer.generator.manual_seed(0)
    return trainer.prepare(dataset.images, dataset.labels)


def watch(trainer):
    """What the model is given and returns, to be filled in as it runs."""
    seen = []
    trainer.model.register_forward_hook(lambda model, inputs, outputs: seen.append((*inputs, *outputs)))
    return seen


@pytest.fixture(scope="module")
def fashion():
    return datasets.load("fashion-mnist")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"noise": "uniform"},
        {"noise": "variational"},
        {"model": MIXTURE},
        {"model": VOLUME_PRESERVING},
        {"conditional": False},
        {"precision": "bfloat16"},
        {"optimizer": "muon"},
        {"optimizer": "muon", "precision": "bfloat16", "noise": "variational"},
        FLOWPP,
        FLOWPP | {"model": FlowPPConfig(coupling="affine", **SMALL), "noise": "uniform", "precision": "bfloat16"},
    ],
    ids=str,
)
def test_training_on_real_images_lowers_the_bits(fashion, settings):
    trainer, _ = build(fashion, learning_rate=3e-3, warmup_steps=5, max_steps=40, **settings)
    batches = islice(datasets.batches(fashion, 16, seed=0), 40)
    bits = [trainer.train_step(*batch)["bits_per_dim"] for batch in batches]
    pixels, labels = fashion.get_batch(torch.arange(200))
    score = evaluation.noisy_bits_per_dim if trainer.config.training.noise == "gaussian" else evaluation.bits_per_dim
    labels = labels if trainer.config.data.conditional else None
    scores = [score(model, pixels, labels).mean for model in (build(fashion, **settings)[0].average, trainer.average)]
    assert bits[-1] < bits[0] - 0.5
    assert scores[1] < scores[0] - 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {"noise": "uniform"},
        {"noise": "variational"},
        {"model": VOLUME_PRESERVING},
        {"conditional": False},
        {"flip": True},
        {"optimizer": "muon"},
        FLOWPP | {"model": FlowPPConfig(dropout=0.3, **SMALL)},
    ],
    ids=str,
)
def test_a_trainer_goes_on_from_its_state(settings):
    data = pictures()
    whole, batches = build(data, **settings)
    for batch in batches:
        whole.train_step(*batch)
    state = copy.deepcopy(whole.state_dict())
    resumed, _ = build(data, **settings)
    resumed.load_state_dict(state)
    measures = [[trainer.train_step(*batch) for batch in batches] for trainer in (whole, resumed)]
    assert_close(measures[1], measures[0], **EXACTLY)
    assert_close(resumed.state_dict(), whole.state_dict(), **EXACTLY)


def test_dropout_is_in_what_is_trained_and_not_in_the_average():
    model = FlowPPConfig(dropout=0.5, dequantizer=DequantizerConfig(filters=8, dropout=0.5), **SMALL)
    trainer, batches = build(**FLOWPP | {"model": model})
    for batch in batches:
        trainer.train_step(*batch)
    assert all(module.training for module in trainer.model.modules())
    assert not any(module.training for module in trainer.average.modules())
    with torch.no_grad():
        trained, averaged = (
            [model.dequantizer(batches[0][0], torch.ones(16, 1, 14, 14))[0] for _ in range(2)]
            for model in (trainer.model, trainer.average)
        )
    assert not torch.equal(*trained)
    assert torch.equal(*averaged)


def set_in(*keys, to):
    """What puts a value into a nested state; None takes the entry out."""

    def harm(state):
        *path, last = keys
        for key in path:
            state = state[key]
        if to is None:
            del state[last]
        else:
            state[last] = to(state[last]) if callable(to) else to

    return harm


MOMENTS = ("optimizer", "state", 0)
BAD_STATES = {
    "moment of another shape": (set_in(*MOMENTS, "exp_avg", to=torch.zeros(3, 3)), "state.optimizer.state.0.exp_avg: "),
    "moment of another dtype": (
        set_in(*MOMENTS, "exp_avg_sq", to=lambda t: t.double()),
        r"expected .*float32 .* got .*64",
    ),
    "moment that is none": (
        set_in(*MOMENTS, "exp_avg", to=lambda t: t.tolist()),
        "exp_avg: expected a Tensor; got a list",
    ),
    "moment without data": (
        set_in(*MOMENTS, "exp_avg", to=lambda t: t.to("meta")),
        "exp_avg: expected .* without data",
    ),
    "sparse moment": (
        set_in(*MOMENTS, "exp_avg", to=lambda t: t.to_sparse()),
        "exp_avg: expected .*strided.* got .*sparse",
    ),
    "moment missing": (set_in(*MOMENTS, "exp_avg_sq", to=None), "state.0: expected a part exp_avg_sq"),
    "moment too many": (
        set_in(*MOMENTS, "max_exp_avg_sq", to=torch.zeros(())),
        "state.0: expected no part max_exp_avg_sq",
    ),
    "moments of nothing": (set_in("optimizer", "state", 1000, to={}), "optimizer.state: expected no part 1000"),
    "no moments": (set_in("optimizer", "state", to={}), "optimizer.state: expected a part 0"),
    "no optimizer": (set_in("optimizer", to=None), "state: expected a step, and an optimizer"),
    "no rate": (set_in("optimizer", "param_groups", to=[]), "state: expected a step, and an optimizer"),
    "infinite moment": (set_in(*MOMENTS, "exp_avg", to=lambda t: t + math.inf), "exp_avg: expected finite numbers"),
    "negative square": (
        set_in(*MOMENTS, "exp_avg_sq", to=lambda t: t - 1),
        "exp_avg_sq: expected no number below 0; got -1",
    ),
    "negative count": (set_in(*MOMENTS, "step", to=torch.tensor(-1.0)), "step: expected no number below 0; got -1"),
    "no average": (set_in("average", to=None), "state: expected a part average"),
    "average of another width": (
        set_in("average", "flow.blocks.0.transformer.proj_out.bias", to=torch.zeros(7)),
        r"bias: expected .* \[98\]; got .* \[7\]",
    ),
    "weights that are not finite": (
        set_in("model", "flow.blocks.0.transformer.proj_out.bias", to=lambda t: t * math.nan),
        "nan or inf",
    ),
    "step below 0": (set_in("step", to=-1), "state.step: expected a whole number >= 0; got -1"),
    "step that is true": (set_in("step", to=True), "state.step: expected a whole number >= 0; got True"),
    "counter of another shape": (set_in("bad_steps", to=torch.zeros(2)), "state.bad_steps: expected "),
    "counter missing": (set_in("bad_in_a_row", to=None), "state: expected a part bad_in_a_row"),
}

MOMENTUM = ("muon", 0, "momentum_buffer")
BAD_STATES_OF_MUON = {
    "no momenta": (set_in("muon", to=None), "state: expected a part muon"),
    "momentum missing": (set_in(*MOMENTUM, to=None), "state.muon.0: expected a part momentum_buffer"),
    "momentum of another shape": (set_in(*MOMENTUM, to=torch.zeros(3, 3)), r"momentum_buffer: .* got .* \[3, 3\]"),
    "infinite momentum": (set_in(*MOMENTUM, to=lambda t: t + math.inf), "momentum_buffer: expected finite numbers"),
}
EVERY_BAD_STATE = [
    pytest.param(optimizer, *case, id=f"{optimizer}: {name}")
    for optimizer, cases in (("adamw", BAD_STATES), ("muon", BAD_STATES | BAD_STATES_OF_MUON))
    for name, case in cases.items()
]


@pytest.mark.parametrize(("optimizer", "harm", "message"), EVERY_BAD_STATE)
def test_a_state_that_does_not_fit_is_refused_and_nothing_of_it_loaded(optimizer, harm, message):
    source, batches = build(optimizer=optimizer)
    source.train_step(*batches[0])
    state = copy.deepcopy(source.state_dict())
    harm(state)
    trainer, _ = build(optimizer=optimizer)
    trainer.train_step(*batches[1])
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(ValueError, match=message):
        trainer.load_state_dict(state)
    assert_close(trainer.state_dict(), before, **EXACTLY)


def test_the_settings_of_the_optimizer_are_those_of_the_run_and_not_of_a_state():
    source, batches = build(weight_decay=0.5, beta2=0.9)
    source.train_step(*batches[0])
    state = copy.deepcopy(source.state_dict())
    state["optimizer"]["param_groups"][0] |= {"amsgrad": True, "fused": False}
    trainer, _ = build(weight_decay=0.25, beta2=0.95)
    trainer.load_state_dict(state)
    group = trainer.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"][1], group["amsgrad"], group["fused"]) == (0.25, 0.95, False, True)
    trainer.train_step(*batches[1])


def test_a_step_returns_the_measures_that_it_says():
    trainer, batches = build()
    assert tuple(trainer.train_step(*batches[0])) == MEASURES


@pytest.mark.parametrize(
    ("seed", "step", "same"), [(3, 5, True), (3, 6, False), (4, 5, False)], ids=["same", "next step", "other seed"]
)
def test_what_a_step_draws_depends_on_seed_and_step_alone(seed, step, same):
    data, inputs = pictures(flip=True), []
    for trained, (seed_of_run, step_of_run) in enumerate([(3, 5), (seed, step)]):
        trainer, batches = build(data, seed=seed_of_run, label_drop=0.5)
        seen = watch(trainer)
        for _ in range(trained):
            torch.rand(7)
            trainer.train_step(*batches[1])
        trainer.step = step_of_run
        trainer.train_step(*batches[0])
        inputs.append(seen[-1][:2])
    assert [torch.equal(*pair) for pair in zip(*inputs, strict=True)] == [same, same]


def test_uniform_noise_fills_the_bin_of_its_pixel():
    data = pictures(500)
    u = (prepared(data, noise="uniform")[0] + 1) * 128 - data.images
    assert -1e-4 < u.min() < 1e-3
    assert 0.999 < u.max() < 1 + 1e-4
    assert u.mean() == pytest.approx(0.5, abs=0.005)
    assert u.var() == pytest.approx(1 / 12, abs=0.002)


@pytest.mark.parametrize("sigma", [0.05, 0.5])
def test_gaussian_noise_has_the_sigma_asked_for(sigma):
    data = pictures(500)
    eps = (prepared(data, sigma=sigma)[0] - (data.images / 127.5 - 1)) / sigma
    assert eps.mean() == pytest.approx(0, abs=0.01)
    assert eps.std() == pytest.approx(1, abs=0.01)
    assert eps.pow(4).mean() == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_the_share_of_labels_asked_for_is_dropped_and_the_others_stay(share):
    data = pictures(4000)
    labels = prepared(data, label_drop=share)[1]
    dropped = labels == -1
    assert dropped.float().mean() == pytest.approx(share, abs=0.02)
    assert torch.equal(labels[~dropped], data.labels[~dropped])


@pytest.mark.parametrize("noise", ["gaussian", "uniform", "variational"])
def test_a_share_of_a_batch_gets_the_random_numbers_that_it_would_get_in_the_batch(noise):
    data = pictures(flip=True)
    trainer, _ = build(data, noise=noise, label_drop=0.5)
    assert_shares_are_of_the_batch(trainer, data)


def test_without_classes_there_are_no_labels():
    assert prepared(pictures(), conditional=False)[1] is None


@pytest.mark.parametrize(
    ("allowed", "flip", "share"),
    [(True, None, 0.5), (False, None, 0), (True, False, 0), (False, True, 0.5)],
)
def test_half_of_the_images_are_mirrored_where_told_or_else_where_the_dataset_allows(allowed, flip, share):
    data = pictures(1000, flip=allowed)
    x = prepared(data, sigma=1e-6, flip=flip)[0]
    clean = data.images / 127.5 - 1
    as_is, mirrored = ((x - other).abs().amax((1, 2, 3)) < 1e-3 for other in (clean, clean.flip(-1)))
    assert (as_is ^ mirrored).all()
    assert mirrored.float().mean() == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_least(warmup):
    trainer, batches = build(learning_rate=0.01, min_learning_rate=0.002, warmup_steps=warmup, max_steps=10)
    rates = []
    for _ in range(12):
        trainer.train_step(*batches[0])
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[:warmup] == pytest.approx([0.002 + 0.008 * step / warmup for step in range(1, warmup + 1)])
    halfway = [0.5 * (1 + math.cos(math.pi * step / (10 - warmup))) for step in range(1, 11 - warmup)]
    assert rates[warmup:10] == pytest.approx([0.002 + 0.008 * share for share in halfway])
    assert rates[9:] == pytest.approx([0.002] * 3)


@pytest.mark.parametrize(
    ("preset", "rates"),
    [
        ("cifar10-flowpp", {1: 1.5e-7, 1000: 1.5e-4, 2000: 3e-4, 400_000: 3e-4}),
        (
            "imagenet32-flowpp",
            {
                1: 2e-7,
                2500: 5e-4,
                5000: 1e-3,
                50_000: 1e-3,
                50_001: 0.99995e-3,
                60_000: 6.0652e-4,
                74_078: 3.0000e-4,
                74_079: 3e-4,
                640_000: 3e-4,
            },
        ),
        (
            "imagenet64-flowpp",
            {
                1: 4e-8,
                10_000: 4e-4,
                50_000: 4e-4,
                52_000: 3.6193e-4,
                54_999: 3.1154e-4,
                55_000: 3e-4,
                229_999: 3e-4,
                230_000: 0,
                235_000: 5e-6,
                240_000: 1e-5,
                279_999: 1e-5,
                280_000: 0,
                285_000: 5e-7,
                290_000: 1e-6,
                300_000: 1e-6,
            },
        ),
    ],
)
def test_the_learning_rate_of_flowpp_is_the_published_one(preset, rates):
    dataset, model = pictures(), FLOWPP["model"]
    config = replace(PRESETS[preset], model=model, training=replace(PRESETS[preset].training, precision="float32"))
    trainer, batch = Trainer(config, dataset, torch.device("cpu")), dataset.get_batch(torch.arange(16))
    for step, rate in rates.items():
        trainer.step = step - 1
        trainer.train_step(*batch)
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-4), step


def flat(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def test_a_published_flowpp_step_is_that_of_adam_on_nats_per_image_clipped_at_norm_1():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (16, 3, 32, 32), generator=generator, dtype=torch.uint8)
    data = ImageDataset(images, torch.zeros(16, dtype=torch.int64), ("any",), True, "noise")
    noise = DequantizerConfig(filters=8, stack="stripe1", context_filters=8)
    model = FlowPPConfig(
        dequantizer=noise, **SMALL | {"image_size": 32, "in_channels": 3, "stack": "squeeze squeeze channel2"}
    )
    settings = replace(PRESETS["cifar10-flowpp"].training, warmup_steps=0, learning_rate=0.01)
    config = replace(PRESETS["cifar10-flowpp"], model=replace(model, dropout=0.2), training=settings)
    trainer = Trainer(config, data, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "proj_out" in name:
                parameter.mul_(10)  # so that there is something to clip
    plain, begun = copy.deepcopy(trainer.model), flat(trainer.model)
    adam = torch.optim.Adam(plain.parameters(), lr=0.01)
    for step in range(2):
        seed = derive_seed(settings.seed, step)
        eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        x, log_q = plain.dequantizer(images, eps)
        z, logdet = plain(x)
        nats = -(plain.log_prior(z) + logdet - log_q).mean()
        adam.zero_grad()
        nats.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        assert norm > 10
        adam.step()
        measures = trainer.train_step(images, data.labels)
        assert measures["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-3)
        assert (flat(trainer.model) - flat(plain)).norm() < 1e-3 * (flat(plain) - begun).norm()


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("capabilities", [{}, {"avx512_bf16": False}, {"avx512_bf16": True}, {"amx_bf16": True}])
def test_a_cpu_trains_in_bfloat16_as_told_or_where_it_multiplies_in_it(monkeypatch, precision, capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    expected = any(capabilities.values()) if precision == "auto" else precision == "bfloat16"
    assert uses_bfloat16(precision, torch.device("cpu")) is expected


def test_published_flowpp_trains_in_float32_on_images_as_they_are():
    presets = {name: config for name, config in PRESETS.items() if name.endswith("-flowpp") and "fashion" not in name}
    assert set(presets) == {"cifar10-flowpp", "imagenet32-flowpp", "imagenet64-flowpp"}
    for config in presets.values():
        assert not uses_bfloat16(config.training.precision, torch.device("cpu"))
        assert (config.training.precision, config.data.flip) == ("float32", False)


# The matrices in the layers of TARFLOW, and how many maps are stored in each.
LAYER_MATRICES = {"qkv": 3, "proj": 1, "mlp.0": 1, "mlp.2": 1}


def layer_matrix(name):
    return next((n for n in LAYER_MATRICES if name.endswith(f"layers.0.{n}.weight")), None)


@pytest.mark.parametrize("noise", ["gaussian", "variational"])
def test_muon_moves_the_matrices_of_the_layers_and_adamw_all_else(noise):
    trainer, _ = build(optimizer="muon", noise=noise)
    by_muon, by_adamw = (
        {id(parameter) for parameter in parameters}
        for parameters in (trainer.muon.weights, trainer.optimizer.param_groups[0]["params"])
    )
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    assert by_muon | by_adamw == names.keys()
    assert by_muon & by_adamw == set()
    assert {names[one] for one in by_muon} == {name for name in names.values() if layer_matrix(name)}


def test_muon_moves_each_map_by_an_orthogonal_matrix_of_the_size_of_a_step_of_adam():
    rate = 0.01
    constant = {"learning_rate": rate, "min_learning_rate": rate, "warmup_steps": 0, "weight_decay": 0}
    trainer, batches = build(optimizer="muon", **constant)
    trainer.train_step(*batches[0])  # before it the layers have no gradient, since they project to nothing
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train_step(*batches[1])
    checked = 0
    for name, weight in trainer.model.named_parameters():
        if matrix := layer_matrix(name):
            for change in (weight.detach() - before[name]).double().chunk(LAYER_MATRICES[matrix]):
                sizes = torch.linalg.svdvals(change / (0.2 * rate * max(change.shape) ** 0.5))
                assert sizes.max() == pytest.approx(1, abs=0.3), name
                # Of the gradient's own, 6 % at most are above half of the largest.
                assert (sizes > 0.5).double().mean() > 0.4, name
                checked += 1
    assert checked == 2 * sum(LAYER_MATRICES.values())


@torch.no_grad()
def test_matrices_that_muon_moves_together_move_as_one_by_one():
    ours, pytorchs = (LayerMuon(build()[0].model, weight_decay=0.1) for _ in range(2))
    start = [weight.clone() for weight in ours.weights]
    generator = torch.Generator().manual_seed(0)
    for muon in (ours, pytorchs):
        muon.param_groups[0]["lr"] = 0.01
    for _ in range(3):
        for weight, (_, parts) in zip(ours.weights, pytorchs.matrices, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator)
            for matrix, gradient in zip(parts, weight.grad.chunk(len(parts)), strict=True):
                matrix.grad = gradient
        ours.step_unless(torch.tensor(False))
        pytorchs.step()
    for weight, expected, before in zip(ours.weights, pytorchs.weights, start, strict=True):
        assert torch.linalg.norm(weight - expected) <= 0.02 * torch.linalg.norm(expected - before)


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.999])
def test_the_average_is_its_formula(decay):
    trainer, batches = build(ema_decay=decay, learning_rate=0.01, warmup_steps=0)
    expected = [parameter.double() for parameter in trainer.model.parameters()]
    for step in range(1, 6):
        trainer.train_step(*batches[step % 2])
        d = min(decay, (1 + step) / (10 + step))
        parameters = trainer.model.parameters()
        expected = [d * mean + (1 - d) * p.detach().double() for mean, p in zip(expected, parameters, strict=True)]
    assert_close([p.double() for p in trainer.average.parameters()], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_the_norm_of_the_gradient_is_clipped(clip):
    trainer, batches = build(gradient_clip=clip)
    applied = []

    def note(optimizer, args, kwargs):
        applied.append(torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()]).item())

    trainer.optimizer.register_step_pre_hook(note)
    norm = trainer.train_step(*batches[0])["grad_norm"].item()
    assert 1e-3 < norm < 1e3
    assert applied == [pytest.approx(min(clip, norm), rel=1e-4)]


def latents(model, pixels, labels, sigma, draws=8):
    """Those of images with the noise of training, over several draws of it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return torch.cat([model(add_gaussian_noise(pixels, sigma, generator), labels)[0] for _ in range(draws)])


@pytest.mark.parametrize("batch_size", [16, 300], ids=lambda size: f"batch {size}")
def test_the_prior_of_the_average_has_the_variance_of_its_own_latents(batch_size):
    data = pictures(1000)
    settings = {"learning_rate": 0.03, "warmup_steps": 0, "label_drop": 0.0}
    trainer, batches = build(data, VOLUME_PRESERVING, batch_size=batch_size, **settings)
    for step in range(12):
        trainer.train_step(*batches[step % 2])
    averaged, trained = (
        latents(model, data.images, data.labels, trainer.config.training.sigma).square().mean(0)
        for model in (trainer.average, trainer.model)
    )
    assert (trained / averaged - 1).abs().max() > 0.5, "there is something to be mistaken for"
    assert_close(trainer.average.flow.prior_variance, averaged, rtol=0.15, atol=0)


def test_the_prior_of_the_average_depends_on_weights_seed_and_step_alone():
    whole, batches = build(model=VOLUME_PRESERVING, learning_rate=0.01)
    looked, _ = build(model=VOLUME_PRESERVING, learning_rate=0.01)
    for step in range(4):
        whole.train_step(*batches[step % 2])
        looked.train_step(*batches[step % 2])
        assert looked.average is looked.average
        looked.state_dict()
    resumed, _ = build(model=VOLUME_PRESERVING, learning_rate=0.01)
    resumed.load_state_dict(copy.deepcopy(looked.state_dict()))
    for trainer in (looked, resumed):
        assert_close(trainer.average.state_dict(), whole.average.state_dict(), **EXACTLY)


def test_a_volume_preserving_model_in_training_averages_the_variance_of_its_latents():
    trainer, batches = build(model=VOLUME_PRESERVING, learning_rate=0.01)
    seen = watch(trainer)
    variance = torch.ones_like(trainer.model.flow.prior_variance)
    for step in range(4):
        trainer.train_step(*batches[step % 2])
        variance = 0.9 * variance + 0.1 * seen[-1][2].detach().square().mean(0)
    assert_close(trainer.model.flow.prior_variance, variance)
    assert variance.std() > 0.01


@pytest.mark.parametrize("settings", [{"noise": "variational"}, FLOWPP], ids=["TarFlow", "Flow++"])
def test_learned_noise_is_paid_for_and_learns(settings):
    """The loss is the bound of the noise that was drawn, and its gradient reaches the dequantizer."""
    trainer, batches = build(**settings)
    before = copy.deepcopy(trainer.model)
    generator = torch.Generator().manual_seed(derive_seed(trainer.config.training.seed, 0))
    pixels, labels = batches[0]
    eps = torch.randn(pixels.shape, generator=generator)
    if trainer.config.data.conditional:
        dropped = torch.rand(len(labels), generator=generator) < trainer.config.training.label_drop
        labels = labels.masked_fill(dropped, -1)
    else:
        labels = None
    measures = trainer.train_step(*batches[0])
    with torch.no_grad():
        x, log_q = before.dequantizer(pixels, eps)
        bound = before.log_prob(x, labels) - log_q
    dims = before.config.num_dims
    assert_close(measures["bits_per_dim"], bits_per_dim(bound, dims).mean())
    assert_close(measures["loss"], -bound.mean() / dims - 0.5 * math.log(2 * math.pi))
    moved = [not torch.equal(*pair) for pair in zip(before.parameters(), trainer.model.parameters(), strict=True)]
    names = [name for name, _ in before.named_parameters()]
    assert all(m for m, name in zip(moved, names, strict=True) if "dequantizer" in name and "pos_embed" not in name)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_precision_is_that_of_the_transformers_and_not_of_latents(precision):
    trainer, batches = build(precision=precision)
    layers, seen = [], watch(trainer)
    layer = trainer.model.flow.blocks[0].transformer.layers[0]
    layer.mlp.register_forward_hook(lambda module, inputs, output: layers.append(output.dtype))
    trainer.train_step(*batches[0])
    assert layers == [getattr(torch, precision)]
    assert [tensor.dtype for tensor in seen[0][2:]] == [torch.float32] * 2
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


# Each spoils the steps until its handle is removed.
SPOILED = {
    "gradient": lambda model: model.flow.blocks[1].transformer.pos_embed.register_hook(lambda grad: grad * math.nan),
    "infinite gradient": lambda model: next(model.parameters()).register_hook(lambda grad: grad + math.inf),
    "input": lambda model: model.register_forward_pre_hook(lambda _, args: (args[0] * math.nan, *args[1:])),
    "huge input": lambda model: model.register_forward_pre_hook(lambda _, args: (args[0] * 1e38, *args[1:])),
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("model", [TARFLOW, VOLUME_PRESERVING], ids=["affine", "volume-preserving"])
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(spoil, model, optimizer):
    trainer, batches = build(model=model, warmup_steps=0, optimizer=optimizer, weight_decay=0.1)
    for batch in batches:
        trainer.train_step(*batch)
    before = copy.deepcopy(trainer.state_dict())
    handle = spoil(trainer.model)
    counts = [trainer.train_step(*batch) for batch in batches]
    handle.remove()
    after = trainer.state_dict()
    assert [(row["bad_steps"].item(), row["bad_in_a_row"].item()) for row in counts] == [(1, 1), (2, 2)]
    assert_close(after["model"], before["model"], **EXACTLY)
    assert_close(after["optimizer"]["state"], before["optimizer"]["state"], **EXACTLY)
    assert_close(after.get("muon", {}), before.get("muon", {}), **EXACTLY)
    for decay in (4 / 13, 5 / 14):  # the average goes on towards weights that stay
        for name, mean in before["average"].items():
            before["average"][name] = decay * mean + (1 - decay) * before["model"][name]
    for name, mean in trainer.average.named_parameters():
        assert_close(mean, before["average"][name])
    good = trainer.train_step(*batches[0])
    assert (good["bad_steps"], good["bad_in_a_row"]) == (2, 0)
    for name, weight in trainer.model.named_parameters():
        assert weight.isfinite().all(), name
        assert not torch.equal(weight, before["model"][name]), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_first_step_that_is_not_finite_is_as_if_it_had_not_been(optimizer):
    trainer, batches = build(optimizer=optimizer)
    before = copy.deepcopy(trainer.model.state_dict())
    handle = SPOILED["input"](trainer.model)
    trainer.train_step(*batches[0])
    handle.remove()
    assert_close(trainer.model.state_dict(), before, **EXACTLY)
    undisturbed, _ = build(optimizer=optimizer)
    undisturbed.step = 1
    for one in (trainer, undisturbed):
        one.train_step(*batches[1])
    assert_close(trainer.model.state_dict(), undisturbed.model.state_dict(), **EXACTLY)


def test_a_step_of_muon_never_waits_for_the_device():
    """Tensors without values have nothing to read; what decides about a step is on the device."""
    with torch.device("meta"):
        model = TarFlow(TARFLOW)
        muon, bad = LayerMuon(model, 0.1), torch.zeros((), dtype=torch.bool)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    muon.step_unless(bad)


SHAPES = {
    "gray, classes": TarFlowConfig(channels=64, num_blocks=2, layers_per_block=2, num_classes=10),
    "colour, narrow MLP": TarFlowConfig(image_size=32, in_channels=3, channels=256, expansion=2, num_blocks=2),
    "Flow++": FlowPPConfig(),
    "Flow++, colour": FlowPPConfig(
        image_size=32, in_channels=3, stack="stripe1 squeeze channel1", dequantizer=None, blocks_per_coupling=4
    ),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_the_estimate_of_activations_is_near_what_autograd_saves(config):
    model = TarFlow(config) if isinstance(config, TarFlowConfig) else FlowPP(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    pixels = torch.randint(256, (4, *config.image_shape), dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.importance_log_weights(pixels, torch.zeros(4, dtype=torch.int64) if config.num_classes else None)
    measured = sum(storage.nbytes() for storage in saved.values()) / len(pixels)
    assert config.activation_bytes() == pytest.approx(measured, rel=0.35)
