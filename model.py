"""A GPT whose feed-forward layers are plastic, and the encoder of its images.

Shapes: B episodes, T steps, S steps seen, Q queries, C channels (d_model), H heads,
D = C / H, E features of an image or a vector, Z outputs of the last layer.
"""
import math
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from plasticity import PlasticLinear, Plasticity, UnrolledFastWeights

RULES = ("none", "hebbian", "gradient")

def setting(default, help, low=None, high=10**6, choices=None):
    """A field, and its flag (train.add_flags). A number has limits."""
    return field(default=default, metadata=dict(help=help, limits=(low, high), choices=choices))

@dataclass
class Config:
    """The settings of a model. train.py passes its own, which have the same names."""
    n_layer: int = setting(2, "number of blocks", 1, 1000)
    n_head: int = setting(4, "number of attention heads; must divide --d-model", 1)
    d_model: int = setting(64, "channels of a token", 1)
    d_ff: int = setting(128, "channels inside a feed-forward layer", 1)
    window: int = setting(0, "number of steps that a step attends to; 0: all", 0)
    filters: int = setting(64, "filters per convolution of the image encoder", 1, 1000)
    rule: str = setting("hebbian", "what is written (none: nothing)", choices=RULES)
    plastic: str = setting("all", "which blocks are plastic", choices=("all", "last"))
    alpha_init: float = setting(80.0, "initial value of alpha and beta", 0, 1000)
    eta0: float = setting(0.02, "eta_0, the upper limit of eta_t", 1e-9, 1)
    max_norm: float = setting(1.0, "norm above which a write is scaled down", 1e-9, 1e18)
    aux_dim: int = setting(4, "auxiliary outputs, for the gradient rule", 0, 1000)
    ablate: str = setting("none", "eta: sigmoid(m_t) is 1. alpha: alpha and beta are not "
                          "trained. backward: writes pass no gradient, and alpha, beta and "
                          "w_out are not trained", choices=("none", "eta", "alpha", "backward"))

class Attention(nn.Module):
    """Steps attend to earlier steps and to one another, with several heads."""
    def __init__(self, config):
        super().__init__()
        C = config.d_model
        self.n_head = config.n_head
        self.qkv = nn.Linear(C, 3 * C)
        self.proj = nn.Linear(C, C)
        # Queries and keys start with equal weights: similar steps attend to each other.
        with torch.no_grad():
            self.qkv.weight[C:2 * C] = self.qkv.weight[:C]

    def forward(self, x, mask, past=None):
        """x (B, T, C) -> (B, T, C), and the keys and values (B * H, S, D) of all steps
        so far. mask (T, S) is true where a step may attend."""
        qkv = self.qkv(x).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2)  # (B * H, T, D) each
        if past is not None:
            k = torch.cat([past[0], k], dim=1)  # (B * H, S, D)
            v = torch.cat([past[1], v], dim=1)

        # softmax(q kᵀ / sqrt(D)) v; fused attention lacks the gradient rule's 2nd derivative
        scores = torch.bmm(q, k.mT) / math.sqrt(q.size(2))  # (B * H, T, S)
        weights = scores.masked_fill(~mask, -math.inf).softmax(2)
        heads = torch.bmm(weights, v).unflatten(0, (-1, self.n_head))  # (B, H, T, D)
        return self.proj(heads.transpose(1, 2).flatten(2)), (k, v)

class Block(nn.Module):
    """Attention, then a feed-forward whose two linear layers may be plastic."""
    def __init__(self, config, plastic):
        super().__init__()
        C = config.d_model
        alpha_init = config.alpha_init if plastic else None
        self.norm1 = nn.LayerNorm(C)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(C)
        self.up = PlasticLinear(C, config.d_ff, alpha_init)
        self.down = PlasticLinear(config.d_ff, C, alpha_init)

    def attend(self, x, mask, past=None):
        """x (B, T, C) -> (B, T, C); keys and values. mask, past: see Attention."""
        attended, past = self.attention(self.norm1(x), mask, past)
        return x + attended, past

    def feed_forward(self, x, fast=None):
        """x (B, T, C) -> (B, T, C), read with the FastWeights `fast`, if any."""
        hidden = F.gelu(self.up(self.norm2(x), fast))  # (B, T, d_ff)
        return x + self.down(hidden, fast)

