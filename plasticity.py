"""Fast weights: a memory that a layer writes while it reads a sequence.

A model reads an episode step by step. A plastic linear layer has slow weights W
(out, in) and b (out), learned between episodes, and fast weights P_t (out, in) and p_t
(out), zero when an episode begins. After each step t, the layer writes its input x_t
(in) and a signal u_t (out) into its fast weights:

    read    y_t     = (W + P_t) x_t + (b + p_t)
    write   P_{t+1} = (1 - eta_t) P_t + eta_t (alpha ∘ u_t x_tᵀ)
            p_{t+1} = (1 - eta_t) p_t + eta_t (beta ∘ u_t)

∘ multiplies entry by entry. alpha (out, in) and beta (out) are learned: how plastic
each connection is. The rule chooses the signal u_t:

    hebbian     u_t =  y_t                      output times input, "post times pre"
    gradient    u_t = -g_t,  g_t = dL_t/dy_t    a step down an internal loss L_t

eta_t is one number per step and episode: the strength of the write, and the share of
the past that the write erases. The model sets it by one more output, the neuromodulator
m_t. Where n_t, the norm of u_t x_tᵀ in all layers, is over max_norm, eta_t shrinks:

    eta_t = eta_0 * sigmoid(m_t) * min(1, max_norm / n_t),  n_t² = sum of ||u_t x_tᵀ||²

**A read is attention over past writes.** Every later write fades an earlier one: at
step t, c_ts = eta_s (1 - eta_{s+1}) ... (1 - eta_{t-1}) is left of the write at s. So

    P_t x = sum over s < t of c_ts u_s ∘ (alpha (x_s ∘ x))

The query x meets each earlier input x_s as a key, whose value is the signal u_s. A
window limits attention to recent steps, but it does not limit this sum.

**An example by numbers**: the Hebbian rule, W = I, b = 0, beta = 0, alpha = 80,
max_norm = 1, eta_0 = 0.02 and m_t = 0, so that eta_t = 0.02 * sigmoid(0) = 0.01.

    read (1, 0)   y = (1, 0), n_t = 1: write P = 0.01 * 80 * y xᵀ = [[0.8, 0], [0, 0]]
    read (1, 0)   y = (1.8, 0): this input is known, so the output is larger
    read (0, 1)   y = (0, 1): this input is new, so the output is unchanged

**Why the internal loss needs no label.** L_t = mean((w_out ∘ z_t)²) pulls the model's
outputs z_t to zero, which is no goal in itself. But the outer loss knows the answers,
and is differentiated through all reads, writes, eta_t and g_t. So training shapes w_out
and the last layer until a step down L_t writes what a later answer needs.

Sources: Chaudhary 2025 (arXiv 2510.21908); Duan et al. 2023 (arXiv 2302.03235);
Miconi et al. 2018, 2019 (plasticity per connection, neuromodulation).
"""
from collections import defaultdict

import torch
from torch import nn

class PlasticLinear(nn.Linear):
    """Slow weights W (out, in), b (out); plasticity alpha (out, in), beta (out).

    alpha and beta start at `alpha_init`. A layer with `alpha_init` None is not plastic.
    """
    def __init__(self, d_in, d_out, alpha_init=1.0):
        super().__init__(d_in, d_out)
        self.plastic = alpha_init is not None
        if self.plastic:
            self.alpha = nn.Parameter(torch.full((d_out, d_in), float(alpha_init)))
            self.beta = nn.Parameter(torch.full((d_out,), float(alpha_init)))

    def forward(self, x, fast=None):
        """x (B, T, in) -> y (B, T, out), read with the FastWeights `fast`, if any."""
        if fast is None or not self.plastic:
            return super().forward(x)  # W x + b
        return fast.read(self, x)

