"""A GPT-style decoder whose feed-forward layers are plastic, and the Conv-4 image encoder.

    Embed        what an episode shows -> tokens (B, T, C)
    Attention    causal, optionally limited to a window of the last W steps
    Block        x + attention(norm(x)), then x + feed-forward(norm(x)), the feed-forward made of two PlasticLinear
    Transformer  embeds, reads and writes the context step by step, then reads all queries in one parallel pass

Shapes: B episodes, T steps, Q queries, C channels (d_model), H heads, S past steps, Z outputs of the head.
"""
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from plasticity import FastWeights, Plasticity, PlasticLinear

LABEL_SCALE = 4.0  # one-hot labels times 4 stand on one scale with a layer-normed embedding, see README


class Gates(NamedTuple):
    """What the plastic layers did at each of the T writes of an episode: eta_t and ||D_t||, (B, T) each."""

    eta: torch.Tensor
    d_norm: torch.Tensor


class Conv4(nn.Module):
    """The few-shot encoder of the literature: 4 times (3x3 convolution, batch norm, 2x2 max pooling, ReLU).

    images (N, channels, size, size), uint8 -> (N, d_out), where d_out = filters * (size // 16)².
    """

    def __init__(self, channels, size, filters):
        super().__init__()
        layers = []
        for i in range(4):
            layers += [nn.Conv2d(filters if i else channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters)]
            layers += [nn.MaxPool2d(2), nn.ReLU()]  # pooling and ReLU commute; pooled first, ReLU has a quarter to do
        # channels_last: the same numbers in the order in which CPU convolutions are about twice as fast
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.d_out = filters * (size // 16) ** 2

    def forward(self, images):
        x = images.to(self.layers[0].weight.dtype) / 127.5 - 1  # 0..255 -> -1..1
        return self.layers(x.contiguous(memory_format=torch.channels_last)).flatten(1)  # (N, d_out)


class Embed(nn.Module):
    """Tokens (B, T, C) of what a task shows; the task's `kind` says which of three.

    token    (B, T) integers (copy): a learned vector each
    vector   (B, T, F) features (cue, regression): linear in [features, value, query flag]
    image    (B, T, channels, size, size) uint8: linear in [layer-normed Conv-4 embedding, 4 * one-hot label, query flag]

    A query's value or label is 0 and its flag 1.
    """

    def __init__(self, task, d_model, filters):
        super().__init__()
        self.kind, self.n_out = task.kind, task.n_out
        if self.kind == "token":
            self.token = nn.Embedding(task.vocab_size, d_model)
        elif self.kind == "vector":
            self.linear = nn.Linear(task.n_features + 2, d_model)
        else:
            self.encoder = Conv4(*task.image_shape, filters)
            self.norm = nn.LayerNorm(self.encoder.d_out)
            self.linear = nn.Linear(self.encoder.d_out + self.n_out + 1, d_model)

    def forward(self, episodes):
        """-> context tokens (B, T, C) and query tokens (B, Q, C), or None where the task has no queries."""
        if self.kind == "token":
            return self.token(episodes.support_x), None
        n_support = episodes.support_x.size(1)
        x = torch.cat([episodes.support_x, episodes.query_x], dim=1)  # (B, T + Q, ...)
        y = episodes.support_y  # (B, T, 1) values, or (B, T) labels
        if self.kind == "image":
            x = self.norm(self.encoder(x.flatten(0, 1))).unflatten(0, x.shape[:2])  # (B, T + Q, d_out)
            y = LABEL_SCALE * F.one_hot(y, self.n_out)  # (B, T, ways)
        y = F.pad(y.to(x.dtype), (0, 0, 0, x.size(1) - n_support))  # (B, T + Q, 1 or ways), 0 at the queries
        flag = torch.zeros_like(y[..., :1])  # (B, T + Q, 1)
        flag[:, n_support:] = 1
        tokens = self.linear(torch.cat([x, y, flag], dim=-1))  # (B, T + Q, C)
        return tokens[:, :n_support], tokens[:, n_support:]


class Attention(nn.Module):
    """Multi-head attention of a chunk of steps to the steps before the chunk and, as `mask` says, to its own.

    With a window W > 0 a step sees the last W steps, itself included.
    """

    def __init__(self, d_model, n_head, window, dropout):
        super().__init__()
        self.n_head, self.window = n_head, window
        self.qkv = nn.Linear(d_model, 3 * d_model)
        with torch.no_grad():  # queries start equal to keys, so that a step first attends to what looks like it:
            self.qkv.weight[d_model:2 * d_model] = self.qkv.weight[:d_model]  # matching is found in half the updates
        self.proj = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, past, mask):
        """x (B, T, C); past: keys and values (B, H, S, C/H) of the S steps before, or None; mask (T, T): may attend,
        or None for a single step.

        -> (B, T, C), and the keys and values with those of the chunk appended.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, C/H) each
        if past is not None:
            start = max(0, past[0].size(2) - self.window + 1) if self.window else 0  # the window's W - 1 past steps
            k = torch.cat([past[0][:, :, start:], k], dim=2)  # (B, H, S + T, C/H)
            v = torch.cat([past[1][:, :, start:], v], dim=2)
        # softmax(q kᵀ / sqrt(C/H)) v, written out because the gradient rule differentiates it twice,
        # which PyTorch's fused attention cannot do
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S + T)
        if mask is not None:
            mask = F.pad(mask, (k.size(2) - x.size(1), 0), value=True)  # (T, S + T): all of the past, then the chunk
            scores = scores.masked_fill(~mask, -math.inf)
        weights = self.dropout(scores.softmax(-1))
        out = (weights @ v).transpose(1, 2).flatten(2)  # (B, T, C)
        return self.dropout(self.proj(out)), (k, v)


class Block(nn.Module):
    """Attention, then the feed-forward whose two linear layers are plastic, each behind a layer norm."""

    def __init__(self, d_model, n_head, d_ff, window, dropout, rule, alpha_init):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, n_head, window, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.up = PlasticLinear(d_model, d_ff, rule, alpha_init)
        self.down = PlasticLinear(d_ff, d_model, rule, alpha_init)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, past, mask, fast):
        attended, past = self.attention(self.norm1(x), past, mask)
        x = x + attended  # (B, T, C)
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x), fast)), fast)), past


class Transformer(nn.Module):
    """The plastic Transformer.

    task         gives the sizes of what goes in and out (tasks.py): kind, n_out, context_length, query positions
    rule         none, hebbian or gradient
    window       a step attends to the last `window` steps, itself included; 0: to all
    block_size   learned absolute positions; the queries of an episode all stand right after its context
    alpha_init, eta0, max_norm, aux_dim    plasticity.py
    Raises ValueError where sizes do not fit.
    """

    def __init__(self, task, rule, n_layer=2, n_head=4, d_model=64, d_ff=128, dropout=0.0, window=0, block_size=None,
                 filters=64, alpha_init=1.0, eta0=0.2, max_norm=1.0, aux_dim=4):
        super().__init__()
        if d_model % n_head:
            raise ValueError(f"--n-head {n_head} must divide --d-model {d_model}")
        if window < 0:
            raise ValueError(f"--window {window}: must be 0 (attend to all) or more")
        self.block_size = block_size or task.n_positions
        if task.n_positions > self.block_size:
            raise ValueError(f"an episode of this task takes {task.n_positions} positions, --block-size gives "
                             f"{self.block_size}: make the episode shorter or --block-size larger")
        self.rule, self.window = rule, window
        self.plasticity = Plasticity(rule, task.n_out, eta0, max_norm, aux_dim)
        self.embed = Embed(task, d_model, filters)
        # as large as the tokens where the order is what is learned (copy), else small: pairs may come in any order
        scale = 1.0 if task.kind == "token" else 0.02
        self.position = nn.Parameter(scale * torch.randn(self.block_size, d_model))  # (block_size, C)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(d_model, n_head, d_ff, window, dropout, rule, alpha_init) for _ in range(n_layer))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, self.plasticity.n_head_rows)

    def forward(self, episodes, stepwise=False):
        """Read a batch of episodes (tasks.Episodes) -> answers (B, Q, n_out), or (B, T, n_out) without queries; Gates.

        Context steps are read and written one by one. Without plasticity nothing is written, and the context is one
        causal pass (or `stepwise`, to show that both agree). The queries then read in parallel and write nothing.
        """
        context, queries = self.embed(episodes)  # (B, T, C), (B, Q, C)
        T = context.size(1)
        context = self.dropout(context + self.position[:T])
        fast = None if self.rule == "none" else FastWeights(self.plasticity)
        chunk = T if fast is None and not stepwise else 1  # steps read at a time
        caches = [None] * len(self.blocks)
        steps = torch.arange(chunk, device=context.device)
        age = steps[:, None] - steps  # (chunk, chunk): how many steps ago
        causal = (age >= 0) & (age < (self.window or T)) if chunk > 1 else None
        outputs = []
        # the gradient rule needs the derivatives of its internal loss in evaluation too
        with torch.set_grad_enabled(torch.is_grad_enabled() or self.rule == "gradient"):
            for t, x in enumerate(context.split(chunk, dim=1)):
                z, caches = self.read(x, caches, causal, fast)  # (B, chunk, Z)
                outputs.append(z[..., :self.plasticity.n_out])
                if fast is not None and (queries is not None or t + 1 < T):  # nobody reads a last step's write
                    fast.write(z)
                    if not fast.learning:
                        caches = [(k.detach(), v.detach()) for k, v in caches]
        if queries is None:
            out = torch.cat(outputs, dim=1)  # (B, T, n_out)
        else:
            queries = self.dropout(queries + self.position[T])  # (B, Q, C): each stands right after the context
            itself = torch.eye(queries.size(1), dtype=torch.bool, device=queries.device)
            z, _ = self.read(queries, caches, itself, fast)  # (B, Q, Z)
            out = z[..., :self.plasticity.n_out]
        gates = None if fast is None else Gates(torch.cat(fast.eta, 1), torch.cat(fast.d_norm, 1))
        return out if torch.is_grad_enabled() else out.detach(), gates

    def read(self, x, caches, mask, fast):
        """One pass through all layers: x (B, T, C) -> z (B, T, Z), and each block's keys and values."""
        new = []
        for block, past in zip(self.blocks, caches):
            x, past = block(x, past, mask, fast)
            new.append(past)
        # in the parameters' precision, so that bfloat16 autocast does not round eta_t and the internal loss
        return self.head(self.norm(x)).to(self.head.weight.dtype), new


def build_model(args, task):
    """The model that `args` (the flags of train.py) describes, for `task`. Raises ValueError where sizes do not fit."""
    return Transformer(task, args.rule, args.n_layer, args.n_head, args.d_model, args.d_ff, args.dropout, args.window,
                       args.block_size, args.filters, args.alpha_init, args.eta0, args.max_norm, args.aux_dim)
