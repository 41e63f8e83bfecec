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
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from plasticity import FastWeights, Plasticity, PlasticLinear, SharedMatrix

LABEL_SCALE = 4.0  # one-hot labels times 4 stand on one scale with a layer-normed embedding, see README


class Gates(NamedTuple):
    """What the plastic layers did at each of the T writes of an episode: eta_t and ||D_t||, (B, T) each."""

    eta: torch.Tensor
    d_norm: torch.Tensor


class AllReduce(torch.autograd.Function):
    """The sum over all processes, which sends each of them the sum of their gradients."""

    @staticmethod
    def forward(_, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes. PyTorch's SyncBatchNorm does so on GPUs only."""

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        world, n = dist.get_world_size(), x.numel() // x.size(1)  # every process has as many images
        mean = AllReduce.apply(x.mean((0, 2, 3))) / world  # (channels)
        x = x - mean[:, None, None]
        var = AllReduce.apply(x.square().mean((0, 2, 3))) / world  # (channels)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (world * n / (world * n - 1)), self.momentum)
            self.num_batches_tracked += 1
        return x * (self.weight * (var + self.eps).rsqrt())[:, None, None] + self.bias[:, None, None]


class Conv4(nn.Module):
    """The few-shot encoder of the literature: 4 times (3x3 convolution, batch norm, 2x2 max pooling, ReLU).

    images (N, channels, size, size), uint8 -> (N, d_out), where d_out = filters * (size // 16)².
    """

    def __init__(self, channels, size, filters):
        super().__init__()
        layers = []
        for i in range(4):
            layers += [nn.Conv2d(filters if i else channels, filters, 3, padding=1, bias=False), BatchNorm(filters)]
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


class Cache:
    """The keys and values of the context steps that one block has read step by step; no step that left the window.

    Appending a step to S others copies all of them, so it is appended to at most `fold` others. These then join the
    rest, which does not change for the next `fold` steps and is a plasticity.SharedMatrix, as folded fast weights are.
    """

    def __init__(self, window, fold):
        self.window, self.fold = window, fold
        self.learning = torch.is_grad_enabled()  # else, as for fast weights: no history for the outer gradient
        self.k = self.v = None  # (B, H, S, C/H) each: the last S steps
        self.rest = None  # keys (S', C/H) and, transposed, values (C/H, S') of the S' steps before, for each of (B, H)

    def append(self, k, v):
        """k, v (B, H, 1, C/H): of the present step."""
        if self.k is not None and self.k.size(2) == self.fold and not 0 < self.window <= self.fold:
            k_rest, v_rest = (seen[:, :, -self.window:] for seen in self.past())  # -0: all
            self.rest = SharedMatrix(k_rest, self.fold), SharedMatrix(v_rest.mT, self.fold)
            self.k = self.v = None
        if self.k is not None:
            k, v = torch.cat([self.k, k], dim=2)[:, :, -self.window:], torch.cat([self.v, v], dim=2)[:, :, -self.window:]
        self.k, self.v = k, v

    def attend(self, q, dropout):
        """q (B, H, 1, C/H) of the step just appended -> (B, H, 1, C/H).

        softmax(q kᵀ / sqrt(C/H)) v, written out because the gradient rule differentiates it twice, which PyTorch's
        fused attention cannot do.
        """
        scores = q @ self.k.mT  # (B, H, 1, S)
        if self.rest is not None:
            old = self.rest[0].read(q)  # (B, H, 1, S')
            left = max(0, old.size(3) + scores.size(3) - self.window) if self.window else 0  # how many left the window
            scores = torch.cat([old[..., left:], scores], dim=3)
        weights = dropout((scores / math.sqrt(q.size(-1))).softmax(-1))
        S = self.k.size(2)
        out = weights[..., -S:] @ self.v
        if self.rest is not None:
            out = out + self.rest[1].read(F.pad(weights[..., :-S], (left, 0)))
        if not self.learning:
            self.k, self.v = self.k.detach(), self.v.detach()
        return out

    def past(self):
        """Keys and values (B, H, S, C/H) of all steps held."""
        if self.rest is None:
            return self.k, self.v
        k, v = self.rest[0].matrix, self.rest[1].matrix.mT
        return torch.cat([k, self.k], dim=2), torch.cat([v, self.v], dim=2)


def rotate(x, angle):
    """Rotary positions (Su et al. 2021): pairs of channels of x (B, H, T, D) turn by angle (T, D/2), so that q·k depends
    on how far apart two steps are and not on where they stand."""
    a, b = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention, of many steps at once or of one step to a cache of those before it."""

    def __init__(self, d_model, n_head, dropout):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(d_model, 3 * d_model)
        with torch.no_grad():  # queries start equal to keys, so that a step first attends to what looks like it:
            self.qkv.weight[d_model:2 * d_model] = self.qkv.weight[:d_model]  # matching is found in half the updates
        self.proj = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, angle, mask=None, past=None, cache=None):
        """x (B, T, C) -> (B, T, C), and the keys and values (B, H, T, C/H) of x. angle (T, C/H/2): see rotate; or None.

        Many steps: they attend to `past`, keys and values (B, H, S, C/H) of S steps before them (or None), and among
        themselves as `mask` (T, S + T) says. One step: it attends to all in `cache`, to which it is added.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, C/H) each
        if angle is not None:
            q, k = rotate(q, angle), rotate(k, angle)
        if cache is not None:
            cache.append(k, v)
            out = cache.attend(q, self.dropout)  # (B, H, 1, C/H)
        else:
            keys, values = (k, v) if past is None else (torch.cat(pair, dim=2) for pair in zip(past, (k, v)))
            dropout = self.dropout.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, keys, values, mask, dropout)  # (B, H, T, C/H)
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2))), (k, v)


