"""TarFlow as the paper writes it (arXiv 2412.06329): one image, one token and one head at a time, in float64.

Nothing is batched, cached or shared with the library: every step of the inverse runs the whole transformer again over
the tokens that are known. ``state`` is the ``state_dict()`` of a :class:`tarflow.TarFlow`, ``config`` anything with the
fields of its configuration.
"""

import math

import torch


def forward(state, config, images, labels=None, levels=None):
    """Images ``(B, C, H, W)`` to latents ``(B, N, D)`` and log-dets ``(B,)``; levels are those of noise."""
    latents, logdets = [], []
    for image, *given in zip(images.double(), _each(labels, images), _each(levels, images), strict=True):
        tokens, logdet = patchify(image, config), torch.zeros((), dtype=torch.float64)
        for t in range(config.num_blocks):
            x = permute(tokens, t)
            parameters = transformer(block_parameters(state, t), config, x, *given)
            z = [x[0]]
            for i in range(1, len(x)):
                mu, alpha, *mixture = parameters[i - 1]
                v, slope = mixture_map(x[i], *mixture) if mixture else (x[i], torch.ones_like(x[i]))
                z.append((v - mu) * torch.exp(-alpha))
                logdet = logdet + torch.log(slope).sum() - alpha.sum()
            tokens = permute(z, t)
        latents.append(torch.stack(tokens))
        logdets.append(logdet)
    return torch.stack(latents), torch.stack(logdets)


def inverse(
    state,
    config,
    latents,
    labels=None,
    levels=None,
    weight=0.0,
    schedule="linear",
    temperature=1.0,
    parameters="both",
    drop_label=True,
    rule="extrapolate",
    blocks=None,
):
    """Latents ``(B, N, D)`` to images ``(B, C, H, W)``, guided where a weight is given."""
    images = []
    for z, label, level in zip(latents.double(), _each(labels, latents), _each(levels, latents), strict=True):
        tokens = list(z)
        reference_label = -1 if drop_label and label is not None else label
        for t in reversed(range(config.num_blocks)):
            z, params = permute(tokens, t), block_parameters(state, t)
            x = [z[0]]
            for i in range(1, len(z)):
                mu, alpha, *mixture = transformer(params, config, x, label, level)[-1]
                sigma = torch.exp(alpha)
                if weight and config.num_blocks - 1 - t < (blocks or config.num_blocks):
                    mu_ref, alpha_ref, *refs = transformer(params, config, x, reference_label, level, temperature)[-1]
                    w = weight * i / (len(z) - 1) if schedule == "linear" else weight
                    sigma_ref = torch.exp(alpha_ref)
                    if rule == "gaussian":
                        mu, sigma = quotient(mu, sigma, mu_ref, torch.maximum(sigma_ref, sigma), w)
                    else:
                        if parameters in ("both", "mu"):
                            mu = (1 + w) * mu - w * mu_ref
                        if parameters in ("both", "alpha") and level is not None and not mixture:
                            sigma = torch.abs((1 + w) * sigma - w * sigma_ref)
                        elif parameters in ("both", "alpha"):
                            sigma = torch.exp((1 + w) * alpha - w * alpha_ref)
                        mixture = [(1 + w) * v - w * ref for v, ref in zip(mixture, refs, strict=True)]
                v = z[i] * sigma + mu
                x.append(solve_mixture(v, *mixture) if mixture else v)
            tokens = permute(x, t)
        images.append(unpatchify(tokens, config))
    return torch.stack(images)


def quotient(mu, sigma, mu_ref, sigma_ref, w):
    """Mean and deviation of ``N(mu, sigma^2)^(1 + w) / N(mu_ref, sigma_ref^2)^w``, by precisions."""
    precision = (1 + w) / sigma**2 - w / sigma_ref**2
    mean = ((1 + w) * mu / sigma**2 - w * mu_ref / sigma_ref**2) / precision
    return mean, 1 / torch.sqrt(precision)


def transformer(params, config, tokens, label, level=None, temperature=1.0):
    """(mu, alpha), or (mu, alpha, logits, means, log-scales), for each token: those of the token after it."""
    stream = []
    for i, token in enumerate(tokens):
        h = linear(params, "proj_in", token) + params["pos_embed"][i]
        if label is not None:
            embeddings = params["class_embed"]
            h = h + (embeddings.mean(0) if label == -1 else embeddings[label])
        if level is not None:
            h = h + embed_level(params, level)
        stream.append(h)
    for number in range(num_layers(params)):
        layer = below(params, f"layers.{number}.")
        normed = [layer_norm(layer, "attention_norm", h) for h in stream]
        attended = attention(layer, config.head_dim, normed, temperature)
        stream = [h + a for h, a in zip(stream, attended, strict=True)]
        stream = [h + mlp(layer, layer_norm(layer, "mlp_norm", h)) for h in stream]
    parameters = []
    for h in stream:
        out, size = linear(params, "proj_out", h), len(tokens[0])
        if config.volume_preserving:
            parameters.append((out, torch.zeros_like(out)))
        else:
            alpha, mu, mixture = out[:size], out[size : 2 * size], out[2 * size :]
            parameters.append((mu, alpha, *mixture.view(3, size, config.num_mixtures)) if len(mixture) else (mu, alpha))
    return parameters


