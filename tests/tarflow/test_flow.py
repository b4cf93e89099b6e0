"""The flow is a flow: invertible, causal, with the log-det of its Jacobian and a density that integrates to one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal
from torch.testing import assert_close

from helpers import PREFIX, draw, randomize, tarflow
from tarflow import Guidance, TarFlow, TarFlowConfig, TokenFlow
from tarflow.model import STARFLOW
from tarflow.transformer import Condition

MODELS = {
    "one block": {"num_blocks": 1},
    "two blocks": {"num_blocks": 2, "in_channels": 3},
    "three blocks, classes": {"num_blocks": 3, "num_classes": 3},
    "volume preserving": {"num_blocks": 2, "volume_preserving": True},
    "volume preserving, classes": {"num_blocks": 3, "volume_preserving": True, "num_classes": 3},
    "mixture": {"num_blocks": 2, "coupling": "mixture", "num_mixtures": 3},
    "mixture, classes": {"num_blocks": 3, "coupling": "mixture", "num_classes": 3},
    "one token": {"image_size": 2},
    "one token, mixture": {"image_size": 2, "coupling": "mixture"},
    "one head": {"head_dim": 32, "layers_per_block": 1},
    "starflow": STARFLOW | {"num_blocks": 2},
    "starflow, classes": STARFLOW | {"num_blocks": 3, "num_classes": 3},
    "starflow, prefix": PREFIX | {"num_blocks": 2, "num_classes": 3},
    "start token": {"start_token": True},
    "start token, mixture": {"start_token": True, "coupling": "mixture", "num_mixtures": 3},
    "start token, volume preserving": {"start_token": True, "volume_preserving": True},
    "sizes of their own": {"channels": (16, 32, 48), "layers_per_block": (1, 1, 3), "num_classes": 3},
}
every_coupling = pytest.mark.parametrize("coupling", ["affine", "mixture"])
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
one_of_each_kind = pytest.mark.parametrize(
    "config", [{}, {"num_classes": 3}, {"volume_preserving": True}, {"coupling": "mixture", "num_mixtures": 3}], ids=str
)
in_both_precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["float64", "float32"]
)


def images_and_labels(model, dtype=torch.float64):
    """Three images, and labels of which one is dropped."""
    config = model.config
    x = draw(1, 3, config.in_channels, config.image_size, config.image_size, dtype=dtype)
    return x, torch.tensor([0, -1, config.num_classes - 1]) if config.num_classes else None


def token_flow(num_tokens, token_dim, **options):
    return randomize(TokenFlow(num_tokens, token_dim, 16, 3, 1, head_dim=8, **options)).double()


@in_both_precisions
@every_model
def test_inverse_and_forward_undo_each_other(config, dtype, tolerance):
    model = tarflow(dtype=dtype, **config)
    x, labels = images_and_labels(model, dtype)
    z, _ = model(x, labels)
    assert_close(model.inverse(z.detach(), labels), x, atol=tolerance, rtol=0)
    latents = draw(2, *z.shape, dtype=dtype)
    assert_close(model(model.inverse(latents, labels), labels)[0].detach(), latents, atol=tolerance, rtol=0)


@every_model
def test_logdet_is_that_of_the_jacobian(config):
    model = tarflow(**config)
    x, labels = images_and_labels(model)
    _, logdet = model(x, labels)
    for i in range(len(x)):
        label = None if labels is None else labels[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda x, label=label: model(x, label)[0], x[i : i + 1])
        assert_close(logdet[i], torch.linalg.slogdet(jacobian.view(x[i].numel(), -1)).logabsdet)
    assert bool((logdet == 0).all()) == model.config.volume_preserving or (
        model.config.num_tokens == 1 and not model.config.start_token
    )


@every_model
def test_a_block_is_causal_in_its_own_order(config):
    """Tokens depend on all earlier ones, on themselves value by value, and on no later one."""
    flow = tarflow(**config).flow
    tokens = draw(1, 1, *flow.prior_variance.shape)
    condition = flow.condition(torch.tensor([1]) if flow.num_classes else None, None, tokens)
    for block in flow.blocks:
        jacobian = torch.autograd.functional.jacobian(lambda x, block=block: block(x, condition)[0], tokens)[0, :, :, 0]
        jacobian = jacobian.transpose(1, 2)  # token and token, value and value
        if block.reverse:
            jacobian = jacobian.flip(0, 1)
        for i, row in enumerate(jacobian):
            assert all(bool(row[j].any()) for j in range(i))
            assert torch.equal(row[i], row[i].diag().diag())
            assert (row[i].diag() > 0).all()
            assert not row[i + 1 :].any()
        stays = torch.equal(jacobian[0, 0], torch.eye(tokens.shape[2], dtype=torch.float64))
        started = config.get("start_token", False) and not config.get("volume_preserving", False)
        assert stays != started, "the first token stays, unless a start token comes before it"


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_untrained_it_is_the_identity_on_the_patches_of_unfold(patch_size):
    model = TarFlow(TarFlowConfig(image_size=8, in_channels=3, patch_size=patch_size, channels=64))
    x = draw(0, 2, 3, 8, 8, dtype=torch.float32)
    z, logdet = model(x)
    assert torch.equal(z, F.unfold(x, patch_size, stride=patch_size).transpose(1, 2))
    assert torch.equal(logdet, torch.zeros(2))
    assert torch.equal(model.inverse(z.detach()), x)


@pytest.mark.parametrize("num_mixtures", [1, 2, 8, 30])
def test_untrained_a_mixture_is_nearly_the_identity(num_mixtures):
    flow = TokenFlow(9, 101, 64, 1, 1, coupling="mixture", num_mixtures=num_mixtures)
    x = torch.linspace(-4, 4, 101).expand(2, 9, 101)
    z, logdet = flow(x)
    assert (z - x).abs().max() < (0.05 if num_mixtures > 1 else 1e-5)
    assert (logdet / x[0].numel()).abs().max() < 0.05
    assert_close(flow.inverse(z.detach()), x, atol=1e-5, rtol=1e-5)
    assert ((flow(10 * x)[0] / (10 * x))[x.abs() > 0.4] - 1).abs().max() < 0.06, "beyond it bends no further"


def test_the_components_of_an_untrained_mixture_learn_different_things():
    flow = TokenFlow(4, 3, 64, 1, 1, coupling="mixture", num_mixtures=5)
    flow.log_prob(draw(0, 8, 4, 3, dtype=torch.float32)).mean().backward()
    _, _, gradients = flow.transform.split(flow.blocks[0].transformer.proj_out.weight.grad.t())
    for gradient in gradients.unbind(1):  # (C, D, K)
        distances = torch.cdist(gradient.flatten(0, 1).t(), gradient.flatten(0, 1).t())
        assert (distances / gradient.abs().max() + torch.eye(5) > 0.01).all()


@pytest.mark.parametrize(
    "options", [{}, {"num_classes": 2}, {"volume_preserving": True}, {"coupling": "mixture"}], ids=str
)
def test_density_integrates_to_one(options):
    flow = token_flow(2, 1, **options)
    if flow.volume_preserving:
        flow.prior_variance.copy_(torch.tensor([[0.5], [2.0]]))
    axis = torch.linspace(-12, 12, 161, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).unsqueeze(-1)
    for label in (-1, 0, 1) if flow.num_classes else (None,):
        labels = None if label is None else torch.full((len(grid),), label)
        with torch.no_grad():
            total = flow.log_prob(grid, labels).exp().sum() * (axis[1] - axis[0]) ** 2
        assert abs(total - 1) < 1e-4


def test_log_prob_is_the_prior_at_the_latent_and_the_logdet():
    flow = token_flow(3, 2, num_classes=2)
    flow.prior_variance.copy_(draw(3, 3, 2).exp())
    tokens, labels = draw(0, 4, 3, 2), torch.tensor([0, 1, -1, 1])
    z, logdet = flow(tokens, labels)
    expected = Normal(0, flow.prior_variance.sqrt()).log_prob(z).sum((1, 2)) + logdet
    assert_close(flow.log_prob(tokens, labels), expected)


def test_prior_draws_have_its_variance():
    flow = token_flow(2, 1)
    flow.prior_variance.copy_(torch.tensor([[0.25], [4.0]]))
    z = flow.sample_prior(20000, torch.Generator().manual_seed(0))
    assert_close(z.mean(0), torch.zeros(2, 1).double(), atol=0.05, rtol=0)
    assert_close(z.var(0), flow.prior_variance, atol=0, rtol=0.05)


@pytest.mark.parametrize("spoilt", [None, float("nan"), float("inf")])
def test_prior_follows_finite_batches_alone(spoilt):
    flow = token_flow(2, 1)
    z = torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]], dtype=torch.float64)
    if spoilt is not None:
        z[0, 0] = spoilt
    flow.update_prior(z, rate=0.25)
    expected = [[0.75 + 0.25 * 5.0], [0.75 + 0.25 * 2.0]] if spoilt is None else [[1.0], [1.0]]
    assert flow.prior_variance.tolist() == expected


def test_trajectory_passes_through_every_block():
    flow = token_flow(4, 2, num_classes=3)
    x, labels = draw(0, 2, 4, 2), torch.tensor([2, -1])
    states = [x]
    for block in flow.blocks:
        states.append(block(states[-1], Condition(labels))[0].detach())
    for state, expected in zip(flow.trajectory(states.pop(), labels), reversed(states), strict=True):
        assert_close(state, expected)


def test_what_the_inverse_returns_can_be_trained_on():
    flow = token_flow(4, 2)
    flow.log_prob(flow.inverse(draw(0, 2, 4, 2))).sum().backward()


@every_coupling
@pytest.mark.parametrize("guidance", [None, Guidance(1.0)], ids=["plain", "guided"])
def test_autocast_keeps_latents_and_logdets_in_float32(guidance, coupling):
    model = tarflow(dtype=torch.float32, num_classes=3, coupling=coupling)
    x, labels = images_and_labels(model, torch.float32)
    z, logdet = (t.detach() for t in model(x, labels))
    images = model.inverse(z, labels, guidance)
    with torch.autocast("cpu", torch.bfloat16):
        assert {t.dtype for t in model.flow.blocks[0].transformer(z, Condition(labels))} == {torch.float32}
        low = *(t.detach() for t in model(x, labels)), model.inverse(z, labels, guidance)
    for result, expected in zip(low, (z, logdet, images), strict=True):
        assert result.dtype == torch.float32
        assert not torch.equal(result, expected), "the transformer did not run in bfloat16"
        assert_close(result, expected, atol=0.2, rtol=0.05)


@every_coupling
def test_autocast_rounds_the_layers_of_the_inverse_alone(coupling):
    model = tarflow(dtype=torch.float32, coupling=coupling)
    for block in model.flow.blocks:
        for layer in block.transformer.layers:
            for linear in (layer.proj, layer.mlp[2]):  # what a layer adds comes out of these
                torch.nn.init.zeros_(linear.weight)
                torch.nn.init.zeros_(linear.bias)
    z = draw(0, 2, 4, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        images = model.inverse(z)
    assert_close(images, model.inverse(z))


@one_of_each_kind
def test_compiled_whole_it_is_the_same(config):
    model = tarflow(num_blocks=2, layers_per_block=1, **config)
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, backend="aot_eager")
    x, labels = images_and_labels(model)
    results = []
    for run in (model, compiled):
        z, logdet = run(x, labels)
        (z.square().sum() - logdet.sum()).backward()
        results.append([z, logdet, *(parameter.grad for parameter in run.parameters())])
    assert_close(*results)


@one_of_each_kind
def test_exported_it_takes_batches_of_any_size(config):
    model = tarflow(num_blocks=2, layers_per_block=1, **config).requires_grad_(False)
    x, labels = images_and_labels(model)
    inputs = (x,) if labels is None else (x, labels)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, inputs, dynamic_shapes=({0: batch},) * len(inputs)).module()
    for size in (1, 2, 5):
        more = [tensor.repeat(2, *[1] * (tensor.dim() - 1))[:size] for tensor in inputs]
        assert_close(exported(*more), model(*more))


@pytest.mark.parametrize("parameters", ["alpha", "mu"])
def test_a_mixture_is_guided_as_a_whole(parameters):
    flow = token_flow(4, 3, num_classes=2, coupling="mixture")
    with pytest.raises(ValueError, match=rf"^parameters: expected both with a mixture coupling; got '{parameters}'"):
        flow.inverse(TOKENS, LABELS, Guidance(1.0, parameters=parameters))


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("coupling", {"coupling": "spline"}),
        ("num_mixtures", {"coupling": "mixture", "num_mixtures": 0}),
        ("num_mixtures", {"coupling": "mixture", "num_mixtures": 65}),
        ("volume_preserving", {"coupling": "mixture", "volume_preserving": True}),
    ],
)
def test_couplings_that_do_not_exist(argument, options):
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*; got "):
        token_flow(4, 3, **options)


@pytest.mark.parametrize("name", ["channels", "layers_per_block"])
def test_sizes_that_are_not_one_for_each_block(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected one number, or 3, one for each block; got \(64, 64\)"):
        TokenFlow(4, 3, **{"channels": 64, "num_blocks": 3, "layers_per_block": 1} | {name: (64, 64)})


TOKENS, LABELS = torch.zeros(2, 4, 3, dtype=torch.float64), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "argument"), [(TokenFlow.__call__, "tokens"), (TokenFlow.log_prob, "tokens"), (TokenFlow.inverse, "z")]
)
@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        (TOKENS[0], ValueError),
        (TOKENS[:, :3], ValueError),
        (TOKENS[..., :2], ValueError),
        (TOKENS.int(), TypeError),
    ],
)
def test_tokens_that_do_not_fit(call, argument, tokens, error):
    with pytest.raises(error, match=rf"^{argument}: expected .*; got "):
        call(token_flow(4, 3), tokens)


@pytest.mark.parametrize("call", [TokenFlow.inverse, TokenFlow.trajectory])
@pytest.mark.parametrize(("name", "value"), [("decoder", "fast"), ("guidance", Guidance(1.0))])
def test_errors_come_before_the_first_block(call, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: .*expected .*; got "):
        call(token_flow(4, 3), TOKENS, **{name: value})


@pytest.mark.parametrize("call", [TokenFlow.__call__, TokenFlow.log_prob, TokenFlow.inverse, TokenFlow.trajectory])
@pytest.mark.parametrize(
    ("num_classes", "labels", "error"),
    [
        (0, LABELS, ValueError),
        (2, None, ValueError),
        (2, [0, 1], TypeError),
        (2, LABELS.int(), TypeError),
        (2, LABELS.double(), TypeError),
        (2, LABELS[:1], ValueError),
        (2, LABELS[:, None], ValueError),
        (2, LABELS + 1, ValueError),
        (2, LABELS - 2, ValueError),
    ],
)
def test_labels_that_do_not_fit(call, num_classes, labels, error):
    with pytest.raises(error, match=r"^labels: expected .*; got "):
        call(token_flow(4, 3, num_classes=num_classes), TOKENS, labels)