class Block(nn.Module):
    """Attention, then the feed-forward whose two linear layers are plastic, each behind a layer norm."""

    def __init__(self, d_model, n_head, d_ff, dropout, rule, alpha_init, outer):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, n_head, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.up = PlasticLinear(d_model, d_ff, rule, alpha_init, outer)
        self.down = PlasticLinear(d_ff, d_model, rule, alpha_init, outer)
        self.dropout = nn.Dropout(dropout)

    def attend(self, x, angle, *seen):
        """x (B, T, C) -> (B, T, C), and the keys and values of x. `angle` and `seen`: see Attention."""
        out, kv = self.attention(self.norm1(x), angle, *seen)
        return x + out, kv

    def feed_forward(self, x, fast=None):
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x), fast)), fast))  # (B, T, C)


class Transformer(nn.Module):
    """The plastic Transformer.

    task         gives the sizes of what goes in and out (tasks.py): kind, n_out, context_length, query positions
    rule         none, hebbian or gradient
    window       a step attends to the last `window` steps, itself included; 0: to all
    position     learned: a vector for each of block_size absolute positions; rotary: relative, of any number of steps.
                 The queries of an episode all stand right after its context.
    outer        alpha has rank one; fold: steps between two folds, 0 for none. Neither changes what a rule means.
    alpha_init, eta0, max_norm, aux_dim, ablate    plasticity.py
    Raises ValueError where sizes do not fit.
    """

    def __init__(self, task, rule, n_layer=2, n_head=4, d_model=64, d_ff=128, dropout=0.0, window=0, block_size=None,
                 filters=64, alpha_init=1.0, outer=False, fold=32, eta0=0.2, max_norm=1.0, aux_dim=4, position="learned",
                 ablate="none"):
        super().__init__()
        if d_model % n_head:
            raise ValueError(f"--n-head {n_head} must divide --d-model {d_model}")
        if position == "rotary" and d_model // n_head % 2:
            raise ValueError(f"--position rotary turns pairs of channels: --d-model {d_model} over --n-head {n_head} must be even")
        if window < 0:
            raise ValueError(f"--window {window}: must be 0 (attend to all) or more")
        self.block_size = block_size or task.n_positions
        if position == "learned" and task.n_positions > self.block_size:
            raise ValueError(f"an episode of this task takes {task.n_positions} positions, --block-size gives "
                             f"{self.block_size}: make the episode shorter or --block-size larger")
        self.rule, self.window, self.fold = rule, window, fold
        self.plasticity = Plasticity(rule, task.n_out, eta0, max_norm, aux_dim, ablate)
        self.embed = Embed(task, d_model, filters)
        # as large as the tokens where the order is what is learned (copy), else small: pairs may come in any order
        scale = 1.0 if task.kind == "token" else 0.02
        self.position = nn.Parameter(scale * torch.randn(self.block_size, d_model)) if position == "learned" else None
        # how far rotary positions turn at each step, from a radian to 1/10,000 of it
        speed = 10000.0 ** -torch.linspace(0, 1, d_model // n_head // 2)  # (C/H/2)
        self.register_buffer("speed", speed if position == "rotary" else None, persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(d_model, n_head, d_ff, dropout, rule, alpha_init, outer) for _ in range(n_layer))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, self.plasticity.n_head_rows)
        if ablate in ("alpha", "backward"):
            for name, parameter in self.blocks.named_parameters():
                if name.split(".")[-1].startswith(("alpha", "beta")):
                    parameter.requires_grad_(False)

    def forward(self, episodes, stepwise=False):
        """Read a batch of episodes (tasks.Episodes) -> answers (B, Q, n_out), or (B, T, n_out) without queries; Gates.

        Context steps are read and written one by one. Without plasticity nothing is written, and the context is one
        causal pass (or `stepwise`, to show that both agree). The queries then read in parallel and write nothing.
        """
        context, queries = self.embed(episodes)  # (B, T, C), (B, Q, C)
        T = context.size(1)
        steps = torch.arange(T, device=context.device)
        age = steps[:, None] - steps  # (T, T): how many steps ago
        causal = (age >= 0) & (age < (self.window or T))
        x, angle = self.place(context, steps)
        fast = None if self.rule == "none" else FastWeights(self.plasticity, self.fold)
        if fast is None and not stepwise:
            past = []
            for block in self.blocks:
                x, kv = block.attend(x, angle, causal)
                x = block.feed_forward(x)
                past.append(kv)
            z = self.logits(x)  # (B, T, Z)
        else:
            z, past = self.read_stepwise(x, angle, causal, fast, writes=T if queries is not None else T - 1)
        if queries is not None:
            x, angle = self.place(queries, steps[-1:] + 1)  # (B, Q, C): each stands right after the context
            itself = torch.eye(x.size(1), dtype=torch.bool, device=x.device)
            if fast is not None:
                fast.fold_terms()
            for block, (k, v) in zip(self.blocks, past):
                seen = torch.arange(k.size(2), device=x.device) > k.size(2) - (self.window or math.inf)  # (S): W - 1 of them
                x, _ = block.attend(x, angle, torch.cat([seen.expand(len(itself), -1), itself], dim=1), (k, v))
                x = block.feed_forward(x, fast)
            z = self.logits(x)  # (B, Q, Z)
        gates = None if fast is None else Gates(torch.cat(fast.eta, 1), torch.cat(fast.d_norm, 1))
        return z[..., :self.plasticity.n_out], gates

    def place(self, x, steps):
        """Tokens x (B, T, C) at `steps` (T), or at one for all -> x with its positions, and the angles of rotary ones."""
        if self.position is not None:
            return self.dropout(x + self.position[steps]), None
        return self.dropout(x), steps[:, None] * self.speed

    def read_stepwise(self, x, angle, causal, fast, writes):
        """Read the context x (B, T, C) and write after each of the first `writes` steps, as all that follows reads it.

        -> z (B, T, Z), and each block's keys and values.
        """
        learning = torch.is_grad_enabled()
        caches = [Cache(self.window, self.fold) for _ in self.blocks[1:]]
        # no step's fast weights have touched what the first block attends to: all steps can attend at once
        x, kv = self.blocks[0].attend(x, angle, causal)
        zs = []
        # the gradient rule needs the derivatives of its internal loss in evaluation too
        with torch.set_grad_enabled(learning or self.rule == "gradient"):
            for t, x in enumerate(x.split(1, dim=1)):  # (B, 1, C)
                x = self.blocks[0].feed_forward(x, fast)
                for block, cache in zip(self.blocks[1:], caches):
                    x, _ = block.attend(x, angle if angle is None else angle[t:t + 1], None, None, cache)
                    x = block.feed_forward(x, fast)
                z = self.logits(x)  # (B, 1, Z)
                if fast is not None and t < writes:
                    fast.write(z)
                zs.append(z if learning else z.detach())
        return torch.cat(zs, dim=1), [kv, *(cache.past() for cache in caches)]

    def logits(self, x):
        """z (B, T, Z), in the parameters' precision: bfloat16 autocast should not round eta_t and the internal loss."""
        return self.head(self.norm(x)).to(self.head.weight.dtype)


def build_model(args, task):
    """The model that `args` (the flags of train.py) describes, for `task`. Raises ValueError where sizes do not fit."""
    return Transformer(task, args.rule, args.n_layer, args.n_head, args.d_model, args.d_ff, args.dropout, args.window,
                       args.block_size, args.filters, args.alpha_init, args.alpha == "outer", args.fold, args.eta0,
                       args.max_norm, args.aux_dim, args.position, args.ablate)