def embed_level(params, level):
    """Sinusoids of log t, sines before cosines, through a hidden layer with a GELU."""
    size = len(params["pos_embed"][0])
    angles = [math.log(level) / 10_000 ** (2 * k / size) for k in range(size // 2)]
    sinusoids = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)
    return linear(params, "noise_embed.2", gelu(linear(params, "noise_embed.0", sinusoids)))


def mixture_map(x, logits, means, log_scales):
    """``v = logit(F(x))`` and dv/dx for the distribution function F of a mixture of logistics at every value of x."""
    below = above = density = 0  # F, 1 - F and F'
    for k in range(logits.shape[1]):
        weight = torch.exp(logits[:, k]) / torch.exp(logits).sum(1)
        scale = torch.exp(log_scales[:, k].clamp(min=-7))
        z = (x - means[:, k]) / scale
        below = below + weight / (1 + torch.exp(-z))
        above = above + weight / (1 + torch.exp(z))
        density = density + weight / (1 + torch.exp(-z)) / (1 + torch.exp(z)) / scale
    return torch.log(below / above), density / (below * above)


def solve_mixture(v, *mixture):
    """The x at which the mixture is v, by bisection."""
    low, high = torch.full_like(v, -100), torch.full_like(v, 100)
    for _ in range(60):
        middle = (low + high) / 2
        too_low = mixture_map(middle, *mixture)[0] < v
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return (low + high) / 2


def attention(layer, head_dim, tokens, temperature):
    """Every head of every token attends to that token and the ones before it."""
    channels = len(tokens[0])
    queries_keys_values = [linear(layer, "qkv", token) for token in tokens]
    out = []
    for i in range(len(tokens)):
        heads = []
        for start in range(0, channels, head_dim):
            head = slice(start, start + head_dim)
            query = queries_keys_values[i][:channels][head]
            keys = [qkv[channels : 2 * channels][head] for qkv in queries_keys_values[: i + 1]]
            values = [qkv[2 * channels :][head] for qkv in queries_keys_values[: i + 1]]
            scores = [torch.exp(query @ key / math.sqrt(head_dim) / temperature) for key in keys]
            heads.append(sum(score * value for score, value in zip(scores, values, strict=True)) / sum(scores))
        out.append(linear(layer, "proj", torch.cat(heads)))
    return out


def mlp(layer, x):
    """Two linear maps with a GELU between them."""
    return linear(layer, "mlp.2", gelu(linear(layer, "mlp.0", x)))


def gelu(x):
    """``x Phi(x)``."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def layer_norm(params, name, x):
    """Zero mean and unit variance over the channels, then a scale and a bias for each."""
    centred = x - x.mean()
    return centred / torch.sqrt(centred.square().mean() + 1e-5) * params[f"{name}.weight"] + params[f"{name}.bias"]


def linear(params, name, x):
    """``W x + b``."""
    return params[f"{name}.weight"] @ x + params[f"{name}.bias"]


def permute(tokens, t):
    """Odd blocks run from the last token to the first."""
    return tokens[::-1] if t % 2 else tokens


def patchify(image, config):
    """Patches in raster order, each flattened channel by channel, then row by row."""
    p = config.patch_size
    corners = range(0, config.image_size, p)
    return [image[:, top : top + p, left : left + p].flatten() for top in corners for left in corners]


def unpatchify(tokens, config):
    """Every patch back to its place."""
    p = config.patch_size
    image = torch.empty(config.in_channels, config.image_size, config.image_size, dtype=torch.float64)
    for i, token in enumerate(tokens):
        row, column = divmod(i, config.image_size // p)
        image[:, row * p : row * p + p, column * p : column * p + p] = token.view(config.in_channels, p, p)
    return image


def block_parameters(state, t):
    """The parameters of the transformer of block t, in float64; positions are in the order of generation."""
    return {name: value.double() for name, value in below(state, f"flow.blocks.{t}.transformer.").items()}


def num_layers(params):
    """The number of layers of a block, which may differ between blocks."""
    return 1 + max(int(name.split(".")[1]) for name in params if name.startswith("layers."))


def below(params, prefix):
    """The parameters whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def _each(labels, images):
    return [None] * len(images) if labels is None else labels.tolist()
