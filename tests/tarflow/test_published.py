"""A checkpoint of the paper's code becomes the same map, and a file that is something else becomes an error."""

import functools
import itertools
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import published_cases as cases
from helpers import draw
from tarflow import Decoder, TarFlow, TarFlowConfig, load_published
from tarflow.denoising import denoise_by_levels
from tarflow.model import patchify, unpatchify
from tarflow.published import PUBLISHED_LEVELS, infer_config, to_published

HEAD = 64  # always

# [patch-channels-blocks-layers] on images of side by side patches, as the published code names its models.
SMALL = {"side": 3, "patch": 2, "channels": 128, "blocks": 3, "layers": 2}
VARIANTS = {
    "unconditional": {},
    "classes": {"classes": 5},
    "volume preserving": {"nvp": False},
    "volume preserving, classes": {"nvp": False, "classes": 5, "blocks": 2},
    "gray": {"in_channels": 1},
    "one head": {"channels": 64, "blocks": 1},
    "noise levels": {"classes": 5, "levels": True},
    "sizes of their own": {"channels": (128, 64, 128), "layers": (1, 1, 3), "classes": 5},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def published_shapes(side, patch, channels, blocks, layers, classes=0, in_channels=3, nvp=True, levels=False):
    """Name and shape of every tensor in a state dict of the published code of TarFlow or, with levels, of iTarFlow.

    Channels and layers are one for all blocks or one for each.
    """
    tokens, values = side**2, in_channels * patch**2
    yield "var", (tokens, values)
    for t, width, depth in zip(range(blocks), each(channels, blocks), each(layers, blocks), strict=True):
        yield f"blocks.{t}.attn_mask", (tokens, tokens)
        yield f"blocks.{t}.pos_embed", (tokens, width)
        if classes:
            yield f"blocks.{t}.class_embed", (classes, 1, width)
        linear = {"proj_in": (width, values), "proj_out": ((1 + nvp) * values, width)}
        if levels:
            linear |= {"time_embed.mlp.0": (4 * width, width), "time_embed.mlp.2": (width, 4 * width)}
        names = [f"{'head' if levels else 'attn'}_blocks.{number}" for number in range(depth)]
        yield from layer_shapes(t, linear, names, width)


def layer_shapes(t, linear, layers, width):
    """Name and shape of the tensors in the layers of a block, and in other linear layers."""
    for layer in layers:
        for norm in ("attention", "mlp"):
            yield f"blocks.{t}.{layer}.{norm}.norm.weight", (width,)
            yield f"blocks.{t}.{layer}.{norm}.norm.bias", (width,)
        linear[f"{layer}.attention.qkv"] = (3 * width, width)
        linear[f"{layer}.attention.proj"] = (width, width)
        linear[f"{layer}.mlp.main.0"] = (4 * width, width)
        linear[f"{layer}.mlp.main.2"] = (width, 4 * width)
    for name, shape in linear.items():
        yield f"blocks.{t}.{name}.weight", shape
        yield f"blocks.{t}.{name}.bias", shape[:1]


def each(size, blocks):
    return size if isinstance(size, tuple) else (size,) * blocks


def published_state(**variant):
    """Random weights under the published names, so small that the latents stay near the images."""
    state = {}
    for seed, (name, shape) in enumerate(published_shapes(**SMALL | variant)):
        scale = 0.2 if "proj_out" in name else 1.0
        state[name] = draw(seed, *shape, dtype=torch.float32) * scale / shape[-1] ** 0.5
        if name.endswith("attn_mask"):
            state[name] = torch.ones(shape).tril()
    return state | {"var": state["var"].exp()}


def published_forward(state, x, y=None, level=None, patch=2):
    """What the published code computes from such a state: the latents, and minus the sum of the log-scales."""
    state = {name.replace("head_blocks", "attn_blocks"): tensor for name, tensor in state.items()}
    z = F.unfold(x, patch, stride=patch).transpose(1, 2)
    logdet = torch.zeros(len(x), dtype=x.dtype)
    for t in range(count(state, "blocks.{}.proj_in.weight")):
        p, flipped = below(state, f"blocks.{t}."), [1] if t % 2 else []
        x = z.flip(flipped)
        h = linear(p, "proj_in", x) + p["pos_embed"][None].flip(flipped)
        if level is not None:
            half = h.shape[2] // 2
            angles = level.log()[:, None] * 10_000 ** (-torch.arange(half) / half)
            hidden = F.gelu(linear(p, "time_embed.mlp.0", torch.cat((angles.sin(), angles.cos()), dim=1)))
            h = h + linear(p, "time_embed.mlp.2", hidden)[:, None]
        if y is not None:
            dropped = (y < 0).view(-1, 1, 1)
            h = h + torch.where(dropped, p["class_embed"].mean(0), p["class_embed"][y.clamp(min=0)])
        for number in range(count(p, "attn_blocks.{}.attention.qkv.weight")):
            h = published_layer(below(p, f"attn_blocks.{number}."), h, p["attn_mask"])
        out = F.pad(linear(p, "proj_out", h)[:, :-1], (0, 0, 1, 0))
        alpha, mu = out.chunk(2, 2) if out.shape[2] > x.shape[2] else (torch.zeros_like(out), out)
        z = ((x - mu) * torch.exp(-alpha)).flip(flipped)
        logdet = logdet - alpha.sum((1, 2))
    return z, logdet


def published_layer(p, h, mask):
    batch, length, channels = h.shape
    qkv = linear(p, "attention.qkv", norm(p, "attention.norm", h))
    q, k, v = qkv.view(batch, length, 3 * channels // HEAD, HEAD).chunk(3, 2)
    logits = torch.einsum("bmhd,bnhd->bhmn", q, k) / HEAD**0.5
    weights = logits.masked_fill(mask == 0, -torch.inf).softmax(-1)
    h = h + linear(p, "attention.proj", torch.einsum("bhmn,bnhd->bmhd", weights, v).flatten(2))
    return h + linear(p, "mlp.main.2", F.gelu(linear(p, "mlp.main.0", norm(p, "mlp.norm", h))))


def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def norm(p, name, x):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])


