"""Every test of the project: python test_all.py [words in their names], or pytest test_all.py.

 1. The recurrence: the paper's equations and nothing else, and what agrees with them
 2. Facts about the model: what it sees, what a lesion leaves, where it stays finite
 3. Tasks and splits    4. Training and resuming    5. Bad input    6. The pages of results

LONG=2000, KILLS=30, DAMAGED=200 and ARGUMENTS=500, set in the environment, make some try more.
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
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest import SkipTest, TestCase, mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a CPU numbers repeat, and CUDA's threads hinder fork
import torch
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.nn import functional as F

import eval as evaluation
import tasks
import train
from model import Config, Transformer
from plasticity import UnrolledFastWeights
from results import tables
from tasks import SPLITS, Copy, Cue, Episodes, FewShot, Regression, random_generator

HERE = Path(__file__).parent
RULES = get_args(Config.__annotations__["rule"].__origin__)  # a new one, too
PLASTIC = RULES[1:]
FORMS = ("literal", "unrolled")
FOLDERS = tempfile.TemporaryDirectory()  # removed when the tests end

# ------ 1. The recurrence ------

class Oracle:
    """Section 1 of the paper: one sequence, one step at a time, an explicit P_t. Not batched."""
    def __init__(self, model, episodes, b):  # of which it reads episode b
        self.model, self.config, self.etas, self.changes = model, model.config, [], []
        self.P, self.p = collections.defaultdict(float), collections.defaultdict(float)
        self.x, self.y = {}, {}  # what each layer read at this step, and its output
        self.past = [[] for _ in model.blocks]  # of each block: key and value of every step
        one = Episodes(*(t if t is None else t[b:b + 1] for t in episodes))
        context, queries = model.embed(one)
        zs = [self.step(token, t) for t, token in enumerate(context[0])]
        if queries is not None:  # each reads as if it alone came next, and leaves nothing behind
            zs = [self.step(query, len(zs), last=True) for query in queries[0]]
        self.answers = torch.stack(zs)[:, :model.n_out]  # (Q or T, n_out)

    def read(self, layer, x):
        # y_t = (W + P_t) x_t + (b + p_t)
        y = (layer.weight + self.P[layer]) @ x + (layer.bias + self.p[layer])
        if hasattr(layer, "alpha"):  # else P_t and p_t stay zero
            self.x[layer], self.y[layer] = x, y
        return y

    def write(self, z):
        d = self.y
        if self.config.rule == "gradient":
            # L_t = mean((w_out ∘ z_t)²), g_t = dL_t/dy_t
            L = ((self.model.plasticity.w_out * z) ** 2).mean()
            g = torch.autograd.grad(L, [*self.y.values()], create_graph=True)
            d = {layer: -g_t for layer, g_t in zip(self.y, g)}
        elif self.config.rule != "hebbian":  # a reader's own: what it writes is its own word
            now = {layer: (self.x[layer][None, None], y[None, None]) for layer, y in d.items()}
            u = self.model.plasticity.post_signal(z[None, None], now)
            d = {layer: u_t[0, 0] for layer, u_t in zip(now, u)}
        D = {layer: torch.outer(d[layer], x) for layer, x in self.x.items()}
        # ||D_t||² = sum over the plastic layers of ||D_t||_F²
        norm = torch.sqrt(sum((D_t ** 2).sum() for D_t in D.values()))
        # eta_t = eta_0 * sigmoid(m_t) * min(1, max_norm / ||D_t||)
        gate = 1.0 if self.config.ablate == "eta" else torch.sigmoid(z[self.model.n_out])
        eta = self.config.eta0 * gate * torch.clamp(self.config.max_norm / norm, max=1)
        self.etas.append(eta)
        changed = [eta * layer.alpha * D_t for layer, D_t in D.items()]
        self.changes.append(torch.cat([of.flatten() for of in changed]).norm())
        with torch.set_grad_enabled(self.config.ablate != "backward"):
            for layer in D:
                # P_{t+1} = (1 - eta_t) P_t + eta_t * alpha ∘ D_t
                self.P[layer] = (1 - eta) * self.P[layer] + eta * layer.alpha * D[layer]
                # p_{t+1} = (1 - eta_t) p_t + eta_t * beta ∘ d_t
                self.p[layer] = (1 - eta) * self.p[layer] + eta * layer.beta * d[layer]

    def step(self, x, t, last=False):  # one token (C) at position t -> z_t (Z)
        x = x + self.model.position[t] if self.config.position == "learned" else x
        for block, past in zip(self.model.blocks, self.past):
            x = x + self.attend(block.attention, past, block.norm1(x), t, last)
            x = x + self.read(block.down, F.gelu(self.read(block.up, block.norm2(x))))
        z = self.model.head(self.model.norm(x))
        if self.config.rule != "none" and not last:
            self.write(z)
        return z

    def attend(self, attention, past, x, t, last):
        q, k, v = (whole.chunk(attention.n_head) for whole in attention.qkv(x).chunk(3))
        if self.config.position == "rotary":
            q, k = ([self.turn(part, t) for part in whole] for whole in (q, k))
        seen = [*past, (k, v)][-self.config.window:]  # of 0: all
        past += [] if last else [(k, v)]
        heads = []
        for h, q_h in enumerate(q):
            scores = torch.stack([q_h @ k_s[h] / math.sqrt(len(q_h)) for k_s, _ in seen])
            heads.append(sum(w * v_s[h] for w, (_, v_s) in zip(scores.softmax(0), seen)))
        return attention.proj(torch.cat(heads))

    def turn(self, part, t):
        """Rotary: channels j and j + D/2 are a complex number, which is times e^(i t speed_j)."""
        half = len(part) // 2
        speed = [10000.0 ** (-j / max(1, half - 1)) for j in range(half)]
        angle = (t * torch.tensor(speed, dtype=torch.float32)).double()  # as exact as the model's
        turned = torch.complex(part[:half], part[half:]) * torch.exp(1j * angle)
        return torch.cat([turned.real, turned.imag])

def small_model(task, rule, **sizes):
    """In double precision, and every parameter random: no term hides behind a 0 or a 1."""
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, d_model=8, d_ff=12, filters=4, alpha_init=1.0) | sizes
    model = Transformer(task, Config(rule=rule, **sizes)).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()

def draw(task, batch_size):  # training episodes with features in double precision
    found = task.sample("train", batch_size, random_generator(0, "train"))
    return Episodes(*(t.double() if getattr(t, "dtype", 0) == torch.float32 else t for t in found))

def gradients(model, out):  # of a fixed random weighting of out, by name of what it depends on
    weights = torch.randn(out.shape, generator=random_generator(1, "train"), dtype=out.dtype)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((out * weights).sum(), [*learned.values()], allow_unused=True)
    return {name: gradient for name, gradient in zip(learned, found) if gradient is not None}

def assert_close(a, b, what, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda said: f"{what}: {said}")

def check_against_oracle(task, rule, **sizes):
    """Answers, eta and gradients are the oracle's, in both forms -> FastWeights, gradients."""
    model, episodes = small_model(task, rule, **sizes), draw(task, 2)
    oracles = [Oracle(model, episodes, b) for b in range(2)]
    expected = torch.stack([oracle.answers for oracle in oracles])
    theirs = gradients(model, expected)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    learned -= {"plasticity.w_out"} if model.config.ablate == "backward" else set()
    for form in FORMS:
        model.config.fast_weights = form
        out, fast = model(episodes)
        ours = gradients(model, out)
        assert ours.keys() == theirs.keys() == learned, f"{form}: {learned - ours.keys()}, no grad"
        for name, gradient in theirs.items():
            scale = max(1.0, gradient.abs().max().item())
            assert_close(ours[name] / scale, gradient / scale, f"{form}: gradient of {name}")
        with torch.no_grad():  # evaluation keeps no history, and must say the same
            evaluated, again = model(episodes)
        assert not evaluated.requires_grad
        for b, oracle in enumerate(oracles) if rule != "none" else ():
            change = torch.cat(again.change, dim=1)[b]
            assert_close(change, torch.stack(oracle.changes[:len(change)]), f"{form}: the change")
        for answer, found in ((out, fast), (evaluated, again)):
            assert_close(answer, expected, f"{form}: the answer")
            if rule != "none":
                eta = torch.cat(found.eta, dim=1)
                expected_eta = torch.stack([torch.stack(o.etas[:eta.size(1)]) for o in oracles])
                assert_close(eta, expected_eta, f"{form}: eta")
                assert eta.std() > 0.01 * eta.mean(), "every eta is the same: that shows too little"
    return fast, ours

def test_oracle():
    """Without and with queries, in one block, rotary, with folds and windows of many lengths."""
    copy, cue, rotary = Copy(3, 2, 5), Cue(5, 6), dict(position="rotary")
    sources = ((Copy(2, 2, 5), {}), (Cue(4, 6), {}), (Regression(2, 4, 3), dict(n_layer=1)),
               (Copy(2, 2, 5), rotary), (Regression(2, 4, 2), rotary))
    cases = [(task, {**form, "window": n}) for n, (task, form) in product((0, 1, 3), sources)]
    # a fold of 40, as of 32 elsewhere, is only for queries
    cases += [(task, dict(fold=n)) for n, task in product((1, 2, 3, 40), (copy, cue, Cue(1, 6)))]
    cases += [(task, dict(fold=2, window=n)) for n, task in product((1, 2, 4), (copy, cue))]
    last = dict(plastic="last")  # in front of it a block that only attends, and one that does not
    cases += [(task, dict(last, n_layer=n, fold=2)) for n, task in product((1, 3), (copy, cue))]
    for rule, (task, sizes) in product(RULES, cases):
        check_against_oracle(task, rule, **sizes)
    model = small_model(Copy(2, 2, 5), "hebbian", block_size=4, **rotary)
    assert model(draw(Copy(2, 40, 5), 2))[0].shape == (2, 45, 5)  # there is no longest episode

