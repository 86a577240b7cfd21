"""The needle model: a Llama of few layers whose parameter names are those of Hugging Face's Llama.

Shapes use B sequences, T tokens, H query heads, G KV heads, D head_dim. The last layer runs only
for the positions that are asked for, since nobody reads the others.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class NeedleConfig:
    """The fields of a Hugging Face Llama config that this model uses, under their names."""

    vocab_size: int = 1040
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e7
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 32768


def rope_angles(positions: Tensor, config: NeedleConfig) -> tuple[Tensor, Tensor]:
    """The cos and sin [..., T, D] of int positions [..., T], in the half-split layout."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=positions.device) / config.head_dim
    angles = positions[..., None].double() * config.rope_theta**-half
    angles = torch.cat((angles, angles), -1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE to [..., T, D]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Window(NamedTuple):
    """How far the layers before the last see in training; see `windowed`."""

    size: int
    stride: int = 0
    """0: nothing beyond the window and the one before."""
    offset: int = 0


class Attention(nn.Module):
    """The projections of grouped-query attention; who attends to what is the caller's business."""

    def __init__(self, config: NeedleConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, query_size, bias=False)
        self.k_proj = nn.Linear(hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, hidden, bias=False)

    def heads(self, projected: Tensor) -> Tensor:
        """Splits heads: [B, T, n * D] -> [B, n, T, D]."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def output(self, attended: Tensor) -> Tensor:
        """Joins and projects heads: [B, H, T, D] -> [B, T, hidden]."""
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: NeedleConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm Llama layer."""

    def __init__(self, config: NeedleConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-RoPE q [B, H, T, D] and k, v [B, G, T, D] of x [B, T, hidden]."""
        normed, attn = self.input_layernorm(x), self.self_attn
        return tuple(attn.heads(p(normed)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream after this layer, from attention's output [B, H, T, D]."""
        x = x + self.self_attn.output(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: NeedleConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class NeedleModel(nn.Module):
    """Tied embeddings, and two layers or more: the first copies neighbours, the last retrieves."""

    def __init__(self, config: NeedleConfig | None = None) -> None:
        super().__init__()
        self.config = config or NeedleConfig()
        if self.config.num_hidden_layers < 2:
            raise ValueError(f"num_hidden_layers must be at least 2, got {self.config.num_hidden_layers}")
        self.model = Trunk(self.config)
        _init_weights(self)

    def logits(self, x: Tensor) -> Tensor:
        """Scores of the next token: [..., hidden] -> [..., vocab]."""
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def forward(
        self, token_ids: Tensor, positions: Tensor, wanted: Tensor, window: Window | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits at the wanted places, and what the landmark loss needs of the last layer.

        Args:
            token_ids: int64 [B, T].
            positions: int64 [B, T], rising along T (training may leave gaps).
            wanted: int64 [B, Q], indices along T.
            window: if set, layers before the last use `windowed`; a shortcut for training at great length.

        Returns:
            logits [B, Q, vocab], post-RoPE queries [B, H, Q, D] and keys [B, G, T, D].
        """
        *before, last = self.model.layers
        cos, sin = (a[:, None] for a in rope_angles(positions, self.config))
        x = self.model.embed_tokens(token_ids)
        for layer in before:
            q, k, v = layer.project(x)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            x = layer.finish(x, causal(q, k, v) if window is None else windowed(q, k, v, window))

        rows = wanted[..., None].expand(-1, -1, x.shape[-1])
        normed, attn = last.input_layernorm(x), last.self_attn
        k, v = attn.heads(attn.k_proj(normed)), attn.heads(attn.v_proj(normed))
        q = attn.heads(attn.q_proj(normed.gather(1, rows)))
        rows_cos, rows_sin = (a.gather(2, wanted[:, None, :, None].expand(-1, -1, -1, a.shape[-1])) for a in (cos, sin))
        q, k = rotate(q, rows_cos, rows_sin), rotate(k, cos, sin)
        seen = torch.arange(x.shape[1], device=x.device) <= wanted[..., None]
        attended = F.scaled_dot_product_attention(q, *_repeat(q, k, v), attn_mask=seen[:, None])
        return self.logits(last.finish(x.gather(1, rows), attended)), q, k


def _repeat(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q [B, H, T, D] over k, v [B, G, T, D]."""
    return F.scaled_dot_product_attention(q, *_repeat(q, k, v), is_causal=True)


def windowed(q: Tensor, k: Tensor, v: Tensor, window: Window) -> Tensor:
    """Causal attention, exact nearby and sampled far away; same shapes as `causal`.

    A token sees its own window and the one before exactly, and of what lies further back every
    stride-th token, counted stride times. A head that attends nearby gets the same result, and
    one that starts to attend far away is punished for it, at a cost that is linear in the length.
    """
    size, num_tokens = window.size, q.shape[2]
    if num_tokens <= 2 * size or num_tokens % size:
        return causal(q, k, v)
    k, v = _repeat(q, k, v)

    def windows(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, size))

    def with_previous(x: Tensor) -> Tensor:
        return torch.cat((F.pad(windows(x), (0, 0, 0, 0, 1, 0))[:, :, :-1], windows(x)), 3)

    def arange(*bounds: int) -> Tensor:
        return torch.arange(*bounds, device=q.device)

    rows, columns = arange(size)[:, None] + size, arange(2 * size)
    hidden = (columns > rows).expand(num_tokens // size, -1, -1).clone()
    hidden[0, :, :size] = True
    scale = q.shape[-1] ** -0.5
    near = windows(q) @ with_previous(k).transpose(-1, -2) * scale
    scores = near.masked_fill(hidden, -1e9)
    if not window.stride:
        return (scores.softmax(-1) @ with_previous(v)).flatten(2, 3)

    sampled = arange(window.offset, num_tokens, window.stride)
    starts = arange(num_tokens // size)[:, None, None] * size - size
    far = windows(q @ k[:, :, sampled].transpose(-1, -2) * scale + math.log(window.stride))
    scores = torch.cat((scores, far.masked_fill(sampled >= starts, -1e9)), -1)
    near, far = scores.softmax(-1).split((2 * size, len(sampled)), -1)
    return (near @ with_previous(v)).flatten(2, 3) + far.flatten(2, 3) @ v[:, :, sampled]


@torch.no_grad()
def _init_weights(model: NeedleModel, constant: float = 1.2, sharpness: float = 6.0) -> None:
    """Random weights, except that head h of layer 0 starts out looking h + 1 tokens back.

    Every embedding shares a constant in dimension 0. Layer 0 turns it into a key that is the same
    for all tokens and into a query rotated back by the head's offset, so that the score over the
    distance d is a sum of cos(theta_i * (d - offset)): a peak at the offset. Found by gradient
    alone, this takes most of the training.
    """
    config, deviation = model.config, 0.2
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    for layer in model.model.layers:  # or the token itself drowns in what attention adds to it
        layer.self_attn.o_proj.weight.mul_(0.2)
        layer.mlp.down_proj.weight.mul_(0.2)
    embedding = model.model.embed_tokens.weight
    nn.init.normal_(embedding, std=deviation)
    embedding[:, 0] = constant
    square = constant**2 + deviation**2 * (config.hidden_size - 1)
    normed_constant = constant / math.sqrt(square / config.hidden_size)

    half, num_pairs = config.head_dim // 2, int(config.head_dim * 0.3125)
    theta = config.rope_theta ** -(torch.arange(num_pairs) / half)
    weight = math.sqrt(sharpness * config.head_dim**0.5) / normed_constant
    attn = model.model.layers[0].self_attn
    attn.q_proj.weight.mul_(0.25)
    attn.k_proj.weight.mul_(0.25)
    queries = attn.q_proj.weight.view(-1, config.head_dim, config.hidden_size)
    keys = attn.k_proj.weight.view(-1, config.head_dim, config.hidden_size)
    queries[:, :, 0] = keys[:, :, 0] = 0.0
    keys[:, :num_pairs, 0] = weight
    for head, query in enumerate(queries):
        angle = theta * (head + 1)
        query[:num_pairs, 0] = weight * angle.cos()
        query[half : half + num_pairs, 0] = -weight * angle.sin()