def below(state, prefix):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def count(state, name):
    return next(number for number in itertools.count() if name.format(number) not in state)


@every_variant
def test_it_is_the_same_map(variant):
    state = published_state(**variant)
    in_channels = variant.get("in_channels", 3)
    levels = (0.01, 0.3) if "levels" in variant else None
    model = load_published(state, in_channels, noise_levels=levels).double()
    x = draw(1, 3, in_channels, 6, 6)
    y = torch.tensor([4, -1, 0]) if "classes" in variant else None
    t = torch.tensor([0.01, 0.2, 0.3]).double() if levels else None
    state = {name: value.double() for name, value in state.items()}
    z, logdet = model(x, y, noise_level=t)
    assert_close((z, logdet), published_forward(state, x, y, t))
    assert bool(logdet.any()) == variant.get("nvp", True)
    assert_close(model.inverse(z.detach(), y, noise_level=t), x)
    assert torch.equal(model.flow.prior_variance, state["var"])


@every_variant
def test_back_under_the_published_names_it_is_the_same_state_but_for_the_masks(variant):
    state = published_state(**variant)
    levels = (0.01, 0.3) if "levels" in variant else None
    back = to_published(load_published(state, variant.get("in_channels", 3), noise_levels=levels).state_dict())
    named = {name.replace("head_blocks", "attn_blocks"): value for name, value in state.items()}
    assert_close(back, {name: value for name, value in named.items() if "attn_mask" not in name}, atol=0, rtol=0)


@functools.cache
def record(path=cases.RECORD):
    return {name: torch.from_numpy(array) for name, array in np.load(path).items()}


