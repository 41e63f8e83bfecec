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

   and (alpha ∘ u xᵀ) x' = u ∘ (alpha (x ∘ x')), so a read is attention over the past with per-connection weights (Read).

2. It may become one. A read costs a product with alpha for each term, so every K steps the terms are folded into the
   matrix P_t0, and for the steps from then on, with terms s >= t0 only,

            P_t = (1 - eta_t0) ... (1 - eta_{t-1}) P_t0 + alpha ∘ sum_s c_ts u_s x_sᵀ

   A step then costs one matrix and at most K terms, however long the episode (FastWeights.fold_terms).

3. What many steps read gets its gradient from many steps. Autograd copies the past to append to it, and forms and adds up a
   gradient as large as the past, or as P_t0, at every step. Here these sums are made aside and in place, or, for a matrix,
   in one product at the end: the same sum. What was read hands it on when all readers have added to it (Aside).

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

    def attend(self, x, c, token, terms):
        """alpha ∘ (sum_s c_ts u_s x_sᵀ) times x (B, 1, in) -> (B, 1, out), without the matrix."""
        if not self.outer:
            return Read.apply(x, c, self.alpha, token, terms, False)
        # alpha_ij = a_i b_j, so alpha (x_s ∘ x) = a (x_s · (b ∘ x)): one number a write, as in linear attention
        return self.alpha_post * Read.apply(self.alpha_pre * x, c, None, token, terms, False)

    def connect(self, cu, pre):
        """alpha ∘ sum_s c_ts u_s x_sᵀ (B, out, in) from c_ts u_s (B, S, out) and x_s (B, S, in)."""
        if not self.outer:
            return self.alpha * (cu.mT @ pre)
        return (self.alpha_post * cu).mT @ (self.alpha_pre * pre)


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
    """The fast weights of every plastic layer over one batch of B episodes: a matrix, and the terms since its fold.

    read() is called by each layer at each step and remembers what that step would write; write() then appends it.
    `fold` is K: after K writes the terms become part of the matrix; 0: never, until someone calls fold_terms().
    `eta` and `d_norm` list eta_t and ||D_t||, each (B, 1), of the writes so far: what the gates are drawn from.
    """

    def __init__(self, plasticity, fold=0):
        self.plasticity, self.fold = plasticity, fold
        self.learning = torch.is_grad_enabled()  # else: evaluation, where no history is kept for the outer gradient
        self.matrix = {}  # of each layer: P_t0 (B, out, in) as a SharedMatrix
        self.decay = 1.0  # then (B, 1, 1): the product of 1 - eta_t since the fold, shared by all layers as eta_t is
        self.terms, self.token = {}, {}  # of each layer: x_s and u_s of the S writes since the fold, and the last write's token
        self.c = None  # (B, S, 1): their c_ts
        self.p = {}  # of each layer: p_t / beta (B, 1, out)
        self.now = {}  # of each layer: x_t (B, 1, in) and y_t (B, 1, out) of the present step
        self.eta, self.d_norm = [], []

    def read(self, layer, x, y):
        """Add P_t x + p_t to y = W x + b. x (B, Q, in), y (B, Q, out): one context step, or Q queries after a fold."""
        if layer in self.p:
            y = y + layer.beta * self.p[layer]
        if layer in self.terms:
            y = y + layer.attend(x, self.c, self.token[layer], self.terms[layer])
        if layer in self.matrix:
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
        keep = 1 - eta
        for (layer, (x, _)), u in zip(self.now.items(), signals):
            if not self.learning:
                x, u = x.detach(), u.detach()
            if layer not in self.terms:
                self.terms[layer], self.token[layer] = Terms(self.learning), eta.new_zeros(())
            self.token[layer] = Write.apply(x, u, self.token[layer], self.terms[layer])
            # p_{t+1} = (1 - eta_t) p_t + eta_t * beta ∘ u_t
            self.p[layer] = keep * self.p[layer] + eta * u if layer in self.p else eta * u
        # c_{t+1,s} = (1 - eta_t) c_ts for the past writes, c_{t+1,t} = eta_t for this one
        self.c = eta if self.c is None else torch.cat([keep * self.c, eta], dim=1)
        self.decay = keep * self.decay
        if self.c.size(1) == self.fold:
            self.fold_terms()

    def fold_terms(self):
        """Make the terms part of the matrix, P_t0 for the present t as t0; queries, which are many, read it alone."""
        for layer, terms in self.terms.items():
            pre, post = All.apply(self.token[layer], terms)  # (B, S, in), (B, S, out)
            P = layer.connect(self.c * post, pre)  # (B, out, in)
            if layer in self.matrix:
                P = torch.addcmul(P, self.decay, self.matrix[layer].matrix)
            self.matrix[layer] = SharedMatrix(P if self.learning else P.detach())
        self.terms, self.token, self.c, self.decay = {}, {}, None, 1.0


