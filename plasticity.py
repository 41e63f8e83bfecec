"""Fast weights: a memory that a layer writes while it reads a sequence.

An episode is read step by step. A plastic linear layer has slow weights W (out, in)
and b (out), learned between episodes, and fast weights P_t (out, in) and p_t (out),
zero when an episode begins. After each step t, the layer writes its input x_t (in)
and a signal u_t (out) into its fast weights:

    read    y_t     = (W + P_t) x_t + (b + p_t)
    write   P_{t+1} = (1 - eta_t) P_t + eta_t * alpha ∘ u_t x_tᵀ
            p_{t+1} = (1 - eta_t) p_t + eta_t * beta ∘ u_t

alpha and beta are learned: how plastic each connection is. The rule chooses u_t:

    hebbian     u_t =  y_t                      output times input, "post times pre"
    gradient    u_t = -g_t,  g_t = dL_t/dy_t    a step down an internal loss L_t

eta_t, the strength of a write, is one number per step and episode. It follows the
neuromodulator m_t, one more output of the model, and n_t, the norm of u_t x_tᵀ over
all layers:

    eta_t = eta_0 * sigmoid(m_t) * min(1, max_norm / n_t)

**A read is attention over past writes.** What later writes leave of the write at a step
s < t has the weight c_ts = eta_s (1 - eta_{s+1}) ... (1 - eta_{t-1}). So

    P_t x = sum over s < t of c_ts u_s ∘ (alpha (x_s ∘ x))

The query x meets each earlier input x_s as a key, whose value is the signal u_s. alpha
weighs each connection. No attention window ends this sum.

**An example by numbers**: the Hebbian rule, W = I, b = 0, beta = 0, alpha = 80,
max_norm = 1, eta_0 = 0.02 and m_t = 0, so that eta_t = 0.02 * sigmoid(0) = 0.01.

    read (1, 0)   y = (1, 0) and n_t = 1; write P = 0.01 * 80 * y xᵀ = [[0.8, 0], [0, 0]]
    read (1, 0)   y = (1.8, 0): this input is known, so the answer is louder
    read (0, 1)   y = (0, 1): this input is new, so the answer is unchanged

**Why the internal loss needs no label.** L_t = mean((w_out ∘ z_t)²) pulls the outputs
z_t of the model to zero, which is no goal in itself. But the outer loss knows the
answers, and is differentiated through all reads, writes, eta_t and g_t. So training
shapes w_out and the head until a step down L_t writes what a later answer needs.

Sources: Chaudhary 2025 (arXiv 2510.21908); Duan et al. 2023 (arXiv 2302.03235);
Miconi et al. 2018, 2019 (plasticity per connection, neuromodulation).
"""
from collections import defaultdict

import torch
from torch import nn