def test_oracle_with_clipping_and_ablations():
    """All learns, what the paper's code detaches too, but for what an ablation stops."""
    for rule, (max_norm, share) in product(PLASTIC, ((0.01, {1}), (1, {0, 1}), (1e9, {0}))):
        fast, _ = check_against_oracle(Copy(2, 2, 5), rule, max_norm=max_norm, eta0=0.1)
        assert share >= {*(torch.cat(fast.norm, 1) > max_norm).flatten().int().tolist()}
    settings = product(PLASTIC, ("none", "eta", "alpha", "backward"), (Copy(2, 2, 5), Cue(4, 6)))
    for rule, ablate, task in settings:
        for form in (dict(fold=2), dict(fold=40)):
            _, grads = check_against_oracle(task, rule, ablate=ablate, **form)
        learned = [name for name in grads if re.search("alpha|beta|w_out", name)]
        w_out = rule == "gradient" and ablate != "backward"
        assert len(learned) == (8 if ablate in ("none", "eta") else 0) + w_out
        for name in learned:
            assert (grads[name].abs() > 1e-12).all(), f"parts of {name} do not learn"
        # m_t; without neuromodulation it is but one more number of the gradient rule's loss L_t
        moves = ablate in ("none", "alpha") or ablate == "eta" and w_out
        weight, bias = grads["head.weight"][task.n_out:].abs(), grads["head.bias"][task.n_out].abs()
        for row in (weight[0].max(), bias):
            assert row > 1e-8 if moves else row == 0, "the neuromodulator learns, or does not"
        assert not w_out or (weight[1:] > 1e-12).all(), "auxiliary outputs learn by second order"

def test_gradcheck():
    """Against finite differences, which owe nothing to anybody's derivatives; several passes."""
    forms = dict(fast_weights="literal"), dict(fold=40), dict(fold=2)
    for rule, form, task in product(PLASTIC, forms, (Copy(1, 1, 4), Cue(3, 3))):
        model = small_model(task, rule, n_layer=1, n_head=1, d_model=3, d_ff=3, **form)
        episodes, values = draw(task, 1), [*model.parameters()]  # which gradcheck changes in place
        assert torch.autograd.gradcheck(lambda *_: model(episodes)[0], values, fast_mode=True)

# ------ 2. Facts about the model ------

def new_folder():  # it is there until the tests end
    return Path(tempfile.mkdtemp(dir=FOLDERS.name))