def build(arguments, noise_levels=None):
    """A model of such arguments of the published code, read as its checkpoint."""
    patch = arguments["patch_sizes"][0] if noise_levels else arguments["patch_size"]
    shapes = published_shapes(
        side=arguments["img_size"] // patch,
        patch=patch,
        channels=one_or_more(arguments["channels"]),
        blocks=arguments["num_blocks"],
        layers=one_or_more(arguments["layers_per_block"]),
        classes=arguments.get("num_classes", 0),
        nvp=arguments.get("nvp", True),
        levels=noise_levels is not None,
    )
    state = cases.weights(shapes) if noise_levels is None else cases.itarflow_weights(shapes)
    return load_published(state, noise_levels=noise_levels).requires_grad_(False)


def one_or_more(size):
    """A number, or a list of one or of one for each block, as the published codes take them."""
    return size if isinstance(size, int) else size[0] if len(size) == 1 else tuple(size)


@functools.cache
def recorded(name):
    """The TarFlow of that name, in double precision."""
    return build(cases.MODELS[name]).double()


@functools.cache
def recorded_itarflow(name):
    """The iTarFlow of that name, in the precision of the published code."""
    return build(cases.ITARFLOWS[name], cases.LEVELS)


@pytest.mark.parametrize("name", cases.MODELS)
def test_latents_and_log_dets_are_those_that_the_published_code_computed(name):
    model, known = recorded(name), record()
    z, logdet = model(known["x"].double(), known["scored"] if model.config.num_classes else None)
    assert_close(z.float(), known[f"{name}: z"], atol=1e-5, rtol=1e-5)
    assert_close((logdet / model.config.num_dims).float(), known[f"{name}: logdet"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("decoder", [Decoder("sequential"), Decoder("jacobi", 4, 0.0)], ids=str)
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in cases.MODELS for kind in cases.GUIDANCE[name]])
def test_images_are_those_that_the_published_code_drew_under_guidance(name, kind, decoder):
    model, known = recorded(name), record()
    z = known["latents"].double() * model.flow.prior_variance.sqrt()
    labels = known["drawn"] if model.config.num_classes else None
    images = model.inverse(z, labels, cases.GUIDANCE[name][kind], decoder)
    assert_close(images.float(), known[f"{name}: {kind}"], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("path", "models"), [(cases.RECORD, cases.GUIDANCE), (cases.ITARFLOW_RECORD, cases.ITARFLOW_GUIDANCE)]
)
def test_no_two_recorded_kinds_of_guidance_draw_the_same_images(path, models):
    for name, kinds in models.items():
        for one, other in itertools.combinations(kinds, 2):
            assert (record(path)[f"{name}: {one}"] - record(path)[f"{name}: {other}"]).abs().max() > 0.05


@pytest.mark.parametrize("name", cases.ITARFLOWS)
def test_an_itarflow_has_the_latents_and_log_dets_that_the_published_code_computed(name):
    model, known = recorded_itarflow(name), record(cases.ITARFLOW_RECORD)
    labels = known["scored"] if model.config.num_classes else None
    z, logdet = model(known["x"], labels, noise_level=torch.from_numpy(cases.noise_levels()))
    assert_close(z, known[f"{name}: z"], atol=1e-5, rtol=1e-5)
    assert_close(logdet / model.config.num_dims, known[f"{name}: logdet"], atol=1e-6, rtol=1e-5)
    other, _ = model(known["x"], labels, noise_level=0.2)
    assert (other - z).abs().amax((1, 2)).min() > 1e-2, "or the level would not matter"


