"""Qwen2-VL's forward for training: transformers' own weights, images of one size as one batch, no padding mask.

transformers attends to one image at a time without flash attention, and its 3D convolution is slow; the logits are the
same (tested). Shapes: B images, N patches each (n = N / 4 visual tokens), D channels, T tokens with all visual ones.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qvq_serve.demo.batch import Batch

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the image processor."""
PATCH, MERGE = 14, 2
VISION_THETA = 10_000.0


@cache
def normalising(device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and summand of each channel, (3, 1, 1); kept, since a copy to the GPU waits for all before it."""
    mean, std = (torch.tensor(part)[:, None, None] for part in (MEAN, STD))
    return (1 / (255 * std)).to(device), (-mean / std).to(device)


@cache
def axes(sections: tuple[int, ...], device: torch.device) -> Tensor:
    """Which of M-RoPE's three axes turns each pair of channels."""
    return torch.arange(3).repeat_interleave(torch.tensor(sections)).to(device)


def patches(pixels: Tensor, size: tuple[int, int], noise: float = 0.0) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, N, 588): brought to `size` = (height, width), normalised, in the order of merging.

    The image processor gives each patch twice, for two frames; here it stands once, and `vision` adds up the weights.
    """
    images = pixels.permute(0, 3, 1, 2)
    if tuple(images.shape[2:]) != size:
        # On the CPU as the processor does it, in bytes; a GPU knows no such resizing, and rounds only at the end.
        images = F.interpolate(images.float() if images.is_cuda else images, size, mode="bicubic", antialias=True)
        images = images.float().round_().clamp_(0, 255)
    images = images.float()
    if noise:
        images = images + torch.randn_like(images) * (torch.rand(len(images), 1, 1, 1, device=images.device) * noise)
    scale, shift = normalising(images.device)
    images = images * scale + shift
    high, wide = size[0] // PATCH // MERGE, size[1] // PATCH // MERGE
    images = images.reshape(-1, 3, high, MERGE, PATCH, wide, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return images.reshape(len(images), high * wide * MERGE * MERGE, 3 * PATCH * PATCH)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the last axis."""
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat((-two, one), -1) * sin


