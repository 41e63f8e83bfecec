"""Fast weights: what a plastic layer reads, what its rule writes, and how much of it.

An episode is read step by step. A plastic linear layer has slow weights W (out, in) and b (out),
learned between episodes, and fast weights P_t (out, in) and p_t (out), zero when an episode begins
and rewritten at every step t from the layer's input x_t and its output y_t:

    read    y_t     = (W + P_t) x_t + (b + p_t)
    write   P_{t+1} = (1 - eta_t) P_t + eta_t * alpha ∘ D_t
            p_{t+1} = (1 - eta_t) p_t + eta_t * beta ∘ d_t

    hebbian     D_t =  y_t x_tᵀ    d_t =  y_t    post times pre
    gradient    D_t = -g_t x_tᵀ    d_t = -g_t    g_t = dL_t/dy_t, of the model's internal loss L_t

Both write u_t x_tᵀ, a signal u_t at the output (`post`) times the input x_t (`pre`). Nothing is
detached: the outer loss is differentiated through reads, writes, eta_t and g_t.

Sources: Chaudhary 2025 (arXiv 2510.21908); Duan et al. 2023 (arXiv 2302.03235); Miconi et al. 2018
and 2019, for plasticity by connection and for neuromodulation.
"""
from collections import defaultdict

import torch
from torch import nn

class PlasticLinear(nn.Linear):
    """Slow weights W (out, in), b (out) and the plasticity of each, alpha (out, in), beta (out)."""

    def __init__(self, d_in, d_out, alpha_init=1.0):  # where alpha and beta start; None: neither
        super().__init__(d_in, d_out)
        if alpha_init is not None:
            self.alpha = nn.Parameter(torch.full((d_out, d_in), float(alpha_init)))
            self.beta = nn.Parameter(torch.full((d_out,), float(alpha_init)))

    def forward(self, x, fast=None):
        """x (B, T, in) -> y (B, T, out). Without `fast`, or without alpha, P_t and p_t are zero."""
        return fast.read(self, x) if fast and hasattr(self, "alpha") else super().forward(x)

class Plasticity(nn.Module):
    """What makes a rule: the signal u_t that it writes, and eta_t, how much of it.

    The head's whole output z_t (B, 1, Z) is the task's `n_out` numbers, the neuromodulator m_t and,
    for the gradient rule, `aux_dim` auxiliary numbers. For the settings see model.Config.
    """

    def __init__(self, rule, n_out, eta0=0.02, max_norm=1.0, aux_dim=4, ablate="none"):
        super().__init__()
        self.rule, self.n_out, self.ablate = rule, n_out, ablate
        self.eta0, self.max_norm = eta0, max_norm
        self.n_head = n_out + (rule != "none") + aux_dim * (rule == "gradient")  # Z
        if rule == "gradient":
            self.w_out = nn.Parameter(torch.ones(self.n_head), ablate != "backward")  # (Z)

    def post_signal(self, z, now, learning=True):
        """u_t (B, 1, out) of each layer, from z_t (B, 1, Z) and now, {layer: (x_t, y_t)}."""
        ys = [y for x, y in now.values()]
        if self.rule == "hebbian":
            return ys  # u_t = y_t
        if self.rule == "gradient":
            # L_t = mean((w_out ∘ z_t)²), one a sequence; their sum has the gradient of each
            L = (self.w_out * z).square().mean(-1).sum()
            # u_t = -g_t, g_t = dL_t/dy_t
            return torch.autograd.grad(-L, ys, create_graph=learning, retain_graph=True)

    def eta(self, z, norm):
        """eta_t (B, 1, 1) from z_t (B, 1, Z) and norm = ||D_t|| (B, 1, 1)."""
        m = z[:, :, self.n_out:self.n_out + 1]  # (B, 1, 1)
        gate = torch.ones_like(m) if self.ablate == "eta" else torch.sigmoid(m)
        # eta_t = eta_0 * sigmoid(m_t) * min(1, max_norm / ||D_t||)
        return self.eta0 * gate * (self.max_norm / norm).clamp(max=1)

