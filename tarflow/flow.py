"""The flow: blocks of autoregressive maps over tokens, in alternating order, under a Gaussian prior.

Block t maps tokens x to z by ``z_0 = x_0`` and ``z_i = (v_i - mu_i) exp(-alpha_i)``, where v_i is x_i, or, with
``coupling="mixture"``, the logit of a mixture of logistic distribution functions at x_i, value by value
(:mod:`tarflow.transforms`). A causal transformer computes mu_i, alpha_i and the mixture from x_<i. With a start token
x_0 is mapped as well. Every other block runs from the last token to the first. Forward is one pass per block; the
inverse is the task of :mod:`tarflow.decoding`.

Source: TarFlow (arXiv 2412.06329); the mixture is that of Flow++ (arXiv 1902.00275); start token and prefix are
STARFlow's (arXiv 2506.06276).
"""

import math
from collections.abc import Iterator, Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from .decoding import BlockStatistics, Decoder, ProgressCallback
from .decoding.decoder import Allowance, Timing, choose
from .decoding.step import DecodingMemory, count_branches
from .guidance import Guidance
from .transformer import UNCONDITIONAL, CausalTransformer, Condition, Context
from .transforms import MixtureTransform, make_transform
from .validation import PerBlock, describe_argument

__all__ = ["Block", "TokenFlow", "check_labels", "for_each_block"]