class Plasticity(nn.Module):
    """A rule chooses the signal u_t to write, and the strength eta_t of the write.

    The model's last layer has Z = `n_outputs` outputs z_t: `n_out` for the answer, one
    for m_t and, for the gradient rule, `aux_dim` more. L_t uses all of them.
    """
    def __init__(self, rule, n_out, eta0=0.02, max_norm=1.0, aux_dim=4, ablate="none"):
        super().__init__()
        self.rule = rule
        self.n_out = n_out
        self.eta0 = eta0
        self.max_norm = max_norm
        self.ablate = ablate  # "none", "eta", "alpha" or "backward": see model.Config
        self.n_outputs = n_out
        if rule != "none":
            self.n_outputs += 1  # m_t
        if rule == "gradient":
            self.n_outputs += aux_dim
            self.w_out = nn.Parameter(torch.ones(self.n_outputs))  # (Z)
            self.w_out.requires_grad_(ablate != "backward")

    def signals(self, z, x, y, learning):
        """{layer: u_t} from z_t (B, 1, Z), {layer: x_t} (for other rules), {layer: y_t}."""
        if self.rule == "hebbian":
            # u_t = y_t
            return y
        if self.rule == "gradient":
            # L_t = mean((w_out ∘ z_t)²); a sum over episodes has the gradient of each
            L = (self.w_out * z).square().mean(-1).sum()
            # u_t = -g_t,  g_t = dL_t/dy_t; retain: the outer loss needs z_t, too
            u = torch.autograd.grad(-L, [*y.values()], create_graph=learning, retain_graph=True)
            return dict(zip(y, u))

    def eta(self, z, norm):
        """eta_t (B, 1, 1), from z_t (B, 1, Z) and n_t (B, 1, 1)."""
        gate = torch.sigmoid(z[:, :, self.n_out:self.n_out + 1])  # sigmoid(m_t)
        if self.ablate == "eta":
            gate = torch.ones_like(gate)
        # eta_t = eta_0 * sigmoid(m_t) * min(1, max_norm / n_t)
        return self.eta0 * gate * (self.max_norm / norm).clamp(max=1)

class FastWeights:
    """The fast weights of all plastic layers over B episodes, as in the equations.

    Each plastic layer reads once per step; then write() ends the step. The lists get
    (B, 1) per write: `eta` eta_t, `norm` n_t and, where no gradient passes the writes,
    `change` ||eta_t alpha ∘ u_t x_tᵀ|| over all layers.
    """
    def __init__(self, plasticity):
        self.plasticity = plasticity
        # Does the outer loss reach the writes? If not, they are constants. In evaluation, the
        # gradient rule enables gradients later, so this is asked before the first step.
        self.learning = torch.is_grad_enabled() and plasticity.ablate != "backward"
        self.P = defaultdict(float)  # layer: P_t, at first 0, then (B, out, in)
        self.p = defaultdict(float)  # layer: p_t, at first 0, then (B, 1, out)
        self.x = {}  # layer: x_t (B, 1, in) of the present step
        self.y = {}  # layer: y_t (B, 1, out) of the present step
        self.eta = []
        self.norm = []
        self.change = []

    def read(self, layer, x):
        """x (B, Q, in) -> y (B, Q, out): a step of the context, or Q queries."""
        # y_t = (W + P_t) x_t + (b + p_t)
        y = x @ (layer.weight + self.P[layer]).mT + (layer.bias + self.p[layer])
        self.x[layer] = x
        self.y[layer] = y
        return y

    def write(self, z):
        """End the present step, at which the last layer gave z_t (B, 1, Z)."""
        u = self.plasticity.signals(z, self.x, self.y, self.learning)
        # n_t² = sum over the layers of ||u_t x_tᵀ||², and ||u xᵀ|| = |u| |x|
        norms = [u[layer].norm(dim=-1) * x.norm(dim=-1) for layer, x in self.x.items()]
        norm = torch.stack(norms, -1).norm(dim=-1, keepdim=True).clamp(min=1e-15)
        with torch.set_grad_enabled(self.learning):
            eta = self.plasticity.eta(z, norm)  # (B, 1, 1)
            self.store(eta, u)
        self.record(eta.detach(), norm.detach(), u)

    def store(self, eta, u):
        """Write u_t (B, 1, out) times x_t (B, 1, in) into every layer."""
        for layer, x in self.x.items():
            # P_{t+1} = (1 - eta_t) P_t + eta_t * alpha ∘ u_t x_tᵀ
            self.P[layer] = (1 - eta) * self.P[layer] + eta * layer.alpha * (u[layer].mT @ x)
            # p_{t+1} = (1 - eta_t) p_t + eta_t * beta ∘ u_t
            self.p[layer] = (1 - eta) * self.p[layer] + eta * layer.beta * u[layer]

    def record(self, eta, norm, u):
        self.eta.append(eta.flatten(1))
        self.norm.append(norm.flatten(1))
        if not self.learning:
            # ||alpha ∘ u xᵀ||² = (u ∘ u)ᵀ (alpha ∘ alpha) (x ∘ x), (B, 1)
            squares = [((u[layer]**2 @ layer.alpha**2) * x**2).sum(-1)
                       for layer, x in self.x.items()]
            self.change.append((eta.flatten(1) * sum(squares).sqrt()).detach())

