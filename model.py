"""A GPT whose feed-forward layers are plastic, and the encoder that shows it images.

Shapes: B episodes, T steps, S past steps, Q queries, C channels, H heads, D = C / H, Z outputs."""
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn
from torch.nn import functional as F

from plasticity import FastWeights, PlasticLinear, Plasticity, SharedMatrix, UnrolledFastWeights

@dataclass
class Config:
    """The settings of a model: type, meaning, limits, default. train.py makes its flags of them."""
    n_layer: Annotated[int, "blocks", 1] = 2
    n_head: Annotated[int, "attention heads; must divide --d-model", 1] = 4
    d_model: Annotated[int, "channels", 1] = 64
    d_ff: Annotated[int, "width of the plastic feed-forward", 1] = 128
    window: Annotated[int, "attend to the last W steps, itself included; 0: to all", 0] = 0
    position: Annotated[Literal["learned", "rotary"], "absolute, or relative positions"] = "learned"
    block_size: Annotated[int, "learned positions; 0: as many as an episode has", 0] = 0
    filters: Annotated[int, "filters of each convolution", 1] = 64
    rule: Annotated[Literal["none", "hebbian", "gradient"], "none: a plain GPT"] = "hebbian"
    plastic: Annotated[Literal["all", "last"], "in which blocks the feed-forward is"] = "all"
    alpha_init: Annotated[float, "where alpha and beta start", 0, 1000] = 80.0
    eta0: Annotated[float, "eta_0, the largest rate of a write", 0, 1] = 0.02
    max_norm: Annotated[float, "a write with a larger ||D_t|| is scaled down to it", 1e-9] = 1.0
    aux_dim: Annotated[int, "auxiliary outputs of the head, with the gradient rule", 0] = 4
    ablate: Annotated[Literal["none", "eta", "alpha", "backward"], "eta: sigmoid(m_t) is 1; alpha: "
                      "it and beta stay as they start; backward: that, and detach writes"] = "none"
    fast_weights: Annotated[Literal["unrolled", "literal"], "P_t as a sum over past writes, or as "
                            "the equations say: the same numbers, slower"] = "unrolled"
    fold: Annotated[int, "writes until the sum becomes a matrix; only for speed", 1, 1000] = 32

def visible(at, seen, window):
    """Which of the steps `seen` (S) the steps `at` (T) may attend to -> (T, S), True or False."""
    age = at[:, None] - seen  # (T, S): how many steps ago
    return (age >= 0) & (age < (window or math.inf))

class Attention(nn.Module):
    """Multi-head attention of some steps to those before them and among themselves."""

    def __init__(self, config):
        super().__init__()
        C, self.n_head, self.fold = config.d_model, config.n_head, config.fold
        self.qkv = nn.Linear(C, 3 * C)
        with torch.no_grad():  # queries start equal to keys, so that a step first attends to what
            self.qkv.weight[C:2 * C] = self.qkv.weight[:C]  # looks like it: half the updates
        self.proj = nn.Linear(C, C)
        speed = 10000.0 ** -torch.linspace(0, 1, C // config.n_head // 2)  # (D/2), radians a step
        self.register_buffer("speed", speed if config.position == "rotary" else None, False)

    def forward(self, x, at, mask, past=None):
        """x (B, T, C), which stands at (T) and sees what mask (T, S + T) says -> (B, T, C), and the
        next step's past: keys and values (B * H, S, D), old as SharedMatrix or None, and new."""
        qkv = self.qkv(x).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2)  # (B * H, T, D) each
        if self.speed is not None:
            angle = at[:, None] * self.speed  # (T, D/2)
            q, k = rotate(q, angle), rotate(k, angle)
        old, *recent = past or [None]
        if recent:
            k, v = (torch.cat(pair, dim=1) for pair in zip(recent, (k, v)))  # (B * H, S, D)
        S = k.size(1)
        # softmax(q kᵀ / sqrt(D)) v; the fused attention of PyTorch has no second derivative
        scores = torch.cat([old[0].times(q), q @ k.mT], dim=2) if old else q @ k.mT
        weights = (scores / math.sqrt(q.size(2))).masked_fill(~mask, -math.inf).softmax(2)
        out = weights[..., -S:] @ v  # (B * H, T, D)
        if old:
            out = out + old[1].times(weights[..., :-S], back=True)
        if len(at) == 1 and S == self.fold:  # they are folded as fast weights are
            seen = [torch.cat([o.matrix, m], dim=1) for o, m in zip(old, (k, v))] if old else (k, v)
            old, k, v = [SharedMatrix(m, self.fold) for m in seen], k[:, :0], v[:, :0]
        out = out.unflatten(0, (-1, self.n_head)).transpose(1, 2).flatten(2)  # (B, T, C)
        return self.proj(out), (old, k, v)

