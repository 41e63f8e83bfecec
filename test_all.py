"""Every test of the project: python test_all.py, or pytest test_all.py.

    python test_all.py oracle       # the tests with "oracle" in their names
    python test_all.py copy damage  # those with any of several words

 1. The recurrence: an oracle, which is the paper's equations and nothing else, and what must
    agree with it
 2. Facts about the model: what it can see, what a lesion leaves, where it stays finite
 3. Tasks and splits: episodes, images, packs, downloads
 4. Training and resuming: the same command gives the same run, however often it is stopped
 5. Bad input: one clear line, exit status 2, and nothing lost

Helpers stand at the head of the chapter that first uses them. Some tests try more when asked to:
LONG=2000, KILLS=30, DAMAGED=200 and ARGUMENTS=500 are such numbers, set as environment variables.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import functools
import http.server
import importlib.util
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import SkipTest, mock

import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import eval as evaluation
import tasks
import train
from model import Config, Transformer
from plasticity import FastWeights, SharedMatrix, UnrolledFastWeights
from tasks import SPLITS, Copy, Cue, Episodes, FewShot, Regression, random_generator

HERE = Path(__file__).parent
PLASTIC = ("hebbian", "gradient")
RULES = ("none", *PLASTIC)


# ------ 1. The recurrence ------


class Oracle:
    """Section 1 of the paper: one sequence, one step at a time, an explicit P_t. Not batched."""

    def __init__(self, model):
        self.model, self.plasticity, self.etas = model, model.plasticity, []
        self.layers = [layer for block in model.blocks for layer in (block.up, block.down)]
        self.P = {layer: torch.zeros_like(layer.weight) for layer in self.layers}
        self.p = {layer: torch.zeros_like(layer.bias) for layer in self.layers}
        self.x, self.y = {}, {}  # what each layer read at this step, and its output
        self.past = [[] for _ in model.blocks]  # of each block: key and value of every step

    def answers(self, context, queries):
        """context (T, C), queries (Q, C) or None -> (T, n_out) or (Q, n_out)"""
        found = []
        for t, token in enumerate(context):
            found.append(self.step(token, t))
            if self.plasticity.rule != "none":
                self.write(found[-1])
        if queries is not None:  # each reads as if it alone came next, and writes nothing
            found = [self.step(query, len(context), remember=False) for query in queries]
        return torch.stack(found)[:, :self.model.n_out]

    def read(self, layer, x):
        # y_t = (W + P_t) x_t + (b + p_t)
        y = (layer.weight + self.P[layer]) @ x + (layer.bias + self.p[layer])
        self.x[layer], self.y[layer] = x, y
        return y

    def write(self, z):
        d = self.y
        if self.plasticity.rule == "gradient":
            # L_t = mean((w_out ∘ z_t)²), g_t = dL_t/dy_t
            L = ((self.plasticity.w_out * z) ** 2).mean()
            g = torch.autograd.grad(L, [self.y[layer] for layer in self.layers], create_graph=True)
            d = {layer: -g_t for layer, g_t in zip(self.layers, g)}
        D = {layer: torch.outer(d[layer], self.x[layer]) for layer in self.layers}
        # ||D_t||² = sum over the plastic layers of ||D_t||_F²
        norm = torch.sqrt(sum((D[layer] ** 2).sum() for layer in self.layers))
        # eta_t = eta_0 * sigmoid(m_t) * min(1, max_norm / ||D_t||)
        scale = torch.clamp(self.plasticity.max_norm / norm, max=1)
        self.store(self.plasticity.eta0 * self.gate(z[self.model.n_out]) * scale, D, d)

    def gate(self, m):
        return torch.sigmoid(m)

    def store(self, eta, D, d):
        self.etas.append(eta)
        for layer in self.layers:
            # P_{t+1} = (1 - eta_t) P_t + eta_t * alpha ∘ D_t
            self.P[layer] = (1 - eta) * self.P[layer] + eta * layer.alpha * D[layer]
            # p_{t+1} = (1 - eta_t) p_t + eta_t * beta ∘ d_t
            self.p[layer] = (1 - eta) * self.p[layer] + eta * layer.beta * d[layer]

    def step(self, token, t, remember=True):
        """One token (C) at position t -> z_t (Z)"""
        x = self.place(token, t)
        for block, past in zip(self.model.blocks, self.past):
            x = x + self.attend(block.attention, past, block.norm1(x), t, remember)
            x = x + self.read(block.down, F.gelu(self.read(block.up, block.norm2(x))))
        return self.model.head(self.model.norm(x))

    def attend(self, attention, past, x, t, remember):
        q, k, v = (whole.chunk(attention.n_head) for whole in attention.qkv(x).chunk(3))
        q, k = ([self.turn(part, t) for part in whole] for whole in (q, k))  # a part for each head
        seen = [*past, (k, v)]
        past += [(k, v)] if remember else []
        seen = seen[-self.model.config.window:]  # of 0: all
        heads = []
        for h, q_h in enumerate(q):
            scores = torch.stack([q_h @ k_s[h] / math.sqrt(len(q_h)) for k_s, _ in seen])
            heads.append(sum(w * v_s[h] for w, (_, v_s) in zip(scores.softmax(0), seen)))
        return attention.proj(torch.cat(heads))

    def place(self, token, t):
        return token + self.model.position[t]

    def turn(self, part, t):
        return part


def oracle(model, episodes, by=Oracle):
    """The answers (B, Q or T, n_out) and the eta_t of each write (B, T) of a batch."""
    answers, etas = [], []
    for b in range(len(episodes.target)):
        one = Episodes(*(None if t is None else t[b:b + 1] for t in episodes))
        context, queries = model.embed(one)
        sequence = by(model)
        answers.append(sequence.answers(context[0], None if queries is None else queries[0]))
        etas.append(torch.stack(sequence.etas or [torch.zeros(())]))
    return torch.stack(answers), torch.stack(etas)


def small_model(task, rule, **sizes):
    """In double precision, and every parameter random: no term hides behind a 0 or a 1."""
    torch.manual_seed(0)
    small = dict(n_layer=2, n_head=2, d_model=8, d_ff=12, filters=4, alpha_init=1.0, rule=rule)
    model = Transformer(task, Config(**{**small, **sizes})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def draw(task, batch_size):
    """Training episodes with features in double precision."""
    episodes = task.sample("train", batch_size, random_generator(0, "train"))
    return Episodes(*(t.double() if t is not None and t.is_floating_point() else t
                      for t in episodes))


def gradients(model, out):
    """d(a fixed random weighting of out)/d(parameter), for every parameter by name."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((out * weights).sum(), list(learned.values()), allow_unused=True)
    return dict(zip(learned, found))


def assert_close(a, b, what, tolerance=1e-9):
    assert a.shape == b.shape, f"{what} has the shape {a.shape}, not {b.shape}"
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"{what} differs by {difference:.2e}"


def check_against_oracle(task, rule, by=Oracle, **sizes):
    """Answers, eta and every gradient are the oracle's, in both forms of the fast weights."""
    for form in ("literal", "unrolled"):
        model, episodes = small_model(task, rule, fast_weights=form, **sizes), draw(task, 2)
        expected, expected_eta = oracle(model, episodes, by)
        out, fast = model(episodes)
        assert_close(out, expected, f"{form}: the answer")
        ours, theirs = gradients(model, out), gradients(model, expected)
        for name, gradient in ours.items():
            if model.config.ablate == "backward" and name == "plasticity.w_out":
                assert gradient is None and theirs[name] is None
                continue
            assert gradient is not None, f"{form}: no gradient reaches {name}"
            scale = max(1.0, theirs[name].abs().max().item())
            assert_close(gradient / scale, theirs[name] / scale, f"{form}: gradient of {name}")
        with torch.no_grad():  # evaluation keeps no history, and must say the same
            evaluated, again = model(episodes)
        assert_close(evaluated, expected, f"{form}: the answer without gradients")
        assert not evaluated.requires_grad
        for found in (fast, again) if rule != "none" else ():
            eta = torch.cat(found.eta, dim=1)
            assert_close(eta, expected_eta[:, :eta.size(1)], f"{form}: eta")
            assert eta.std() > 0.01 * eta.mean(), "every eta is the same: this shows too little"
    return fast