class Transformer(nn.Module):
    """A plastic Transformer for a task. ValueError if --n-head does not fit."""
    def __init__(self, task, config):
        super().__init__()
        C = config.d_model
        if C % config.n_head:
            raise ValueError(f"--n-head {config.n_head} does not divide --d-model {C}")
        self.config = config
        self.n_out = task.n_out
        self.fast_weights = UnrolledFastWeights  # FastWeights is the same, slower.
        self.plasticity = Plasticity(config.rule, task.n_out, config.eta0, config.max_norm,
                                     config.aux_dim, config.ablate)
        self.embed = Embed(task, config)

        if task.kind == "token":  # Positions start as large as tokens: order matters.
            self.position = nn.Parameter(torch.randn(len(task.step_names), C))
        else:  # All queries share one more position, after the context.
            self.position = nn.Parameter(0.02 * torch.randn(len(task.step_names) + 1, C))
        self.blocks = nn.ModuleList()
        for i in range(config.n_layer):
            last = i == config.n_layer - 1
            plastic = config.rule != "none" and (last or config.plastic == "all")
            self.blocks.append(Block(config, plastic))
        self.norm = nn.LayerNorm(C)
        self.head = nn.Linear(C, self.plasticity.n_outputs)
        if config.ablate in ("alpha", "backward"):
            for layer in self.plastic_layers():
                layer.alpha.requires_grad_(False)
                layer.beta.requires_grad_(False)

    def plastic_layers(self):
        layers = [layer for block in self.blocks for layer in (block.up, block.down)]
        return [layer for layer in layers if layer.plastic]

    def forward(self, episodes, write=True):
        """-> answers (B, Q, n_out), or (B, T, n_out) without queries; FastWeights or None."""
        context, queries = self.embed(episodes)  # (B, T, C); (B, Q, C) or None
        fast = None
        if write and self.config.rule != "none":
            fast = self.fast_weights(self.plasticity)
        z, past = self.read_context(context, fast, write_last=queries is not None)
        if queries is not None:
            z = self.answer_queries(queries, fast, past)  # (B, Q, Z)
        return z[..., :self.n_out], fast

    def read_context(self, x, fast, write_last):
        """Read and write step by step: x (B, T, C) -> z (B, T, Z); (keys, values) per block."""
        T = x.size(1)
        x = x + self.position[:T]
        steps = torch.arange(T, device=x.device)
        mask = visible(steps, steps, self.config.window)  # (T, T)

        # The first attention sees only the input, which no write changes: do all steps.
        x, first_past = self.blocks[0].attend(x, mask)
        past = [first_past] + [None] * (len(self.blocks) - 1)
        if fast is None:  # Without writes, all steps pass all blocks at once.
            return self.run_blocks(x, mask, past, None), past

        zs = []
        training = torch.is_grad_enabled()
        # The gradient rule differentiates its internal loss in evaluation, too.
        with torch.set_grad_enabled(training or self.config.rule == "gradient"):
            for t, x_t in enumerate(x.split(1, dim=1)):  # x_t (B, 1, C)
                z = self.run_blocks(x_t, mask[t:t + 1, :t + 1], past, fast)  # (B, 1, Z)
                if t < T - 1 or write_last:  # Only queries read the last write.
                    fast.write(z)
                zs.append(z if training else z.detach())
        return torch.cat(zs, dim=1), past

    def run_blocks(self, x, mask, past, fast):
        """x (B, T, C) from the first block's attention -> z (B, T, Z). `past` grows."""
        for i, block in enumerate(self.blocks):
            if i > 0:
                x, past[i] = block.attend(x, mask, past[i])
            x = block.feed_forward(x, fast)
        return self.head(self.norm(x))

    def answer_queries(self, x, fast, past):
        """x (B, Q, C) -> z (B, Q, Z). Each query comes alone, and writes nothing."""
        T = len(self.position) - 1
        steps = torch.arange(T, device=x.device)
        query_steps = torch.full((x.size(1),), T, device=x.device)  # (Q)
        x = x + self.position[query_steps]
        context = visible(query_steps, steps, self.config.window)  # (Q, T)
        itself = torch.eye(x.size(1), dtype=torch.bool, device=x.device)  # (Q, Q)
        mask = torch.cat([context, itself], dim=1)  # (Q, T + Q)
        x, _ = self.blocks[0].attend(x, mask, past[0])
        return self.run_blocks(x, mask, past, fast)

def visible(steps, others, window):
    """May each of the steps (T) attend to each of the others (S)? -> (T, S)."""
    age = steps[:, None] - others  # (T, S): how many steps ago
    return (age >= 0) & (age < (window or math.inf))