def rotate(x, angle):
    """Rotary positions (Su et al. 2021): pairs of channels of x (B * H, T, D) turn by (T, D/2)."""
    (a, b), cos, sin = x.chunk(2, dim=-1), angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

class Block(nn.Module):
    def __init__(self, config, plastic):
        super().__init__()
        C, alpha_init = config.d_model, config.alpha_init if plastic else None
        self.norm1 = nn.LayerNorm(C)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(C)
        self.up = PlasticLinear(C, config.d_ff, alpha_init)
        self.down = PlasticLinear(config.d_ff, C, alpha_init)

    def forward(self, x, at, mask, past=None, fast=None):
        """x (B, T, C) -> (B, T, C); keys and values. at, mask, past: see Attention."""
        x, past = self.attend(x, at, mask, past)
        return self.feed_forward(x, fast), past

    def attend(self, x, at, mask, past=None):
        out, past = self.attention(self.norm1(x), at, mask, past)
        return x + out, past

    def feed_forward(self, x, fast=None):
        return x + self.down(F.gelu(self.up(self.norm2(x), fast)), fast)

class Conv4(nn.Module):
    """The few-shot encoder of the literature, images (*, channels, size, size) -> (*, d_out)."""

    def __init__(self, channels, size, filters):
        super().__init__()
        layers = []
        for d_in in (channels, filters, filters, filters):
            layers += [nn.Conv2d(d_in, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters)]
            layers += [nn.MaxPool2d(2), nn.ReLU()]  # pooled first, ReLU has a quarter to do
        # channels_last: the same numbers in the order in which CPUs convolve twice as fast
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.d_out = filters * (size // 16) ** 2

    def forward(self, images):
        x = images.flatten(0, -4).to(self.layers[0].weight.dtype) / 127.5 - 1  # 0..255 -> -1..1
        x = self.layers(x.contiguous(memory_format=torch.channels_last)).flatten(1)
        return x.unflatten(0, images.shape[:-3])

class Embed(nn.Module):
    """What a task shows, as tokens (B, T, C). The task's `kind` says how:
    token    (B, T) integers: a learned vector each
    vector   (B, T, F) features: linear in [features, value or 0, 0 or 1 for a query]
    image    (B, T, channels, size, size): linear in [normed Conv4, 4 * label or 0, 0 or 1]"""

    def __init__(self, task, config):
        super().__init__()
        self.kind, self.n_out = task.kind, task.n_out
        if self.kind == "token":
            self.token = nn.Embedding(task.vocab_size, config.d_model)
            nn.init.zeros_(self.token.weight[0])  # a blank is silent: 20 alike drown all else
        elif self.kind == "vector":
            self.linear = nn.Linear(task.n_features + 2, config.d_model)
            self.linear.bias.data *= task.constant  # LayerNorm shows sizes beside a constant only
        else:
            self.encoder = Conv4(*task.image_shape, config.filters)
            self.norm = nn.LayerNorm(self.encoder.d_out)
            self.linear = nn.Linear(self.encoder.d_out + task.n_out + 1, config.d_model)
            self.classes = nn.Linear(self.encoder.d_out, task.n_classes) if task.n_classes else None

    def features(self, episodes):  # of all x, or of images embedded before: (B, T + Q, F)
        x = torch.cat([episodes.support_x, episodes.query_x], dim=1)  # (B, T + Q, ...)
        return x if self.kind == "vector" else self.norm(x if x.ndim == 3 else self.encoder(x))

    def nearest_prototype(self, episodes):
        """The encoder alone: a query is of the class whose shots' mean is nearest (Snell et al.
        2017, there by distance) -> 10 times their cosine, (B, Q, ways); on CIFAR-FS also which of
        all training classes a layer takes each image for, (B, T + Q, classes), else None."""
        x, y = self.features(episodes), F.one_hot(episodes.support_y)  # (B, T + Q, F), (B, T, ways)
        shots, queries = x.tensor_split([y.size(1)], dim=1)  # (B, T or Q, F)
        means = F.normalize(y.to(x.dtype).mT @ shots, dim=2)  # (B, ways, F)
        return 10 * F.normalize(queries, dim=2) @ means.mT, self.classes and self.classes(x)

    def forward(self, episodes):
        """-> context (B, T, C) and queries (B, Q, C), or None where the task has none."""
        if self.kind == "token":
            return self.token(episodes.support_x), None
        T, y = episodes.support_x.size(1), episodes.support_y  # (B, T, 1) values, or (B, T) labels
        x = self.features(episodes)  # (B, T + Q, F)
        if self.kind == "image":
            y = 4 * F.one_hot(y, self.n_out)  # (B, T, ways); 1 would drown beside the embedding
        y = F.pad(y.to(x.dtype), (0, 1, 0, x.size(1) - T))  # (B, T + Q, 1 or ways, and 1)
        y[:, T:, -1] = 1  # marks a query
        return self.linear(torch.cat([x, y], dim=-1)).tensor_split([T], dim=1)

class Transformer(nn.Module):
    """The plastic Transformer for a task, by a Config. ValueError where their sizes do not fit."""

    def __init__(self, task, config):
        super().__init__()
        C, self.config, self.n_out = config.d_model, config, task.n_out
        if C % config.n_head or (config.position == "rotary" and C // config.n_head % 2):
            raise ValueError(f"--d-model {C} over --n-head {config.n_head}: not whole, or odd")
        n_positions = len(task.step_names) + (task.kind != "token")  # all queries stand at one
        self.block_size = config.block_size or n_positions
        if config.position == "learned" and n_positions > self.block_size:
            raise ValueError(f"{n_positions} steps, but {self.block_size} positions: ask for less, "
                             "or train with a larger --block-size or --position rotary")
        self.plasticity = Plasticity(config.rule, task.n_out, config.eta0, config.max_norm,
                                     config.aux_dim, config.ablate)
        self.embed = Embed(task, config)
        scale = 1.0 if task.kind == "token" else 0.02  # in copying order is the task: be loud
        self.position = (nn.Parameter(scale * torch.randn(self.block_size, C))
                         if config.position == "learned" else None)
        plastic = [config.plastic == "all"] * (config.n_layer - 1) + [True]  # which blocks are
        self.blocks = nn.ModuleList(Block(config, of and config.rule != "none") for of in plastic)
        self.norm = nn.LayerNorm(C)
        self.head = nn.Linear(C, self.plasticity.n_head)
        for name, parameter in self.blocks.named_parameters():
            if config.ablate in ("alpha", "backward") and ("alpha" in name or "beta" in name):
                parameter.requires_grad_(False)

    def forward(self, episodes):
        """Episodes -> answers (B, Q, n_out), or (B, T, n_out) without queries; the FastWeights."""
        context, queries = self.embed(episodes)  # (B, T, C), (B, Q, C)
        make = {"literal": FastWeights, "unrolled": UnrolledFastWeights}[self.config.fast_weights]
        fast = None if self.config.rule == "none" else make(self.plasticity, self.config.fold)
        z, past = self.read_context(context, fast, last_writes=queries is not None)
        if queries is not None:
            z = self.answer_queries(queries, fast, past, context.size(1))
        return z[..., :self.n_out], fast

    def read_context(self, x, fast, last_writes):
        """Read x (B, T, C), write after each step -> z (B, T, Z), each block's keys and values."""
        learning, T = torch.is_grad_enabled(), x.size(1)
        steps = torch.arange(T, device=x.device)
        mask = visible(steps, steps, self.config.window)  # (T, T)
        first, *others = self.blocks
        # what the first block attends to no write has touched: all steps attend there at once
        x, kv = first.attend(self.place(x, steps), steps, mask)
        past, zs = [kv] + [None] * len(others), []
        n = 1 if fast else T  # where nothing is written, all steps are read at once
        # the gradient rule needs the derivatives of its internal loss in evaluation, too
        with torch.set_grad_enabled(learning or self.config.rule == "gradient"):
            for t, x in zip(range(0, T, n), x.split(n, dim=1)):  # (B, n, C)
                x = first.feed_forward(x, fast)
                for i, block in enumerate(others, 1):
                    x, past[i] = block(x, steps[t:t + n], mask[t:t + n, :t + n], past[i], fast)
                z = self.head(self.norm(x))  # (B, n, Z)
                if fast and (last_writes or t < T - 1):
                    fast.write(z)
                zs.append(z if learning else z.detach())
        return torch.cat(zs, dim=1), past

    def answer_queries(self, x, fast, past, T):
        """x (B, Q, C) -> z (B, Q, Z): each query comes alone, right after the T context steps."""
        at = torch.full((x.size(1),), T, device=x.device)  # (Q)
        seen = visible(at, torch.arange(T, device=x.device), self.config.window)  # (Q, T)
        itself = torch.eye(len(at), dtype=torch.bool, device=x.device)
        x, mask = self.place(x, at), torch.cat([seen, itself], dim=1)  # (Q, T + Q)
        for block, kv in zip(self.blocks, past):
            x, _ = block(x, at, mask, kv, fast)
        return self.head(self.norm(x))

    def place(self, x, at):
        return x if self.position is None else x + self.position[at]  # (B, T, C)
