"""Bad arguments of every op: an error names the argument, what was expected and what came."""

import pytest
import torch

from tarflow_kernels import (
    affine_forward,
    affine_inverse,
    causal_attention,
    decode_attention,
    embed_next,
    mixture_logistic,
    mixture_logistic_inverse,
    residual_norm,
    use_backend,
)

X, INTEGERS, WIDE = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4)
Q, HALF, LONG = torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4).half(), torch.zeros(2, 1, 4, 4)
ELSEWHERE = torch.device("meta")
CACHED, AT = torch.zeros(2, 1, 5, 4), torch.zeros(2, dtype=torch.int32)
SEQUENCE, ONE = torch.zeros(2, 5, 3), torch.zeros(2, 3, 1)


def embed_with(**wrong):
    """:func:`embed_next` under guidance, with all arguments right but these."""
    right = {"x": SEQUENCE, "z": SEQUENCE, "mu": X, "alpha": X, "mu_ref": X, "alpha_ref": X, "weights": torch.zeros(5)}
    right |= {"positions": AT.repeat(2), "projection": torch.zeros(3, 4), "embedding": torch.zeros(5, 4)}
    return embed_next(**right | {"context": torch.zeros(4, 4), "h": torch.zeros(4, 4), "tickets": AT} | wrong)


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: affine_forward(INTEGERS, X, X), TypeError, "x"),
        (lambda: affine_forward(X, WIDE, X), ValueError, "mu"),
        (lambda: affine_forward(X, X, INTEGERS), TypeError, "alpha"),
        (lambda: affine_forward(X, X, X[:1]), ValueError, "alpha"),
        (lambda: affine_forward(X[0, 0], X[0, 0], X[0, 0]), ValueError, "x"),
        (lambda: affine_forward(X[0], X[0], X[0], shift=True), ValueError, "x"),
        (lambda: affine_inverse(INTEGERS, X, X), TypeError, "z"),
        (lambda: affine_inverse(X[0], X[0], X[0], shift=True), ValueError, "z"),
        (lambda: affine_inverse(X, X, WIDE), ValueError, "alpha"),
        (lambda: mixture_logistic(INTEGERS, ONE, ONE, ONE), TypeError, "x"),
        (lambda: mixture_logistic(X[0, 0], *[X[0]] * 3), ValueError, "x"),
        (lambda: mixture_logistic(X, X, X, X), ValueError, "logits"),
        (lambda: mixture_logistic(X, ONE[:1], ONE[:1], ONE[:1]), ValueError, "logits"),
        (lambda: mixture_logistic(X, *[ONE[..., :0]] * 3), ValueError, "logits"),
        (lambda: mixture_logistic(X, *[ONE.expand(2, 3, 65)] * 3), ValueError, "logits"),
        (lambda: mixture_logistic(X, ONE, ONE.expand(2, 3, 2), ONE), ValueError, "means"),
        (lambda: mixture_logistic(X, ONE, ONE.int(), ONE), TypeError, "means"),
        (lambda: mixture_logistic(X, ONE, ONE, X), ValueError, "log_scales"),
        (lambda: mixture_logistic(X, ONE, ONE, ONE.to(ELSEWHERE)), ValueError, "log_scales"),
        (lambda: mixture_logistic(X.to(ELSEWHERE), ONE, ONE, ONE), ValueError, "logits"),
        (lambda: mixture_logistic(X, ONE, ONE, ONE, min_log_scale=float("nan")), ValueError, "min_log_scale"),
        (lambda: mixture_logistic(X, ONE, ONE, ONE, min_log_scale=float("inf")), ValueError, "min_log_scale"),
        (lambda: mixture_logistic(X, ONE, ONE, ONE, min_log_scale=None), TypeError, "min_log_scale"),
        (lambda: mixture_logistic(X, ONE, ONE, ONE, min_log_scale=ONE), TypeError, "min_log_scale"),
        (lambda: mixture_logistic_inverse(INTEGERS, ONE, ONE, ONE), TypeError, "v"),
        (lambda: mixture_logistic_inverse(X, ONE, ONE[..., 0], ONE), ValueError, "means"),
        (lambda: causal_attention(Q.int(), Q, Q), TypeError, "q"),
        (lambda: causal_attention(X, X, X), ValueError, "q"),
        (lambda: causal_attention(*[Q[..., :0]] * 3), ValueError, "q"),
        (lambda: causal_attention(Q, HALF, Q), TypeError, "k"),
        (lambda: causal_attention(Q, Q, LONG), ValueError, "v"),
        (lambda: causal_attention(Q, Q, Q, temperature=0.0), ValueError, "temperature"),
        (lambda: causal_attention(Q, Q, Q, temperature=float("nan")), ValueError, "temperature"),
        (lambda: causal_attention(Q, Q, Q, temperature=float("inf")), ValueError, "temperature"),
        (lambda: causal_attention(Q, Q, Q, temperature=torch.ones(2, device=ELSEWHERE)), ValueError, "temperature"),
        (lambda: causal_attention(Q, Q, Q, scale=-1.0), ValueError, "scale"),
        (lambda: causal_attention(Q, Q, Q.to(ELSEWHERE)), ValueError, "v"),
        (lambda: affine_forward(X, X.to(ELSEWHERE), X), ValueError, "mu"),
        (lambda: causal_attention(Q, Q, Q, temperature=torch.ones(3)), ValueError, "temperature"),
        (lambda: causal_attention(Q, Q, Q, temperature=torch.ones(2).int()), TypeError, "temperature"),
        (lambda: decode_attention(Q.int(), Q, Q, CACHED, CACHED, AT), TypeError, "q"),
        (lambda: decode_attention(X, X, X, CACHED, CACHED, AT), ValueError, "q"),
        (lambda: decode_attention(*[Q[..., :0]] * 3, *[CACHED[..., :0]] * 2, AT), ValueError, "q"),
        (lambda: decode_attention(Q, LONG, Q, CACHED, CACHED, AT), ValueError, "k"),
        (lambda: decode_attention(Q, Q, HALF, CACHED, CACHED, AT), TypeError, "v"),
        (lambda: decode_attention(Q, Q, Q, CACHED.half(), CACHED, AT), TypeError, "cache_k"),
        (lambda: decode_attention(Q, Q, Q, CACHED[:1], CACHED, AT), ValueError, "cache_k"),
        (lambda: decode_attention(Q, Q, Q, CACHED.flatten(), CACHED, AT), ValueError, "cache_k"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED[0], AT), ValueError, "cache_v"),
        (lambda: decode_attention(Q, Q, Q, CACHED, LONG, AT), ValueError, "cache_v"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED, AT.long()), TypeError, "positions"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED, AT[:1]), ValueError, "positions"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED, AT.to(ELSEWHERE)), ValueError, "positions"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED.to(ELSEWHERE), AT), ValueError, "cache_v"),
        (lambda: decode_attention(Q, Q, Q, CACHED[:, :, :2], CACHED[:, :, :2], AT), ValueError, "q"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED, AT, scale=0.0), ValueError, "scale"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED, AT + 3), ValueError, "positions"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED, AT - 1), ValueError, "positions"),
        (lambda: decode_attention(Q, Q, Q, CACHED, CACHED, AT, temperature=-1.0), ValueError, "temperature"),
        (lambda: residual_norm(INTEGERS, X, X[0], X[0]), TypeError, "h"),
        (lambda: residual_norm(X[0, 0], None, X[0, 0], X[0, 0]), ValueError, "h"),
        (lambda: residual_norm(X, WIDE, X[0], X[0]), ValueError, "delta"),
        (lambda: residual_norm(X, INTEGERS, X[0], X[0]), TypeError, "delta"),
        (lambda: residual_norm(X, X.to(ELSEWHERE), X[0], X[0]), ValueError, "delta"),
        (lambda: residual_norm(X, X, X, X[0]), ValueError, "weight"),
        (lambda: residual_norm(X, X, X[0].half(), X[0]), TypeError, "weight"),
        (lambda: residual_norm(X, X, X[0], WIDE[0]), ValueError, "bias"),
        (lambda: residual_norm(X, X, X[0], X[0].to(ELSEWHERE)), ValueError, "bias"),
        (lambda: residual_norm(X, X, X[0], X[0], eps=0.0), ValueError, "eps"),
        (lambda: residual_norm(X, X, X[0], X[0], eps=float("nan")), ValueError, "eps"),
        (lambda: residual_norm(X, X, X[0], X[0], dtype=torch.int64), TypeError, "dtype"),
        (lambda: residual_norm(X, X, X[0], X[0], dtype="float32"), TypeError, "dtype"),
        (lambda: embed_with(x=SEQUENCE.half()), TypeError, "x"),
        (lambda: embed_with(x=X), ValueError, "x"),
        (lambda: embed_with(z=SEQUENCE[:1]), ValueError, "z"),
        (lambda: embed_with(z=SEQUENCE.double()), TypeError, "z"),
        (lambda: embed_with(mu=WIDE), ValueError, "mu"),
        (lambda: embed_with(mu=X.to(ELSEWHERE)), ValueError, "mu"),
        (lambda: embed_with(alpha=INTEGERS), TypeError, "alpha"),
        (lambda: embed_with(mu_ref=None), ValueError, "mu_ref"),
        (lambda: embed_with(alpha_ref=WIDE), ValueError, "alpha_ref"),
        (lambda: embed_with(mu_ref=INTEGERS), TypeError, "mu_ref"),
        (lambda: embed_with(weights=X[0]), ValueError, "weights"),
        (lambda: embed_with(weights=None), ValueError, "weights"),
        (lambda: embed_with(weights=torch.zeros(5).int()), TypeError, "weights"),
        (lambda: embed_with(positions=AT.repeat(2).long()), TypeError, "positions"),
        (lambda: embed_with(positions=AT), ValueError, "positions"),
        (lambda: embed_with(positions=AT.repeat(2).to(ELSEWHERE)), ValueError, "positions"),
        (lambda: embed_with(projection=WIDE), ValueError, "projection"),
        (lambda: embed_with(projection=WIDE[0]), ValueError, "projection"),
        (lambda: embed_with(projection=torch.zeros(3, 4).double()), TypeError, "projection"),
        (lambda: embed_with(embedding=WIDE), ValueError, "embedding"),
        (lambda: embed_with(embedding=torch.zeros(5, 4).half()), TypeError, "embedding"),
        (lambda: embed_with(context=WIDE), ValueError, "context"),
        (lambda: embed_with(context=torch.zeros(4, 4).double()), TypeError, "context"),
        (lambda: embed_with(context=torch.zeros(4, 4, device=ELSEWHERE)), ValueError, "context"),
        (lambda: embed_with(h=WIDE), ValueError, "h"),
        (lambda: embed_with(h=torch.zeros(4, 4).half()), TypeError, "h"),
        (lambda: embed_with(tickets=AT.repeat(2)), ValueError, "tickets"),
        (lambda: embed_with(tickets=AT.long()), TypeError, "tickets"),
        (lambda: use_backend("cuda").__enter__(), ValueError, "name"),
    ],
)
def test_an_error_names_the_argument(call, error, argument):
    # All on one device, whatever the default: what does not fit is what the call says, and nothing else.
    with torch.device("cpu"), pytest.raises(error, match=rf"^{argument}: expected .*; got "):
        call()