class Aside:
    """Where the readers of something put their shares of its gradient, apart from autograd's own sums.

    Readers take a *token*, an empty output of what they read. Autograd then runs the backward of what was read after the
    backward of all its readers, which is when the sum is complete. `of_this_pass(empty)` is the sum so far, or empty()
    if this backward pass has none yet: what an earlier, partial pass may have left is not added to.
    """

    def __init__(self):
        self.task = self.sum = None

    def of_this_pass(self, empty):
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self.task, self.sum = task, empty()
        return self.sum

    def hand_on(self, empty):
        if torch.is_grad_enabled():
            raise RuntimeError("fast weights can be differentiated once from outside: use create_graph=False")
        total = self.of_this_pass(empty)
        self.task = self.sum = None
        return total


class Terms:
    """x_s (B, S, in) and u_s (B, S, out) of the S writes since a fold: rows of two buffers, which double when full."""

    def __init__(self, learning):
        self.learning, self.size, self.buffers, self.aside = learning, 0, None, Aside()

    def append(self, *rows):
        if self.buffers is None:
            self.buffers = [row.repeat(1, 8, 1) for row in rows]
        elif self.size == self.buffers[0].size(1):
            self.buffers = [torch.cat([buffer, buffer], dim=1) for buffer in self.buffers]
        for buffer, row in zip(self.buffers, rows):
            buffer[:, self.size:self.size + 1] = row
        self.size += 1

    def sides(self, size, back=False):
        """pre (B, S, in) and post (B, S, out) of the first `size` writes; the other way round if `back`."""
        return [buffer[:, :size] for buffer in (self.buffers[::-1] if back else self.buffers)]

    def gradients(self, size, back=False):
        """The same of the sums of their gradients, to be added to in place."""
        sums = self.aside.of_this_pass(lambda: [torch.zeros_like(buffer[:, :self.size]) for buffer in self.buffers])
        return [total[:, :size] for total in (sums[::-1] if back else sums)]


class Write(torch.autograd.Function):
    """Append x (B, 1, in) and u (B, 1, out) to terms -> a token for its readers, and for the next write."""

    @staticmethod
    def forward(ctx, x, u, token, terms):
        ctx.set_materialize_grads(False)
        ctx.terms, ctx.s = terms, terms.size
        terms.append(x, u)
        return token.clone()

    @staticmethod
    def backward(ctx, _):
        if torch.is_grad_enabled():
            raise RuntimeError("fast weights can be differentiated once from outside: use create_graph=False")
        dx, du = (total[:, ctx.s:] for total in ctx.terms.gradients(ctx.s + 1))
        return dx, du, None, None