# ------ This is the whole idea. What follows computes the same numbers faster. ------
class UnrolledFastWeights(FastWeights):
    """The same fast weights as a sum over past writes, so that no step builds a matrix:

        P_t = alpha ∘ (sum over s < t of c_ts u_s x_sᵀ)

    A read takes longer with every term. So after every `fold` writes, at a step t0, all
    terms are added up to a matrix P_t0, and the sum starts anew at s = t0. Until step t,
    P_t0 fades by decay_t = (1 - eta_t0) ... (1 - eta_{t-1}).
    """
    fold = 32  # changes the speed, not the numbers

    def __init__(self, plasticity):
        super().__init__(plasticity)
        self.start_sum()

    def start_sum(self):
        self.decay = 1.0  # decay_t, at first 1, then (B, 1, 1)
        self.c = None  # c_ts (B, S, 1) of the S writes since t0, at first none
        self.past_x = {}  # layer: their x_s (B, S, in)
        self.past_u = {}  # layer: their u_s (B, S, out)

    def read(self, layer, x):
        if x.size(1) > 1:  # Many queries: one matrix is quicker than their sums.
            self.fold_terms()
        # Without fast weights as an argument, a layer reads only its slow ones: W x + b.
        y = layer(x) + self.p[layer]  # (B, Q, out)
        if layer in self.P:
            y = y + self.decay * torch.bmm(x, self.P[layer].mT)
        if layer in self.past_x:
            # sum_s c_ts u_s ∘ (alpha (x_s ∘ x))
            match = (self.past_x[layer] * x) @ layer.alpha.mT  # (B, S, out)
            y = y + torch.bmm(self.c.mT, self.past_u[layer] * match)
        self.x[layer] = x
        self.y[layer] = y
        return y

    def store(self, eta, u):
        # Terms fade: c_{t+1,s} = (1 - eta_t) c_ts. One joins: c_{t+1,t} = eta_t.
        self.decay = (1 - eta) * self.decay
        c = eta[:, :0] if self.c is None else self.c  # (B, S, 1), at first S = 0
        self.c = torch.cat([(1 - eta) * c, eta], dim=1)
        for layer, x in self.x.items():
            past_x = self.past_x.get(layer, x[:, :0])  # (B, S, in), at first S = 0
            past_u = self.past_u.get(layer, u[layer][:, :0])  # (B, S, out)
            self.past_x[layer] = torch.cat([past_x, x], dim=1)
            self.past_u[layer] = torch.cat([past_u, u[layer]], dim=1)
            self.p[layer] = (1 - eta) * self.p[layer] + eta * layer.beta * u[layer]
        if self.c.size(1) == self.fold:
            self.fold_terms()

    def fold_terms(self):
        for layer, x in self.past_x.items():
            terms = layer.alpha * ((self.c * self.past_u[layer]).mT @ x)  # (B, out, in)
            self.P[layer] = self.decay * self.P[layer] + terms
        self.start_sum()