def test_oracle():
    """Without queries, with queries, and in a model of one block."""
    sources = ((Copy(2, 2, 5), 2), (Cue(4, 6), 2), (Regression(2, 4, 3), 1))
    for rule, window, (task, n_layer) in product(RULES, (0, 1, 3), sources):
        check_against_oracle(task, rule, window=window, n_layer=n_layer)
        if rule != "none":
            check_against_oracle(task, rule, window=window, n_layer=n_layer, alpha="outer")
    layer = small_model(task, "hebbian", alpha="outer").blocks[0].up
    for i, j in product(range(12), range(8)):
        assert layer.alpha[i, j] == layer.alpha_post[i] * layer.alpha_pre[j]


def test_oracle_with_and_without_clipping():
    for rule, (max_norm, expected) in product(PLASTIC, ((0.01, 1), (1, None), (1e9, 0))):
        fast = check_against_oracle(Copy(2, 2, 5), rule, max_norm=max_norm, eta0=0.1)
        clipped = (torch.cat(fast.norm, 1) > max_norm).double().mean().item()
        assert expected is None or clipped == expected


def test_oracle_with_folding():
    for rule, alpha in product(PLASTIC, ("full", "outer")):
        for fold in (1, 2, 3, 40):  # 40, as 32 elsewhere, only folds for queries
            check_against_oracle(Copy(3, 2, 5), rule, fold=fold, alpha=alpha)
            check_against_oracle(Cue(5, 6), rule, fold=fold, alpha=alpha)
        for window in (1, 2, 4):  # shorter than the fold, as long, and longer
            check_against_oracle(Copy(3, 2, 5), rule, fold=2, alpha=alpha, window=window)
        check_against_oracle(Cue(5, 6), rule, fold=2, alpha=alpha, window=2)
    check_against_oracle(Copy(3, 2, 5), "none", fold=2)
    check_against_oracle(Cue(1, 6), "gradient", fold=2)  # a single query


class RotaryOracle(Oracle):
    """Rotary positions as complex numbers: channels j, j + D/2 are one, times e^(i t speed_j)."""

    def place(self, token, t):
        return token

    def turn(self, part, t):
        half = len(part) // 2
        speed = [10000.0 ** (-j / max(1, half - 1)) for j in range(half)]
        angle = (t * torch.tensor(speed, dtype=torch.float32)).double()  # as exact as the model's
        turned = torch.complex(part[:half], part[half:]) * torch.exp(1j * angle)
        return torch.cat([turned.real, turned.imag])


def test_oracle_with_rotary_positions():
    for rule, window, task in product(RULES, (0, 3), (Copy(2, 2, 5), Regression(2, 4, 2))):
        check_against_oracle(task, rule, RotaryOracle, window=window, position="rotary")
    # there is no longest episode
    model = small_model(Copy(2, 2, 5), "hebbian", position="rotary", block_size=4)
    assert model(draw(Copy(2, 40, 5), 2))[0].shape == (2, 45, 5)


class AblatedOracle(Oracle):
    """Without neuromodulation, or with nothing learned through the writes."""

    def gate(self, m):
        return 1.0 if self.model.config.ablate == "eta" else super().gate(m)

    def store(self, eta, D, d):
        if self.model.config.ablate == "backward":
            eta = eta.detach()
            D, d = ({layer: signal.detach() for layer, signal in of.items()} for of in (D, d))
        super().store(eta, D, d)


def test_oracle_with_ablations():
    for rule, ablate in product(PLASTIC, ("eta", "alpha", "backward")):
        forms = (dict(fold=40), dict(fold=2), dict(fold=2, alpha="outer"))
        for form, task in product(forms, (Copy(2, 2, 5), Cue(4, 6))):
            check_against_oracle(task, rule, AblatedOracle, ablate=ablate, **form)
        model = small_model(Copy(2, 2, 5), rule, ablate=ablate)
        grads = gradients(model, model(draw(Copy(2, 2, 5), 2))[0])
        learned = any("alpha" in name or "beta" in name for name in grads)
        assert learned == (ablate == "eta")
        # the neuromodulator's row: without it, m_t is but one more number of the gradient rule's
        # internal loss
        moves = (grads["head.weight"][model.n_out] != 0).any()
        assert moves == (ablate == "alpha" or ablate == "eta" and rule == "gradient")


def test_shared_matrix():
    """A product with slots is x @ M.mT: value, first and second derivatives."""
    torch.manual_seed(0)
    M = torch.randn(2, 3, 4, dtype=torch.float64)
    xs = torch.randn(3, 2, 1, 4, dtype=torch.float64)
    results = []
    for shared in (True, False):
        M, xs = M.detach().requires_grad_(), xs.detach().requires_grad_()
        matrix, total = SharedMatrix(M.tanh(), 3), 0
        for x in xs[:2]:  # one slot stays empty
            y = matrix.times(x) if shared else x @ M.tanh().mT
            # as the gradient rule does: a derivative of the read is part of what is learned from
            dx, = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            total = total + y.sin().sum() + dx.pow(2).sum()
        total = total + (xs[2] @ matrix.matrix.mT).cos().sum()  # and another use of the matrix
        # a pass that does not get as far as M changes nothing, nor does a second
        partial, = torch.autograd.grad(total, xs, retain_graph=True)
        again, first = torch.autograd.grad(total, [xs, M], retain_graph=True)
        second, = torch.autograd.grad(total, M)
        assert_close(partial, again, "the gradient of x")
        assert_close(first, second, "the second pass")
        results.append((total, again, first))
    for what, ours, theirs in zip(("the value", "dx", "dM"), *results):
        assert_close(ours, theirs, what)


def test_gradcheck():
    """Against finite differences, which owe nothing to anybody's derivatives."""
    forms = (("full", "literal", 1), ("full", "unrolled", 40), ("full", "unrolled", 2),
             ("outer", "unrolled", 40), ("outer", "unrolled", 2))
    for rule, (alpha, form, fold), task in product(PLASTIC, forms, (Copy(1, 1, 4), Cue(3, 3))):
        model = small_model(task, rule, n_layer=1, n_head=1, d_model=3, d_ff=3, alpha=alpha,
                            fast_weights=form, fold=fold)
        episodes, names = draw(task, 1), [name for name, _ in model.named_parameters()]

        def answer(*values):
            given = dict(zip(names, values))
            return torch.func.functional_call(model, given, (episodes,))[0]

        values = [p.detach().clone().requires_grad_() for p in model.parameters()]
        assert torch.autograd.gradcheck(answer, values, fast_mode=True)


def test_gradients_reach_what_the_paper_detaches():
    for rule, task in product(PLASTIC, (Copy(2, 2, 5), Cue(4, 6))):
        model, n_out = small_model(task, rule), task.n_out
        grads = gradients(model, model(draw(task, 2))[0])
        for name in ("head.weight", "head.bias"):
            moves = grads[name][n_out].abs().max() > 1e-8
            assert moves, f"the neuromodulator's row of {name} does not learn"
        learned = [name for name in grads if name.endswith(("alpha_full", "beta", "w_out"))]
        assert len(learned) == 8 + (rule == "gradient")
        for name in learned:
            assert (grads[name].abs() > 1e-12).all(), f"parts of {name} do not learn"
        if rule == "gradient":  # the auxiliary outputs learn by second order alone
            assert (grads["head.weight"][n_out + 1:].abs() > 1e-12).all()


# ------ 2. Facts about the model ------

FOLDERS = []


def new_folder():
    """A temporary folder, which is there until the tests end."""
    folder = tempfile.TemporaryDirectory()
    FOLDERS.append(folder)
    return Path(folder.name)