class Read(torch.autograd.Function):
    """sum_s c_s post_s ∘ (alpha (pre_s ∘ x)) for x (B, 1, in) -> (B, 1, out); alpha None: ones.

    Its derivative for x has the same form, dx = sum_s c_s pre_s ∘ (alphaᵀ (post_s ∘ dy)): pre and post change places,
    which is `back`. So the gradient rule's internal loss differentiates it by the same function, differentiable again.
    """

    @staticmethod
    def forward(ctx, x, c, alpha, token, terms, back):
        pre, post = terms.sides(c.size(1), back)  # (B, S, in), (B, S, out)
        if alpha is None:
            match = (x @ pre.mT).mT  # (B, S, 1)
            y = (c * match).mT @ post
        else:
            match = F.linear(pre * (c * x), alpha)  # (B, S, out), c_s included
            y = (post * match).sum(1, keepdim=True)
        ctx.terms, ctx.back = terms, back
        ctx.save_for_backward(x, c, alpha, token, match)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, c, alpha, token, match = ctx.saved_tensors
        if torch.is_grad_enabled() or not ctx.terms.learning:  # the internal loss: nobody but x is asked for
            alpha_back = None if alpha is None else alpha.mT
            return Read.apply(dy, c, alpha_back, token, ctx.terms, not ctx.back), None, None, None, None, None
        pre, post = ctx.terms.sides(c.size(1), ctx.back)
        d_pre, d_post = ctx.terms.gradients(c.size(1), ctx.back)
        if alpha is None:
            d_match = (dy @ post.mT).mT  # (B, S, 1)
            dc, d_alpha = match * d_match, None
            d_match = c * d_match
            dx = d_match.mT @ pre
            d_pre.addcmul_(d_match, x)
            d_post.addcmul_(c * match, dy)
        else:
            d_match = post * dy  # (B, S, out)
            d_product = d_match @ alpha  # (B, S, in), of pre ∘ x
            product = pre * x
            dc = (product * d_product).sum(-1, keepdim=True)
            d_alpha = d_match.flatten(0, 1).T @ product.mul_(c).flatten(0, 1)
            d_product.mul_(c)
            dx = (pre * d_product).sum(1, keepdim=True)
            d_pre.addcmul_(d_product, x)
            d_post.addcmul_(match, dy)
        return dx, dc, d_alpha, None, None, None


class All(torch.autograd.Function):
    """-> pre (B, S, in) and post (B, S, out) of all terms as tensors."""

    @staticmethod
    def forward(ctx, token, terms):
        ctx.terms = terms
        return tuple(side.clone() for side in terms.sides(terms.size))

    @staticmethod
    def backward(ctx, *grads):
        for total, grad in zip(ctx.terms.gradients(ctx.terms.size), grads):
            total.add_(grad)
        return None, None


class SharedMatrix:
    """A matrix M (..., o, i) that many steps multiply: read(x) = x Mᵀ for x (..., Q, i). `matrix` is M itself.

    dM = sum_t dy_tᵀ x_t has one term a read: they are kept apart and multiplied once, [dy_1, dy_2, ...]ᵀ [x_1, x_2, ...].
    """

    def __init__(self, matrix):
        self.matrix, self.values, self.aside = matrix, matrix.detach(), Aside()
        self.token = Collect.apply(matrix, self.aside) if matrix.requires_grad and torch.is_grad_enabled() else None

    def read(self, x):
        return x @ self.matrix.mT if self.token is None else Multiply.apply(x, self.values, self.token, self.aside, False)


class Multiply(torch.autograd.Function):
    """x Mᵀ, or x M if `back`, with the gradient for M put aside."""

    @staticmethod
    def forward(ctx, x, M, token, aside, back):
        ctx.aside, ctx.back = aside, back
        ctx.save_for_backward(x, M, token)
        return x @ (M if back else M.mT)

    @staticmethod
    def backward(ctx, dy):
        x, M, token = ctx.saved_tensors
        if not torch.is_grad_enabled():  # else the internal loss: nobody but x is asked for
            ctx.aside.of_this_pass(list).append((x, dy) if ctx.back else (dy, x))
        return Multiply.apply(dy, M, token, ctx.aside, not ctx.back), None, None, None, None


class Collect(torch.autograd.Function):
    """M -> a token for its readers."""

    @staticmethod
    def forward(ctx, M, aside):
        ctx.set_materialize_grads(False)
        ctx.aside = aside
        return M.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        terms = ctx.aside.hand_on(list)
        if not terms:
            return None, None
        dy, x = (torch.cat(side, dim=-2) for side in zip(*terms))  # (..., n, o), (..., n, i)
        return dy.mT @ x, None