class FastWeights:
    """The fast weights of every plastic layer over a batch of B episodes, as the equations say.

    Every layer reads once a step, then write() ends the step and notes eta_t and ||D_t||, and where
    it is not learning also `change`: eta_t ||alpha ∘ D_t||, how much it adds to the weights.
    """

    def __init__(self, plasticity, fold=None):
        self.plasticity, self.fold = plasticity, fold
        # does the outer gradient pass through what is written? else it is a constant
        self.learning = torch.is_grad_enabled() and plasticity.ablate != "backward"
        self.P = defaultdict(float)  # layer: P_t, at first 0, then (B, out, in)
        self.p = defaultdict(float)  # layer: p_t, at first 0, then (B, 1, out)
        self.now = {}  # layer: x_t (B, 1, in) and y_t (B, 1, out) of the present step
        self.eta, self.norm, self.change = [], [], []  # (B, 1) a step

    def read(self, layer, x):
        """x (B, T, in) -> y (B, T, out), of one step of the context or of T queries."""
        # y_t = (W + P_t) x_t + (b + p_t)
        y = x @ (layer.weight + self.P[layer]).mT + (layer.bias + self.p[layer])
        self.now[layer] = x, y
        return y

    def write(self, z):
        """End the present step, whose head said z_t (B, 1, Z)."""
        pre = [x for x, y in self.now.values()]  # x_t of each layer
        post = self.plasticity.post_signal(z, self.now, self.learning)  # u_t of each layer
        # ||D_t||² = sum over the layers of ||u_t x_tᵀ||_F², and ||u xᵀ||_F = |u| |x|
        norms = [u.norm(dim=-1) * x.norm(dim=-1) for x, u in zip(pre, post)]  # (B, 1) each
        norm = torch.stack(norms, -1).norm(dim=-1, keepdim=True).clamp(min=1e-15)  # (B, 1, 1)
        eta = self.plasticity.eta(z, norm)  # (B, 1, 1)
        self.eta.append(eta.detach().flatten(1))
        self.norm.append(norm.detach().flatten(1))
        if not self.learning:
            # ||alpha ∘ u xᵀ||_F² = (u ∘ u)ᵀ (alpha ∘ alpha) (x ∘ x)
            squares = [(u.square() @ layer.alpha.square() * x.square()).sum(-1)
                       for layer, x, u in zip(self.now, pre, post)]  # (B, 1) each
            self.change.append((eta.flatten(1) * sum(squares).sqrt()).detach())
        with torch.set_grad_enabled(self.learning):
            self.store(eta, zip(self.now, pre, post))

    def store(self, eta, writes):
        """Write, for each (layer, x_t, u_t), u_t (B, 1, out) times x_t (B, 1, in)."""
        for layer, x, u in writes:
            # P_{t+1} = (1 - eta_t) P_t + eta_t * alpha ∘ u_t x_tᵀ
            self.P[layer] = (1 - eta) * self.P[layer] + eta * layer.alpha * (u.mT @ x)
            # p_{t+1} = (1 - eta_t) p_t + eta_t * beta ∘ u_t
            self.p[layer] = (1 - eta) * self.p[layer] + eta * layer.beta * u

