"""Fast weights: the plastic linear layer, its two learning rules and the neuromodulator.

One episode is read step by step. A plastic layer has slow weights W (out, in) and b (out), learned between
episodes, and fast weights P_t (out, in) and p_t (out), zero when an episode begins and rewritten at every step:

    read    y_t     = (W + P_t) x_t + (b + p_t)
    write   P_{t+1} = (1 - eta_t) P_t + eta_t * alpha ∘ D_t        p_{t+1} = (1 - eta_t) p_t + eta_t * beta ∘ d_t

            hebbian     D_t =  y_t x_tᵀ      d_t =  y_t            post times pre
            gradient    D_t = -g_t x_tᵀ      d_t = -g_t            g_t = dL_t/dy_t, L_t = mean((w_out ∘ z_t)²)

Both rules write a post-side signal u_t (y_t or -g_t) times the pre-side input x_t, so P_t is never needed as a
matrix. Unrolling the write gives a weighted sum over the past writes s < t,

            P_t = alpha ∘ sum_s c_ts u_s x_sᵀ        c_ts = eta_s * (1 - eta_{s+1}) ... (1 - eta_{t-1})
            p_t = beta  ∘ sum_s c_ts u_s

and that is how this file stores it: x_s, u_s and c_ts, for B episodes at once.

Sources: Chaudhary 2025 (arXiv 2510.21908), Duan et al. 2023 (arXiv 2302.03235), Miconi et al. 2018 and 2019.
Unlike the paper's own code, nothing here is detached: the outer gradient runs through reads, writes, eta_t and g_t.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

RULES = ("none", "hebbian", "gradient")


class PlasticLinear(nn.Linear):
    """A linear layer with slow weights (W, b) and, unless the rule is none, the plasticity of each (alpha, beta).

    alpha (out, in) and beta (out) say how plastic each connection and each bias is; both start at `alpha_init`.
    The fast weights themselves belong to an episode, not to the layer: see FastWeights.
    """

    def __init__(self, d_in, d_out, rule, alpha_init):
        super().__init__(d_in, d_out)
        if rule != "none":
            self.alpha = nn.Parameter(torch.full((d_out, d_in), float(alpha_init)))  # (out, in)
            self.beta = nn.Parameter(torch.full((d_out,), float(alpha_init)))  # (out)

    def forward(self, x, fast=None):
        """y = (W + P_t) x + (b + p_t) for x (B, Q, in) -> (B, Q, out); without `fast`, P_t and p_t are zero."""
        y = super().forward(x)
        return y if fast is None else fast.read(self, x, y)


class Plasticity(nn.Module):
    """What the plastic layers of a model share: the rule, the neuromodulator's settings and the internal loss.

    rule        none, hebbian or gradient
    n_out       how many of the head's outputs are the task's
    eta0        eta_0, the largest rate of a write
    max_norm    a write with a larger ||D_t|| is scaled down to it; 0 or inf: never
    aux_dim     auxiliary outputs of the head (gradient only)

    `n_head_rows` is the size of z_t, the head's whole output, in this order: the task's n_out logits, the
    neuromodulator m_t (both plastic rules), aux_dim auxiliary numbers (gradient). No rule has rows it does not use.
    """

    def __init__(self, rule, n_out, eta0=0.2, max_norm=1.0, aux_dim=4):
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
        self.rule, self.n_out, self.eta0, self.max_norm = rule, n_out, eta0, max_norm
        self.n_head_rows = n_out + {"none": 0, "hebbian": 1, "gradient": 1 + aux_dim}[rule]
        if rule == "gradient":
            self.w_out = nn.Parameter(torch.ones(self.n_head_rows))  # (n_out + 1 + aux_dim)

    def signals(self, z, ys, learning):
        """The post-side signal u_t of every plastic layer, from z_t (B, 1, Z) and their outputs y_t (B, 1, out)."""
        if self.rule == "hebbian":
            # u_t = y_t
            return ys
        # L_t = mean((w_out ∘ z_t)²), one loss a sequence; sequences do not mix, so the sum has each one's gradient
        internal_loss = (self.w_out * z).square().mean(-1).sum()
        # u_t = -g_t, g_t = dL_t/dy_t; create_graph lets the outer loss differentiate through g_t (second order)
        return [-g for g in torch.autograd.grad(internal_loss, ys, create_graph=learning)]

    def eta(self, z, d_norm_sq):
        """eta_t (B, 1) from z_t (B, 1, Z) and ||D_t||² (B, 1)."""
        # eta_t = eta_0 * sigmoid(m_t) * min(1, max_norm / ||D_t||)
        eta = self.eta0 * torch.sigmoid(z[:, :, self.n_out])
        if 0 < self.max_norm < math.inf:
            # clamped before the root, whose derivative is infinite at ||D_t|| = 0
            eta = eta * self.max_norm / d_norm_sq.clamp(min=self.max_norm**2).sqrt()
        return eta


class FastWeights:
    """The fast weights of every plastic layer over one batch of B episodes, as the rank-one terms of P_t and p_t.

    read() is called by each layer at each step and remembers what that step would write; write() then appends it.
    `eta` and `d_norm` list eta_t and ||D_t||, each (B, 1), of the writes so far: what the gates are drawn from.
    """

    def __init__(self, plasticity):
        self.plasticity = plasticity
        self.learning = torch.is_grad_enabled()  # else: evaluation, where no history is kept for the outer gradient
        self.c = None  # (B, S, 1): c_ts of the S past writes; eta_t is shared by all layers, so c is too
        self.pre, self.post = {}, {}  # of each layer: x_s (B, S, in) and u_s (B, S, out)
        self.now = {}  # of each layer: x_t (B, 1, in) and y_t (B, 1, out) of the present step
        self.eta, self.d_norm = [], []

    def read(self, layer, x, y):
        """Add P_t x + p_t to y = W x + b. x (B, Q, in), y (B, Q, out): one context step (Q = 1) or Q queries."""
        if self.c is not None and x.size(1) == 1:
            # P_t x + p_t = sum_s c_ts u_s ∘ (alpha (x_s ∘ x) + beta): attention over the S past writes
            match = F.linear(self.pre[layer] * x, layer.alpha, layer.beta)  # (B, S, out)
            y = y + (self.c * self.post[layer] * match).sum(1, keepdim=True)  # (B, 1, out)
        elif self.c is not None:
            # many queries read the same P_t: build it once, P_t = alpha ∘ sum_s c_ts u_s x_sᵀ, p_t = beta ∘ sum_s c_ts u_s
            cu = self.c * self.post[layer]  # (B, S, out)
            P = layer.alpha * (cu.transpose(1, 2) @ self.pre[layer])  # (B, out, in)
            p = layer.beta * cu.sum(1, keepdim=True)  # (B, 1, out)
            y = y + x @ P.transpose(1, 2) + p  # (B, Q, out)
        self.now[layer] = x, y
        return y

    def write(self, z):
        """End the present step, whose head said z_t (B, 1, Z): work out eta_t and D_t and append them to P_t."""
        layers = list(self.now)
        signals = self.plasticity.signals(z, [self.now[layer][1] for layer in layers], self.learning)
        # ||D_t||² = sum over the layers of ||u_t x_tᵀ||_F², and ||u xᵀ||_F = |u| |x|
        d_norm_sq = sum(u.square().sum(-1) * self.now[layer][0].square().sum(-1) for layer, u in zip(layers, signals))
        eta = self.plasticity.eta(z, d_norm_sq)  # (B, 1)
        if not self.learning:
            eta, signals = eta.detach(), [u.detach() for u in signals]
        self.eta.append(eta.detach())
        self.d_norm.append(d_norm_sq.detach().sqrt())
        # c_{t+1,s} = (1 - eta_t) c_ts for the past writes, c_{t+1,t} = eta_t for this one
        eta = eta.unsqueeze(-1)  # (B, 1, 1)
        self.c = eta if self.c is None else torch.cat([(1 - eta) * self.c, eta], dim=1)  # (B, S + 1, 1)
        for layer, u in zip(layers, signals):
            x = self.now[layer][0] if self.learning else self.now[layer][0].detach()
            self.pre[layer] = torch.cat([self.pre[layer], x], dim=1) if layer in self.pre else x
            self.post[layer] = torch.cat([self.post[layer], u], dim=1) if layer in self.post else u