@functools.cache
def fake_packs():
    """A folder with both packs in the real format; an image's first pixels say which it is."""
    folder = new_folder()
    for name, (file_name, shape) in tasks.PACKS.items():
        n_classes, n_images, _, _, size = shape
        height = size if name == "omniglot" else 1  # what is expanded takes no room
        images = torch.zeros(n_classes, n_images, 1, height, size, dtype=torch.uint8)
        which, number = torch.meshgrid(torch.arange(n_classes), torch.arange(n_images),
                                       indexing="ij")
        for i, value in enumerate((which // 256, which % 256, number // 256, number % 256)):
            images[:, :, 0, 0, i] = value.byte()
        images[:, :, 0, 0, 4] = 255  # an image that was not turned or flipped has this here
        names = sorted([f"class{i:02}" for i in range(64)] + tasks.CIFARFS_VAL + tasks.CIFARFS_TEST)
        if name == "omniglot":  # 33 characters an alphabet, which has a new name from 964 on
            names = [f"{'AB'[i >= 964]}{i // 33:02}/character{i % 33:02}" for i in range(1623)]
        torch.save({"images": images.expand(shape), "classes": names}, folder / file_name)
    return folder


def assert_finite(model, out, what):
    assert out.isfinite().all(), what
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), f"{what}: the gradient of {name}"


def test_a_query_does_not_see_the_others():
    sources = (Cue(4, 6), Regression(2, 4, 5), FewShot("omniglot", fake_packs(), 3, 1, 2))
    for task, rule, window in product(sources, RULES, (0, 2)):
        model, episodes = small_model(task, rule, window=window), draw(task, 2)
        whole = model(episodes)[0]
        other = torch.roll(episodes.query_x, 1, dims=0)  # other queries, but for the last
        other[:, -1] = episodes.query_x[:, -1]
        changed = model(episodes._replace(query_x=other))[0]
        assert_close(whole[:, -1], changed[:, -1], "the last query's answer")
        assert (whole[:, 0] - changed[:, 0]).abs().max() > 1e-6
        alone = model(episodes._replace(query_x=episodes.query_x[:, -1:]))[0]
        assert_close(whole[:, -1:], alone, "the answer to a query alone")


def test_lesion_is_the_slow_model():
    """Nothing written: the model, step by step, says what a plain GPT says of all steps at once."""
    forms = product((Copy(2, 3, 5), Cue(4, 6)), PLASTIC, (0, 1, 3), ("unrolled", "literal"))
    for task, rule, window, form in forms:
        model = small_model(task, rule, window=window, fast_weights=form)
        slow, episodes = small_model(task, "none", window=window), draw(task, 2)
        weights = {name: model.state_dict()[name] for name in slow.state_dict()}
        for name in ("head.weight", "head.bias"):
            weights[name] = weights[name][:task.n_out]
        slow.load_state_dict(weights)
        expected = slow(episodes)[0]
        assert (model(episodes)[0] - expected).abs().max() > 1e-4
        model.plasticity.eta0 = 0.0
        assert_close(model(episodes)[0], expected, f"lesioned {rule}")


def test_window_limits_what_is_seen():
    for window, sees in ((1, False), (4, False), (5, True), (0, True)):
        task = Copy(3, 4, 6)
        model, episodes = small_model(task, "none", window=window, n_layer=1), draw(task, 1)
        other = episodes.support_x.clone()
        other[:, 0] = 5 - other[:, 0]  # another first token
        changed = model(episodes)[0] - model(episodes._replace(support_x=other))[0]
        assert (changed[:, 4].abs().max() > 1e-9) == sees, f"window {window}"


def test_fast_weights_carry_what_a_window_hides():
    for rule in RULES:
        model, episodes = small_model(Cue(4, 6), rule, window=1), draw(Cue(4, 6), 2)
        other = episodes._replace(support_y=1 - episodes.support_y)
        changed = model(episodes)[0] - model(other)[0]
        assert (changed.abs().max() > 1e-6) == (rule != "none"), rule


def test_no_rule_has_parameters_it_does_not_use():
    task, sizes = Copy(2, 2, 5), dict(d_model=8, d_ff=12, aux_dim=4, alpha_init=4.0)
    plain = {name for name, _ in Transformer(task, Config(rule="none", **sizes)).named_parameters()}
    for alpha, its in (("full", {"alpha_full"}), ("outer", {"alpha_post", "alpha_pre"})):
        for rule, n_head, expected in (("none", 5, set()), ("hebbian", 5 + 1, {*its, "beta"}),
                                       ("gradient", 5 + 1 + 4, {*its, "beta", "w_out"})):
            model = Transformer(task, Config(rule=rule, alpha=alpha, **sizes))
            assert model.head.out_features == n_head
            extra = {name for name, _ in model.named_parameters()} - plain
            assert {name.split(".")[-1] for name in extra} == expected
            found = gradients(model, model(draw(task, 2))[0])
            assert not [name for name, gradient in found.items() if gradient is None]
            for block in model.blocks if rule != "none" else ():
                assert (block.up.alpha == 4).all() and (block.down.beta == 4).all()
        assert (model.plasticity.w_out == 1).all()


def test_finite_where_inputs_and_writes_vanish():
    nothing = Episodes(*(torch.zeros(2, *of) for of in ((4, 2), (4, 1), (3, 2), (3, 1))))
    forms = product(PLASTIC, (1e-9, 1.0, 1e9), ("unrolled", "literal"))
    for rule, max_norm, form in forms:
        config = Config(rule=rule, d_model=8, d_ff=12, max_norm=max_norm, fast_weights=form)
        model = Transformer(Regression(2, 4, 3), config)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)  # then y, g and ||D|| are exactly 0
        out, _ = model(nothing)
        out.sum().backward()
        assert_finite(model, out, f"{rule}, max_norm {max_norm}, {form}")


def test_finite_at_the_edges():
    """Long contexts, eta_0 of 1, no clipping, one sequence, one class, one image. LONG=2000.

    Without clipping the Hebbian rule multiplies what it wrote: with alpha from 0.5 or so it
    overflows, as its equations say.
    """
    settings = (("hebbian", 1.0, 8.0, 1.0), ("gradient", 0.02, 20.0, 1.0),
                ("gradient", 1.0, 1.0, 1.0), ("hebbian", 1.0, 0.05, 1e9),
                ("gradient", 1.0, 1.0, 1e9))  # rule, eta_0, alpha, max_norm
    long = Copy(2, int(os.environ.get("LONG", 60)) - 3, 6)
    for task, setting in product((long, FewShot("omniglot", fake_packs(), 1, 1, 1)), settings):
        torch.manual_seed(0)
        given = dict(zip(("rule", "eta0", "alpha_init", "max_norm"), setting))
        given.update(n_layer=1, n_head=2, d_model=8, d_ff=8, filters=4)
        model = Transformer(task, Config(**given))
        episodes = task.sample("train", 1, random_generator(0, "train"))
        out, _ = model(episodes)
        task.loss(out, episodes.target).backward()
        assert_finite(model, out, f"{given}, {type(task).__name__}")


def test_what_is_kept_does_not_grow():
    """Never more past terms than --fold, and no write that nobody reads."""
    sources = ((Copy(3, 20, 5), 3 + 20 + 1 + 3 - 1), (Cue(9, 9), 9))
    for (task, n_writes), form in product(sources, (FastWeights, UnrolledFastWeights)):
        name = "literal" if form is FastWeights else "unrolled"
        model = small_model(task, "gradient", fold=4, fast_weights=name)
        terms, products, real = [], [], form.store

        def watched(self, eta, writes):
            real(self, eta, writes)
            terms.append(max([x.size(1) for x in getattr(self, "pre", {}).values()], default=0))
            shared = [P.vectors for P in self.P.values() if isinstance(P, SharedMatrix)]
            products.extend(len(used) for vectors in shared for used in vectors.values())

        with mock.patch.object(form, "store", watched):
            model(draw(task, 2))
        assert len(terms) == n_writes, "a step wrote that nobody reads after, or one did not"
        assert max(terms) == (0 if form is FastWeights else 3) and min(terms) == 0
        assert max(products, default=0) <= 4


# ------ 3. Tasks and splits ------