# ------ You know the idea and can stop here. What follows gives the same numbers, faster. ------
class UnrolledFastWeights(FastWeights):
    """The same fast weights without a matrix, as a weighted sum over the past writes s < t:

        P_t = alpha ∘ sum_s c_ts u_s x_sᵀ      c_ts = eta_s (1 - eta_{s+1}) ... (1 - eta_{t-1})

    A step costs more with every term, so after `fold` writes, at a step t0, they become the matrix
    P_t0, which then decays by (1 - eta_t0) ... (1 - eta_{t-1}), and the sum is over s >= t0.
    """

    def __init__(self, plasticity, fold=32):
        super().__init__(plasticity, fold)
        self.decay, self.c = 1.0, None  # of P_t0 (B, 1, 1); c_ts (B, S, 1) of the S writes since
        self.pre, self.post = {}, {}  # layer: x_s (B, S, in) and u_s (B, S, out) of these

    def read(self, layer, x):
        if x.size(1) > 1:  # queries, which all read the same P_t
            self.fold_terms()
        y = layer(x) + self.p[layer]  # W x + b + p_t, (B, T, out)
        if layer in self.P:
            y = y + self.decay * self.P[layer].times(x)  # (1 - eta_t0) ... (1 - eta_{t-1}) P_t0 x
        if layer in self.pre:
            # sum_s c_ts u_s ∘ (alpha (x_s ∘ x)): attention with a weight for each connection
            match = (self.pre[layer] * x) @ layer.alpha.mT  # (B, S, out)
            y = y + torch.bmm(self.c.mT, self.post[layer] * match)
        self.now[layer] = x, y
        return y

    def store(self, eta, writes):
        c = self.c if self.pre else eta[:, :0]  # (B, S, 1)
        # P_{t+1} = (1 - eta_t) P_t + eta_t * alpha ∘ u_t x_tᵀ: the terms decay, and one joins,
        # c_{t+1,s} = (1 - eta_t) c_ts and c_{t+1,t} = eta_t
        self.c = torch.cat([(1 - eta) * c, eta], dim=1)
        self.decay = (1 - eta) * self.decay
        for layer, x, u in writes:
            self.pre[layer] = torch.cat([self.pre.get(layer, x[:, :0]), x], dim=1)
            self.post[layer] = torch.cat([self.post.get(layer, u[:, :0]), u], dim=1)
            self.p[layer] = (1 - eta) * self.p[layer] + eta * layer.beta * u
        if self.c.size(1) == self.fold:
            self.fold_terms()

    def fold_terms(self):
        for layer, pre in self.pre.items():
            P = layer.alpha * ((self.c * self.post[layer]).mT @ pre)  # (B, out, in)
            if layer in self.P:
                P = P + self.decay * self.P[layer].matrix
            self.P[layer] = SharedMatrix(P, self.fold)
        self.pre, self.post, self.decay = {}, {}, 1.0

# ------ Fenced off: times(x) equals x @ M.mT, fast where more than --fold steps were folded. ------
class SharedMatrix:
    """A matrix M (B, out, in) that the next n steps multiply, one vector each: times(x) = x Mᵀ.

    Autograd would form each step's dM, as large as M, and add them up. Here each product has a
    slot, a zero whose gradient is dy_t; when all have theirs, dM = sum_t dy_tᵀ x_t is one product.
    The gradient rule differentiates dx_t = dy_t M once more: this use of M has slots, too.
    """

    def __init__(self, matrix, n):
        self.matrix, self.vectors = matrix, {False: [], True: []}  # what was multiplied, by `back`
        if matrix.requires_grad:
            slots = SharedSlots.apply(matrix, self.vectors, n)
            self.slots = {False: slots[:n], True: slots[n:]}

    def times(self, x, back=False):
        """x (B, T, in) -> x Mᵀ (B, T, out), or if `back` x (B, T, out) -> x M (B, T, in)."""
        M = self.matrix if back else self.matrix.mT
        if x.size(1) > 1 or not (M.requires_grad and torch.is_grad_enabled()):
            return x @ M  # queries, or a product that nobody will differentiate
        slot = self.slots[back][len(self.vectors[back])]
        self.vectors[back].append(x.detach())
        return SharedProduct.apply(x, slot, self, back)

class SharedProduct(torch.autograd.Function):
    """One product of a SharedMatrix; the gradient for M goes to the slot."""

    @staticmethod
    def forward(ctx, x, slot, shared, back):
        ctx.shared, ctx.back = shared, back
        return shared.times(x, back)

    @staticmethod
    def backward(ctx, dy):
        return ctx.shared.times(dy, not ctx.back), dy, None, None

class SharedSlots(torch.autograd.Function):
    """M (B, out, in) -> n slots (B, 1, out) for x Mᵀ, then n slots (B, 1, in) for dy M."""

    @staticmethod
    def forward(ctx, M, vectors, n):
        ctx.set_materialize_grads(False)  # a slot that nobody used has None
        ctx.vectors, ctx.n = vectors, n
        zero, (B, d_out, d_in) = M.new_zeros(()), M.shape
        return tuple(zero.expand(B, 1, size) for size in [d_out] * n + [d_in] * n)

    @staticmethod
    def backward(ctx, *grads):
        pairs = [*zip(grads[:ctx.n], ctx.vectors[False]), *zip(ctx.vectors[True], grads[ctx.n:])]
        used = [(dy, x) for dy, x in pairs if dy is not None and x is not None]
        dy, x = (torch.cat(side, dim=1) for side in zip(*used))  # (B, n, out), (B, n, in)
        return dy.mT @ x, None, None  # dM = sum_t dy_tᵀ x_t
