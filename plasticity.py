"""Fast weights: the plastic linear layer, its two learning rules and the neuromodulator.

One episode is read step by step. A plastic layer has slow weights W (out, in) and b (out), learned between
episodes, and fast weights P_t (out, in) and p_t (out), zero when an episode begins and rewritten at every step:

    read    y_t     = (W + P_t) x_t + (b + p_t)
    write   P_{t+1} = (1 - eta_t) P_t + eta_t * alpha ∘ D_t        p_{t+1} = (1 - eta_t) p_t + eta_t * beta ∘ d_t

            hebbian     D_t =  y_t x_tᵀ      d_t =  y_t            post times pre
            gradient    D_t = -g_t x_tᵀ      d_t = -g_t            g_t = dL_t/dy_t, L_t = mean((w_out ∘ z_t)²)

Both rules write a post-side signal u_t (y_t or -g_t) times the pre-side input x_t. Three facts make them fast; each
is an identity, so what is computed stays exactly the rule above:

1. P_t need not be a matrix. Unrolling the write gives a weighted sum over the past writes s < t,

            P_t = alpha ∘ sum_s c_ts u_s x_sᵀ        c_ts = eta_s * (1 - eta_{s+1}) ... (1 - eta_{t-1})
            p_t = beta  ∘ sum_s c_ts u_s

   and (alpha ∘ u xᵀ) x' = u ∘ (alpha (x ∘ x')), so a read is attention over the past with per-connection weights.

2. It may become one. A read costs a product with alpha for each term, so every K steps the terms are folded into the
   matrix P_t0, and for the steps from then on, with terms s >= t0 only,

            P_t = (1 - eta_t0) ... (1 - eta_{t-1}) P_t0 + alpha ∘ sum_s c_ts u_s x_sᵀ

   A step then costs one matrix and at most K terms, however long the episode.

3. The gradient of a folded matrix has low rank too: each read adds dy_t x_tᵀ. SharedMatrix multiplies them once.

Sources: Chaudhary 2025 (arXiv 2510.21908), Duan et al. 2023 (arXiv 2302.03235), Miconi et al. 2018 and 2019.
Unlike the paper's own code, nothing here is detached: the outer gradient runs through reads, writes, eta_t and g_t.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

RULES = ("none", "hebbian", "gradient")
ABLATIONS = ("none", "eta", "alpha", "backward")


class PlasticLinear(nn.Linear):
    """A linear layer with slow weights (W, b) and, unless the rule is none, the plasticity of each (alpha, beta).

    alpha (out, in) and beta (out) say how plastic each connection and each bias is; both start at `alpha_init`. With
    `outer`, alpha has rank one: alpha_ij = alpha_post_i alpha_pre_j, and only the two vectors are learned.
    The fast weights themselves belong to an episode, not to the layer: see FastWeights.
    """

    def __init__(self, d_in, d_out, rule, alpha_init, outer=False):
        super().__init__(d_in, d_out)
        self.outer = outer
        if rule != "none" and outer:
            root = math.sqrt(abs(alpha_init))
            self.alpha_post = nn.Parameter(torch.full((d_out,), math.copysign(root, alpha_init)))  # (out)
            self.alpha_pre = nn.Parameter(torch.full((d_in,), root))  # (in)
        elif rule != "none":
            self.alpha = nn.Parameter(torch.full((d_out, d_in), float(alpha_init)))  # (out, in)
        if rule != "none":
            self.beta = nn.Parameter(torch.full((d_out,), float(alpha_init)))  # (out)

    def forward(self, x, fast=None):
        """y = (W + P_t) x + (b + p_t) for x (B, Q, in) -> (B, Q, out); without `fast`, P_t and p_t are zero."""
        y = super().forward(x)
        return y if fast is None else fast.read(self, x, y)

    def attend(self, x, c, post, pre):
        """alpha ∘ (sum_s c_ts u_s x_sᵀ) times x (B, 1, in) -> (B, 1, out).

        c (B, S, 1), post u_s (B, S, out) and pre x_s (B, S, in) are those of S writes.
        """
        if not self.outer:
            # sum_s c_ts u_s ∘ (alpha (x_s ∘ x))
            return (post * (c * F.linear(pre * x, self.alpha))).sum(1, keepdim=True)
        # alpha_ij = a_i b_j, so alpha (x_s ∘ x) = a (x_s · (b ∘ x)): one number a write, as in linear attention
        match = (pre * (self.alpha_pre * x)).sum(-1, keepdim=True)  # (B, S, 1)
        return self.alpha_post * (post * (c * match)).sum(1, keepdim=True)

    def connect(self, c, post, pre):
        """alpha ∘ sum_s c_ts u_s x_sᵀ -> (B, out, in), from the same as attend."""
        if not self.outer:
            return self.alpha * ((c * post).mT @ pre)
        return (c * self.alpha_post * post).mT @ (self.alpha_pre * pre)


class Plasticity(nn.Module):
    """What the plastic layers of a model share: the rule, the neuromodulator's settings and the internal loss.

    rule        none, hebbian or gradient
    n_out       how many of the head's outputs are the task's
    eta0        eta_0, the largest rate of a write
    max_norm    a write with a larger ||D_t|| is scaled down to it; 0 or inf: never
    aux_dim     auxiliary outputs of the head (gradient only)
    ablate      what is taken away: none; eta: no neuromodulation, sigmoid(m_t) is 1; alpha: alpha and beta stay where they
                start; backward: the outer gradient passes through no write (x_s, u_s and eta_t are constants to it) and
                alpha and beta stay, which leaves only slow weights to learn, as in the paper's own code

    `n_head_rows` is the size of z_t, the head's whole output, in this order: the task's n_out logits, the
    neuromodulator m_t (both plastic rules), aux_dim auxiliary numbers (gradient). No rule has rows it does not use.
    """

    def __init__(self, rule, n_out, eta0=0.2, max_norm=1.0, aux_dim=4, ablate="none"):
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
        if ablate not in ABLATIONS:
            raise ValueError(f"ablate must be one of {', '.join(ABLATIONS)}, not {ablate!r}")
        self.rule, self.n_out, self.eta0, self.max_norm, self.ablate = rule, n_out, eta0, max_norm, ablate
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
        return [-g for g in torch.autograd.grad(internal_loss, ys, retain_graph=True, create_graph=learning)]

    def eta(self, z, d_norm_sq):
        """eta_t (B, 1) from z_t (B, 1, Z) and ||D_t||² (B, 1)."""
        # eta_t = eta_0 * sigmoid(m_t) * min(1, max_norm / ||D_t||)
        m = z[:, :, self.n_out]  # (B, 1)
        eta = self.eta0 * (torch.ones_like(m) if self.ablate == "eta" else torch.sigmoid(m))
        if 0 < self.max_norm < math.inf:
            # clamped before the root, whose derivative is infinite at ||D_t|| = 0
            eta = eta * self.max_norm / d_norm_sq.clamp(min=self.max_norm**2).sqrt()
        return eta


class FastWeights:
    """The fast weights of every plastic layer over one batch of B episodes: a matrix, and the terms since its fold.

    read() is called by each layer at each step and remembers what that step would write; write() then appends it.
    `fold` is K: after K writes the terms become part of the matrix; 0: never, until someone calls fold_terms().
    `eta` and `d_norm` list eta_t and ||D_t||, each (B, 1), of the writes so far: what the gates are drawn from.
    """

    def __init__(self, plasticity, fold=0):
        self.plasticity, self.fold = plasticity, fold
        # else no history is kept for the outer gradient: in evaluation, and where it is ablated
        self.learning = torch.is_grad_enabled() and plasticity.ablate != "backward"
        self.matrix = {}  # of each layer: P_t0 (B, out, in) as a SharedMatrix
        self.decay = 1.0  # then (B, 1, 1): the product of 1 - eta_t since the fold, shared by all layers as eta_t is
        self.c = None  # then c_ts (B, S, 1) of the S writes since
        self.pre, self.post = {}, {}  # of each layer: x_s (B, S, in) and u_s (B, S, out) of these
        self.p = {}  # of each layer: sum_s c_ts u_s (B, 1, out) over all writes, of which p_t is beta times
        self.now = {}  # of each layer: x_t (B, 1, in) and y_t (B, 1, out) of the present step
        self.eta, self.d_norm = [], []

    def read(self, layer, x, y):
        """Add P_t x + p_t to y = W x + b. x (B, Q, in), y (B, Q, out): one context step, or Q queries after a fold."""
        if layer in self.p:
            y = torch.addcmul(y, layer.beta, self.p[layer])
        if layer in self.pre:
            y = y + layer.attend(x, self.c, self.post[layer], self.pre[layer])
        if layer in self.matrix:
            # (1 - eta_t0) ... (1 - eta_{t-1}) P_t0 x
            y = y + self.decay * self.matrix[layer].read(x)
        self.now[layer] = x, y
        return y

    def write(self, z):
        """End the present step, whose head said z_t (B, 1, Z): work out eta_t and D_t and append them to P_t."""
        signals = self.plasticity.signals(z, [y for _, y in self.now.values()], self.learning)
        # ||D_t||² = sum over the layers of ||u_t x_tᵀ||_F², and ||u xᵀ||_F = |u| |x|
        d_norm_sq = sum(u.square().sum(-1) * x.square().sum(-1) for (x, _), u in zip(self.now.values(), signals))
        eta = self.plasticity.eta(z, d_norm_sq)  # (B, 1)
        self.eta.append(eta.detach())
        self.d_norm.append(d_norm_sq.detach().sqrt())
        eta = eta.unsqueeze(-1) if self.learning else eta.detach().unsqueeze(-1)  # (B, 1, 1)
        # c_{t+1,s} = (1 - eta_t) c_ts for the past writes, c_{t+1,t} = eta_t for this one
        keep = 1 - eta
        self.decay = keep * self.decay
        for (layer, (x, _)), u in zip(self.now.items(), signals):
            if not self.learning:
                x, u = x.detach(), u.detach()
            new = eta * u
            self.p[layer] = torch.addcmul(new, keep, self.p[layer]) if layer in self.p else new
            past = layer in self.pre
            self.pre[layer] = torch.cat([self.pre[layer], x], dim=1) if past else x
            self.post[layer] = torch.cat([self.post[layer], u], dim=1) if past else u
        self.c = eta if self.c is None else torch.cat([keep * self.c, eta], dim=1)
        if self.fold and self.c.size(1) == self.fold:
            self.fold_terms()

    def fold_terms(self):
        """Make the terms part of the matrix: P_t0 for the present t as t0. Exact, and done before queries read."""
        for layer, pre in self.pre.items():
            P = layer.connect(self.c, self.post[layer], pre)  # (B, out, in)
            if layer in self.matrix:
                P = torch.addcmul(P, self.decay, self.matrix[layer].matrix)
            self.matrix[layer] = SharedMatrix(P if self.learning else P.detach(), self.fold)
        self.pre, self.post, self.c, self.decay = {}, {}, None, 1.0


class SharedMatrix:
    """A matrix M (..., o, i) that the next `n_reads` steps multiply, one vector each: read(x) = x Mᵀ, x (..., 1, i).

    Exact: dM is the sum over the steps of dy_tᵀ x_t. Autograd forms each, as large as M, and adds them up, which costs more
    than everything else a step does. Here every read has a *slot*, a zero whose gradient is dy_t; when all slots have
    theirs, dM = [dy_1, dy_2, ...]ᵀ [x_1, x_2, ...] is one product. `matrix` is M for other uses than read.

    The gradient rule differentiates the derivative dx_t = dy_t M of a read again, at a dy_t that is g_t; this use of M
    has a slot as well, whose gradient v_t gives the term g_tᵀ v_t.
    """

    def __init__(self, matrix, n_reads):
        self.matrix, self.values = matrix, matrix.detach()
        # by direction (False: x Mᵀ, True: dy M): the vectors that were multiplied, and a slot for each
        self.vectors, self.slots = {False: [], True: []}, None
        if matrix.requires_grad and torch.is_grad_enabled() and n_reads:
            slots = RankOneTerms.apply(matrix, self.vectors, n_reads)
            self.slots = {False: slots[:n_reads], True: slots[n_reads:]}

    def read(self, x):
        """x (..., 1, i) -> x Mᵀ (..., 1, o); or x (..., Q, i) of many queries, which is one product as it is."""
        return self.multiply(x, back=False) if self.slots and x.size(-2) == 1 else x @ self.matrix.mT

    def multiply(self, x, back):
        if not torch.is_grad_enabled():  # the outer backward pass, whose own derivative nobody takes; autocast is off there
            return x @ (self.values if back else self.values.mT).to(x.dtype)
        slot = self.slots[back][len(self.vectors[back])]
        self.vectors[back].append(x.detach())
        return Multiply.apply(x, slot, self, back)


class Multiply(torch.autograd.Function):
    """x Mᵀ, or x M if `back`, for a SharedMatrix; the gradient for M goes to the slot."""

    @staticmethod
    def forward(ctx, x, slot, shared, back):
        ctx.shared, ctx.back = shared, back
        return x @ (shared.values if back else shared.values.mT)

    @staticmethod
    def backward(ctx, dy):
        return ctx.shared.multiply(dy, not ctx.back), dy, None, None


class RankOneTerms(torch.autograd.Function):
    """M (..., o, i) -> n slots like y = x Mᵀ (..., 1, o), and n like x (..., 1, i); see SharedMatrix."""

    @staticmethod
    def forward(ctx, M, vectors, n):
        ctx.set_materialize_grads(False)  # a slot that nobody used has None
        ctx.vectors, ctx.n = vectors, n
        y, x = M.new_zeros(()), M.new_zeros(())  # expanded: they take no memory
        return (*(y.expand(*M.shape[:-2], 1, M.size(-2)) for _ in range(n)),
                *(x.expand(*M.shape[:-2], 1, M.size(-1)) for _ in range(n)))

    @staticmethod
    def backward(ctx, *grads):
        terms = [(dy, x) for dy, x in zip(grads[:ctx.n], ctx.vectors[False]) if dy is not None]
        terms += [(g, v) for v, g in zip(grads[ctx.n:], ctx.vectors[True]) if v is not None]
        if not terms:
            return None, None, None
        dy, x = (torch.cat(side, dim=-2) for side in zip(*terms))  # (..., n, o), (..., n, i)
        # dM = sum_t dy_tᵀ x_t
        return dy.mT @ x.to(dy.dtype), None, None