@functools.cache
def fake_packs():
    """A folder with both packs in the real format; an image's first pixels say which it is."""
    folder = new_folder()
    for name, (file_name, shape) in tasks.PACKS.items():
        names = [f"class{i:02}" for i in range(64)] + tasks.CIFARFS_VAL + tasks.CIFARFS_TEST
        if name == "omniglot":  # 33 characters an alphabet, which has a new name from 964 on
            names = [f"{'AB'[i >= 964]}{i // 33:02}/character{i % 33:02}" for i in range(1623)]
        images = torch.zeros(*shape[:2], 1, 28 if name == "omniglot" else 1, shape[4]).byte()
        which, number = torch.arange(shape[0])[:, None], torch.arange(shape[1])
        # an image that was not turned or flipped has the 255 there; what is expanded takes no room
        for i, value in enumerate((which // 256, which % 256, number // 256, number % 256, 255)):
            images[:, :, 0, 0, i] = value
        torch.save({"images": images.expand(shape), "classes": sorted(names)}, folder / file_name)
    return folder

def test_what_a_step_shows():
    """Linear in the features, the value (0 where it is asked for) and whether it is a query."""
    for task in Cue(4, 6), Regression(2, 4, 5), FewShot("omniglot", fake_packs(), 3, 1, 2):
        model, episodes = small_model(task, "none"), draw(task, 2)
        embed, y = model.embed, episodes.support_y
        x, query_x = (of if of.ndim == 3 else embed.norm(embed.encoder(of.flatten(0, 1))).unflatten(
            0, of.shape[:2]) for of in (episodes.support_x, episodes.query_x))
        values = y if y.ndim == 3 else 4.0 * (y[..., None] == torch.arange(3))  # (B, T, 1 or ways)
        blank = torch.zeros(2, query_x.size(1), values.size(2))
        for shown, parts, query in zip(embed(episodes), ((x, values), (query_x, blank)), (0, 1)):
            step = F.pad(torch.cat(parts, dim=2), (0, 1), value=query)
            assert_close(shown, embed.linear(step), "the queries" if query else "the context")

def test_a_query_does_not_see_the_others():
    sources = (Cue(4, 6), Regression(2, 4, 5), FewShot("omniglot", fake_packs(), 3, 1, 2))
    for task, rule, window in product(sources, RULES, (0, 2)):
        model, episodes = small_model(task, rule, window=window), draw(task, 2)
        whole = model(episodes)[0]
        parts = [model(episodes._replace(query_x=x))[0] for x in episodes.query_x.split(1, dim=1)]
        assert_close(whole, torch.cat(parts, dim=1), "the answers to queries that come alone")
        assert (whole[:, 0] - whole[:, -1]).abs().max() > 1e-6, "a query does not matter"

def test_lesion_is_the_slow_model():
    """Nothing written: the model, step by step, says what a plain GPT says of all steps at once."""
    for task, rule, window, form in product((Copy(2, 3, 5), Cue(4, 6)), PLASTIC, (0, 1, 3), FORMS):
        model, episodes = small_model(task, rule, window=window, fast_weights=form), draw(task, 2)
        written = model(episodes)[0]
        model.plasticity.eta0 = 0.0
        lesioned = model(episodes)[0]
        model.config.rule = "none"
        assert_close(lesioned, model(episodes)[0], f"lesioned {rule}")
        assert (written - lesioned).abs().max() > 1e-4

def test_a_window_hides_what_fast_weights_carry():
    """The fifth step, or a query as the fifth, depends on the first one by either of them."""
    sources = ((Copy(1, 2, 6), "support_x", 5), (Cue(4, 6), "support_y", 1))
    sizes = ((0, 1), (1, 2), (4, 1), (5, 1))
    for rule, (window, n), (task, name, total) in product(RULES, sizes, sources):
        model, episodes = small_model(task, rule, window=window, n_layer=n), draw(task, 1)
        other = getattr(episodes, name).clone()
        other[:, 0] = total - other[:, 0]  # another first token or reward
        changed = (model(episodes)[0] - model(episodes._replace(**{name: other}))[0])[:, -1].abs()
        sees = rule != "none" or window in (0, 5)
        assert changed.max() > 1e-6 if sees else changed.max() < 1e-9, f"{rule}, window {window}"

def test_on_another_device():
    """Forward and backward on PyTorch's meta device: no tensor is made in a wrong place."""
    sources = (Copy(2, 1, 5), Cue(4, 6), Regression(2, 4, 3), FewShot("omniglot", fake_packs(), 3))
    forms = dict(plastic="last", fold=2), dict(fast_weights="literal", position="rotary", window=3)
    for task, rule, sizes in product(sources, RULES, forms):
        model = Transformer(task, Config(2, 2, 8, 8, filters=4, rule=rule, **sizes)).to("meta")
        episodes = task.sample("train", 2, random_generator(0, "train")).to("meta")
        out, _ = model(episodes)
        task.loss(out, episodes.target).backward()
        assert out.is_meta and all(p.grad is None or p.grad.is_meta for p in model.parameters())

def test_no_rule_has_parameters_it_does_not_use():
    """And where they start; the oracle tests say that each parameter learns."""
    both = {("alpha", 4), ("beta", 4)}
    for rule, expected in dict(none=set(), hebbian=both, gradient=both | {("w_out", 1)}).items():
        for plastic, n in ("all", 2), ("last", 1):  # blocks, each with an up and a down
            model = Transformer(Copy(2, 2, 5), Config(rule=rule, plastic=plastic, alpha_init=4.0))
            found = [(name.split(".")[-1], *p.unique().tolist())
                     for name, p in model.named_parameters()
                     if not re.search(r"(^|\.)(weight|bias|position)$", name)]
            assert {*found} == expected and found.count(("beta", 4)) == 2 * n * (rule in PLASTIC)
        assert len(model.head.bias) == 5 + (rule in PLASTIC) + Config.aux_dim * (rule == "gradient")
        assert not model.embed.token.weight[0].any(), "a blank that says something is echoed"

def test_finite_at_the_edges():
    """Zeros, long (LONG=2000), eta_0 of 1, one image; without clipping Hebbian writes multiply."""
    long, one = Copy(2, int(os.environ.get("LONG", 60)) - 3, 6), ("omniglot", fake_packs(), 1, 1, 1)
    edges = (("hebbian", 1.0, 8.0, 1.0), ("gradient", 0.02, 20.0, 1.0), ("gradient", 1.0, 1.0, 1.0),
             ("hebbian", 1.0, 0.05, 1e9), ("gradient", 1.0, 1.0, 1e9), ("hebbian", 1.0, 8.0, 1e-9),
             ("gradient", 1.0, 8.0, 1e-9))
    for task, edge, form in product((long, FewShot(*one), Regression(2, 4, 3)), edges, FORMS):
        torch.manual_seed(0)
        edge = dict(zip(("rule", "eta0", "alpha_init", "max_norm"), edge))
        model = Transformer(task, Config(1, 2, 8, 8, filters=4, fast_weights=form, **edge))
        episodes = task.sample("train", 1, random_generator(0, "train"))
        for tensor in (*model.parameters(), *episodes) if isinstance(task, Regression) else ():
            torch.nn.init.zeros_(tensor)
        out, _ = model(episodes)
        task.loss(out, episodes.target).backward()
        for found in (out, *(p.grad for p in model.parameters() if p.grad is not None)):
            assert found.isfinite().all(), f"{task}, {model.config}"

def test_what_is_kept_does_not_grow():
    """Never more past terms than --fold, and no write that nobody reads."""
    for task, n_writes in ((Copy(3, 20, 5), 3 + 20 + 1 + 3 - 1), (Cue(9, 9), 9)):
        terms, products, store = [], [], UnrolledFastWeights.store
        def watched(fast, eta, writes):
            store(fast, eta, writes)
            terms.append(max([x.size(1) for x in fast.pre.values()], default=0))
            products.extend(len(used) for P in fast.P.values() for used in P.vectors.values())
        with mock.patch.object(UnrolledFastWeights, "store", watched):
            for form in FORMS:
                model = small_model(task, "gradient", fold=4, fast_weights=form)
                assert len(model(draw(task, 2))[1].eta) == n_writes, "who reads the last write?"
        assert len(terms) == n_writes and (min(terms), max(terms)) == (0, 3) and max(products) <= 4

# ------ 3. Tasks and splits ------

def quiet():  # what is printed goes into another sys.stdout and sys.stderr
    return mock.patch.multiple(sys, stdout=io.StringIO(), stderr=io.StringIO())

def in_two_processes(work):
    """Call work() in two processes that find what torchrun would tell them; it must not fail."""
    same = dict(MASTER_ADDR="localhost", MASTER_PORT=str(get_free_port()), WORLD_SIZE="2")
    def begin(rank):
        os.environ.update(same, RANK=str(rank), LOCAL_RANK=str(rank))
        work()
    torch.multiprocessing.start_processes(begin, nprocs=2, start_method="fork")

def test_copy_episodes():
    cases = (None, "train", {5}), (2, "train", {2, 3, 4, 5}), (2, "val", {5}), (2, "test", {5})
    drawn = {split: set() for split in SPLITS}
    for least, split, delays in cases:
        task = Copy(3, 5, 6, least)
        batches = [task.sample(split, 20, random_generator(i, split)) for i in range(50)]
        assert {batch.support_x.shape for batch in batches} == {(20, 7 + d) for d in delays}
        for x, _, _, items in batches:
            rest = torch.tensor([0] * (x.size(1) - 7) + [5, 0, 0, 0])  # delay, delimiter, recall
            assert torch.equal(x[:, :3], items) and torch.equal(x[:, 3:], rest.expand(20, -1))
            drawn[split] |= {*map(tuple, items.tolist())}
        out = F.one_hot(F.pad(items, (9, 0)), 6).float()  # scored at the last three steps alone
        assert task.score(out, items).eq(1).all() and task.score(out.roll(1, 1), items).mean() < 0.5
    every = {*product((1, 2, 3, 4), repeat=3)}  # no sequence is in two splits, each in one
    assert set.union(*drawn.values()) == every and sum(map(len, drawn.values())) == len(every)
    assert all({sum(of) % 5 for of in drawn[split]} == sums
               for split, sums in zip(SPLITS, ({0, 1, 2}, {3}, {4})))
    x, _, _, items = batch = Copy(3, 40, 6, distractors=1).sample(
        "train", 20, random_generator(0, "train"))
    assert torch.equal(x[:, :3], items) and x[:, 3:43].unique().tolist() == [1, 2, 3, 4]
    assert x[:, 43:].eq(torch.tensor([5, 0, 0, 0])).all()
    assert torch.equal(x.gather(1, task.shown(batch)), items), "not the step that showed it"

def test_cue_regression_and_random_streams():
    for noise in 0, 30:
        task = Cue(8, 20, noise)
        x, y, query_x, target = batch = task.sample("train", 100, random_generator(0, "train"))
        counts = x[..., -1] == 1 if noise else x.sum(-1) == 1  # (B, T)
        assert x.shape == (100, 8 + noise, 20 + bool(noise)) and counts.sum(1).eq(8).all()
        cues, asked = x[..., :20], query_x[..., :20]
        assert cues.sum(-1).eq(1).all() and (cues * counts[..., None]).sum(1).le(1).all()
        # the reward that the cue came with where it counted, whatever came with it elsewhere
        assert torch.equal(asked @ (cues.mT @ (y * counts[..., None])), target)
        assert abs(y.mean() - 0.5) < 0.05 and 0 <= y.min() and y.max() <= 1
        shown = task.shown(batch)  # (B, Q)
        assert torch.equal(y[..., 0].gather(1, shown), target[..., 0])
        assert torch.equal(counts.nonzero()[:, 1].view(100, 8), shown.sort(1).values)
        assert (shown.diff() > 0).all(1).double().mean() < 0.2, "queries in the order of the pairs"
        assert not noise or counts.double().mean(0).min() > 0.05, "a step that never counts"
        assert not noise or (cues * ~counts[..., None]).sum((0, 1)).min() > 50, "noise: any cue"
    x, y, query_x, target = draw(Regression(dim=3, support=10, queries=7), 500)
    fit = torch.linalg.lstsq(F.pad(x, (0, 1), value=1.0), y).solution  # (B, dim + 1, 1)
    assert Regression().loss(F.pad(query_x, (0, 1), value=1.0) @ fit, target) < 1e-8  # no noise
    assert abs(Regression().loss(torch.zeros_like(target), target) - 4) < 0.5  # guessing 0 gives 4
    twice = [*product(range(5), SPLITS)] * 2  # seeds and splits have streams of their own
    assert len({random_generator(*of).get_state().numpy().tobytes() for of in twice}) == 15

def test_distorted_images():
    """Two blobs, at complex numbers: their difference tells turn and scale, their middle shift."""
    place = torch.arange(28) - 13.5 + 1j * (torch.arange(28)[:, None] - 13.5)
    blobs = torch.stack([torch.exp(-(place - centre).abs() ** 2 / 4) for centre in (-6, 6)])
    images = (blobs * 255).round().byte().expand(4, 100, 2, 28, 28)  # two channels
    out, again = (tasks.distort(images, random_generator(0, "train")) for _ in range(2))
    assert out.dtype == torch.uint8 and out.shape == images.shape and torch.equal(out, again)
    mass = out.flatten(0, 1).double()  # (400, 2, 28, 28)
    left, right = ((mass * place).sum((-2, -1)) / mass.sum((-2, -1))).T  # the centres, (400)
    turn, shift = 12 / (right - left), (left + right) / (right - left) * 6 / 14 / 0.15
    u = torch.stack([turn.angle().rad2deg() / 10, (turn.abs() - 1) / 0.15, shift.real, shift.imag])
    for low, high, mean in zip(u.amin(1), u.amax(1), u.mean(1)):
        assert -1.03 < low < -0.75 and 0.75 < high < 1.03 and abs(mean) < 0.15, (low, high, mean)
    assert u.corrcoef().triu(1).abs().max() < 0.2, "two of them go together"

def test_shifted_images():
    """A bright pixel on gray says where it went, and whether the image was mirrored before."""
    images = torch.full((4, 200, 3, 32, 32), 100).byte()
    images[..., 15, 12] = 150
    out, again = (tasks.shift(images, random_generator(0, "train")) for _ in range(2))
    assert out.dtype == torch.uint8 and out.shape == images.shape and torch.equal(out, again)
    out = out.flatten(0, 1)  # (800, 3, 32, 32)
    at = out.flatten(2).argmax(2)  # (800, 3)
    mirrored = at[:, 0] % 32 > 15
    moves = torch.stack([at[:, 0] // 32 - 15, at[:, 0] % 32 - torch.where(mirrored, 19, 12)], 1)
    kinds, counts = torch.cat([moves, mirrored[:, None]], 1).unique(dim=0, return_counts=True)
    assert (at == at[:, :1]).all() and moves.abs().max() == 2
    assert len(kinds) == 50 and counts.max() < 40, "not all equally often"
    for (down, right), image in zip(moves.tolist(), out):  # what comes in from outside is black
        assert (image[0] == 0).sum() == 1024 - (32 - abs(down)) * (32 - abs(right))

def test_embedded_images():
    """The mean of both mirror images' embeddings, of CIFAR-FS alone."""
    def encoder(images):  # each column's mean
        return images.double().mean((-3, -2))
    for name, split in product(tasks.PACKS, ("val", "test")):
        task = FewShot(name, fake_packs(), 5, 2, 3)
        x, y, query_x, target = task.sample("test", 4, random_generator(0, "test"))
        task.embed(split, encoder, "cpu")
        shown, label, asked, right = task.sample("test", 4, random_generator(0, "test"))
        assert torch.equal(y, label) and torch.equal(target, right)
        for images, of in (x, shown), (query_x, asked):
            if (name, split) == ("cifarfs", "test"):
                images = (encoder(images) + encoder(images.flip(-1))) / 2
            assert_close(of, images, f"{name} {split}")

def test_encoder_learns_then_embeds():
    """By prototypes and, on CIFAR-FS, by a layer; what the reader and eval.py see is embedded."""
    drawn, losses, run = [], [], new_folder()
    def loss(task, out, target):
        losses.append((out.size(2), target))
        return tasks.Classification.loss(task, out, target)
    def embed(task, split, encoder, device):
        assert not encoder.training, "each batch would have a norm of its own"
        drawn.append((split, sum(of.sum().item() for of in encoder.state_dict().values())))
        task.embedded[split] = torch.rand(len(task.class_ids[split]), 600, encoder.d_out)
    flags = f"{TINY_IMAGES} --task cifarfs --steps 2 --data-dir {fake_packs()} --out-dir {run}"
    with mock.patch.multiple(FewShot, embed=embed, loss=loss):
        call(train, flags)
        (ways, target), (n, classes) = losses[:2]  # the encoder's: by prototypes, by the layer
        assert ways == n == 64 and torch.equal(classes[0].sort().values[::2], torch.arange(64))
        assert torch.equal(classes[:, 64:], target), "the shots, then the queries"
        assert losses[4][0] == 5, "not the reader's, after two updates of the encoder"
        learned = load(run)["model"]["embed.classes.weight"]
        call(train, f"--resume --out-dir {run}")
        call(evaluation, f"{run} --episodes 2")
        assert [split for split, _ in drawn] == ["train", "val", "train", "val", "test"]
        assert len({state for _, state in drawn}) == 1, "not by the encoder that was pretrained"
        call(train, f"{flags} --pretrain-steps 0")
        assert not torch.equal(load(run)["model"]["embed.classes.weight"], learned)
        call(evaluation, f"{run} --episodes 2")
        assert len(drawn) == 5, "an encoder that learns changes what it says of an image"

def test_few_shot_episodes():
    def identify(images):  # of a fake pack -> class, number and way: 2 x quarter-turns + flipped
        corners = torch.stack([view.rot90(-k, (-2, -1))[..., 0, 0, :5].long()  # (8, *, 5)
                               for k in range(4) for view in (images, images.flip(-1))])
        way = (corners[..., 4] == 255).long().argmax(0)
        a, b, c, d, _ = corners.take_along_dim(way[None, ..., None], 0)[0].unbind(-1)
        return a * 256 + b, c * 256 + d, way
    cases = (("cifarfs", (0, 0), [64, 16, 20], [1], [0]),
             ("omniglot", (0, 0), [813, 151, 659], [1, 3, 5, 7], [0]),
             ("omniglot", (1, 1), [813, 151, 659], [1, 3, 5, 7], [0, 2, 4, 6]))
    folder = fake_packs()
    for (name, options, sizes, train_ways, ways), split in product(cases, SPLITS):
        task, generator = FewShot(name, folder, 5, 2, 3, *options), random_generator(0, split)
        n, ids = sum(sizes), task.class_ids
        parts = [(ids[of] % n).unique().tolist() for of in SPLITS]
        assert [*map(len, parts)] == sizes and sorted(sum(parts, [])) == [*range(n)]
        change = "shift" if name == "cifarfs" else "distort"
        with mock.patch.object(tasks, change, lambda images, _: images.flip(-1)):
            x, y, query_x, target = task.sample(split, 40, generator)
            wide = task.sample("train", 1, generator, 60, shots=1, queries=2)  # to pretrain on
            every = task.sample("train", 3, generator, 64)
        if name == "cifarfs":  # each of all classes keeps its label
            kind, _, _ = identify(every.support_x)
            assert torch.equal(kind, ids["train"][every.support_y])
        kind, _, way = identify(torch.cat([wide.support_x, wide.query_x], 1))  # (1, 180) each
        classes, label = kind + way // 2 * n, torch.cat([wide.support_y, wide.target], 1)
        assert torch.isin(classes, ids["train"]).all() and way.unique().tolist() == train_ways
        assert torch.equal(classes, classes[:, wide.support_y[0].argsort()][0, label])
        kind, number, way = identify(torch.cat([x, query_x], 1))  # (B, 25) each
        assert torch.isin(kind + way // 2 * n, ids[split]).all()
        assert way.unique().tolist() == (train_ways if split == "train" else ways)
        group = kind // 33 + 99 * (kind >= 964)
        assert (group == group[:, :1]).all() == options[1], "not of one alphabet, or always"
        assert x.shape[:2] == y.shape == (40, 10) and query_x.shape[:2] == target.shape == (40, 15)
        assert max((part.diff() >= 0).all(1).float().mean() for part in (y, target)) < 0.2, "sorted"
        label, order = torch.cat([y, target], 1).sort()
        shown, number = (t.gather(1, order).view(40, 5, 5) for t in (4 * kind + way // 2, number))
        assert (label.view(40, 5, 5) == torch.arange(5)[:, None]).all(), "not five of each label"
        assert (shown == shown[..., :1]).all(), "one label has two classes"
        assert shown[..., 0].sort().values.diff().all(), "one class has two labels"
        assert number.sort().values.diff().all(), "a support image is a query"

def test_packing_downloads():
    def cifar(root, train, download):  # class and part in single pixels; classes mixed
        targets = torch.arange(50000 if train else 10000) % 100
        data = torch.zeros(len(targets), 32, 32, 3, dtype=torch.uint8)
        data[:, 1, 2, 0], data[:, 3, 4, 2] = targets, not train
        return SimpleNamespace(data=data.numpy(), targets=targets.tolist(), classes=want * download)
    def omniglot(root, background, download):  # six characters, black ink on white paper
        folder, scan = Path(root, str(background)), Image.new("1", (105, 105), 1)
        scan.paste(0, (0, 0, 15, 15))
        for name, i in product(("Zulu", "Alpha") if background else ("Beta",), (2, 1) * download):
            (folder / f"{name}/character0{i}").mkdir(parents=True)
            for drawer in range(1, 21):
                scan.save(folder / f"{name}/character0{i}/0001_{drawer:02}.png")
        return SimpleNamespace(target_folder=folder)
    from PIL import Image
    want = [f"c{i:03}" for i in range(100)]
    folder, six = new_folder() / "new", (6, 20, 1, 28, 28)
    with quiet(), mock.patch.multiple("torchvision.datasets", CIFAR100=cifar, Omniglot=omniglot), \
         mock.patch.object(tasks, "PACKS", {"omniglot": ("pack", six)}):
        images, classes = tasks.pack_cifar100("").values()  # and of Omniglot two at once
        in_two_processes(lambda: tasks.load_pack(folder, "omniglot"))
    assert images.shape == (100, 600, 3, 32, 32) and classes == want
    assert (images[:, :, 0, 1, 2] == torch.arange(100)[:, None]).all(), "not in its class"
    assert (images[:, :, 2, 3, 4] == (torch.arange(600) >= 500)).all(), "training images come first"
    images, classes = load(folder, "pack").values()
    assert classes == [f"{of}/character0{i}" for of in ("Alpha", "Zulu", "Beta") for i in (1, 2)]
    assert images.shape == six and images.dtype == torch.uint8 and os.listdir(folder) == ["pack"]
    assert (images[..., 0, 0] == 255).all() and (images[..., 27, 27] == 0).all(), "ink is 255"

def test_broken_downloads():
    """A download is cut, wrong, missing, of too few images, or nobody listens at the port."""
    def answer(connection, *_):  # a GET of /STATUS/LENGTH/... by so many of 100000 bytes
        _, status, length, *_ = connection.recv(9999).split(b"/")
        connection.sendall(b"HTTP/1.0 %s\nContent-Length: 100000\n\n" % status + bytes(int(length)))
    server, folder = http.server.ThreadingHTTPServer(("localhost", 0), answer), new_folder()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    few = dict(images=torch.zeros(6, 20, 1, 28, 28, dtype=torch.uint8), classes=[*"abcdef"])
    packers = dict.fromkeys(("pack_cifar100", "pack_omniglot"), lambda root: few)
    ways = [f"{server.server_port}/{how}" for how in ("200/50000", "200/100000", "404/0")]
    for way, (name, (file, shape)) in product((*ways, "1/nobody", "few"), tasks.PACKS.items()):
        url, why = f"http://localhost:{way}/", re.escape(f"not {shape} " * (way == "few"))
        line = rf"^no {name} in {folder / file} \(.*{why}.*\): check the network and --data-dir.*\Z"
        with quiet(), mock.patch.dict(vars(tasks), packers if way == "few" else {}), \
             mock.patch("torchvision.datasets.CIFAR100.url", url), \
             mock.patch("torchvision.datasets.Omniglot.download_url_prefix", url), \
             TestCase().assertRaisesRegex(ValueError, line):
            tasks.load_pack(folder, name)
        left = os.listdir(folder)
        assert way == "few" or not left, f"{way}: {name} left {left}"

def test_real_packs():
    folder = HERE.parent / "shared" / "data"
    if not folder.is_dir():
        raise SkipTest("no ../shared/data here")
    names = torch.load(folder / "omniglot.pt", weights_only=True, mmap=True)["classes"]
    cifarfs, ids = (FewShot(name, folder).class_ids for name in tasks.PACKS)
    alphabets = [name.split("/")[0] for name in names] * 4  # quarter-turns are classes
    train, val, test = ({alphabets[i] for i in ids[split]} for split in SPLITS)
    assert [len(train), len(val), len(test)] == [25, 5, 20] and len(ids["test"]) == 659
    assert max(train) < min(val) and not train & test
    assert [len(cifarfs[split]) for split in SPLITS] == [64, 16, 20]

# ------ 4. Training and resuming, as a user does it ------

TINY = "--overwrite --device cpu --d-model 16 --d-ff 16 --n-head 2 --batch-size 8"
train.EVAL_EPISODES = 16
TINY_COPY = f"{TINY} --task copy --seq-len 2 --delay 3 --vocab-size 6"
TINY_IMAGES = f"{TINY} --task omniglot --filters 4 --batch-size 2 --pretrain-steps 2"

def call(script, argv, *statuses):
    """Run a script, to end with one of `statuses` (or 0) -> what it said: with 2, an error line."""
    with quiet():
        try:
            status = script.main(argv.split()) or 0
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:
            raise AssertionError(f"{argv}: {error!r}") from error
        said = (sys.stderr if status == 2 else sys.stdout).getvalue()
    clear = status != 2 or said.startswith("error: ") and said.count("\n") == 1
    assert status in (statuses or (0,)) and clear, f"{argv}: exit status {status}, {said!r}"
    return said

def trained(argv):  # in a new folder -> which
    run = new_folder()
    call(train, f"{argv} --out-dir {run}")
    return run

def patched(at, owner, name, act, *command):
    """call(*command) with calls of a function, from number `at` on, being act(real, *args)."""
    real, calls = getattr(owner, name), []
    def changed(*args):
        calls.append(args)
        return real(*args) if len(calls) < at else act(real, *args)
    with mock.patch.object(owner, name, changed):
        return call(*command), calls  # what it said, and all calls

def interrupted(argv, at, number=signal.SIGTERM):  # before update `at`, by a signal -> said
    def interrupt(real, *args):
        signal.raise_signal(number)
        return real(*args)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # not to end these tests, where train.py fails
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    said, calls = patched(at, train, "update", interrupt, train, argv, 130)
    assert len(calls) == at, f"it went on until update {len(calls)}"
    return said

def load(folder, name="ckpt.pt"):
    return torch.load(folder / name, weights_only=True)

def rows_of(run):  # the lines of metrics.jsonl, without the times, which differ
    return [{**json.loads(line), "seconds": 0} for line in (run / "metrics.jsonl").open()]

def assert_same_run(one, other):  # ckpt.pt, best.pt and log, bit for bit but for the times
    pairs = [(load(run), load(run, "best.pt")) for run in (one, other)]
    states = [[last["generator"], last["optimizer"], last["model"], best["step"], best["model"],
               *(last["run"][of] for of in ("step", "best", "losses"))] for last, best in pairs]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert rows_of(one) == rows_of(other) != []

def test_fast_weights_learn_and_are_used():
    """Without attention only fast weights can answer a cue: they learn to, lesioned they do not."""
    for rule in RULES:
        run = new_folder()
        said = call(train, f"{TINY} --task cue --pairs 2 --cues 3 --window 1 --steps 120 --lr 1e-2 "
                    f"--rule {rule} --batch-size 16 --d-model 32 --d-ff 32 --n-layer 1 "
                    f"--out-dir {run}")
        text = call(evaluation, f"{run} --episodes 200 --json {run}/e.json")
        for word in ("shown", "right", "answered", "silenced"):
            assert (word in said and word in text) == (word != "silenced" or rule != "none")
        assert "mse 0.0833 is guessing, 0 perfect" in said and "% of perfect by update" in said
        assert rule == "none" or not re.search(r"answered +(.*)\n +silenced +\1", text)
        row, = json.loads((run / "e.json").read_text())
        assert row["score"] < 0.02 or rule == "none", f"{rule}: {row['score']:.4f}"
        chance = row["score" if rule == "none" else "lesion"]
        assert chance > 0.06, f"{rule}: an error of {chance} where guessing gives 0.083"

def test_evaluation_of_a_run():
    argv = f"{TINY_COPY} --min-delay 3 --steps 4 --eval-interval 1 --block-size 9 --seed"
    runs = [trained(f"{argv} {seed}") for seed in (0, 1)]
    state = load(runs[0], "best.pt")
    state["model"]["head.bias"] += 1.0  # scores are the best model's, gates the last one's
    torch.save(state, runs[0] / "best.pt")
    table, picture = (new_folder() / name for name in ("e.json", "picture.png"))
    drawn = f"--plot {picture}" if importlib.util.find_spec("matplotlib") else ""
    text = call(evaluation, f"{runs[0]} {runs[1]} --episodes 30 --json {table} {drawn}")
    assert not drawn or picture.read_bytes().startswith(b"\x89PNG")
    for seed, run, row in zip((0, 1), runs, json.loads(table.read_text()), strict=True):
        best = max(rows_of(run), key=lambda row: (row["val_metric"], row["step"]))
        assert row["step"] == best["step"] and row["seed"] == seed and str(run)[-32:] in text
        assert f" {row['score']:11.5f} {row['interval']:11.5f} " in text
        assert len(row["steps"]) == 8 and len(row["gates"]["write"]) == 7  # the last writes none
        (_, task, model), (_, _, last) = (train.load_run(run / of) for of in ("best.pt", "ckpt.pt"))
        episodes = task.sample("test", 30, random_generator(0, "test"))
        with torch.no_grad():
            (out, _), (_, fast) = model.eval()(episodes), last.eval()(episodes)
        eta, norm = torch.cat(fast.eta, 1), torch.cat(fast.norm, 1)
        right = (out[:, -2:].argmax(-1) == episodes.target).double()  # (30, 2)
        write = (eta * norm).mean(0)
        assert abs(row["score"] - right.mean()) < 1e-6
        assert row["by_step"] == [[0, right[:, 0].mean()], [1, right[:, 1].mean()]]
        assert abs(row["interval"] - 1.96 * right.mean(1).std() / 30**0.5) < 1e-6
        assert_close(torch.tensor(row["gates"]["write"]), write, "the mean write", 1e-5)
        assert_close(torch.tensor(row["writes"][""]), write / 0.02, "the mean write", 1e-3)
        assert abs(row["persistence"] - eta.mean() / 0.02) < 1e-5
        assert abs(row["cap_share"] - write.mean() / 0.02) < 1e-4
        slow = torch.cat([p.flatten() for name, p in last.named_parameters()
                          if re.search("(up|down).weight", name)]).norm()
        assert abs(row["change"] - torch.cat(fast.change).mean() / slow) < 1e-5
    for delay in ("delay 2", "delay 4"):  # than in training
        assert delay in call(evaluation, f"{run} --{delay} --episodes 10")
    (run / "eval.json").write_text(json.dumps([row]))
    full = call(evaluation, f"{run} --episodes 30").partition("\n")[2]
    (run / "best.pt").rename(run / "kept")  # as in results/
    assert call(evaluation, str(run)) == full and "0 item" in full and "2 blank" in full
    assert full.count("30 episodes; guessing 0.25\n") == 2  # of four tokens; the score, the lesion
    assert full not in text
    (run / "kept").rename(run / "best.pt")
    for flag, size in (("--block-size", "--delay 5"), ("--ways", "--ways 5")):
        assert flag in call(evaluation, f"{run} {size}", 2)

def test_salience():
    """Writes at steps that count are compared with others at the same position, and only there."""
    model = Transformer(Cue(2, 4, 3), Config(rule="hebbian", max_norm=0.5))
    shown = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2], [0, 3]])  # 0 always counts, 4 never
    write = torch.tensor([[7, 6, 3, 4, 7], [7, 2, 3, 4, 7], [7, 1, 9, 4, 7], [7, 2, 9, 4, 7],
                          [7, 3, 3, 1, 7]]).double()
    gates = torch.stack([write.square(), write, write, write])  # (4, 5, 5)
    row = evaluation.gate_figures(gates, shown, model)
    # at step 1: 6 and 2 against 1, 2 and 3; at step 2: 9 and 9 against 3s; at step 3: 1 against 4s
    assert math.isclose(row["selectivity"], (4 / 2 + 9 / 3 + 1 / 4) / 3)
    assert math.isclose(row["eta_selectivity"], (20 / (14 / 3) + 81 / 9 + 1 / 16) / 3)
    assert math.isclose(row["share_of_pairs"], (4.5 + 6 + 0) / (6 + 6 + 4))
    for kind, begin, means in (", counts", 0, [7.0, 4, 9, 1]), (", noise", 1, [2.0, 3, 4, 7]):
        capped = torch.tensor(row["writes"][kind][begin:begin + 4])  # of eta_0 0.02, max_norm 0.5
        assert_close(capped * 0.02 * 0.5, torch.tensor(means), kind, 1e-5)
    row = evaluation.gate_figures(gates, torch.tensor([[0, 1]] * 5), model)
    assert "selectivity" not in row
    ones = torch.ones(600, 5)
    assert math.isclose(evaluation.interval(ones), 1 - 600 / (600 + 1.96**2))  # Wilson's
    assert evaluation.interval(ones[:1]) == math.inf

def test_nearest_prototype():
    """One query at a time, by its cosine with the mean of each class's shots; eval.py's score."""
    flags = f"--filters 16 --shots 2 --rule none --steps 1 --data-dir {fake_packs()}"
    run = trained(f"{TINY_IMAGES} {flags}")
    text = call(evaluation, f"{run} --queries 4 --episodes 10 --batch-size 4 --json {run}/e.json")
    _, task, model = train.load_run(run / "best.pt", dict(queries=4))
    generator, embed, right = random_generator(0, "test"), model.eval().embed, []
    for n in 4, 4, 2:
        episodes = task.sample("test", n, generator)
        answers, _ = embed.nearest_prototype(episodes)  # (n, 20, 5)
        right.append((answers.argmax(2) == episodes.target).flatten())
        for x, y, query_x, answer in zip(*episodes[:3], answers):
            shots, queries = (embed.norm(embed.encoder(images)) for images in (x, query_x))
            for query, cosines in zip(queries, answer / 10):
                means = torch.stack([shots[y == c].mean(0) for c in range(5)])
                assert_close(cosines, torch.cosine_similarity(query, means), "cosines", 1e-5)
    found = json.loads((run / "e.json").read_text())[0]["prototype"]
    right = torch.cat(right).double()  # of 10 episodes of 20 queries
    assert len(right) == 200 and 0.25 < found < 1 and abs(found - right.mean()) < 1e-9
    assert f"nearest prototype  {found:.5f}" in text

def test_pretrained_encoder_stays():
    """What is pretrained, on 60 training classes at a time, is the same for every rule and no
    update changes it; without pretraining all learn."""
    drawn = []
    def encoder(flags):
        def sample(task, split, *of, **sizes):
            episodes = draw(task, split, *of, **sizes)
            drawn.append((split, episodes.support_y.size(1), episodes.target.size(1)))
            return episodes
        with mock.patch.object(FewShot, "sample", sample):
            run = trained(f"{TINY_IMAGES} --data-dir {fake_packs()} --filters 16 {flags}")
        state = load(run)
        moments = {of["step"].item() for of in state["optimizer"]["state"].values()}
        assert moments == {state["run"]["step"]}, "the reader goes on with moments of before"
        return {name: of for name, of in state["model"].items() if "embed.encoder" in name}
    same, other, draw = "--rule none --steps 1", "--rule hebbian --steps 3", FewShot.sample
    one, two = encoder(same), encoder(other)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert drawn[:2] == [("train", 60, 120)] * 2 and drawn.count(drawn[0]) == 4
    one, two = (encoder(f"{flags} --pretrain-steps 0") for flags in (same, other))
    assert not any(torch.equal(one[name], two[name]) for name in one)

def test_summary_is_about_the_reader():
    """When it was nearly perfect: the encoder alone, in the steps up to 0, does not count."""
    rows = [dict(step=step, val_metric=score) for step, score in ((-9, 1.0), (3, 0.9), (6, 0.97))]
    args, task = SimpleNamespace(out_dir="out"), SimpleNamespace(chance=0.2, perfect=1.0, metric="")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train.summary(dict(step=6, seconds=1.0, best=0.97, log=rows), args, task, ["answers"])
    assert "within 5% of perfect by update 6\n" in said.getvalue()

def test_validation():
    """best.pt has the lowest error, and the validation episodes stay the same."""
    argv = f"{TINY} --task regression --rule none --steps 6 --eval-interval 1 --lr"
    run = trained(f"{argv} 0.5")
    errors = [row["val_metric"] for row in rows_of(run)]
    assert load(run, "best.pt")["step"] == 1 + errors.index(min(errors))
    assert load(run)["run"]["step"] == len(set(errors)) == 6
    run = trained(f"{argv} 1e-12")
    losses, training = ([row[of] for row in rows_of(run)] for of in ("val_loss", "train_loss"))
    assert max(losses) - min(losses) < 1e-6 and len(set(training)) == 6, "validation was redrawn"
    run = trained(f"{argv} 1e-12 --eval-interval 3")
    for row, parts in zip(rows_of(run), (training[:3], training[3:])):
        assert abs(row["train_loss"] - sum(parts) / 3) < 1e-6, "not the mean since the last line"
    run = trained(f"{argv} 1e-12 --seed 1 --batch-size 16")
    _, task, model = train.load_run(run / "ckpt.pt")
    episodes = task.sample("val", 16, random_generator(1, "val"))
    loss = task.loss(model.eval()(episodes)[0], episodes.target).item()
    assert abs(rows_of(run)[-1]["val_loss"] - loss) < 1e-5, "not the episodes of its seed"
    losses, images = [], f"{TINY_IMAGES} --rule none --steps 1 --data-dir {fake_packs()}"
    for interval in (1, 2):
        with mock.patch.object(train, "PRETRAIN_INTERVAL", interval):
            losses.append([row["train_loss"] for row in rows_of(trained(images))][:-1])
    (one, other), (mean,) = losses
    assert one != other and abs((one + other) / 2 - mean) < 1e-6

@mock.patch.object(train, "PRETRAIN_INTERVAL", 1)
def test_resumed_run_is_the_same():
    """A command gives the same numbers, however often it is stopped; another seed gives others."""
    part = new_folder()
    # what, how often it had saved; before which update it stops, what it had saved, by which signal
    for what, every, *stops in (
            (f"{TINY_COPY} --rule gradient", 1, (2, 1), (4, 3, signal.SIGINT)),
            (TINY_IMAGES, 4, (3, 0)), (TINY_IMAGES, 3, (2, -1), (6, 3))):  # up to 0: pretraining
        argv = f"{what} --steps 7 --eval-interval {every} --data-dir {fake_packs()}"
        whole = trained(argv)
        assert rows_of(whole) != rows_of(trained(f"{argv} --seed 1"))
        for at, saved, *how in stops:
            said = interrupted(f"{argv} --out-dir {part}", at, *how)
            assert f"stopped; to go on: python train.py --resume --out-dir {part}\n" in said
            assert load(part)["run"]["step"] == saved
            # whatever is in the log, afterwards it is the log of the uninterrupted run
            (part / "metrics.jsonl").open("a").write('{"step": 6, "val_metric": 0.5}\n{"step": 7')
            for _ in range(2):  # at the second time nothing is left to do
                torch.randn(3)
                step, said = load(part)["run"]["step"], call(train, f"--resume --out-dir {part}")
                assert f", {max(0, step)}/7 done; " in said and "finished: 7 updates" in said
                assert_same_run(whole, part)
    call(train, f"--resume --steps 9 --eval-interval 3 --lr 0.5 --out-dir {part}")
    assert [row["step"] for row in rows_of(part)] == [-1, 0, 3, 6, 7, 9]
    assert {*"train_loss val_loss val_metric metric".split()} < {*rows_of(part)[0]}
    rate = load(part)["optimizer"]["param_groups"][0]["lr"]
    assert math.isclose(rate, 0.5 * train.learning_rate(9, 9)) and load(part)["args"]["lr"] == 0.5

def test_killed_at_any_moment():
    """kill -9 at random, again and again: what is there loads, and the end is the same. KILLS=30"""
    rng, killed, began = random.Random(0), 0, time.time()
    argv = f"{TINY_COPY} --rule hebbian --steps 24 --eval-interval 1"
    whole, took = trained(argv), time.time() - began
    for _ in range(int(os.environ.get("KILLS", 1))):
        part, run = new_folder(), None
        life, seconds = f"{argv} --out-dir {part}", 0  # the first ends with its first evaluation
        while not run or run.exitcode:
            run = torch.multiprocessing.get_context("fork").Process(target=call, args=(train, life))
            run.start()
            while not (part / "metrics.jsonl").exists():
                time.sleep(1e-3)
            run.join(seconds)
            run.kill()
            run.join()
            assert run.exitcode in (0, -signal.SIGKILL), f"the run failed, {run.exitcode}"
            killed += run.exitcode != 0
            for path in part.glob("*.pt"):
                train.load_run(path)
            life, seconds = f"--resume --out-dir {part}", rng.uniform(0, took)
        assert_same_run(whole, part)
        assert killed and not list(part.glob("*.tmp"))

def test_processes_share_a_batch():
    """Two processes step by the gradients that one alone has, clipped to CLIP where larger."""
    folder, cases = new_folder(), [*product((Copy(2, 3, 6), Regression(30, 4, 2)), RULES)]
    def learn():
        device, rank, world = train.prepare(SimpleNamespace(device="cpu", threads=1, batch_size=4))
        for i, (task, rule) in enumerate(cases):
            model, at = small_model(task, rule).train(), folder / f"{i}{rank}{world}"
            of = [*model.parameters()]
            optimizer = mock.Mock(step=lambda: torch.save([p.grad for p in of], at),
                                  param_groups=[dict(params=of)])
            shared = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
            episodes = draw(task, 4).to(device, rank, world)
            train.update(task.loss(shared(episodes)[0], episodes.target), optimizer, 0)
    in_two_processes(learn)
    learn()
    for i, (task, _) in enumerate(cases):
        alone, *shared = (load(folder, f"{i}{of}") for of in ("01", "02", "12"))
        norm = torch.cat([gradient.flatten() for gradient in alone]).norm() / train.CLIP
        assert 0.99 < norm < 1.01 or isinstance(task, Copy), norm
        torch.testing.assert_close(shared, [alone] * 2, rtol=0, atol=1e-9)

def test_training_in_two_processes():
    """They write what one alone does, and each can go on with the other's run."""
    argv = f"{TINY_COPY} --steps 4 --eval-interval 2 --lr 1e-3"
    one, two, mixed, new = trained(argv), *(new_folder() / "run" for _ in range(3))
    shutil.copytree(one, mixed)
    in_two_processes(lambda: interrupted(f"{argv} --out-dir {two}", 3))  # both are told
    assert load(two)["run"]["step"] == 2
    for more in (f"--out-dir {two}", f"--steps 6 --out-dir {mixed}"):
        in_two_processes(lambda: call(train, f"--resume {more}"))
    for run in (one, two):
        call(train, f"--resume --steps 6 --out-dir {run}")
    for run, of in product((one, two, mixed), ("train_loss", "val_loss")):
        for row, expected, step in zip(rows_of(run), rows_of(one), (2, 4, 6), strict=True):
            assert row["step"] == step and abs(row[of] - expected[of]) < 1e-4
    in_two_processes(lambda: call(train, f"{argv} --out-dir {new} --batch-size 3", 2))
    assert not new.exists()

# ------ 5. Bad input ------

WRONG = """--n-head 3 --d-model 64; --pairs 9 --cues 8 --task cue; --ways 17 --task cifarfs
    --alphabet 1 --task cifarfs; --shots 6 --queries 15 --task omniglot; --turned 1 --task cifarfs
    --window -1; --block-size 31 --delay 40; --steps 0; --steps ten; --lr nan; --lr -1; --eta0 2
    --alpha-init inf; --alpha-init -1; --max-norm -1; --max-norm 0; --rule magic; --fold -1
    --fold 0; --alpha rank2; --ablate all; --vocab-size 3; --n-head 4 --d-model 12 --position rotary
    --min-delay 6 --delay 5; --delay 3 --task cue; --pretrain-steps 5; --nonsense
    --fast-weights magic; --device tpu; --seed 99999999999999999999"""  # the error names these

def test_bad_arguments():
    """Nothing is written. A run is not replaced unasked, nor resumed with flags it does not fit."""
    out, argv = new_folder() / "out", f"{TINY_COPY} --rule none --steps 2"
    wrong = re.split(r"; |\n +", WRONG + "; --device cuda" * (not torch.cuda.is_available()))
    others = {"--resume": ["ckpt.pt"], "--d-ff 4000000000": ["memory", "--batch-size"]}
    for flags, reasons in {**{of: of.split()[:2] for of in wrong}, **others}.items():
        line = call(train, f"{flags} --out-dir {out} --data-dir {fake_packs()}", 2)
        assert all(of in line for of in reasons) and not out.exists(), f"{flags}: {line}"
    out.write_text("a file")
    for script, flags in ((train, f"--steps 1 --out-dir {out}"), (evaluation, str(out))):
        assert str(out) in call(script, flags, 2) and out.read_text() == "a file"
    assert "best.pt" in call(evaluation, str(out.parent), 2)
    run = trained(argv)
    before = {path: path.read_bytes() for path in run.iterdir()}
    said = "--resume goes on with it, --overwrite replaces it"
    assert said in call(train, f"{argv.replace('--overwrite', '')} --out-dir {run}", 2)
    unfit = dict.fromkeys(("--n-layer 1", "--rule hebbian", "--task cue"), "ckpt.pt does not load")
    for flags, reason in {**unfit, "--delay 30": "--block-size", "--pairs 3": "--pairs"}.items():
        assert reason in call(train, f"--resume --out-dir {run} {flags}", 2)
    assert {path: path.read_bytes() for path in run.iterdir()} == before

def damaged(read, trap):  # of each file that a command reads: path, content instead, statuses
    def saved(content):
        torch.save(content, buffer := io.BytesIO())
        return buffer.getvalue()
    rng, images = random.Random(0), torch.zeros(1).byte().expand(tasks.PACKS["cifarfs"][1])
    changes = [dict(images=images[:3], classes=list("abc")), dict(images=images.float()),
               dict(images=trap), dict(model={}), dict(model=None), dict(args=trap),
               dict(args=None), dict(args={"task": "copy"})]
    misfits = (dict(d_ff=17), dict(d_ff="wide"), dict(rule="magic"))  # to other arguments
    for path in read:
        ignored = path.parent.name + path.suffix == "run.jsonl"  # by a resume
        yield path, saved(dict(args=trap, images=trap, model=trap)), (0 if ignored else 2,)
        if path.suffix == ".pt":
            good, state = path.read_bytes(), load(path.parent, path.name)
            args = [dict(args={**state.get("args", {}), **of}) for of in misfits]
            wrong = [{**state, **of} for of in changes + args if of.keys() <= state.keys()]
            cut = (b"", b"x" * 1000, good[:len(good) // 2], good[:-100])
            for content in (*cut, *map(saved, ([1, 2], *wrong))):
                yield path, content, (2,)
    for _ in range(int(os.environ.get("DAMAGED", 15))):
        path = rng.choice([path for path in read if path.suffix == ".pt"])
        flips = rng.choice((0, 1, 10, 1000))
        content = bytearray(path.read_bytes())
        for _ in range(flips):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        yield path, content if flips else content[:rng.randrange(len(content))], (0, 2)

def test_damaged_files():
    """What is damaged or does not fit: one line, status 2, nothing lost. DAMAGED=200 tries more."""
    folder, refusals = new_folder(), 0
    run, kept, new, pack = (folder / name for name in ("run", "kept", "new", "cifar100.pt"))
    trap = type("Trap", (), dict(__reduce__=lambda _: (os.mkdir, (str(new),))))()  # runs code
    shutil.copy(fake_packs() / pack.name, pack)
    call(train, f"{TINY_COPY} --rule gradient --steps 4 --eval-interval 1 --out-dir {run}")
    call(evaluation, f"{run} --episodes 4 --json {run}/eval.json")
    shutil.copytree(run, kept, ignore=shutil.ignore_patterns("*.pt"))
    resume = (train, f"--resume --steps 5 --out-dir {run}")
    plot = (evaluation, f"{kept} --plot {kept}/picture.png")  # or: there is no matplotlib
    read = {run / "ckpt.pt": resume, run / "best.pt": (evaluation, f"{run} --episodes 4"),
            pack: (train, f"{TINY_IMAGES} --task cifarfs --steps 1 --batch-size 1 "
                   f"--pretrain-steps 0 --data-dir {folder} --out-dir {run}"),
            kept / "eval.json": plot, kept / "metrics.jsonl": plot, run / "metrics.jsonl": resume}
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path, content, statuses in damaged(read, trap):
        path.write_bytes(content)
        refused = (line := call(*read[path], *statuses)).startswith("error: ")
        assert 0 in statuses or path.name in line or path.parent == kept, line
        assert not new.exists(), "a file that was loaded ran code"
        for p, expected in {**before, path: content}.items():
            assert not refused or p.read_bytes() == expected, f"{path} changed {p}"
            p.write_bytes(before[p])
        refusals += refused and len(statuses) == 2
    assert refusals

def test_faults_lose_nothing():
    """A disk that is full, once when renaming and twice when writing, and a loss that is nan."""
    def full(real, *args):
        if real is not os.replace:  # what was written until then stays there
            next(path for path in args if isinstance(path, Path)).open("wb").write(b"half")
        raise OSError(28, "No space left on device")
    run = new_folder()
    argv = f"{TINY_COPY} --steps 6 --eval-interval 1 --out-dir {run}"
    for at, owner, name in ((9, os, "replace"), (7, torch, "save"), (4, Path, "write_bytes")):
        line, _ = patched(at, owner, name, full, train, argv, 2)
        assert "No space left" in line and str(run) in line and not list(run.glob("*.tmp")), line
        step = load(run)["run"]["step"]
        assert 0 < step < 6 and load(run, "best.pt")["step"] <= step + 1 and rows_of(run)
        call(train, f"--resume --out-dir {run}")
    table = run / "eval.json"
    call(evaluation, f"{run} --episodes 4 --json {table}")
    before = table.read_bytes()
    line, _ = patched(1, os, "replace", full, evaluation, f"{run} --episodes 2 --json {table}", 2)
    assert str(table) in line and table.read_bytes() == before
    # an update and two validation batches a step: call 10 is the loss of update 4
    line, _ = patched(10, Copy, "loss", lambda real, *args: real(*args) * math.nan, train, argv, 2)
    assert "loss nan" in line and "--lr" in line and load(run)["run"]["step"] == 3, line
    assert all(value.isfinite().all() for value in load(run)["model"].values())

def flags_of(script):  # those that train or evaluation knows, and what argparse knows about each
    _, calls = patched(1, argparse.ArgumentParser, "parse_args", lambda *_: sys.exit(0), script, "")
    return {flag.option_strings[-1]: flag for flag in calls[0][0]._actions if flag.option_strings}

def test_random_arguments():
    """Any arguments: a run, or one line and exit status 2. ARGUMENTS=500 tries so many."""
    rng, outcomes, run = random.Random(1), [], new_folder()
    flags = {flag: of.choices or "-1 0 1 1 2 2 3 4 8 30 0.5 nan 1e20 inf x".split()
             for flag, of in flags_of(train).items() if of.nargs != 0 and flag != "--device"}
    for _ in range(int(os.environ.get("ARGUMENTS", 30))):
        argv = (f"--task {rng.choice([*tasks.TASKS])} --steps 1 --batch-size 2 --d-model 8 "
                f"--d-ff 8 --filters 2 --device cpu")
        for flag in rng.sample([*flags], rng.choice((1, 2, 4, 8))):
            argv += f" {flag} {rng.choice(flags[flag])}"
        argv += f" --pretrain-steps=0 --data-dir {fake_packs()} --out-dir {run}"
        if not call(train, argv + rng.choice(("", " --overwrite")), 0, 2).startswith("error: "):
            size = rng.choice("--delay --ways --shots --support --queries --episodes".split())
            argv = f"{run} --batch-size 2 --episodes 2 {size} {rng.choice((1, 2, 30))}"
            outcomes.append(call(evaluation, argv, 0, 2).startswith("error: "))
    assert False in outcomes

def test_flags_are_explained():
    """Help says what each is and its default; the README names none that does not exist."""
    flags = {flag: known.help for flag, known in flags_of(train).items()}
    shown = re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", call(train, "--help"), re.MULTILINE)
    assert sorted(shown) == sorted(flags) and all(flags.values())
    for name, value in train.defaults("copy", "hebbian").items():
        assert value is None or f"{value}" in flags["--" + name.replace("_", "-")], name
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (HERE / "README.md").read_text()))
    unknown = named - {*flags, *flags_of(evaluation), "--standalone", "--nproc_per_node"}
    assert not unknown, f"the README knows flags that nobody has: {sorted(unknown)}"

def test_commands_from_outside():
    """The scripts as processes: exit status, streams, and a folder that is not the project's."""
    folder, run = new_folder(), subprocess.getstatusoutput
    python = f"cd {folder} && {sys.executable} {HERE}"
    status, said = run(f"{python}/train.py {TINY_COPY} --rule none --steps 2 2> /dev/null")
    assert status == 0 and "on cpu" in said, said
    assert {*os.listdir(folder / "out/copy-none-s0")} == {"best.pt", "ckpt.pt", "metrics.jsonl"}
    status, said = run(f"{python}/eval.py out/copy-none-s0 | true")
    assert status == 0 and said == ""  # who reads has left
    leader, terminal = os.openpty()
    argv = f"{TINY_COPY} --steps 2 --eval-interval 1 --watch --out-dir".split()
    subprocess.run([sys.executable, HERE / "train.py", *argv, folder / "a b"], stdout=terminal)
    said = os.read(leader, 10**5).decode()
    assert said.count("\x1b[3F\x1b[J") == 1 and said.count("steps  iibbbdrr") == 2, said
    assert f"python eval.py '{folder}/a b'" in said
    status, said = run(f"{python}/eval.py out/nowhere > /dev/null")
    assert status == 2 and re.fullmatch("error: out/nowhere/best.pt does not load.*", said), said

# ------ 6. The pages of results ------

def cell(task, rule, figures, key="score", first=0, **args):  # one seed a figure, from `first` on
    args = {**tables.SHORT, "task": task, "delay": 40, "noise": 9, "steps": 500, **args}
    row = dict(task=task, rule=rule, args=args, metric="accuracy" if task == "copy" else "mse",
               alike=str(args),
               cell=f"{task}-{rule}", episodes=600, score=0.8, learned=100)
    return [{**row, key: figure, "seed": n} for n, figure in enumerate(figures, first)]

def verdict(start, *cells):
    found = tables.claims(cells)
    return next((said for name, _, said, *_ in found if name.startswith(start)), None)

def versus(start, one, other, key="score", task="copy", **how):  # Hebbian, gradient; static guesses
    guesses = [0.12, 0.125, 0.13] if task == "copy" else [3.9, 4, 4.1]
    return verdict(start, cell(task, "none", guesses), cell(task, "hebbian", one, key),
                   cell(task, "gradient", other, key, **how))

def three(*figures, task="copy", **args):  # a cell of each rule
    return [cell(task, rule, of, **args) for rule, of in zip(RULES, figures)]

def test_student():
    """Quantiles from any table of Student's t; a worked example of either form of the test."""
    for t, df, p in ((12.706, 1, 0.05), (4.303, 2, 0.05), (-2.776, 4, 0.05), (2.228, 10, 0.05),
                     (-1.96, 1e4, 0.05), (9.925, 2, 0.01), (0.741, 4, 0.5)):
        assert abs(tables.p_value(t, df) / p - 1) < 0.01, t
    # differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), so t = 3.46 at 2 degrees of freedom
    mean, p = tables.t_test({0: 2, 1: 4, 2: 6}, {0: 1, 1: 2, 2: 3})
    assert mean == 2 and abs(p - 0.0742) < 1e-3
    # Welch: variances 1 and 5/3 of 3 and 4, so t = 1.5 / sqrt(1/3 + 5/12) = 1.732 at 4.959 degrees
    mean, p = tables.t_test({0: 12, 1: 13, 2: 14}, {5: 10, 6: 11, 7: 12, 8: 13})
    assert mean == 1.5 and abs(p - tables.p_value(1.7321, 4.959)) < 1e-4
    assert tables.t_test({0: 1, 1: 1}, {0: 1, 1: 1}) == (0, 1)
    _, p = tables.t_test({0: 0.8, 1: 0.81, 2: 0.83}, {0: 0.7, 1: 0.71, 2: 0.73})
    assert p == 1  # no spread but that of rounding: no test
    assert abs(tables.p_value(200, 2) / 2.4998e-5 - 1) < 1e-3

def test_claims_follow_from_the_figures():
    no, low, high = "not shown (0, 0, 1)", [0.5, 0.51, 0.52], [0.8, 0.82, 0.81]
    holds, not_so = "holds (1, 0, 0)", "does not hold (0, 1, 0)"
    assert versus("2", low, high) == holds and versus("2", high, low) == not_so
    assert versus("2", [0.9] * 3, [0.905, 0.904, 0.906]) == no  # less than a hundredth of 0.875
    assert versus("2", low, [0.5, 0.7, 1.0]) == no  # not beyond the spread
    assert versus("2", [0.4, 0.5, 0.6], [0.42, 0.56, 0.7]) == no  # p is 0.12
    for few in [0.5], [0.5, 0.51]:
        assert versus("2", few, [0.9] * 5) == "too few seeds (0, 0, 0)"
    # paired by seed what is +0.05 in each seed shows; with other seeds it drowns
    spread, more = [0.3, 0.5, 0.7], [0.35, 0.56, 0.75]
    assert versus("2", spread, more) == holds and versus("2", spread, more, first=5) == no
    # to be best is to beat each other one; either rule is enough to add to attention
    assert versus("1", high, low) == holds and verdict("1", *three(low, low, high)) == not_so
    assert verdict("1", *three(high, high, low)) == no  # as good as one of them
    assert verdict("1", *three(low, high)) == "too few seeds (0, 0, 0)"  # nor without a rule
    assert verdict("5-window", *three(low, low, high)) == holds
    (_, p, _), = next(tables.claims(three([0.7, 0.71, 0.75], high, low)))[-1]
    assert 0.01 < p < 0.05  # that of the weaker comparison
    # a claim counts its experiments, alike but for the rule; ablations and re-tests are none
    def pair(one, other, **args):
        return cell("copy", "hebbian", one, **args), cell("copy", "gradient", other, **args)
    assert verdict("2", *pair(low, high), *pair(high, low, delay=80)) == "mixed (1, 1, 0)"
    for one, said in (low, "shown in 1 of 2 (1, 0, 1)"), (high, "the opposite in 1 of 2 (0, 1, 1)"):
        other = high if one == low else low
        assert verdict("2", *pair(one, other), *pair(high, high, delay=80)) == said
    for size in dict(delay=20), dict(seq_len=9), dict(n_layer=4), dict(min_delay=9), dict(window=0):
        assert verdict("2-d", *pair(low, high, **size)) is None, size
    assert verdict("2-t", *pair(low, high, seq_len=9, delay=20)) == holds
    assert verdict("2", *pair(low, high), *pair(high, low, ablate="eta")) == holds
    retest = [[{**row, "cell": row["cell"] + "@delay 60"} for row in of] for of in pair(high, low)]
    assert verdict("2", *pair(low, high), *retest) == holds
    assert verdict("2", pair(low, high)[0], pair(low, high, lr=9)[1]) is None

def test_claims_on_errors_and_gates():
    no, holds, not_so = "not shown (0, 0, 1)", "holds (1, 0, 0)", "does not hold (0, 1, 0)"
    # errors are compared as logarithms, and must differ by a hundredth of what there is to learn
    assert versus("1", [0.2, 0.4, 0.9], [1.1, 2.0, 4.6], task="regression") == holds
    assert versus("1", [1.1, 2.0, 4.6], [0.2, 0.4, 0.9], task="regression") == not_so
    assert versus("1", [0.001] * 3, [0.010, 0.011, 0.012], task="regression") == no
    # as logarithms the first is better, by its mean the other: that shows nothing
    assert versus("1", [0.04] * 4 + [4], [0.296] * 4 + [2.43], task="regression") == no
    # static weights suffice where their error is surely not larger by that hundredth
    for static, said in ([2e-4, 1e-4, 3e-4], holds), ([1e-3, 8e-4, 9e-4], no), ([0.08] * 3, not_so):
        figures = static, [1e-4, 2e-4, 1.5e-4], [2e-4, 2e-4, 1e-4]
        cues = three(*figures, task="cue", window=0)
        assert verdict("3", *cues) == said, static
    assert verdict("3", *([{**row, "learned": None} for row in of] for of in cues)) is None
    assert verdict("5-whole", *cues) == holds and verdict("5-window", *cues) is None
    # a rule that is surely worse does not make the p of one that may be better
    worse = three([0.5, 0.51, 0.52], [0.5, 0.53, 0.52], [0.1, 0.13, 0.1])
    assert verdict("5-window", *worse) == no and next(tables.claims(worse))[-1][0][1] > 0.3
    assert versus("2-learned", [300, 250, 270], [100, 101, 90], "learned") == holds
    assert versus("2-learned", [300, None, 280], [100, 101, 99], "learned") == holds  # as 550
    assert versus("2-learned", [None] * 3, [500, 500, 499], "learned") == holds
    assert versus("2-learned", [70] * 3, [56] * 3, "learned") == no  # no spread, no test
    assert versus("2-learned", [None] * 3, [None] * 3, "learned") is None
    assert versus("4-open", [1e-4, 1e-3, 1e-2], [1e-3, 1.1e-2, 1e-1], "persistence") == holds
    assert versus("4-gated", [9, 8, 10], [3, 4, 5], "selectivity", "cue") == holds
    late = dict(learned=None)  # gates count where each seed has learned
    assert verdict("4-g", cell("cue", "hebbian", [9, 8, 10], "selectivity"),
                   [{**row, **late} for row in cell("cue", "gradient", [3] * 3, "selectivity")]
                   ) is None

def test_pages_come_from_the_results():
    for name, rows in tables.read_cells().items():
        assert len({row["flags"] for row in rows}) == 1, f"{name}: its seeds differ"
    for path, text in tables.pages().items():
        assert text == path.read_text(), f"{path}: python results/tables.py"
        assert max(len(line) for line in text.splitlines() if line[:1] == "|") <= 160
    source = "".join(path.read_text() for path in HERE.glob("*.py"))
    idea = (HERE / "README.md").read_text().split("## Make it your own")[0]
    for block in re.findall(r"```python\n(.*?)```", idea, re.DOTALL):
        for line in block.splitlines():
            assert line in source, f"the README has a line that is nowhere: {line}"

def test_make_it_your_own():
    """The README's blocks, as they stand there, in a copy of the project."""
    copy = new_folder()
    (copy / "results").mkdir()
    for path in [*HERE.glob("*.py"), *HERE.glob("results/*.py")]:
        shutil.copy(path, copy / path.relative_to(HERE))
    section = (HERE / "README.md").read_text().split("## Make it your own")[1]
    rule, task, *others = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    branch, names = '        if self.rule == "gradient":\n', '"gradient"]'
    for file, old, new in (("plasticity.py", branch, rule + branch),
                           ("model.py", names, '"gradient", "delta"]'), ("tasks.py", "", task)):
        text = (copy / file).read_text()
        (copy / file).write_text(text.replace(old, new) if old else text + new)
    oracle = ("import train\nfrom test_all import *\nfor task in (Copy(2, 2, 5), Cue(4, 6)):\n"
              "    check_against_oracle(task, 'delta', fold=2)")
    runs = [f"train.main('--steps 2 --batch-size 2 {argv}'.split())"
            for argv in ("--task sine --rule delta", "--window 8 --out-dir out/short")]
    (copy / "all.py").write_text("\n".join([oracle, *runs, *others]))
    status, said = subprocess.getstatusoutput(f"cd {copy} && {sys.executable} all.py")
    assert status == 0 and "sine, rule delta" in said, said

def test_figures_in_prose():
    seeds = [dict(metric="mse", score=0.03, learned=1250), dict(metric="mse", score=0.344)]
    want = ("It has <!-- a-b score -->0.19. Worst: <!-- a-b worst -->0.34, best "
            "<!-- a-b best -->0.030 (<!-- a-b learned -->1250).")
    old = want.replace("0.19", "9").replace("0.34", "?").replace("1250", "")
    assert tables.fill(old, {"a-b": seeds}, {}) == tables.fill(want, {"a-b": seeds}, {}) == want
    assert tables.figure(seeds, "learned") == "1250 (1 of 2)"
    assert tables.figure(cell("copy", "none", [1.0] * 3), "score") == "1.000 (≥ 0.994)"  # of 600
    assert tables.figure(cell("copy", "none", [1.0, 0.9997]), "score") == "0.99985 ± 0.00021"
    one = dict(k=cell("copy", "none", [0.7]))
    assert tables.by_rule(one, "k")[0] == "0.700 (one seed)"
    minutes = [{**row, "minutes": n} for row, n in zip(one["k"] * 3, (9, 4, 40))]
    assert tables.figure(minutes, "minutes") == "4.0"  # of the quickest
    row = dict(grid=True, learned=56, validation=[[9, 0.5], [10, 0.75]])
    assert tables.tries([dict(row, flags="--task copy --rule hebbian --lr 0.1 --seed 0"),
                         dict(row, flags="--task copy --rule none --lr 0.1 --seed 0", learned=None),
                         dict(row, flags="--task copy --rule none --lr 0.2 --seed 0", grid=False)]
                        ) == [["copy --lr 0.1", "0.75000, never", "0.75000, 56", "-"]]
    names = ("copy-hebbian-w8-4all", "copy-hebbian-w8-4last")
    low, high = (cell("copy", "hebbian", of) for of in ([0.6, 0.61, 0.62], [0.7, 0.72, 0.71]))
    (_, key, every, last, p), _ = tables.depth(dict(zip(names, (low, high))))
    assert (key, every, last) == ("score", "0.610 ± 0.010", "0.710 ± 0.010") and float(p) < 0.05
    for wrong in ("a-c score -->", "a-b nothing -->", "begin x -->\n<!-- end x -->", "begin x -->"):
        with contextlib.suppress(ValueError):
            raise AssertionError(tables.fill("<!-- " + wrong, {"a-b": seeds}, {}))

def run(name):  # one test, by its name -> its outcome and the line to print
    began = time.time()
    try:
        globals()[name]()
    except SkipTest as reason:
        return "skipped", f"skip  {name}: {reason}"
    except (Exception, SystemExit):
        return "failed", f"FAIL  {name}\n{traceback.format_exc()}"
    return "passed", f"ok    {name}  {time.time() - began:.1f} s"

def main(words):
    names = [name for name in globals() if name[:5] == "test_" and re.search("|".join(words), name)]
    if not names:
        sys.exit(f"no test has {' or '.join(words)} in its name")
    outcomes = collections.Counter(passed=0, failed=0)
    with concurrent.futures.ProcessPoolExecutor(2, None, torch.set_num_threads, (1,)) as pool:
        for outcome, line in pool.map(run, names):
            print(line, flush=True)
            outcomes[outcome] += 1
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    sys.exit(1 if outcomes["failed"] else 0)

if __name__ == "__main__":
    main(sys.argv[1:])