@pytest.mark.parametrize("decoder", [Decoder("sequential"), Decoder("jacobi", 4, 0.0)], ids=str)
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in cases.ITARFLOWS for kind in cases.ITARFLOW_GUIDANCE[name]]
)
def test_an_itarflow_draws_what_the_published_code_drew_under_guidance(name, kind, decoder):
    model, known = recorded_itarflow(name), record(cases.ITARFLOW_RECORD)
    z = known["latents"] * model.flow.prior_variance.sqrt()
    labels = known["drawn"] if model.config.num_classes else None
    levels = torch.from_numpy(cases.noise_levels())
    images = model.inverse(z, labels, cases.ITARFLOW_GUIDANCE[name][kind], decoder, noise_level=levels)
    assert_close(images, known[f"{name}: {kind}"], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("kind", cases.DENOISING)
@pytest.mark.parametrize("name", cases.ITARFLOWS)
def test_an_itarflow_denoises_as_the_published_code_did(name, kind):
    model, known, denoising = recorded_itarflow(name), record(cases.ITARFLOW_RECORD), cases.DENOISING[kind]
    labels = known["drawn"] if model.config.num_classes else None
    levels = model.denoising_levels(cases.LEVELS[1], denoising)
    noisy = cases.NOISY * known["x"]
    *_, images = denoise_by_levels(lambda x, t: model.denoise(x, t, labels), noisy, levels, denoising)
    assert_close(images, known[f"{name}: {kind}"], atol=1e-3, rtol=1e-5)
    assert (images - noisy).abs().max() > 0.1


@functools.cache
def recorded_starflow(name):
    """The STARFlow of that name, in the precision of the published code, with its embeddings of no text."""
    arguments, known = cases.STARFLOWS[name], record(cases.STARFLOW_RECORD)
    model = load_published(cases.weights(starflow_shapes(**arguments)), arguments["in_channels"])
    if model.flow.class_prefixes is not None:
        model.flow.class_prefixes.copy_(known["empty text"])
    return model.requires_grad_(False)


def starflow_shapes(
    in_channels, img_size, patch_size, channels, num_blocks, layers_per_block, txt_size=0, txt_dim=0, **options
):
    """Name and shape of every tensor in a state dict of the published code of STARFlow."""
    tokens, values = (img_size // patch_size) ** 2, in_channels * patch_size**2
    yield "var", (tokens, values)
    for buffer in ("freqs_cos", "freqs_sin"):
        yield f"feat_rope.{buffer}", (tokens + txt_size, HEAD)
    for t, depth in enumerate(layers_per_block):
        yield f"blocks.{t}.attn_mask", (tokens + txt_size, tokens + txt_size)
        yield f"blocks.{t}.sos_embed", (1, 1, values)
        yield f"blocks.{t}.final_norm.weight", (channels,)
        linear = {"proj_in": (channels, values), "proj_out": (2 * values, channels)}
        if txt_dim and t == num_blocks - 1:
            linear["proj_txt"] = (channels, txt_dim)
        yield from layer_shapes(t, linear, [f"attn_blocks.{number}" for number in range(depth)], channels)


@pytest.mark.parametrize("name", cases.STARFLOWS)
def test_a_starflow_has_the_latents_and_log_dets_that_the_published_code_computed(name):
    model, known = recorded_starflow(name), record(cases.STARFLOW_RECORD)
    z, logdet = model(known[f"{name}: x"], known["text"] if model.config.prefix_dim else None)
    assert_close(in_published_layout(model, z), known[f"{name}: z"], atol=1e-5, rtol=1e-5)
    assert_close(logdet, known[f"{name}: logdet"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decoder", [Decoder("sequential"), Decoder("jacobi", 4, 0.0)], ids=str)
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in cases.STARFLOWS for kind in cases.STARFLOW_GUIDANCE[name]]
)
def test_a_starflow_draws_what_the_published_code_drew_under_guidance(name, kind, decoder):
    model, known = recorded_starflow(name), record(cases.STARFLOW_RECORD)
    z = patchify(known[f"{name}: latents"], model.config.patch_size)
    text = known["text"] if model.config.prefix_dim else None
    images = model.inverse(z, text, cases.STARFLOW_GUIDANCE[name][kind], decoder)
    assert_close(images, known[f"{name}: {kind}"], atol=1e-4, rtol=1e-5)


def in_published_layout(model, z):
    """Latents as images, as the published code of STARFlow returns them."""
    return unpatchify(z, model.config.patch_size, model.config.image_size)


def test_the_text_of_nothing_is_no_part_of_a_checkpoint():
    model = load_published(cases.weights(starflow_shapes(**cases.STARFLOWS["text"])))
    assert model.flow.class_prefixes.shape == (1, cases.TEXT, cases.TEXT_DIM)
    assert not model.flow.class_prefixes.any()


@pytest.mark.parametrize("name", ["text", "no text"])
def test_a_starflow_becomes_the_checkpoint_that_it_came_from(name):
    state = cases.weights(starflow_shapes(**cases.STARFLOWS[name]))
    back = to_published(load_published(state).state_dict())
    unused = {key for key in state if key.endswith(("attn_mask", "freqs_cos", "freqs_sin"))}
    assert back.keys() == state.keys() - unused
    assert all(torch.equal(back[key], state[key]) for key in back if key != "var")


@pytest.mark.parametrize("size", [64, 128, 256])
def test_an_itarflow_has_the_published_noise_levels_of_its_size(size):
    shapes = published_shapes(side=4, patch=size // 4, channels=64, blocks=1, layers=1, levels=True)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes}
    state = {name.replace("head_blocks", "attn_blocks"): tensor for name, tensor in state.items()}
    assert infer_config(state).noise_levels == PUBLISHED_LEVELS[size]


@pytest.mark.parametrize(
    ("variant", "noise_levels", "message"),
    [
        ({"levels": True}, None, "expected those of training for an iTarFlow of .*; got None for 6"),
        ({"levels": True}, (0.3, 0.01), r"expected two rising numbers > 0, .*; got \(0\.3, 0\.01\)"),
        ({}, (0.01, 0.3), r"expected None for a TarFlow; got \(0\.01, 0\.3\)"),
    ],
    ids=str,
)
def test_noise_levels_that_do_not_fit_the_checkpoint(variant, noise_levels, message):
    with pytest.raises(ValueError, match=rf"noise_levels: {message}"):
        load_published(published_state(**variant), noise_levels=noise_levels)


def test_layers_that_blocks_share_are_refused():
    state = published_state(levels=True)
    shared = {name.replace("blocks.0.head_blocks.0", "shared_backbone.0"): state[name] for name in state}
    with pytest.raises(ValueError, match=r"^source: .*shared_backbone"):
        load_published(state | shared, noise_levels=(0.01, 0.3))


@pytest.mark.parametrize(
    ("published", "config"),
    [
        (
            {"side": 4, "patch": 2, "channels": (64, 128), "blocks": 2, "layers": (1, 3)},
            TarFlowConfig(8, 3, 2, (64, 128), 2, (1, 3)),
        ),
        (
            {"side": 32, "patch": 2, "channels": 768, "blocks": 8, "layers": 8},
            TarFlowConfig(64, 3, 2, 768, 8, 8, 0),
        ),
        (
            {"side": 32, "patch": 4, "channels": 1024, "blocks": 8, "layers": 8, "classes": 1000},
            TarFlowConfig(128, 3, 4, 1024, 8, 8, 1000),
        ),
        (
            {"side": 32, "patch": 8, "channels": 768, "blocks": 8, "layers": 8, "classes": 3},
            TarFlowConfig(256, 3, 8, 768, 8, 8, 3),
        ),
        (
            {"side": 7, "patch": 4, "channels": 128, "blocks": 4, "layers": 12, "in_channels": 1, "nvp": False},
            TarFlowConfig(28, 1, 4, 128, 4, 12, volume_preserving=True),
        ),
    ],
    ids=["deep-shallow", "ImageNet 64", "ImageNet 128", "AFHQ 256", "digits, volume preserving"],
)
def test_shapes_alone_tell_the_configuration(published, config):
    state = {name: torch.empty(shape, device="meta") for name, shape in published_shapes(**published)}
    assert infer_config(state, config.in_channels) == config
    with torch.device("meta"):
        own = TarFlow(config).state_dict()
    masks = published["blocks"] * published["side"] ** 4
    assert sum(tensor.numel() for tensor in own.values()) == sum(t.numel() for t in state.values()) - masks


def test_a_pth_file_is_read(tmp_path):
    state, path = published_state(classes=5), tmp_path / "model.pth"
    torch.save(state, path)
    expected = TarFlow.from_published(state).state_dict()
    for source in (path, str(path)):
        assert_close(TarFlow.from_published(source).state_dict(), expected, atol=0, rtol=0)
    assert not any(module.training for module in TarFlow.from_published(path).modules())


def test_training_the_model_leaves_the_state_alone():
    state = published_state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    model = TarFlow.from_published(state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(state, before)


class Malice:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_that_would_run_code_is_refused_without_advice_to_run_it(tmp_path, protocol):
    harm, path = tmp_path / "harm", tmp_path / "model.pth"
    torch.save(published_state() | {"var": Malice(harm)}, path, pickle_protocol=protocol)
    message = r"^source: .*model\.pth is .* it is damaged, or holds more than tensors, numbers and names$"
    with warnings.catch_warnings(action="error"), pytest.raises(ValueError, match=message):
        TarFlow.from_published(path)
    assert not harm.exists()


@pytest.mark.parametrize("keep", [0, 10, 5000, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "model.pth"
    torch.save(published_state(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"^source: .*model\.pth is truncated"):
        TarFlow.from_published(path)


@pytest.mark.parametrize(
    "content",
    [
        b"not a checkpoint",
        pickle.dumps({"a": 1}, protocol=2),
        b"hello world",
        b"K",
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"^source: "):
        TarFlow.from_published(tmp_path / "model.pth")


def test_a_missing_file_is_an_error_of_its_own(tmp_path):
    with pytest.raises(FileNotFoundError):
        TarFlow.from_published(tmp_path / "model.pth")


def without(*names):
    return {name: tensor for name, tensor in published_state().items() if name not in names}


@pytest.mark.parametrize(
    ("state", "in_channels", "argument"),
    [
        (nn.Linear(2, 2).state_dict(), 3, "source"),
        (TarFlow(TarFlowConfig()).state_dict(), 1, "source"),
        ({"model": published_state()}, 3, "source"),
        (without("var"), 3, "source"),
        (without("blocks.1.attn_blocks.1.attention.qkv.bias"), 3, "source"),
        (published_state() | {"extra": torch.zeros(1)}, 3, "source"),
        (published_state() | {"var": torch.ones(9, 3)}, 3, "source"),
        (without("blocks.0.pos_embed"), 3, "source"),
        ({"blocks.0.proj_in.weight": torch.zeros(64, 12)}, 3, "source"),
        (published_state(), 1, "in_channels"),
        (published_state(), 2, "in_channels"),
        (published_state(), 0, "in_channels"),
        (published_state(in_channels=1), 3, "in_channels"),
    ],
)
def test_what_is_no_published_state_or_has_other_channels_is_refused(state, in_channels, argument):
    with pytest.raises(ValueError, match=rf"^{argument}: .*expected .*"):
        TarFlow.from_published(state, in_channels)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({1: torch.zeros(1)}, "names and tensors; got 1 and a Tensor"),
        ({"extra": [torch.zeros(1)]}, "names and tensors; got 'extra' and a list"),
        ({"var": None}, "names and tensors; got 'var' and a NoneType"),
        ({"var": torch.ones(9, 12).to_sparse()}, "dense weights; got var of torch.sparse_coo on cpu"),
        ({"var": torch.ones(9, 12, device="meta")}, "dense weights; got var of torch.strided on meta"),
        ({"var": torch.ones(9, 12, dtype=torch.int64)}, r"prior_variance in float16, .*; got torch\.int64"),
        ({"var": torch.ones(9, 12, dtype=torch.bool)}, r"prior_variance in float16, .*; got torch\.bool"),
        ({"var": torch.ones(9, 12, dtype=torch.complex64)}, r"prior_variance in float16, .*; got torch\.complex64"),
        ({"var": torch.full((9, 12), -1.0)}, r"positive numbers in flow\.prior_variance; got -1"),
        ({"blocks.0.proj_in.weight": torch.zeros(())}, r"proj_in\.weight of 2 dimensions; got shape \(\)"),
        ({"blocks.0.proj_in.weight": torch.zeros(0, 12)}, r"proj_in\.weight of 2 dimensions; got shape \(0, 12\)"),
        ({"blocks.0.pos_embed": torch.zeros(9)}, r"pos_embed of 2 dimensions; got shape \(9,\)"),
        ({"blocks.0.class_embed": torch.zeros(())}, r"class_embed of 3 dimensions; got shape \(\)"),
        ({"x_pos_embed": torch.zeros(9, 3)}, "x_pos_embed of shape nothing"),
        ({"blocks.99999999.proj_in.weight": torch.zeros(128, 12)}, "of shape "),
        ({f"blocks.{t}.x": torch.zeros(1) for t in range(3, 2000)}, r"num_blocks: expected an integer in \[1, 1024\]"),
        ({"blocks.0.pos_embed": torch.zeros(1, 1).expand(10**12, 128)}, "image_size: expected an integer in "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_no_state_dict_of_the_published_model_is_refused_at_once(tmp_path, state, expected):
    torch.save(published_state() | state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=rf"^source: .*{expected}"):
        TarFlow.from_published(tmp_path / "model.pth")


def test_a_file_need_not_hold_what_is_no_part_of_the_checkpoint(tmp_path):
    """Prefixes and the variance of the prior, which are float32, count for nothing in a file of bfloat16."""
    arguments = cases.STARFLOWS["text"] | {"txt_size": 256, "txt_dim": 2048}
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in starflow_shapes(**arguments)}
    torch.save(state | {"var": torch.ones_like(state["var"])}, tmp_path / "model.pth")
    model = load_published(tmp_path / "model.pth", arguments["in_channels"])
    assert model.flow.class_prefixes.shape == (1, 256, 2048)


def test_weights_that_the_file_does_not_hold_are_refused(tmp_path):
    """Of stride 0 they take no space in the file, and 400 times its size in memory."""
    state = {name: torch.zeros(()).expand(shape) for name, shape in published_shapes(**SMALL) if name != "var"}
    torch.save(state | {"var": torch.ones(()).expand(9, 12)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"source: expected weights that are stored in full; .*model\.pth is smaller"):
        TarFlow.from_published(tmp_path / "model.pth")


def test_any_flipped_bit_of_a_file_is_noticed(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(published_state(blocks=1, layers=1, channels=64), path)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:  # between the records there is padding, which says nothing
        records = [(info.header_offset + 400, info.file_size) for info in archive.infolist() if info.file_size > 4000]
    for start, size in records:
        place = start + size // 2
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"^source: .*model\.pth is .*corrupt.*: wrong checksum of "):
            TarFlow.from_published(path)


def test_compressed_records_are_refused(tmp_path):
    """A few bytes of them may hold any amount of zeros."""
    torch.save(published_state(), tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(tmp_path / "model.pth", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for info in stored.infolist():
            compressed.writestr(info.filename, stored.read(info))
    with pytest.raises(ValueError, match=r"^source: .*expected stored records; got a compressed one, "):
        TarFlow.from_published(tmp_path / "model.pth")