def vision_angles(size: tuple[int, int], head: int, device: torch.device) -> Tensor:
    """(N, head) angles of the patches' rows and columns, in the order of merging."""
    high, wide = size[0] // PATCH, size[1] // PATCH
    rows = torch.arange(high, device=device)[:, None].expand(high, wide)
    columns = torch.arange(wide, device=device)[None].expand(high, wide)
    order = [
        one.reshape(high // MERGE, MERGE, wide // MERGE, MERGE).permute(0, 2, 1, 3).flatten() for one in (rows, columns)
    ]
    speed = VISION_THETA ** -(torch.arange(0, head // 2, 2, device=device) / (head // 2))
    half = torch.cat([one[:, None] * speed for one in order], -1)
    return torch.cat((half, half), -1)


def vision_block(block: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, N, D) -> (B, N, D)."""
    (batch, count, width), heads = x.shape, block.attn.num_heads
    q, k, v = block.attn.qkv(block.norm1(x)).view(batch, count, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    q, k = turned(q, cos, sin).to(v.dtype), turned(k, cos, sin).to(v.dtype)
    seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, width)
    x = x + block.attn.proj(seen)
    hidden = block.mlp.fc1(block.norm2(x))
    return x + block.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))


def normed(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.variance_epsilon)


def text_block(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D), causal."""
    batch, count, width = x.shape
    attention, y = layer.self_attn, normed(layer.input_layernorm, x)
    q, k, v = (
        part(y).view(batch, count, -1, attention.head_dim).transpose(1, 2)
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = turned(q, cos, sin).to(v.dtype), turned(k, cos, sin).to(v.dtype)
    k, v = (part.repeat_interleave(attention.num_key_value_groups, 1) for part in (k, v))
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + attention.o_proj(seen.transpose(1, 2).reshape(batch, count, width))
    y = normed(layer.post_attention_layernorm, x)
    return x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))


def spread(image_at: Tensor, visual: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Where each of T = tokens + visual - 1 places comes from, (B, T): its index in the text, and in the image."""
    place = torch.arange(tokens + visual - 1, device=image_at.device)[None]
    inside = place - image_at[:, None]
    return torch.where(inside < 0, place, torch.where(inside < visual, image_at[:, None], place - visual + 1)), inside


def positions(image_at: Tensor, grid: tuple[int, int], tokens: int) -> Tensor:
    """(3, B, T): M-RoPE's time, row and column of each token, for one image of `grid` = rows x columns."""
    rows, columns = grid
    _, inside = spread(image_at, rows * columns, tokens)
    place = torch.arange(inside.shape[1], device=image_at.device)[None]
    visual = (inside >= 0) & (inside < rows * columns)
    plain = torch.where(inside < 0, place, place - rows * columns + max(rows, columns))
    start = image_at[:, None]
    return torch.stack([
        torch.where(visual, start, plain),
        torch.where(visual, start + inside // columns, plain),
        torch.where(visual, start + inside % columns, plain),
    ])  # fmt: skip


class Forward:
    """A model's forward; `fused` compiles the blocks."""

    def __init__(self, model: Any, fused: bool = False) -> None:
        self.model, self.text, self.vision = model, model.config.text_config, model.config.vision_config
        self.vision_block: Callable[..., Tensor] = vision_block
        self.text_block: Callable[..., Tensor] = text_block
        if fused:
            self.vision_block = torch.compile(vision_block, dynamic=True)
            self.text_block = torch.compile(text_block, dynamic=True)

    def images(self, flat: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, N, 588) -> (B, n, D), one for each visual token."""
        visual = self.model.model.visual
        kernel = visual.patch_embed.proj.weight.sum(2).flatten(1)  # both frames are the same image
        x = F.linear(flat, kernel)
        angles = vision_angles(size, self.vision.embed_dim // self.vision.num_heads, flat.device)
        cos, sin = angles.cos(), angles.sin()
        for block in visual.blocks:
            x = self.vision_block(block, x, cos, sin)
        x = visual.merger.ln_q(x).view(x.shape[0], -1, x.shape[-1] * MERGE * MERGE)
        merged: Tensor = visual.merger.mlp(x)
        return merged

    def hidden(self, batch: Batch, noise: float = 0.0) -> Tensor:
        """(B, T, D) before the head."""
        grid = (batch.size[0] // PATCH // MERGE, batch.size[1] // PATCH // MERGE)
        with torch.no_grad():
            flat = patches(batch.pixels, batch.size, noise)
        seen, language = self.images(flat, batch.size), self.model.model.language_model
        source, _ = spread(batch.image_at, grid[0] * grid[1], batch.ids.shape[1])
        words = language.embed_tokens(batch.ids.gather(1, source))
        at = batch.image_at[:, None] + torch.arange(seen.shape[1], device=seen.device)
        # A scatter goes back as a gather, without sums over the same place.
        x = words.scatter(1, at[..., None].expand_as(seen), seen.to(words.dtype))
        rope = self.text.rope_parameters
        half = self.text.hidden_size // self.text.num_attention_heads // 2
        axis = axes(tuple(rope["mrope_section"]), x.device)
        speed = rope["rope_theta"] ** -(torch.arange(half, device=x.device) / half)
        angles = positions(batch.image_at, grid, batch.ids.shape[1])[axis].permute(1, 2, 0) * speed  # (B, T, half)
        angles = torch.cat((angles, angles), -1)[:, None]
        cos, sin = angles.cos(), angles.sin()
        for layer in language.layers:
            x = self.text_block(layer, x, cos, sin)
        return normed(language.norm, x)

    def logits(self, batch: Batch, noise: float = 0.0) -> Tensor:
        """(M, V) at the places that foretell the batch's targets."""
        x = self.hidden(batch, noise)
        visual = x.shape[1] - batch.ids.shape[1]
        places = batch.rows * x.shape[1] + batch.columns + visual - 1
        found: Tensor = self.model.lm_head(x.flatten(0, 1).index_select(0, places))
        return found