class TokenFlow(nn.Module):
    """A normalizing flow over token sequences ``(B, N, D)`` of any modality.

    Args:
        num_tokens, token_dim: N and D.
        channels, num_blocks, layers_per_block: width of the transformers, number of blocks, number of layers in each;
            widths and layers are one for all blocks or one for each, beginning with the data.
        head_dim, expansion: size of an attention head, factor of the hidden layer of the MLPs.
        num_classes: number of classes, 0 for an unconditional flow.
        volume_preserving: whether alpha = 0 throughout; the prior then keeps a variance per coordinate, averaged in
            training.
        coupling: the transform of each value, ``"affine"``, or ``"softplus"`` or ``"mixture"``, which preserve no
            volumes; see :mod:`tarflow.transforms`.
        num_mixtures: number of components of the mixture.
        takes_noise_level: whether the flow is one of noisy data, and conditioned on the level of the noise.
        positions, final_norm, start_token: see :class:`~tarflow.transformer.CausalTransformer`.
        reversed_blocks: which blocks run from the last token to the first, ``"odd"`` or ``"even"``, where the block
            next to the data is number 0.
        prefix_length, prefix_dim: L and E, if the block that is generated first, and no other, sees L embeddings of E
            numbers before the tokens, such as those of a text; 0 without.

    Raises:
        ValueError: a head_dim that is no divisor of channels, sizes that are neither one nor one for each block, an
            unknown coupling, a mixture of no or too many components, or one that is to preserve volumes.

    Labels are int64 ``(B,)``, below num_classes, where -1 is a dropped label; None for an unconditional flow. A flow
    with a prefix has no other use for a class than the prefix that :attr:`class_prefixes` holds for it, and takes
    embeddings ``(B, L, E)`` in place of labels. A noise level is a positive number, or a floating-point ``(B,)``, one
    for each sample; None for a flow that takes none. On a GPU the range of both is not checked, because looking would
    stall it.
    """

    prior_variance: Tensor
    class_prefixes: Tensor | None
    """The prefix of a dropped label and of each class, ``(1 + num_classes, L, E)``, zeros until they are set."""
    calibration: Sequence[Timing] = ()
    """Timings that the ``auto`` decoder follows, made by :func:`tarflow.decoding.calibration.calibrate`."""

    def __init__(
        self,
        num_tokens: int,
        token_dim: int,
        channels: PerBlock,
        num_blocks: int,
        layers_per_block: PerBlock,
        *,
        head_dim: int = 64,
        expansion: int = 4,
        num_classes: int = 0,
        volume_preserving: bool = False,
        coupling: str = "affine",
        num_mixtures: int = 8,
        takes_noise_level: bool = False,
        positions: str = "learned",
        final_norm: bool = False,
        start_token: bool = False,
        reversed_blocks: str = "odd",
        prefix_length: int = 0,
        prefix_dim: int = 0,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.num_steps = num_tokens if start_token else num_tokens - 1
        self.takes_noise_level = takes_noise_level
        self.volume_preserving = volume_preserving
        self.transform = make_transform(coupling, num_mixtures, volume_preserving)
        widths = for_each_block("channels", channels, num_blocks)
        depths = for_each_block("layers_per_block", layers_per_block, num_blocks)
        self.blocks = nn.ModuleList(
            Block(
                CausalTransformer(
                    num_tokens,
                    token_dim,
                    width,
                    depth,
                    head_dim=head_dim,
                    expansion=expansion,
                    num_classes=0 if prefix_dim else num_classes,
                    takes_noise_level=takes_noise_level,
                    positions=positions,
                    final_norm=final_norm,
                    start_token=start_token,
                    prefix_length=prefix_length,
                    prefix_dim=prefix_dim if t == num_blocks - 1 else 0,
                    transform=self.transform,
                ),
                reverse=(t % 2 == 1) == (reversed_blocks == "odd"),
            )
            for t, (width, depth) in enumerate(zip(widths, depths, strict=True))
        )
        weights = [depth * width**2 for width, depth in zip(widths, depths, strict=True)]
        self._step_costs = [num_blocks * read / sum(weights) for read in weights]  # relative to their mean
        self.register_buffer("prior_variance", torch.ones(num_tokens, token_dim))
        prefixes = torch.zeros(1 + num_classes, prefix_length, prefix_dim) if prefix_dim else None
        self.register_buffer("class_prefixes", prefixes)

    def forward(
        self, tokens: Tensor, labels: Tensor | None = None, *, noise_level: float | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map data to latents z ``(B, N, D)``; also return the log-det in nats, ``(B,)``, both at least float32."""
        self._check(tokens, labels)
        condition = self.condition(labels, noise_level, tokens)
        # shape[0], not len(), which torch.export would make a constant.
        z = tokens
        logdet = tokens.new_zeros(tokens.shape[0], dtype=torch.promote_types(tokens.dtype, torch.float32))
        for block in self.blocks:
            z, block_logdet = block(z, condition)
            logdet = logdet + block_logdet
        return z, logdet

    def log_prob(
        self, tokens: Tensor, labels: Tensor | None = None, *, noise_level: float | Tensor | None = None
    ) -> Tensor:
        """Return the log-density of tokens, ``log p(z) + logdet``, in nats, ``(B,)``."""
        z, logdet = self(tokens, labels, noise_level=noise_level)
        return self.log_prior(z) + logdet

    def log_prior(self, z: Tensor) -> Tensor:
        """Return the log-density of latents ``(B, N, D)`` under the prior, in nats, ``(B,)``."""
        variance = self.prior_variance
        return -0.5 * (z.square() / variance + (2 * math.pi * variance).log()).sum((1, 2))

    def inverse(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        guidance: Guidance | None = None,
        decoder: str | Decoder = "auto",
        progress: ProgressCallback = lambda statistics: None,
        *,
        noise_level: float | Tensor | None = None,
    ) -> Tensor:
        """Map latents to data, ``(B, N, D)``: the inverse of :meth:`forward`, or, under guidance, a guided map.

        ``decoder`` is a :class:`~tarflow.Decoder` or the name of one; ``progress`` is called after each block.
        """
        *_, tokens = self.trajectory(z, labels, guidance, decoder, progress, noise_level=noise_level)
        return tokens

    def trajectory(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        guidance: Guidance | None = None,
        decoder: str | Decoder = "auto",
        progress: ProgressCallback = lambda statistics: None,
        *,
        noise_level: float | Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield the tokens after each block on the way from latents to data; arguments are those of :meth:`inverse`."""
        self._check(z, labels, "z")
        if (guidance := Guidance.of(guidance)) is not None:
            conditions = self.num_classes if self.class_prefixes is None else len(self.class_prefixes)
            guidance.check(conditions, mixture=isinstance(self.transform, MixtureTransform))
        condition = self.condition(labels, noise_level, z)
        return self._trajectory(z, condition, guidance, Decoder.of(decoder), progress)

    def _trajectory(self, tokens, condition, guidance, decoder, progress):
        first, steps = len(self.blocks) - 1, self.num_steps
        guided = [guidance and block.guided(guidance, first - t) for t, block in enumerate(self.blocks)]
        rows = [len(tokens) * count_branches(of_block) for of_block in guided]
        memory, weight = DecodingMemory(), self.blocks[0].transformer.proj_in.weight
        is_affine = not isinstance(self.transform, MixtureTransform)
        allowance = Allowance.for_flow(weight, rows[first - 1], len(self.blocks), steps) if is_affine else None
        for t, block in reversed(list(enumerate(self.blocks))):
            # The block that is generated first converges slowly: nothing is staked on it.
            stake = allowance if t < first else None
            if stake is not None:
                stake.step_cost = self._step_costs[t]
            chosen = choose(self.calibration, decoder, t, rows[t], weight, stake)
            with torch.inference_mode():
                branches = self.branches(condition, guided[t])
                decoded, passes = block.inverse(tokens, branches, guided[t], chosen, memory, stake)
            progress(BlockStatistics(t, chosen, len(tokens), passes, steps))
            tokens = decoded.clone()  # a tensor of inference mode cannot be saved for a backward pass
            yield tokens

    def sample_prior(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents ``(num, N, D)`` from the prior, on the device of the flow."""
        variance = self.prior_variance
        eps = torch.randn(num, *variance.shape, generator=generator, device=variance.device, dtype=variance.dtype)
        return eps * variance.sqrt()

    @torch.no_grad()
    def update_prior(self, z: Tensor, rate: float | Tensor = 0.1) -> None:
        """Move the variance of the prior by ``rate`` towards that of a batch; for volume-preserving flows only.

        A batch that is not finite leaves it unchanged.
        """
        moment = z.square().mean(0)
        self.prior_variance.lerp_(torch.where(moment.isfinite().all(), moment, self.prior_variance), rate)

    def _check(self, tokens: Tensor, labels: Tensor | None, name: str = "tokens") -> None:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{name}: expected a floating-point torch.Tensor; got {describe_argument(tokens)}")
        if tokens.dim() != 3 or tokens.shape[1:] != self.prior_variance.shape:
            num_tokens, token_dim = self.prior_variance.shape
            raise ValueError(f"{name}: expected shape (B, {num_tokens}, {token_dim}); got {tuple(tokens.shape)}")
        if not tokens.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor; got {tokens.dtype}")
        self.check_labels(labels, tokens.shape[0])

    def check_labels(self, labels: Tensor | None, batch: int) -> None:
        """Raise TypeError or ValueError for labels, or embeddings in their place, that do not fit a batch."""
        if self.class_prefixes is not None and isinstance(labels, Tensor) and labels.is_floating_point():
            expected = batch, *self.class_prefixes.shape[1:]
            if labels.shape != expected:
                raise ValueError(f"labels: expected embeddings of shape {expected}; got {tuple(labels.shape)}")
        else:
            check_labels(labels, batch, self.num_classes)

    def condition(self, labels: Tensor | None, noise_level: float | Tensor | None, tokens: Tensor) -> Condition:
        """Return what the samples are conditioned on: in place of labels, if the flow has one, a prefix."""
        level = self._to_levels(noise_level, tokens)
        if self.class_prefixes is None:
            return Condition(labels, level)
        if labels is None:
            labels = torch.full((tokens.shape[0],), -1, device=tokens.device)
        prefix = labels if labels.is_floating_point() else self.class_prefixes[labels + 1]
        return Condition(None, level, prefix)

    def branches(self, condition: Condition, guidance: Guidance | None) -> list[Condition]:
        """Return the conditions of the branches of guidance, the conditional one first."""
        if guidance is None or count_branches(guidance) == 1:
            return [condition]
        reference = condition
        if guidance.drop_label and condition.labels is not None:
            reference = condition._replace(labels=torch.full_like(condition.labels, -1))
        elif guidance.drop_label and condition.prefix is not None and self.class_prefixes is not None:
            dropped = self.class_prefixes[0].to(condition.prefix)
            reference = condition._replace(prefix=dropped.expand_as(condition.prefix))
        return [condition, reference]

    def _to_levels(self, noise_level: float | Tensor | None, tokens: Tensor) -> Tensor | None:
        """Return the noise level of each sample, ``(B,)``, on the device and in the dtype of the tokens."""
        if not self.takes_noise_level:
            if noise_level is not None:
                got = describe_argument(noise_level)
                raise ValueError(f"noise_level: expected None for a flow that takes no noise level; got {got}")
            return None
        batch = tokens.shape[0]
        level = noise_level.to(tokens) if isinstance(noise_level, Tensor) else noise_level
        if isinstance(level, Real):
            level = tokens.new_full((batch,), level)
        if not isinstance(level, Tensor) or level.shape != (batch,):
            got = describe_argument(noise_level)
            raise ValueError(f"noise_level: expected a positive number, or shape ({batch},); got {got}")
        if level.device.type == "cpu" and batch and not torch.compiler.is_compiling():
            low, high = (value.item() for value in level.aminmax())
            if not 0 < low <= high < math.inf:
                raise ValueError(f"noise_level: expected positive numbers; got values from {low:g} to {high:g}")
        return level


class Block(nn.Module):
    """An autoregressive map, in raster order or, with ``reverse``, from the last token to the first."""

    def __init__(self, transformer: CausalTransformer, reverse: bool):
        super().__init__()
        self.transformer = transformer
        self.reverse = reverse

    def forward(self, x: Tensor, condition: Condition = UNCONDITIONAL) -> tuple[Tensor, Tensor]:
        """Return ``z_i = (v_i - mu_i) exp(-alpha_i)`` in raster order, and ``logdet = sum log dv/dx - sum alpha``."""
        x, shift = self._permute(x), self.transformer.start_token is None
        z, logdet = self.transformer.transform.forward(x, *self.transformer(x, condition), shift=shift)
        return self._permute(z), logdet

    def inverse(
        self,
        z: Tensor,
        branches: Sequence[Condition],
        guidance: Guidance | None,
        decoder: Decoder,
        memory: DecodingMemory | None = None,
        allowance: Allowance | None = None,
    ) -> tuple[Tensor, int]:
        """Return the tokens x whose latents are z, and the number of passes of the transformer.

        The ``branches`` are the conditions of those of guidance, the conditional one first. The ``memory`` is that of
        other blocks, if they are to share it, and so is the ``allowance`` of ``auto``.
        """
        contexts = [self.transformer.embed_context(condition) for condition in branches]
        parts = [None if part[0] is None else torch.stack(part, dim=1) for part in zip(*contexts, strict=True)]
        # A start token is a token that is known, its own latent.
        started = self.transformer.prepend_start(self._permute(z))
        x, passes = decoder(self.transformer, started, Context(*parts), guidance, memory, allowance)
        return self._permute(x[:, started.shape[1] - z.shape[1] :]), passes

    def guided(self, guidance: Guidance, number: int) -> Guidance | None:
        """Return the guidance of this block, generated after so many others; None where both branches are alike."""
        transformer = self.transformer
        sees_labels = transformer.class_embed is not None or transformer.proj_prefix is not None
        differs = guidance.temperature != 1 or (guidance.drop_label and sees_labels)
        return guidance.of_block(number) if differs else None

    def _permute(self, tokens: Tensor) -> Tensor:
        return tokens.flip(1) if self.reverse else tokens


def for_each_block(name: str, size: int | Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """Return the size of each block, given one for all or one for each; ValueError for any other number of them."""
    sizes = (size,) * num_blocks if isinstance(size, int) else tuple(size)
    if len(sizes) != num_blocks:
        raise ValueError(f"{name}: expected one number, or {num_blocks}, one for each block; got {size}")
    return sizes


def check_labels(labels: Tensor | None, batch: int, num_classes: int) -> None:
    """Raise TypeError for labels of another type, and ValueError for labels that do not fit a batch and a model."""
    if not num_classes:
        if labels is not None:
            raise ValueError(f"labels: expected None for an unconditional model; got {describe_argument(labels)}")
        return
    expected = f"int64 of shape ({batch},) in [-1, {num_classes}), -1 for a dropped label"
    if labels is None:
        raise ValueError(f"labels: expected {expected}; got None")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels: expected {expected}; got {describe_argument(labels)}")
    if labels.shape != (batch,):
        raise ValueError(f"labels: expected {expected}; got shape {tuple(labels.shape)}")
    if labels.device.type == "cpu" and batch and not torch.compiler.is_compiling():
        low, high = (int(value) for value in labels.aminmax())
        if low < -1 or high >= num_classes:
            raise ValueError(f"labels: expected {expected}; got values from {low} to {high}")