@contextlib.contextmanager
def quiet():
    """Catch what is printed -> (stdout, stderr) as StringIO."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            yield out, err


def fails(reason, function, *args):
    """Call what must raise a ValueError of one line with `reason` in it."""
    try:
        function(*args)
    except ValueError as error:
        assert reason in str(error) and "\n" not in str(error), f"{reason!r} is not in: {error}"
    else:
        raise AssertionError(f"accepted: {args}")


def fork(work, **environment):
    """Call work() in a process of its own, which ends with status 0 or 1 -> its id."""
    if not hasattr(os, "fork"):
        raise SkipTest("needs fork")
    child = os.fork()
    if child:
        return child
    os.environ.update(environment)
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def in_processes(world, work):
    """Call work() in processes that find what torchrun would tell them -> exit statuses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        same = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]),
                    WORLD_SIZE=str(world))
    children = [fork(work, RANK=str(i), LOCAL_RANK=str(i), **same) for i in range(world)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def identify(images):
    """Images (*, channels, size, size) of a fake pack -> class, image number, quarter-turns and
    whether it was flipped, (*) each."""
    flipped = images[..., 0, 0, -5] == 255
    straight = torch.where(flipped[..., None, None, None], images.flip(-1), images)
    corners = [straight.rot90(-k, (-2, -1))[..., 0, 0, :5].long() for k in range(4)]
    corners = torch.stack(corners)  # (4, *, 5)
    turns = (corners[..., 4] == 255).long().argmax(0)
    index = turns[None, ..., None].expand(1, *turns.shape, 5)
    a, b, c, d, _ = corners.gather(0, index)[0].unbind(-1)
    return a * 256 + b, c * 256 + d, turns, flipped


def test_copy_episodes():
    task = Copy(seq_len=3, delay=4, vocab_size=6)
    episodes = task.sample("train", 200, random_generator(0, "train"))
    items, rest = episodes.support_x[:, :3], episodes.support_x[:, 3:]
    assert episodes.support_x.shape == (200, 11) and (items == episodes.target).all()
    assert sorted(items.unique().tolist()) == [1, 2, 3, 4]
    assert (rest == torch.tensor([0, 0, 0, 0, 5, 0, 0, 0])).all()
    # recall is scored at the last three steps, not at the blanks before
    out = F.one_hot(F.pad(items, (8, 0)), 6).float()
    assert task.score(out, episodes.target).eq(1).all()
    assert task.score(out.roll(1, 1), episodes.target).mean() < 0.5
    # delays from 2 to 5 in training, always 5 in a test; the delimiter stands before the recall
    task, generator = Copy(3, 5, 6, min_delay=2), random_generator(0, "train")
    for split, delays in (("train", {2, 3, 4, 5}), ("test", {5})):
        batches = [task.sample(split, 2, generator) for _ in range(50)]
        assert {batch.support_x.size(1) - 7 for batch in batches} == delays
        for x, _, _, target in batches:
            assert (x[:, -4] == 5).all() and (x[:, :3] == target).all()


def test_cue_episodes():
    x, y, query_x, target = Cue(8, 20).sample("train", 100, random_generator(0, "train"))
    assert x.sum(-1).eq(1).all() and x.sum(1).le(1).all()  # one-hot, all different
    for b in range(100):
        reward = dict(zip(x[b].argmax(-1).tolist(), y[b, :, 0].tolist()))
        assert [reward[cue] for cue in query_x[b].argmax(-1).tolist()] == target[b, :, 0].tolist()
    assert abs(target.mean() - 0.5) < 0.05 and 0 <= target.min() and target.max() <= 1
    ordered = (query_x == x).all(-1).double().mean()
    assert ordered < 0.2, "the queries come in the order of the pairs"


def test_regression_episodes():
    task = Regression(dim=3, support=10, queries=7)
    x, y, query_x, target = draw(task, 500)
    fit = torch.linalg.lstsq(F.pad(x, (0, 1), value=1.0), y).solution  # (B, dim + 1, 1)
    answer = F.pad(query_x, (0, 1), value=1.0) @ fit
    assert task.loss(answer, target) < 1e-8  # least squares gives 0, guessing 0 gives 4
    assert abs(task.loss(torch.zeros_like(answer), target).item() - 4) < 0.5


def test_distorted_images():
    """Two blobs: the middle between them says how far an image was shifted, their difference how
    it was turned and scaled."""
    y, x = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
    blobs = torch.stack([torch.exp(-((x - centre) ** 2 + y**2) / 4) for centre in (-6, 6)])
    images = (blobs * 255).round().byte().expand(4, 100, 2, 28, 28)  # two channels
    out = tasks.distort(images, random_generator(0, "train"))
    assert out.dtype == torch.uint8 and out.shape == images.shape
    assert torch.equal(out, tasks.distort(images, random_generator(0, "train")))
    mass = out.flatten(0, 1).double()  # (400, 2, 28, 28)
    mass = mass / mass.sum((-2, -1), keepdim=True)
    centre = torch.stack([(mass * of).sum((-2, -1)) for of in (x, y)], -1)  # (400, 2 blobs, x, y)
    apart = centre[:, 1] - centre[:, 0]
    angle, scale = torch.atan2(apart[:, 1], apart[:, 0]).rad2deg(), 12 / apart.norm(dim=1)
    across, down = (centre.mean(1) * scale[:, None] / 14).T  # of half the width
    mixed = 0.15 * (math.cos(math.radians(10)) + math.sin(math.radians(10)))  # by the turn
    for away, most in ((angle, 10), (scale - 1, 0.15), (across, mixed), (down, mixed)):
        low, high, mean = away.min() / most, away.max() / most, away.mean() / most
        assert -1.03 < low < -0.75 and 0.75 < high < 1.03 and abs(mean) < 0.15, (low, high, mean)
    together = torch.stack([angle, scale, across, down]).corrcoef().triu(1).abs().max()
    assert together < 0.2, "two of them go together"


def test_few_shot_episodes():
    straight = mock.Mock(side_effect=lambda images, generator: images)
    for name in ("omniglot", "cifarfs"):
        task, seen = FewShot(name, fake_packs(), ways=5, shots=2, queries=3), {}
        with mock.patch.object(tasks, "distort", straight):
            for split in SPLITS:
                straight.reset_mock()
                episodes = task.sample(split, 40, random_generator(0, split))
                distorted = sum(call.args[0].shape[:2].numel() for call in straight.call_args_list)
                assert distorted == 40 * 25 * (name == "omniglot" and split == "train")
                seen[split] = check_few_shot(task, split, episodes)
            images, classes = task.sample_images(50, random_generator(0, "train"))  # to pretrain on
        assert not seen["train"] & (seen["val"] | seen["test"]) and not seen["val"] & seen["test"]
        (kind, _, turns, _), ids = identify(images), torch.tensor(task.class_ids["train"])
        assert (ids[classes % len(ids)] == kind).all()
        assert name == "cifarfs" or (classes // len(ids) == turns).all()


def check_few_shot(task, split, episodes):
    """40 episodes of 5 ways, 2 shots and 3 queries a class -> the classes that they show."""
    x, y, query_x, target = episodes
    assert x.shape[:2] == (40, 10) and query_x.shape[:2] == (40, 15)
    labels = torch.cat([y, target], 1)  # (B, 25)
    kind, number, turns, flipped = identify(torch.cat([x, query_x], 1))  # (B, 25) each
    for b in range(40):
        shown = [*zip(labels[b].tolist(), kind[b].tolist(), turns[b].tolist())]
        assert labels[b].bincount().tolist() == [5] * 5
        assert len(set(shown)) == 5, "one label has two classes"
        assert len({of[1:] for of in shown}) == 5, "one class has two labels"
        for label in range(5):
            assert len(number[b, labels[b] == label].unique()) == 5, "a support image is a query"
    if task.task == "omniglot":
        assert {*turns.flatten().tolist()} == ({0, 1, 2, 3} if split == "train" else {0})
    else:
        assert flipped.any() == (split == "train") and not flipped.all()
    for part in (y, target):  # sorted queries would give the class away
        assert (part.diff() >= 0).all(1).double().mean() < 0.2, "the labels come sorted"
    assert {*kind.flatten().tolist()} <= {*task.class_ids[split]}
    return {*kind.flatten().tolist()}


def test_class_splits():
    for name, sizes in (("cifarfs", (64, 16, 20)), ("omniglot", (964 - 139, 139, 659))):
        # the fake pack's last 5 alphabets have 4 x 33 + 7 characters
        ids = FewShot(name, fake_packs()).class_ids
        assert tuple(len(ids[split]) for split in SPLITS) == sizes
        assert sorted(ids["train"] + ids["val"] + ids["test"]) == [*range(sum(sizes))]
    assert len(set(tasks.CIFARFS_VAL)) == 16 and len(set(tasks.CIFARFS_TEST)) == 20


def test_random_streams_are_apart():
    def numbers(seed, split):
        return tuple(torch.rand(4, generator=random_generator(seed, split)).tolist())

    assert len({numbers(*of) for of in product(range(5), SPLITS)}) == 15
    assert numbers(3, "val") == numbers(3, "val")


class FakeCIFAR100:
    """What torchvision would have downloaded, with the class and the part in single pixels."""
    classes = [f"c{i:03}" for i in range(100)]

    def __init__(self, root, train, download):
        n = 500 if train else 100
        self.targets = [i % 100 for i in range(100 * n)]  # mixed, as in the real one
        data = torch.zeros(100 * n, 32, 32, 3, dtype=torch.uint8)
        data[:, 1, 2, 0] = torch.tensor(self.targets)
        data[:, 3, 4, 2] = 0 if train else 1
        self.data = data[:0 if not download else None].numpy()


class FakeOmniglot:
    """Six characters instead of 1623, in folders as the real ones: black ink on white paper."""

    def __init__(self, root, background, download):
        from PIL import Image
        self.target_folder = Path(root) / ("background" if background else "evaluation")
        alphabets = ("Zulu", "Alpha") if background else ("Beta",)
        for alphabet, character in product(alphabets, (2, 1) if download else ()):
            folder = self.target_folder / alphabet / f"character{character:02}"
            folder.mkdir(parents=True)
            for drawer in range(20):
                scan = Image.new("1", (105, 105), 1)
                scan.paste(0, (0, 0, 15 * character, 15))
                scan.save(folder / f"0001_{drawer + 1:02}.png")


def test_packing_downloads():
    from torchvision import datasets
    path = new_folder() / "new" / "omniglot.pt"
    with quiet(), mock.patch.multiple(datasets, CIFAR100=FakeCIFAR100, Omniglot=FakeOmniglot):
        pack = tasks.pack_cifar100("")
        fails("not (1623, 20, 1, 28, 28)", tasks.load_pack, path.parent, "omniglot")
        assert not list(path.parent.iterdir()), "a refused download left something"
        # where Omniglot has six characters: two at once, as two runs that start together
        with mock.patch.dict(tasks.PACKS, omniglot=(path.name, (6, 20, 1, 28, 28))), \
             mock.patch.object(tasks, "OMNIGLOT_BACKGROUND", 4):
            statuses = in_processes(2, lambda: tasks.load_pack(path.parent, "omniglot"))
    images = pack["images"]
    assert images.shape == (100, 600, 3, 32, 32) and pack["classes"] == FakeCIFAR100.classes
    assert (images[:, :, 0, 1, 2] == torch.arange(100)[:, None]).all(), "not in its class"
    assert (images[:, :, 2, 3, 4] == (torch.arange(600) >= 500)).all(), "training images come first"
    assert statuses == [0, 0] and os.listdir(path.parent) == [path.name]
    pack = torch.load(path, weights_only=True)
    images, names = pack["images"], product(("Alpha", "Zulu", "Beta"), (1, 2))
    assert pack["classes"] == [f"{alphabet}/character0{i}" for alphabet, i in names]
    assert images.shape == (6, 20, 1, 28, 28) and images.dtype == torch.uint8
    assert (images[..., 0, 0] == 255).all() and (images[..., 27, 27] == 0).all(), "ink is 255"


class Broken(http.server.BaseHTTPRequestHandler):
    """/cut ends in the middle, /wrong is something else, /missing is not there."""

    def do_GET(self):
        self.send_response(404 if self.path.startswith("/missing") else 200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(b"x" * (50000 if self.path.startswith("/cut") else 100000))

    def log_message(self, *_):
        pass


def test_broken_downloads():
    """torchvision's downloads from a server that fails: one line, and nothing is left behind."""
    from torchvision.datasets import CIFAR100, Omniglot
    server, folder = http.server.ThreadingHTTPServer(("localhost", 0), Broken), new_folder()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for how in ("cut", "wrong", "missing", "nobody"):
        if how == "nobody":  # listens there any more
            server.shutdown()
            server.server_close()
        url = f"http://localhost:{server.server_port}/{how}"
        with quiet(), mock.patch.object(CIFAR100, "url", url), \
             mock.patch.object(Omniglot, "download_url_prefix", url):
            for name, (file_name, _) in tasks.PACKS.items():
                fails(f"no {name} in {folder}/{file_name}", tasks.load_pack, folder, name)
                fails("check the network and --data-dir", tasks.load_pack, folder, name)
                assert not os.listdir(folder), f"{how}: {name} left {os.listdir(folder)}"


def test_real_packs():
    """The packs in ../shared/data, where they are there: the split that the README describes."""
    folder = HERE.parent / "shared" / "data"
    if not folder.is_dir():
        raise SkipTest("no ../shared/data here")
    ids = FewShot("omniglot", folder).class_ids
    names = torch.load(folder / "omniglot.pt", weights_only=True, mmap=True)["classes"]
    train, val, test = ({names[i].split("/")[0] for i in ids[split]} for split in SPLITS)
    assert [len(train), len(val), len(test)] == [25, 5, 20] and len(ids["test"]) == 659
    assert max(train) < min(val) and not train & test
    ids = FewShot("cifarfs", folder).class_ids
    assert [len(ids[split]) for split in SPLITS] == [64, 16, 20]


# ------ 4. Training and resuming, as a user does it ------

TINY = "--d-model 16 --d-ff 16 --n-head 2 --batch-size 8 --eval-batches 2 --device cpu"
TINY_COPY = f"{TINY} --task copy --seq-len 2 --delay 3 --vocab-size 6"


def tiny_images():
    return (f"{TINY} --task omniglot --rule hebbian --filters 4 --batch-size 2 --pretrain-steps 2 "
            f"--data-dir {fake_packs()}")


def run_train(argv):
    with quiet() as (out, _):
        train.main(argv.split() + ([] if "--resume" in argv else ["--overwrite"]))
    return out.getvalue()


def run_eval(argv):
    with quiet() as (out, _):
        evaluation.main(argv.split())
    return out.getvalue()


def ends_well(main, argv):
    """Run what may fail with one line on stderr and exit status 2 -> None, or the line."""
    with quiet() as (_, err):
        try:
            return main(argv.split())
        except SystemExit as stop:
            line, status = err.getvalue(), stop.code
        except BaseException as error:
            raise AssertionError(f"{argv}: {type(error).__name__}: {error}") from error
    clear = line.startswith("error: ") and line.count("\n") == 1
    assert status == 2 and clear, f"{argv}: exit status {status}, {line!r}"
    return line


def refused(main, argv):
    line = ends_well(main, argv)
    assert line, f"{argv} was accepted"
    return line


def interrupted(argv, at, number=signal.SIGTERM):
    """Run train.py until a signal comes, before update `at`, and ends it -> what it said."""
    done, real, before = [], train.update, signal.getsignal(signal.SIGTERM)

    def update(*args):
        done.append(args)
        if len(done) == at:
            os.kill(os.getpid(), number)
            time.sleep(1)
        return real(*args)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # not to end these tests, where train.py fails
    try:
        with quiet() as (out, _), mock.patch.object(train, "update", update):
            train.main(argv.split())
    except SystemExit as stop:
        assert stop.code == 130 and len(done) == at, f"exit status {stop.code}, {len(done)} updates"
        return out.getvalue()
    finally:
        signal.signal(signal.SIGTERM, before)
    raise AssertionError("the signal was ignored")


def load(run, name="ckpt.pt"):
    return torch.load(Path(run) / name, weights_only=True)


def rows_of(run):
    """The lines of metrics.jsonl, without the times, which differ."""
    rows = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def assert_same_run(one, other):
    """The same checkpoint, best.pt and metrics.jsonl, bit for bit but for the times."""
    a, b = load(one), load(other)
    best, best_b = load(one, "best.pt"), load(other, "best.pt")
    for name in ("step", "best", "losses"):
        assert a["run"][name] == b["run"][name], name
    assert rows_of(one) == rows_of(other) and rows_of(one) and best["step"] == best_b["step"]
    pairs = [(a["generator"], b["generator"])]
    for x, y in ((a["model"], b["model"]), (best["model"], best_b["model"]),
                 *((x, b["optimizer"]["state"][i]) for i, x in a["optimizer"]["state"].items())):
        assert x.keys() == y.keys() and x
        pairs += [(x[name], y[name]) for name in x]
    assert all(torch.equal(x, y) for x, y in pairs)


def test_same_command_same_numbers():
    folder = new_folder()
    for argv in (f"{TINY_COPY} --rule gradient", tiny_images()):
        for run, seed in (("a", 0), ("b", 0), ("c", 1)):
            run_train(f"{argv} --steps 4 --eval-interval 2 --seed {seed} --out-dir {folder}/{run}")
        a, b, c = (rows_of(folder / run) for run in "abc")
        assert a == b != c and [row["step"] for row in a] == [2, 4]
        assert {*"train_loss val_loss val_metric metric eta write_norm".split()} < a[0].keys()


def test_fast_weights_learn_and_are_used():
    """Without attention to the past only fast weights can answer a cue: they learn to, and lose
    it when lesioned."""
    for rule in RULES:
        folder = new_folder()
        run_train(f"{TINY} --task cue --pairs 2 --cues 3 --window 1 --steps 120 --lr 1e-2 "
                  f"--batch-size 16 --d-model 32 --d-ff 32 --n-layer 1 --eval-interval 120 "
                  f"--rule {rule} --out-dir {folder}")
        run_eval(f"{folder} --episodes 200 --json {folder}/e.json")
        row, = json.loads((folder / "e.json").read_text())
        chance = row["score"] if rule == "none" else row["lesion"]
        assert chance > 0.06, f"{rule}: an error of {chance} where guessing gives 0.083"
        assert rule == "none" or row["score"] < 0.02, f"{rule}: {row['score']:.4f}"


def test_evaluation_of_a_run():
    folder = new_folder()
    run, other, table = folder / "run", folder / "other", folder / "e.json"
    argv = f"{TINY_COPY} --rule hebbian --steps 4 --eval-interval 1 --block-size 9 --out-dir"
    run_train(f"{argv} {run}")
    best = max(rows_of(run), key=lambda row: (row["val_metric"], -row["step"]))
    text = run_eval(f"{run} --episodes 30 --json {table}")
    row, = json.loads(table.read_text())
    assert row["step"] == best["step"] and f"{row['score']:.5f} ± {row['interval']:.5f}" in text
    assert len(row["tokens"]) == 8 and len(row["gates"]["write"]) == 7  # the last writes nothing
    # the figures again, from the model itself
    _, task, model = train.load_run(run / "best.pt")
    episodes = task.sample("test", 30, random_generator(0, "test"))
    with torch.no_grad():
        out, fast = model.eval()(episodes)
    eta, norm = torch.cat(fast.eta, 1), torch.cat(fast.norm, 1)
    scores = (out[:, -2:].argmax(-1) == episodes.target).double().mean(1)
    write = (eta * norm).mean(0)
    assert abs(row["score"] - scores.mean()) < 1e-6
    assert abs(row["interval"] - 1.96 * scores.std() / 30**0.5) < 1e-6
    assert_close(torch.tensor(row["gates"]["write"]), write, "the mean write", 1e-5)
    assert abs(row["selectivity"] - write[:2].mean() / write[2:].mean()) < 1e-4
    assert abs(row["persistence"] - eta.mean() / 0.2) < 1e-5
    # other sizes: what fits is measured, what does not is refused
    assert "delay 4" in run_eval(f"{run} --delay 4 --episodes 10")
    assert "--block-size" in refused(evaluation.main, f"{run} --delay 5")
    assert "--ways" in refused(evaluation.main, f"{run} --ways 5")
    # several runs: each is reported, and the file has a row for each
    run_train(f"{argv} {other} --seed 1")
    picture = bool(importlib.util.find_spec("matplotlib")) * f"--plot {folder}/picture.png"
    text = run_eval(f"{run} {other} --episodes 10 --json {table} {picture}")
    assert not picture or (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    for row, seed in zip(json.loads(table.read_text()), (0, 1), strict=True):
        assert row["seed"] == seed and f"{row['run']}: copy" in text
        assert f"{row['score']:.5f}" in text


def test_best_is_the_lowest_error():
    run = new_folder()
    run_train(f"{TINY} --task regression --support 3 --rule none --steps 6 --eval-interval 1 "
              f"--lr 0.5 --out-dir {run}")
    errors = [row["val_metric"] for row in rows_of(run)]
    assert load(run, "best.pt")["step"] == 1 + errors.index(min(errors))
    assert load(run)["run"]["step"] == 6 and len(set(errors)) == 6


def test_validation_episodes_stay_the_same():
    run = new_folder()
    run_train(f"{TINY} --task cue --rule none --steps 3 --eval-interval 1 --lr 1e-12 "
              f"--out-dir {run}")
    losses = [row["val_loss"] for row in rows_of(run)]
    assert max(losses) - min(losses) < 1e-6, "validation was redrawn"
    assert len({row["train_loss"] for row in rows_of(run)}) == 3


def test_gradients_are_clipped():
    """The norm the optimizer sees is CLIP where the gradient is larger."""
    norms, step = [], torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack([g.norm() for g in grads if g is not None]).norm().item())
        return step(self, *args, **kwargs)

    with mock.patch.object(torch.optim.AdamW, "step", watched):
        # targets of a variance near 31 make gradients far larger than 1
        run_train(f"{TINY} --task regression --dim 30 --rule none --steps 3 "
                  f"--out-dir {new_folder()}")
    assert len(norms) == 3 and all(0.99 < norm / train.CLIP < 1.01 for norm in norms), norms


def test_resumed_run_is_the_same():
    whole, part = new_folder(), new_folder()
    # what, where it stops, how it is asked to, and how often it had saved
    for what, *stops in ((f"{TINY_COPY} --rule gradient", (2, signal.SIGTERM, 0),
                          (4, signal.SIGINT, 0)),
                         (tiny_images(), (3, signal.SIGTERM, 1000), (6, signal.SIGTERM, 0))):
        argv = f"{what} --steps 7 --eval-interval 2 --overwrite --out-dir"
        run_train(f"{argv} {whole}")
        for at, number, every in stops:
            said = interrupted(f"{argv} {part} --save-interval {every}", at, number)
            assert f"stopped; to go on: python train.py --resume --out-dir {part}\n" in said
            assert load(part)["run"]["step"] == (0 if every else at - 1)
            # whatever is in the log, afterwards it is the log of the uninterrupted run
            with open(part / "metrics.jsonl", "a") as log:
                log.write('{"step": 6, "val_metric": 0.5}\n{"step": 7, "val')
            torch.randn(3)
            run_train(f"--resume --out-dir {part}")
            assert_same_run(whole, part)
        assert "best validation" in run_train(f"--resume --out-dir {part}")  # nothing is left to do
        assert_same_run(whole, part)
    # a flag that is given wins
    run_train(f"--resume --steps 9 --eval-interval 3 --lr 0.5 --out-dir {part}")
    assert [row["step"] for row in rows_of(part)] == [2, 4, 6, 7, 9]
    rate = load(part)["optimizer"]["param_groups"][0]["lr"]
    assert math.isclose(rate, 0.5 * train.learning_rate(9, 9)) and load(part)["args"]["lr"] == 0.5


def test_killed_at_any_moment():
    """kill -9, at random, again and again: what is there can be loaded, and the run ends as if
    nothing had happened. KILLS=30 makes it 30 runs."""
    whole, rng, killed = new_folder(), random.Random(0), 0
    argv = f"{TINY_COPY} --rule hebbian --steps 24 --eval-interval 3 --save-interval 0 --out-dir"
    began = time.time()
    run_train(f"{argv} {whole}")
    took = time.time() - began
    for _ in range(int(os.environ.get("KILLS", 1))):
        part, status = new_folder(), signal.SIGKILL
        while status:
            begun = (part / "metrics.jsonl").exists()
            status = one_life(argv, part, rng.uniform(0, took) if begun else None)
            assert status in (0, signal.SIGKILL), f"the run failed, {status}"
            killed += status == signal.SIGKILL
            for path in part.glob("*.pt"):
                train.load_run(path)
        assert_same_run(whole, part)
        assert not list(part.glob("*.tmp"))
    assert killed


def one_life(argv, part, seconds):
    """Begin or resume the run, kill it after so many seconds (None: after its first evaluation)
    -> what os.waitpid says"""
    argv = f"--resume --out-dir {part}" if (part / "ckpt.pt").exists() else f"{argv} {part}"
    child = fork(lambda: run_train(argv))
    while seconds is None and not (part / "metrics.jsonl").exists():
        time.sleep(1e-3)
    time.sleep(seconds or 0)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def test_processes_share_a_batch():
    """Two processes take the same gradients as one, for every rule."""
    folder, task = new_folder(), Copy(2, 3, 6)

    def learn():
        options = SimpleNamespace(device="cpu", threads=1, batch_size=4)
        device, rank, world = train.prepare(options)
        for rule in RULES:
            model = small_model(task, rule).train()
            shared = DistributedDataParallel(model) if world > 1 else model
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            train.update(shared, task, optimizer, draw(task, 4).to(device, rank, world))
            found = {name: p.grad for name, p in model.named_parameters()}
            torch.save(found, folder / f"{rule}-{rank}-of-{world}")

    assert in_processes(2, learn) == [0, 0]
    learn()
    for rule, rank in product(RULES, (0, 1)):
        found = load(folder, f"{rule}-{rank}-of-2")
        for name, value in load(folder, f"{rule}-0-of-1").items():
            assert_close(found[name], value, f"{rule}, {name}")


def test_training_in_two_processes():
    """One writes; what it writes is what one process alone does, and each can go on with the
    other's run."""
    folder = new_folder()
    argv = (f"{TINY_COPY} --rule hebbian --steps 4 --eval-interval 2 --lr 1e-3 --save-interval 0 "
            "--out-dir")
    one, two, mixed, new = (folder / name for name in ("one", "two", "mixed", "new"))
    run_train(f"{argv} {one}")
    assert in_processes(2, lambda: interrupted(f"{argv} {two}", 3)) == [0, 0]  # both are told
    assert load(two)["run"]["step"] == 2
    assert in_processes(2, lambda: run_train(f"--resume --out-dir {two}")) == [0, 0]
    shutil.copytree(one, mixed)
    run_train(f"--resume --steps 6 --out-dir {one}")
    assert in_processes(2, lambda: run_train(f"--resume --steps 6 --out-dir {mixed}")) == [0, 0]
    run_train(f"--resume --steps 6 --out-dir {two}")
    rows = rows_of(one)
    assert [row["step"] for row in rows] == [2, 4, 6]
    for run in (two, mixed):
        for row, expected in zip(rows_of(run), rows, strict=True):
            assert abs(row["val_loss"] - expected["val_loss"]) < 1e-4
    odd = f"{argv} {new} --batch-size 3"
    assert in_processes(2, lambda: refused(train.main, odd)) == [0, 0] and not new.exists()


# ------ 5. Bad input ------


class Surprise:
    """A pickle that makes a folder when it is loaded without weights_only."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


WRONG = """--n-head 3 --d-model 64; --pairs 9 --cues 8 --task cue; --ways 17 --task cifarfs
    --shots 6 --queries 15 --task omniglot; --window -1; --block-size 31 --delay 40; --steps 0
    --steps ten; --lr nan; --lr -1; --eta0 2; --alpha-init inf; --alpha-init -1; --max-norm -1
    --max-norm 0; --rule magic; --fold -1; --fold 0; --alpha rank2; --ablate all; --vocab-size 3
    --n-head 4 --d-model 12 --position rotary; --min-delay 6 --delay 5; --delay 3 --task cue
    --pretrain-steps 5; --nonsense; --fast-weights magic; --device tpu"""


def test_bad_arguments():
    folder = new_folder()
    out = folder / "out"
    for argv in re.split(r"; |\n +", WRONG):
        line = refused(train.main, f"{argv} --out-dir {out} --data-dir {fake_packs()}")
        assert argv.split()[0] in line, f"{argv}: {line}"
        assert not out.exists(), f"{argv} wrote something"
    if not torch.cuda.is_available():
        assert "--device cuda" in refused(train.main, f"--device cuda --out-dir {out}")
    assert "ckpt.pt" in refused(train.main, f"--resume --out-dir {out}") and not out.exists()
    out.write_text("a file")
    assert str(out) in refused(train.main, f"--steps 1 --out-dir {out}")
    assert out.read_text() == "a file" and str(out) in refused(evaluation.main, str(out))
    assert "best.pt" in refused(evaluation.main, str(folder))


def test_runs_that_do_not_fit():
    """A run is not replaced unasked, and a flag that its checkpoint does not fit is refused."""
    run = new_folder()
    argv = f"{TINY_COPY} --rule none --steps 2 --out-dir {run}"
    run_train(argv)
    before = {path: path.read_bytes() for path in run.iterdir()}
    said = refused(train.main, argv)
    assert "--resume goes on with it, --overwrite replaces it" in said
    for flags, said in (("--n-layer 1", "ckpt.pt does not load"), ("--delay 30", "--block-size"),
                        ("--rule hebbian", "ckpt.pt does not load"), ("--pairs 3", "--pairs"),
                        ("--task cue", "ckpt.pt does not load")):
        assert said in refused(train.main, f"--resume {flags} --out-dir {run}")
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_damaged_packs_and_checkpoints():
    folder = new_folder()
    run, surprise, path = folder / "copy", folder / "surprise", folder / "omniglot.pt"
    run_train(f"{TINY_COPY} --steps 1 --out-dir {run}")
    shutil.copy(fake_packs() / "omniglot.pt", path)
    images = torch.zeros(1623, 20, 1, 28, 28)
    packs = ([1, 2], {"images": images[:3].byte(), "classes": list("abc")},
             {"images": images, "classes": ["a"] * 1623}, {"images": Surprise(surprise)})
    changes = [dict(args={"task": "copy"}), dict(args=None), dict(model={}), dict(model=None),
               dict(args=Surprise(surprise))]
    changes += [dict(args={**load(run)["args"], name: value})
                for name, value in (("d_ff", 17), ("d_ff", "wide"), ("rule", "magic"))]
    commands = ((path, train.main, f"--task omniglot --data-dir {folder} --out-dir {folder}/run"),
                (run / "best.pt", evaluation.main, str(run)),
                (run / "ckpt.pt", train.main, f"--resume --out-dir {run}"))
    for path, main, argv in commands:
        good, state = path.read_bytes(), torch.load(path, weights_only=True)
        for content in (b"", b"x" * 1000, good[:len(good) // 2], good[:-100]):
            path.write_bytes(content)
            assert path.name in refused(main, argv) and path.read_bytes() == content
        for content in packs if main is train.main and path.parent == folder else changes:
            content = {**state, **content} if content in changes else content
            torch.save(content, path)
            assert path.name in refused(main, argv), content
    assert not surprise.exists(), "a file that was loaded ran code"


def failing(owner, name, at, error, argv):
    """train.py where call number `at` of a function, and each after it, fails -> its one line."""
    real, calls = getattr(owner, name), []

    def broken(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs) if len(calls) < at else error(real, *args, **kwargs)

    with mock.patch.object(owner, name, broken):
        return refused(train.main, argv)


def full(*_):
    raise OSError(28, "No space left on device")


def half(real, *args):  # what was written until the disk was full stays there
    for path in args:
        if isinstance(path, Path):
            path.open("wb").write(b"half")
    full()


def not_finite(real, model, *rest):
    with torch.no_grad():
        model.head.weight.fill_(math.inf)
    return real(model, *rest)


def test_faults_lose_nothing():
    run = new_folder()
    argv = (f"{TINY_COPY} --rule gradient --steps 6 --eval-interval 1 --save-interval 0 "
            f"--overwrite --out-dir {run}")
    for fault in ((os, "replace", 9, full), (torch, "save", 7, half),
                  (Path, "write_bytes", 4, half)):
        line = failing(*fault, argv)
        assert "No space left" in line and str(run) in line and not list(run.glob("*.tmp")), line
        step = load(run)["run"]["step"]
        assert 0 < step < 6 and load(run, "best.pt")["step"] <= step + 1 and rows_of(run)
        run_train(f"--resume --out-dir {run}")
    run_eval(f"{run} --episodes 4 --json {run}/eval.json")
    before = (run / "eval.json").read_bytes()
    with mock.patch.object(os, "replace", full):
        again = refused(evaluation.main, f"{run} --episodes 2 --json {run}/eval.json")
    assert f"{run}/eval.json" in again and (run / "eval.json").read_bytes() == before
    line = failing(train, "update", 4, not_finite, argv)
    assert "loss nan" in line and "--lr" in line and load(run)["run"]["step"] == 3, line
    assert all(value.isfinite().all() for value in load(run)["model"].values())


def test_damaged_files():
    """Truncations, flipped bits and foreign pickles: one line and exit status 2, or a file that
    loads. DAMAGED=200 tries so many."""
    folder, rng, refusals = new_folder(), random.Random(0), 0
    run, pack, kept = folder / "run", folder / "omniglot.pt", folder / "kept"
    shutil.copy(fake_packs() / "omniglot.pt", pack)
    run_train(f"{TINY_COPY} --rule gradient --steps 4 --eval-interval 1 --out-dir {run}")
    run_eval(f"{run} --episodes 4 --json {run}/eval.json")
    shutil.copytree(run, kept, ignore=shutil.ignore_patterns("*.pt"))
    resume = (train.main, f"--resume --steps 5 --out-dir {run}")
    images = f"{tiny_images()} --steps 1 --batch-size 1 --eval-batches 1 --pretrain-steps 0"
    plot = (evaluation.main, f"{kept} --plot {kept}/picture.png")  # or: there is no matplotlib
    read = {run / "ckpt.pt": resume, run / "metrics.jsonl": resume, kept / "eval.json": plot,
            run / "best.pt": (evaluation.main, f"{run} --episodes 4"),
            kept / "metrics.jsonl": plot,
            pack: (train.main, f"{images} --overwrite --data-dir {folder} --out-dir {run}")}
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for _ in range(int(os.environ.get("DAMAGED", 15))):
        path, how = rng.choice([*read]), rng.choice(("cut", "flip", "flip", "foreign"))
        damaged = bytearray(before[path])
        if how == "cut":
            del damaged[rng.randrange(len(damaged)):]
        for _ in range(rng.choice((1, 10, 1000)) if how == "flip" else 0):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        if how == "foreign":
            torch.save(dict.fromkeys(("args", "images", "model"), Surprise(folder / "new")), path)
        wrong, line = path.read_bytes(), ends_well(*read[path])
        refusals += bool(line)
        ignored = path == run / "metrics.jsonl"  # by a resume
        assert not (folder / "new").exists() and (line or how != "foreign" or ignored), path
        for p, content in before.items():
            same = not line or p.read_bytes() == (wrong if p == path else content)
            assert same, f"{how} in {path} changed {p}"
            if p != pack or path == pack:
                p.write_bytes(content)
    assert refusals


VALUES = """--task copy cue regression cifarfs omniglot nonsense
    --rule none hebbian gradient magic  --seq-len 0 1 3  --delay 0 3 -1  --min-delay 0 2 9
    --vocab-size 2 3 5  --pairs 1 3 9  --cues 2 4  --dim 1 3  --support 1 3 x  --queries 0 1 2 30
    --ways 1 3 999  --shots 1 2 19 20  --n-layer 0 1 2  --n-head 1 2 3  --d-model 1 4 6
    --d-ff 1 8  --window 0 1 3 -1  --block-size 1 40  --position learned rotary polar
    --filters 1 2  --alpha full outer  --fast-weights literal unrolled  --fold 0 1 2 -3
    --alpha-init -1 0 8 inf  --eta0 0 1 1.5 nan  --max-norm 0 1 inf -1  --aux-dim 0 2
    --ablate none eta alpha backward  --steps 0 1 2  --batch-size 1 2 0  --lr 1e-3 1 0 2
    --pretrain-steps 0 1  --seed 0 7 -1 99999999999999999999  --device cpu tpu  --threads 1 0
    --eval-interval 1 5  --eval-batches 1 2  --save-interval 0 nan"""


def test_random_arguments():
    """Any arguments: a run, or one line and exit status 2. ARGUMENTS=500 tries so many."""
    rng, outcomes, run = random.Random(0), [], new_folder()
    values = [entry.split() for entry in re.split(r"\s+(?=--)", VALUES)]
    for _ in range(int(os.environ.get("ARGUMENTS", 30))):
        argv = (f"--task {rng.choice([*tasks.TASKS])} --steps 1 --batch-size 2 --d-model 8 "
                f"--d-ff 8 --filters 2 --eval-batches 1 --device cpu --data-dir {fake_packs()}")
        for flag, *choices in rng.sample(values, rng.choice((1, 2, 4, 8))):
            argv += f" {flag} {rng.choice(choices)}"
        argv += rng.choice(("", " --overwrite"))
        if not ends_well(train.main, f"{argv} --pretrain-steps=0 --out-dir {run}"):
            size = rng.choice("--delay --ways --shots --support --queries --episodes".split())
            argv = f"{run} --batch-size 2 --episodes 2 {size} {rng.choice((1, 2, 30))}"
            outcomes.append(ends_well(evaluation.main, argv))
    assert None in outcomes


def flags_of(script, argv):
    """The flags that train.py or eval.py knows, and the help of each."""
    with mock.patch.object(argparse.ArgumentParser, "parse_args", autospec=True,
                           side_effect=argparse.ArgumentParser.parse_args) as parse:
        script.parse_args(argv)
    return {action.option_strings[0]: action.help for action in parse.call_args.args[0]._actions
            if action.option_strings and action.dest != "help"}


def test_help_explains_every_flag():
    flags = flags_of(train, [])
    with quiet() as (out, _), contextlib.suppress(SystemExit):
        train.main(["--help"])
    shown = re.findall(r"^  (--[a-z0-9-]+)", out.getvalue(), re.MULTILINE)
    assert sorted(shown) == sorted(flags) and all(flags.values())
    for task, rule in product(tasks.TASKS, RULES):
        for name, value in train.defaults(task, rule).items():
            said = flags["--" + name.replace("_", "-")]
            assert value is None or name in ("task", "rule") or str(value) in said, name
            assert "default:" in said or len(said.split()) > 5, f"{name}: no default, nor why"


def test_readme_names_no_flag_that_does_not_exist():
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (HERE / "README.md").read_text()))
    known = {*flags_of(train, []), *flags_of(evaluation, ["run"]), "--help"}
    unknown = named - known - {"--standalone", "--nproc_per_node"}  # torchrun's
    assert not unknown, f"the README knows flags that nobody has: {sorted(unknown)}"


def test_commands_from_outside():
    """The scripts as processes: exit status, streams, and a folder that is not the project's."""
    folder = new_folder()
    pipes = dict(cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    argv = f"{HERE}/train.py {TINY_COPY} --rule none --steps 2"
    good = subprocess.Popen([sys.executable, *argv.split()], **pipes)
    bad = subprocess.Popen([sys.executable, HERE / "eval.py", "out/nowhere"], **pipes)
    said, complaint = good.communicate()[0], bad.communicate()[1]
    assert good.returncode == 0 and "on cpu" in said, said
    written = sorted(os.listdir(folder / "out/copy-none-s0"))
    assert written == ["best.pt", "ckpt.pt", "metrics.jsonl"]
    assert bad.returncode == 2 and complaint.count("\n") == 1, complaint
    assert complaint.startswith("error: out/nowhere/best.pt does not load")


# tables


def run(name):
    """One test, by its name -> its outcome and the line to print."""
    began = time.time()
    try:
        globals()[name]()
    except SkipTest as reason:
        return "skipped", f"skip  {name}: {reason}"
    except (Exception, SystemExit):
        return "failed", f"FAIL  {name}\n{traceback.format_exc()}"
    return "passed", f"ok    {name}  {time.time() - began:.1f} s"


def main(words):
    names = [name for name in globals() if name.startswith("test_")]
    names = [name for name in names if not words or any(word in name for word in words)]
    if not names:
        sys.exit(f"no test has {' or '.join(words)} in its name")
    outcomes = collections.Counter(passed=0, failed=0)
    # two at a time; everything here is small, so one thread each
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ProcessPoolExecutor(
            2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        tempfile.tempdir = folder  # of the processes to come, too
        for outcome, line in pool.map(run, names):
            print(line, flush=True)
            outcomes[outcome] += 1
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    sys.exit(1 if outcomes["failed"] else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
