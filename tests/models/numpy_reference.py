"""Sparse autoencoders in NumPy and float64, written from the formulas and not from the library."""

from __future__ import annotations

import numpy as np


def arrays(dictionary) -> dict[str, np.ndarray]:
    """The parameters by name."""
    return {name: tensor.detach().double().numpy() for name, tensor in dictionary.state_dict().items()}


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def pre_activations(cfg, weights, x):
    h = x @ weights["W_E"] + weights["b_E"]
    return h * sigmoid(x @ weights["W_E_glu"] + weights["b_E_glu"]) if cfg.use_glu_encoder else h


def decoder_norm(weights):
    return np.sqrt((weights["W_D"] ** 2).sum(1))


def gate_values(cfg, weights, h):
    return h * decoder_norm(weights) if cfg.sparsity_include_decoder_norm else h


def codes(cfg, weights, x, k, mask, training):
    h = pre_activations(cfg, weights, x)
    q = gate_values(cfg, weights, h)
    match cfg.act_fn:
        case "relu":
            fires = q > 0
        case "jumprelu":
            fires = (q > np.exp(weights["activation_function.log_jumprelu_threshold"])) & (h > 0)
        case "topk":
            fires = largest(q, k)
        case "batchtopk" if training:
            among = np.where(mask[:, None], q, 0.0)
            fires = largest(among.reshape(1, -1), k * int(mask.sum())).reshape(q.shape)
        case "batchtopk":
            fires = (q > weights["activation_function.threshold"]) & (h > 0)
    return np.where(fires, h, 0.0)


def largest(q, k):
    """The k largest positive entries of each row."""
    chosen = np.zeros(q.shape, dtype=bool)
    for row, values in enumerate(q):
        chosen[row, np.argsort(-values, kind="stable")[:k]] = True
    return chosen & (q > 0)


def decode(weights, f, x):
    skipped = x @ weights["W_skip"] if "W_skip" in weights else 0.0
    return f @ weights["W_D"] + weights.get("b_D", 0.0) + skipped


def scale(cfg, x, mask, constant_norm, training):
    """s of each mode, [N, 1] or a number."""
    root = np.sqrt(cfg.d_model)
    norms = np.sqrt((x**2).sum(-1, keepdims=True))
    match cfg.norm_activation:
        case "token-wise":
            return np.divide(root, norms, out=np.ones_like(norms), where=norms > 0)
        case "batch-wise" if training:
            return root / norms[mask].mean()
        case "inference":
            return 1.0
        case _:
            return root / constant_norm


# ------------------------------------------------------------------------------------------------ losses


def reconstruction_loss(x_hat, y, mask):
    return ((x_hat - y) ** 2).sum(1)[mask].mean()


def power_loss(f, norm, mask, p):
    return (((f * norm) ** p).sum(1) ** (1 / p))[mask].mean()


def tanh_loss(f, norm, mask, c):
    return np.tanh(c * f * norm).sum(1)[mask].mean()


def tanh_quad_loss(f, norm, mask, c, s):
    frequency = np.tanh(c * f * norm)[mask].mean(0)
    return (frequency * (1 + frequency / s)).sum()


def preactivation_loss(cfg, weights, x, mask):
    h = pre_activations(cfg, weights, x)
    theta = np.exp(weights["activation_function.log_jumprelu_threshold"])
    if cfg.sparsity_include_decoder_norm:
        per_latent = np.maximum(theta - gate_values(cfg, weights, h), 0)
    else:
        per_latent = np.maximum(theta - h, 0) * decoder_norm(weights)
    return per_latent.sum(1)[mask].mean()


def auxk_loss(cfg, weights, x, y, x_hat, mask, dead, k_aux):
    h = pre_activations(cfg, weights, x)
    q = np.where(dead, gate_values(cfg, weights, h), 0.0)
    e_hat = np.where(largest(q, k_aux), h, 0.0) @ weights["W_D"]
    e = y - x_hat
    variance = ((y[mask] - y[mask].mean(0)) ** 2).sum(1).mean()
    return variance * ((e - e_hat) ** 2).sum(1)[mask].mean() / (e**2).sum(1)[mask].mean()