class PlasticLinear(nn.Linear):
    """Slow weights W (out, in), b (out), and plasticity alpha (out, in), beta (out).

    alpha and beta start at `alpha_init`. Where that is None, the layer is not plastic.
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
    """A rule: the signal u_t that is written, and eta_t, the strength of the write.

    The model's head has Z = `n_outputs` outputs z_t: `n_out` for the answer, one for the
    neuromodulator m_t and, for the gradient rule, `aux_dim` auxiliary ones that only L_t
    uses. model.Config says what the settings mean.
    """
    def __init__(self, rule, n_out, eta0=0.02, max_norm=1.0, aux_dim=4, ablate="none"):
        super().__init__()
        self.rule = rule
        self.n_out = n_out
        self.eta0 = eta0
        self.max_norm = max_norm
        self.ablate = ablate
        self.n_outputs = n_out
        if rule != "none":
            self.n_outputs += 1  # m_t
        if rule == "gradient":
            self.n_outputs += aux_dim
            self.w_out = nn.Parameter(torch.ones(self.n_outputs))  # (Z)
            self.w_out.requires_grad_(ablate != "backward")

    def signals(self, z, x, y, learning=True):
        """{layer: u_t (B, 1, out)}, from z_t (B, 1, Z), {layer: x_t} and {layer: y_t}."""
        if self.rule == "hebbian":
            # u_t = y_t
            return y
        if self.rule == "gradient":
            # L_t = mean((w_out ∘ z_t)²), summed over the episodes: each has its gradient
            L = (self.w_out * z).square().mean(-1).sum()
            # u_t = -g_t,  g_t = dL_t/dy_t
            u = torch.autograd.grad(-L, [*y.values()], create_graph=learning, retain_graph=True)
            return dict(zip(y, u))

    def eta(self, z, norm):
        """eta_t (B, 1, 1), from z_t (B, 1, Z) and n_t (B, 1, 1)."""
        gate = torch.sigmoid(z[:, :, self.n_out:self.n_out + 1])  # sigmoid(m_t), (B, 1, 1)
        if self.ablate == "eta":
            gate = torch.ones_like(gate)
        # eta_t = eta_0 * sigmoid(m_t) * min(1, max_norm / n_t)
        return self.eta0 * gate * (self.max_norm / norm).clamp(max=1)

class FastWeights:
    """The fast weights of all plastic layers over B episodes, as the equations say.

    Each plastic layer reads once per step; then write() ends the step. Every write adds
    (B, 1) to the lists `eta` (eta_t), `norm` (n_t) and, outside training, `change`: how
    much it adds to the weights of all layers, ||eta_t alpha ∘ u_t x_tᵀ||.
    """
    def __init__(self, plasticity):
        self.plasticity = plasticity
        # Does the outer loss reach the writes? If not, they are constants.
        self.learning = torch.is_grad_enabled() and plasticity.ablate != "backward"
        self.P = defaultdict(float)  # layer: P_t, at first 0, then (B, out, in)
        self.p = defaultdict(float)  # layer: p_t, at first 0, then (B, 1, out)
        self.x = {}  # layer: x_t (B, 1, in) of the present step
        self.y = {}  # layer: y_t (B, 1, out) of the present step
        self.eta = []
        self.norm = []
        self.change = []

    def read(self, layer, x):
        """x (B, T, in) -> y (B, T, out): one step of the context, or T queries."""
        # y_t = (W + P_t) x_t + (b + p_t)
        y = x @ (layer.weight + self.P[layer]).mT + (layer.bias + self.p[layer])
        self.x[layer] = x
        self.y[layer] = y
        return y

    def write(self, z):
        """End the present step, at which the model's head gave z_t (B, 1, Z)."""
        u = self.plasticity.signals(z, self.x, self.y, self.learning)
        # n_t² = sum over the layers of ||u_t x_tᵀ||², and ||u xᵀ|| = |u| |x|
        norms = [u[layer].norm(dim=-1) * x.norm(dim=-1) for layer, x in self.x.items()]
        norm = torch.stack(norms, -1).norm(dim=-1, keepdim=True).clamp(min=1e-15)  # (B, 1, 1)
        eta = self.plasticity.eta(z, norm)  # (B, 1, 1)

        self.eta.append(eta.detach().flatten(1))
        self.norm.append(norm.detach().flatten(1))
        if not self.learning:
            # ||alpha ∘ u xᵀ||² = (u ∘ u)ᵀ (alpha ∘ alpha) (x ∘ x) of each layer, (B, 1)
            squares = [(u[layer]**2 @ layer.alpha**2 * x**2).sum(-1)
                       for layer, x in self.x.items()]
            self.change.append((eta.flatten(1) * sum(squares).sqrt()).detach())
        with torch.set_grad_enabled(self.learning):
            self.store(eta, u)

    def store(self, eta, u):
        """Write u_t (B, 1, out) times x_t (B, 1, in) into every layer."""
        for layer, x in self.x.items():
            # P_{t+1} = (1 - eta_t) P_t + eta_t * alpha ∘ u_t x_tᵀ
            self.P[layer] = (1 - eta) * self.P[layer] + eta * layer.alpha * (u[layer].mT @ x)
            # p_{t+1} = (1 - eta_t) p_t + eta_t * beta ∘ u_t
            self.p[layer] = (1 - eta) * self.p[layer] + eta * layer.beta * u[layer]

# ------ You know the idea and can stop here. What follows is the same, faster. ------
class UnrolledFastWeights(FastWeights):
    """The same fast weights as a sum over past writes, so that no step builds a matrix:

        P_t = alpha ∘ (sum over s < t of c_ts u_s x_sᵀ)

    A read takes longer with every term. So after every `fold` writes, at a step t0, all
    terms are added up to P_t0. It fades by decay_t = (1 - eta_t0) ... (1 - eta_{t-1}),
    and the sum starts anew at s = t0.
    """

    fold = 32  # changes the speed, not the numbers

    def __init__(self, plasticity):
        super().__init__(plasticity)
        self.start_sum()

    def start_sum(self):
        self.decay = 1.0  # decay_t, at first 1, then (B, 1, 1)
        self.c = None  # c_ts (B, S, 1) of the S writes since t0
        self.past_x = {}  # layer: their x_s (B, S, in)
        self.past_u = {}  # layer: their u_s (B, S, out)

    def read(self, layer, x):
        if x.size(1) > 1:  # One matrix serves all queries.
            self.fold_terms()
        y = layer(x) + self.p[layer]  # W x + b + p_t, (B, T, out)
        if layer in self.P:
            y = y + self.decay * (x @ self.P[layer].mT)
        if layer in self.past_x:
            # sum_s c_ts u_s ∘ (alpha (x_s ∘ x))
            match = (self.past_x[layer] * x) @ layer.alpha.mT  # (B, S, out)
            y = y + self.c.mT @ (self.past_u[layer] * match)
        self.x[layer] = x
        self.y[layer] = y
        return y

    def store(self, eta, u):
        # The terms fade: c_{t+1,s} = (1 - eta_t) c_ts. One joins: c_{t+1,t} = eta_t.
        self.decay = (1 - eta) * self.decay
        self.c = eta if self.c is None else torch.cat([(1 - eta) * self.c, eta], dim=1)
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