class Embed(nn.Module):
    """What a task shows, as vectors (B, T, C). The task's `kind` says how:

    token    a learned vector for each integer
    vector   a linear map of [features, value, 0], or for a query of [features, 0, 1]
    image    the same of normed Conv4 features, and 4 * the one-hot label for a value
    """
    def __init__(self, task, config):
        super().__init__()
        C = config.d_model
        self.kind = task.kind
        self.n_out = task.n_out
        if self.kind == "token":
            self.token = nn.Embedding(task.vocab_size, C)
            # Many equal blanks outweigh the few items, so blanks start at 0.
            nn.init.zeros_(self.token.weight[0])
        elif self.kind == "vector":
            self.linear = nn.Linear(task.n_features + 2, C)
            # LayerNorm divides the size of x away. A large bias keeps the size readable.
            self.linear.bias.data *= task.bias_scale
        else:
            self.encoder = Conv4(*task.image_shape, config.filters)
            self.norm = nn.LayerNorm(self.encoder.d_out)
            self.linear = nn.Linear(self.encoder.d_out + task.n_out + 1, C)
            if task.n_classes:  # for train.encoder_loss() alone
                self.classes = nn.Linear(self.encoder.d_out, task.n_classes)

    def forward(self, episodes):
        """-> context (B, T, C); queries (B, Q, C), or None where there are none."""
        if self.kind == "token":
            return self.token(episodes.support_x), None

        T = episodes.support_x.size(1)
        features = self.features(episodes)  # (B, T + Q, E)
        values = episodes.support_y  # (B, T, 1) numbers, or (B, T) labels
        if self.kind == "image":
            # A single 1 would hardly count among E features.
            values = 4 * F.one_hot(values, self.n_out)  # (B, T, n_out)
        known = features.new_zeros(*features.shape[:2], values.size(2) + 1)
        known[:, :T, :-1] = values
        known[:, T:, -1] = 1  # marks a query
        return self.linear(torch.cat([features, known], dim=-1)).tensor_split([T], dim=1)

    def features(self, episodes):
        """Of the context, then of all queries: (B, T + Q, E)."""
        x = torch.cat([episodes.support_x, episodes.query_x], dim=1)
        if self.kind == "vector":
            return x
        if x.ndim > 3:  # images, which no FewShot.encode_images() has encoded before
            x = self.encoder(x)
        return self.norm(x)

    def answer(self, episodes):
        """What the encoder alone answers (B, Q, n_out); None in place of FastWeights."""
        return nearest_prototype(self.features(episodes), episodes), None

def nearest_prototype(features, episodes):
    """Compare each query with the mean of each class's shots, by 10 times the cosine (Snell
    et al. 2017 compare by distance): features (B, T + Q, E) -> (B, Q, n_out)."""
    labels = F.one_hot(episodes.support_y).to(features.dtype)  # (B, T, n_out)
    shots, queries = features.tensor_split([labels.size(1)], dim=1)
    # The cosine needs only the direction of a mean, which is that of the sum.
    prototypes = F.normalize(labels.mT @ shots, dim=2)  # (B, n_out, E)
    return 10 * F.normalize(queries, dim=2) @ prototypes.mT

def nearest_neighbour(features, episodes):
    """The same by the nearest shot alone, as if each shot were a class of its own."""
    shot = torch.arange(episodes.support_y.size(1), device=features.device)  # (T)
    each = episodes._replace(support_y=shot.expand_as(episodes.support_y))
    nearest = nearest_prototype(features, each).argmax(2)  # (B, Q)
    n_out = int(episodes.support_y.max()) + 1  # The answers may lack a label.
    answers = episodes.support_y.gather(1, nearest)  # (B, Q)
    return F.one_hot(answers, n_out).to(features.dtype)  # (B, Q, n_out)

class Conv4(nn.Module):
    """The encoder of the few-shot literature: (..., channels, size, size) -> (..., d_out)."""
    def __init__(self, channels, size, filters):
        super().__init__()
        layers = []
        for d_in in (channels, filters, filters, filters):
            layers += [nn.Conv2d(d_in, filters, 3, padding=1, bias=False),
                       nn.BatchNorm2d(filters), nn.MaxPool2d(2), nn.ReLU()]
        # In this memory format CPUs convolve twice as fast.
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.d_out = filters * (size // 16) ** 2

    def forward(self, images):
        x = images.flatten(0, -4).to(self.layers[0].weight.dtype)  # (N, channels, size, size)
        x = x / 127.5 - 1  # 0..255 -> -1..1
        x = self.layers(x.contiguous(memory_format=torch.channels_last))
        return x.flatten(1).unflatten(0, images.shape[:-3])  # (..., d_out)
