"""Every test of the project: python test_all.py [words in their names], or pytest test_all.py.

1. The recurrence    2. Facts about the model    3. Tasks and splits
4. Training, resuming and measuring    5. Bad input    6. The pages of results

LONG=2000, KILLS=30, DAMAGED=200 and ARGUMENTS=500 in the environment make some tests try more.
"""
import argparse
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
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import SkipTest, TestCase, mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # On a CPU numbers repeat, and CUDA hinders fork.
import torch
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.nn import functional as F

import eval as evaluation
import tasks
import train
from model import RULES, Config, Transformer
from plasticity import FastWeights, PlasticLinear, Plasticity, UnrolledFastWeights
from results import tables
from tasks import SPLITS, Copy, Cue, Episodes, FewShot, Regression, random_generator

HERE = Path(__file__).resolve().parent
PLASTIC = RULES[1:]  # A reader's own rule is tested, too.
FORMS = (FastWeights, UnrolledFastWeights)
FOLDERS = tempfile.TemporaryDirectory()  # It is removed when the tests end.

# ------ 1. The recurrence ------

class Oracle:
    """The paper's recurrence for episode b: one step at a time, an explicit P_t, no batch."""
    def __init__(self, model, episodes, b):
        self.model = model
        self.config = model.config
        self.P = defaultdict(float)  # layer: P_t (out, in), at first 0
        self.p = defaultdict(float)  # layer: p_t (out), at first 0
        self.x = {}  # layer: x_t (in) of the present step
        self.y = {}  # layer: y_t (out) of the present step
        self.past = [[] for _ in model.blocks]  # of each block: the key and value of every step
        self.writes = []  # of each step: eta_t, n_t, and how much the write changes
        context, queries = model.embed(each_part(episodes, lambda part: part[b:b + 1]))
        zs = [self.step(token, t) for t, token in enumerate(context[0])]
        if queries is not None:  # Each is read as if it came next, and leaves nothing.
            zs = [self.step(query, len(zs), query=True) for query in queries[0]]
        self.answers = torch.stack(zs)[:, :model.n_out]  # (Q or T, n_out)

    def read(self, layer, x):
        # y_t = (W + P_t) x_t + (b + p_t)
        y = (layer.weight + self.P[layer]) @ x + (layer.bias + self.p[layer])
        if layer.plastic:  # Elsewhere P_t and p_t stay zero.
            self.x[layer] = x
            self.y[layer] = y
        return y

    def signals(self, z):  # {layer: u_t (out)}
        if self.config.rule == "hebbian":
            # u_t = y_t
            return self.y
        if self.config.rule == "gradient":
            # L_t = mean((w_out ∘ z_t)²), u_t = -g_t, g_t = dL_t/dy_t
            L = ((self.model.plasticity.w_out * z) ** 2).mean()
            g = torch.autograd.grad(L, [*self.y.values()], create_graph=True)
            return {layer: -g_t for layer, g_t in zip(self.y, g)}
        # A reader's own rule is trusted in what it writes.
        x, y = [{layer: v[None, None] for layer, v in part.items()} for part in (self.x, self.y)]
        u = self.model.plasticity.signals(z[None, None], x, y, learning=True)
        return {layer: u_t[0, 0] for layer, u_t in u.items()}

    def write(self, z):
        u = self.signals(z)
        uxT = {layer: torch.outer(u[layer], x) for layer, x in self.x.items()}  # u_t x_tᵀ
        # n_t² = sum over the plastic layers of ||u_t x_tᵀ||²
        n = torch.sqrt(sum((uxT[layer] ** 2).sum() for layer in uxT))
        # eta_t = eta_0 * sigmoid(m_t) * min(1, max_norm / n_t)
        gate = 1.0 if self.config.ablate == "eta" else torch.sigmoid(z[self.model.n_out])
        eta = self.config.eta0 * gate * torch.clamp(self.config.max_norm / n, max=1)
        changes = [(eta * layer.alpha * uxT[layer]).flatten() for layer in uxT]
        self.writes.append(torch.stack([eta, n, torch.cat(changes).norm()]))
        with torch.set_grad_enabled(self.config.ablate != "backward"):
            for layer in uxT:
                # P_{t+1} = (1 - eta_t) P_t + eta_t * alpha ∘ u_t x_tᵀ
                self.P[layer] = (1 - eta) * self.P[layer] + eta * layer.alpha * uxT[layer]
                # p_{t+1} = (1 - eta_t) p_t + eta_t * beta ∘ u_t
                self.p[layer] = (1 - eta) * self.p[layer] + eta * layer.beta * u[layer]

    def step(self, x, t, query=False):  # a token (C) at position t -> z_t (Z)
        x = x + self.model.position[t]
        for block, past in zip(self.model.blocks, self.past):
            x = x + self.attend(block.attention, past, block.norm1(x), query)
            x = x + self.read(block.down, F.gelu(self.read(block.up, block.norm2(x))))
        z = self.model.head(self.model.norm(x))
        if self.config.rule != "none" and not query:
            self.write(z)
        return z

    def attend(self, attention, past, x, query):
        q, k, v = [part.chunk(attention.n_head) for part in attention.qkv(x).chunk(3)]
        seen = [*past, (k, v)][-self.config.window:]  # A window of 0 shows all.
        if not query:
            past.append((k, v))
        heads = []
        for h, q_h in enumerate(q):
            scores = torch.stack([q_h @ k_s[h] / math.sqrt(len(q_h)) for k_s, _ in seen])
            heads.append(sum(w * v_s[h] for w, (_, v_s) in zip(scores.softmax(0), seen)))
        return attention.proj(torch.cat(heads))

def each_part(episodes, change):  # of the parts that the task has
    return Episodes(*[part if part is None else change(part) for part in episodes])

def small_model(task, rule, form=UnrolledFastWeights, **sizes):
    """In double precision, and every parameter random: no term hides behind a 0 or a 1."""
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, d_model=8, d_ff=12, filters=4, alpha_init=1.0) | sizes
    model = Transformer(task, Config(rule=rule, **sizes)).double()
    model.fast_weights = form
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()

def draw(task, batch_size):  # training episodes in double precision
    episodes = task.sample("train", batch_size, random_generator(0, "train"))
    return each_part(episodes, lambda part: part.double() if part.is_floating_point() else part)

def folding(n):
    """The unrolled form with another `fold`. Its terms never pile up."""
    class Folding(UnrolledFastWeights):
        fold = n
        def store(self, eta, u):
            super().store(eta, u)
            n_terms = max([x.size(1) for x in self.past_x.values()], default=0)
            assert n_terms == (len(self.eta) + 1) % n, "not one more a write, and none after n"
    return Folding

def gradients(model, out):
    """{name: gradient} of one random weighting of `out`. A parameter without one is an error."""
    weights = torch.randn(out.shape, generator=random_generator(1, "train"), dtype=out.dtype)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(learned, torch.autograd.grad((out * weights).sum(), [*learned.values()])))

def assert_close(a, b, what, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text: f"{what}: {text}")

def check_against_oracle(task, rule, fold=32, **sizes):
    """Both forms answer, write and learn as the oracle does -> FastWeights, gradients."""
    model = small_model(task, rule, **sizes)
    episodes = draw(task, 2)
    oracles = [Oracle(model, episodes, b) for b in range(2)]
    answers = torch.stack([oracle.answers for oracle in oracles])
    expected = gradients(model, answers)
    for form, training in product((FastWeights, folding(fold)), (False, True)):
        model.fast_weights = form
        with torch.set_grad_enabled(training):
            out, fast = model(episodes)
        assert out.requires_grad == training, "evaluation keeps no history"
        assert_close(out, answers, f"{form}: the answer")
        if rule != "none":
            n_writes = len(task.step_names) - (episodes.query_x is None)  # Who reads the last?
            writes = torch.stack([torch.stack(oracle.writes[:n_writes]) for oracle in oracles])
            figures = [fast.eta, fast.norm] if training else [fast.eta, fast.norm, fast.change]
            for steps, expected_steps in zip(figures, writes.unbind(2)):  # (B, T)
                assert_close(torch.cat(steps, dim=1), expected_steps, f"{form}: eta, n or change")
            eta = writes[..., 0]
            assert eta.std() > 0.01 * eta.mean(), "every eta is the same: that shows too little"
        for name, grad in gradients(model, out).items() if training else ():
            scale = max(1.0, expected[name].abs().max().item())
            assert_close(grad / scale, expected[name] / scale, f"{form}: gradient of {name}")
    return fast, expected

def test_oracle():
    """It reads each query alone, so no query sees another."""
    both = (Copy(3, 2, 5), Cue(5, 6))
    images = FewShot("omniglot", fake_packs(), 2, 1, 1)
    sources = [(Copy(2, 2, 5), 2), (Cue(4, 6), 2), (Regression(2, 4, 3), 1), (images, 1)]
    cases = [(task, dict(window=n, n_layer=m)) for n, (task, m) in product((0, 1, 3), sources)]
    # The default fold of 32, above, only comes before queries.
    cases += [(task, dict(fold=n)) for n, task in product((1, 2, 3), (*both, Cue(1, 6)))]
    # The last block, where it alone is plastic, is the only one or follows two others.
    sizes = [dict(window=1), dict(window=2), dict(window=4),
             dict(plastic="last", n_layer=1), dict(plastic="last", n_layer=3)]
    cases += [(task, dict(size, fold=2)) for size, task in product(sizes, both)]
    for rule, (task, sizes) in product(RULES, cases):
        check_against_oracle(task, rule, **sizes)

def test_oracle_with_clipping_and_ablations():
    """What the paper's code detaches learns here, but for what an ablation stops."""
    for rule, max_norm in product(PLASTIC, (0.01, 1, 1e9)):  # They clip all writes, some, none.
        fast, _ = check_against_oracle(Copy(2, 2, 5), rule, max_norm=max_norm, eta0=0.1)
        clipped = torch.cat(fast.norm, dim=1) > max_norm
        assert max_norm == 1 or clipped.eq(max_norm == 0.01).all()
    ablations = ("none", "eta", "alpha", "backward")
    for rule, ablate, task in product(PLASTIC, ablations, (Copy(2, 2, 5), Cue(4, 6))):
        for fold in (2, 40):
            _, grads = check_against_oracle(task, rule, ablate=ablate, fold=fold)
        learned = [name for name in grads if re.search("alpha|beta|w_out", name)]
        w_out_learns = rule == "gradient" and ablate != "backward"
        # Each of the four layers has an alpha and a beta.
        assert len(learned) == 8 * (ablate in ("none", "eta")) + w_out_learns
        for name in learned:
            assert (grads[name].abs() > 1e-12).all(), f"parts of {name} do not learn"
        m, *auxiliary = grads["head.weight"][task.n_out:].abs()  # (C) each
        # Where m_t gates nothing, it is one more number of the gradient rule's loss L_t.
        m_learns = ablate in ("none", "alpha") or ablate == "eta" and w_out_learns
        for grad in (m.max(), grads["head.bias"][task.n_out].abs()):
            assert grad > 1e-8 if m_learns else grad == 0, "m_t learns, or does not"
        for grad in auxiliary if w_out_learns else ():
            assert (grad > 1e-12).all(), "auxiliary outputs learn by second order"

def test_gradcheck():
    """Gradients against finite differences, which owe nothing to anybody's derivatives."""
    forms = (FastWeights, folding(40), folding(2))
    for rule, form, task in product(PLASTIC, forms, (Copy(1, 1, 4), Cue(3, 3))):
        model = small_model(task, rule, form, n_layer=1, n_head=1, d_model=3, d_ff=3)
        episodes = draw(task, 1)
        parameters = [*model.parameters()]  # gradcheck changes them in place.
        assert torch.autograd.gradcheck(lambda *_: model(episodes)[0], parameters, fast_mode=True)

def test_example_by_numbers():
    """The one in the docstring of plasticity.py."""
    known, new = torch.eye(2)[:, None, None]  # (1, 0) and (0, 1), (B, T, in) each
    for form in (FastWeights, folding(1), folding(32)):
        layer = PlasticLinear(2, 2, alpha_init=80)
        slow = dict(weight=torch.eye(2), bias=torch.zeros(2), beta=torch.zeros(2))
        layer.load_state_dict({**layer.state_dict(), **slow})
        fast = form(Plasticity("hebbian", n_out=1))
        assert_close(layer(known, fast), known, "the first answer")
        fast.write(torch.zeros(1, 1, 2))  # m_t = 0
        assert fast.norm[0] == 1 and math.isclose(fast.eta[0], 0.01, rel_tol=1e-6)
        assert_close(layer(known, fast), 1.8 * known, "louder", 1e-6)
        assert_close(layer(new, fast), new, "unchanged")

# ------ 2. Facts about the model ------

def new_folder():  # It is there until the tests end.
    return Path(tempfile.mkdtemp(dir=FOLDERS.name))

@functools.cache
def fake_packs():
    """A folder with both packs in the real format. The first pixels of an image number it."""
    folder = new_folder()
    cifar = [f"class{i:02}" for i in range(64)] + tasks.CIFARFS_VAL + tasks.CIFARFS_TEST
    omniglot = [f"alphabet{i // 33:02}/character{i % 33:02}" for i in range(1623)]
    for name, classes in dict(cifarfs=cifar, omniglot=omniglot).items():
        file_name, shape = tasks.PACKS[name]
        images = torch.zeros(*shape[:2], 1, 1, shape[4], dtype=torch.uint8)  # All rows are one.
        number = torch.arange(shape[0] * shape[1]).view(*shape[:2], 1, 1, 1)
        images[..., :3] = number >> torch.tensor([16, 8, 0]) & 255
        torch.save({"images": images.expand(shape), "classes": sorted(classes)}, folder / file_name)
    return folder

def test_tokens_of_a_step():
    """Linear in the features, the value (0 where it is asked for) and whether it is a query."""
    for task in (Cue(4, 6), Regression(2, 4, 5), FewShot("omniglot", fake_packs(), 3, 1, 2)):
        embed = small_model(task, "none").embed
        episodes = draw(task, 2)
        x, y, query_x, _ = episodes
        if task.kind == "image":
            y = 4.0 * F.one_hot(y, 3)
            x, query_x = [torch.stack([embed.norm(embed.encoder(images)) for images in part])
                          for part in (x, query_x)]
        context, queries = embed(episodes)
        assert_close(context, embed.linear(F.pad(torch.cat([x, y], dim=2), (0, 1))), "context")
        tokens = F.pad(F.pad(query_x, (0, y.size(2))), (0, 1), value=1)
        assert_close(queries, embed.linear(tokens), "the queries")

def test_lesion_is_the_slow_model():
    """Not to write, to write with eta_0 = 0, step by step, and to have no rule are the same."""
    for task, rule, window, form in product((Copy(2, 3, 5), Cue(4, 6)), PLASTIC, (0, 1, 3), FORMS):
        model = small_model(task, rule, form, window=window)
        episodes = draw(task, 2)
        answers, _ = model(episodes)
        lesioned, fast = model(episodes, write=False)
        assert fast is None and (answers - lesioned).abs().max() > 1e-4
        model.plasticity.eta0 = 0.0
        assert_close(model(episodes)[0], lesioned, f"{rule}: eta_0 = 0")
        model.config.rule = "none"
        assert_close(model(episodes)[0], lesioned, f"{rule}: no rule")

def test_a_window_hides_what_fast_weights_carry():
    """The fifth step, or a query as the fifth, depends on the first one by either of them."""
    sources = [(Copy(1, 2, 6), "support_x", 5), (Cue(4, 6), "support_y", 1)]
    sizes = [(0, 1), (1, 2), (4, 1), (5, 1)]  # windows and blocks
    for rule, (window, n_layer), (task, name, total) in product(RULES, sizes, sources):
        model = small_model(task, rule, window=window, n_layer=n_layer)
        episodes = draw(task, 1)
        part = getattr(episodes, name).clone()
        part[:, 0] = total - part[:, 0]  # another first item of 1 to 4, or reward in [0, 1]
        others = episodes._replace(**{name: part})
        difference = (model(episodes)[0] - model(others)[0])[:, -1].abs().max()
        sees = rule != "none" or window in (0, 5)
        assert difference > 1e-6 if sees else difference < 1e-9, f"{rule}, window {window}"

def test_on_another_device():
    """Forward and backward on PyTorch's meta device: no tensor is made in a wrong place."""
    images = FewShot("omniglot", fake_packs(), 1, 1, 2)
    sources = (Copy(2, 0, 5), Cue(2, 3), Regression(2, 2, 2), images)
    for task, rule, form in product(sources, RULES, (FastWeights, folding(2))):
        model = small_model(task, rule, form, plastic="last", window=3).float().to("meta")
        episodes = task.sample("train", 2, random_generator(0, "train")).to("meta")
        out, _ = model(episodes)
        task.loss(out, episodes.target).backward()
        assert out.is_meta and all(p.grad is None or p.grad.is_meta for p in model.parameters())

def test_no_rule_has_parameters_it_does_not_use():
    """And alpha, beta and w_out start where they should. The oracle's tests say what learns."""
    both = {("alpha", 4.0), ("beta", 4.0)}
    starts = dict(none=set(), hebbian=both, gradient=both | {("w_out", 1.0)})
    n_outputs = dict(none=10, hebbian=11, gradient=15)  # m_t is one more, four are auxiliary
    for rule, (plastic, n_layers) in product(starts, dict(all=4, last=2).items()):
        model = Transformer(Copy(), Config(rule=rule, plastic=plastic, alpha_init=4.0))
        found = [(name.split(".")[-1], *p.unique().tolist()) for name, p in
                 model.named_parameters() if not re.search(r"\b(weight|bias|position)$", name)]
        assert {*found} == starts[rule]
        assert found.count(("beta", 4.0)) == n_layers * (rule in PLASTIC)
        assert len(model.head.bias) == n_outputs[rule]
        assert not model.embed.token.weight[0].any(), "a blank that says something is echoed"

def test_finite_at_the_edges():
    """Zeros, long episodes, eta_0 of 1, one image; without clipping Hebbian writes multiply."""
    edges = [("hebbian", 1.0, 8.0, 1.0), ("hebbian", 1.0, 0.05, 1e9), ("hebbian", 1.0, 8.0, 1e-9),
             ("gradient", 0.02, 20.0, 1.0), ("gradient", 1.0, 1.0, 1.0),
             ("gradient", 1.0, 1.0, 1e9), ("gradient", 1.0, 8.0, 1e-9)]
    long = Copy(2, int(os.environ.get("LONG", 60)) - 5, 6)
    sources = (long, FewShot("omniglot", fake_packs(), 1, 1, 1), Regression(2, 4, 3))
    for task, (rule, eta0, alpha_init, max_norm), form in product(sources, edges, FORMS):
        torch.manual_seed(0)
        edge = dict(rule=rule, eta0=eta0, alpha_init=alpha_init, max_norm=max_norm)
        model = Transformer(task, Config(1, 2, 8, 12, filters=4, **edge))
        model.fast_weights = form
        episodes = task.sample("train", 1, random_generator(0, "train"))
        for tensor in [*model.parameters(), *episodes] if isinstance(task, Regression) else ():
            torch.nn.init.zeros_(tensor)
        out, _ = model(episodes)
        task.loss(out, episodes.target).backward()
        for tensor in [out, *[p.grad for p in model.parameters() if p.grad is not None]]:
            assert tensor.isfinite().all(), f"{task}, {edge}"

# ------ 3. Tasks and splits ------

def quiet():  # What is printed goes into another sys.stdout and sys.stderr.
    return mock.patch.multiple(sys, stdout=io.StringIO(), stderr=io.StringIO())

def in_two_processes(work):
    """Call work() in two processes that find what torchrun would tell them. None may fail."""
    address = dict(MASTER_ADDR="localhost", MASTER_PORT=str(get_free_port()), WORLD_SIZE="2")
    def begin(rank):
        os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
        work()
    torch.multiprocessing.start_processes(begin, nprocs=2, start_method="fork")

def load(folder, name="ckpt.pt"):
    return torch.load(folder / name, weights_only=True)

def test_random_streams():
    """Seeds and splits have random numbers of their own, the same each time."""
    pairs = [*product(range(5), SPLITS)] * 2
    assert len({tuple(random_generator(*pair).get_state().tolist()) for pair in pairs}) == 15

def test_copy_episodes():
    """Each sequence is in one split, by the sum of its items."""
    task = Copy(3, 5, 6)
    found = []
    for split, remainders in {"train": {0, 1, 2}, "val": {3}, "test": {4}}.items():
        batch = task.sample(split, 1000, random_generator(0, split))
        items = batch.target  # (B, 3)
        rest = torch.tensor([0, 0, 0, 0, 0, 5, 0, 0, 0])  # delay, delimiter, recall
        assert torch.equal(batch.support_x, torch.cat([items, rest.expand(1000, -1)], dim=1))
        assert {*(items.sum(1) % 5).tolist()} == remainders
        found += {*map(tuple, items.tolist())}
        out = 20 * F.one_hot(F.pad(items, (9, 0)), 6).float()  # The last three steps count.
        assert task.score(out, items).eq(1).all() and task.loss(out, items) < 1e-6
        assert task.score(out.roll(1, 1), items).mean() < 0.5
    assert sorted(found) == [*product((1, 2, 3, 4), repeat=3)] and task.chance == 1 / 4

def test_cue_episodes():
    """With noise, one more feature marks the pairs that count."""
    for noise in (0, 1, 30):
        task = Cue(8, 20, noise)
        batch = task.sample("train", 100, random_generator(0, "train"))
        x, y, query_x, target = batch
        assert x.shape == (100, 8 + noise, 20 + bool(noise))
        counts = x[..., -1] == 1 if noise else x.sum(-1) == 1  # (B, T)
        assert counts.sum(1).eq(8).all() and counts.double().mean(0).min() > 0.05
        cues = x[..., :20]
        counting = cues * counts[..., None]
        assert cues.sum(-1).eq(1).all() and counting.sum(1).le(1).all()
        assert noise < 30 or (cues - counting).sum((0, 1)).min() > 50, "noise: any cue"
        assert abs(y.mean() - 0.5) < 0.05 and 0 <= y.min() and y.max() <= 1
        assert abs(y.var() / task.chance - 1) < 0.07, "chance is the loss of answering 0.5"
        # Asked is the reward of the pair that counts, whatever the cue came with elsewhere.
        assert torch.equal(query_x[..., :20] @ (counting.mT @ y), target)
        asked_steps = task.asked_steps(batch)  # (B, Q)
        assert torch.equal(y[..., 0].gather(1, asked_steps), target[..., 0])
        assert torch.equal(counts.nonzero()[:, 1].view(100, 8), asked_steps.sort().values)
        assert (asked_steps.diff() > 0).all(1).double().mean() < 0.2, "in the order of the pairs"

def test_regression_episodes():
    """The plane through what is shown answers all queries. Chance is the loss of answering 0."""
    for dim in (1, 3, 8):
        task = Regression(dim, support=10, queries=7)
        x, y, query_x, target = draw(task, 5000)
        fit = torch.linalg.lstsq(F.pad(x, (0, 1), value=1.0), y).solution  # (B, dim + 1, 1)
        assert task.loss(F.pad(query_x, (0, 1), value=1.0) @ fit, target) < 1e-8
        assert abs(task.loss(torch.zeros_like(target), target) / task.chance - 1) < 0.04

def test_distorted_images():
    """Two blobs at complex numbers: the difference tells turn and scale, the middle shift."""
    place = torch.arange(28) - 13.5 + 1j * (torch.arange(28)[:, None] - 13.5)
    blobs = [torch.exp(-(place - centre).abs() ** 2 / 4) for centre in (-6, 6)]
    images = (255 * torch.stack(blobs)).round().byte().expand(4, 100, 2, 28, 28)
    out, again = [tasks.distort(images, random_generator(0, "train")) for _ in range(2)]
    assert out.dtype == torch.uint8 and out.shape == images.shape and torch.equal(out, again)
    mass = out.flatten(0, 1).double()  # (400, 2, 28, 28)
    left, right = ((mass * place).sum((-2, -1)) / mass.sum((-2, -1))).T  # the centres, (400)
    turn = 12 / (right - left)
    shift = (left + right) / (right - left) * 6 / 14 / 0.15
    u = torch.stack([turn.angle().rad2deg() / 10, (turn.abs() - 1) / 0.15, shift.real, shift.imag])
    assert u.abs().max() < 1.03 and u.mean(1).abs().max() < 0.15
    assert u.amin(1).max() < -0.9 and u.amax(1).min() > 0.9, "not all of the range"
    assert u.corrcoef().triu(1).abs().max() < 0.2, "two of them go together"

def test_shifted_images():
    """A bright pixel on gray says where it went, and whether the image was mirrored before."""
    images = torch.full((4, 200, 3, 32, 32), 100).byte()
    images[..., 15, 12] = 150
    out, again = [tasks.shift(images, random_generator(0, "train")) for _ in range(2)]
    assert out.dtype == torch.uint8 and out.shape == images.shape and torch.equal(out, again)
    out = out.flatten(0, 1)  # (800, 3, 32, 32)
    place = out.flatten(2).argmax(2)  # (800, 3)
    column = place[:, 0] % 32
    mirrored = column > 15
    moves = torch.stack([place[:, 0] // 32 - 15, column - torch.where(mirrored, 19, 12)], dim=1)
    ways, counts = torch.cat([moves, mirrored[:, None]], 1).unique(dim=0, return_counts=True)
    assert (place == place[:, :1]).all() and moves.abs().max() == 2
    assert len(ways) == 50 and counts.max() < 40, "not all equally often"
    inside = (32 - moves.abs()).prod(1)  # What comes in from outside is black.
    assert torch.equal((out[:, 0] > 0).sum((1, 2)), inside)

def test_encoded_images():
    """In CIFAR-FS, in the split that was encoded: the mean over both mirror images."""
    def encoder(images):  # -> the mean of each column
        return images.double().mean((-3, -2))
    for name, split in product(tasks.PACKS, ("val", "test")):
        task = FewShot(name, fake_packs(), 5, 2, 3)
        episodes = task.sample("test", 4, random_generator(0, "test"))
        task.encode_images(split, encoder, "cpu")
        encoded = task.sample("test", 4, random_generator(0, "test"))
        for part, found in zip(episodes, encoded):
            if (name, split) == ("cifarfs", "test") and part.ndim > 2:
                part = (encoder(part) + encoder(part.flip(-1))) / 2
            assert_close(found, part, f"{name} {split}")

def test_splits_of_images():
    """Every class is in one split. In training, each quarter-turn of a character is a class."""
    images, classes = load(fake_packs(), "cifar100.pt").values()
    task = FewShot("cifarfs", fake_packs())
    train, val, test = [[classes[i] for i in task.class_ids[split]] for split in SPLITS]
    assert torch.equal(task.images, images) and sorted(train + val + test) == classes
    assert val == tasks.CIFARFS_VAL and test == tasks.CIFARFS_TEST
    images, _ = load(fake_packs(), "omniglot.pt").values()
    task = FewShot("omniglot", fake_packs())
    ids = torch.arange(4 * 1623).view(4, 1623)
    assert all(torch.equal(task.images[ids[k]], images.rot90(k, (-2, -1))) for k in range(4))
    for split, part in zip(SPLITS, (ids[:, :813].flatten(), ids[0, 813:964], ids[0, 964:])):
        assert torch.equal(task.class_ids[split], part)

def test_few_shot_episodes():
    """The task's own, and those to pretrain on: 1000 * class + number in place of images."""
    sources = [*product(tasks.PACKS, SPLITS, [(5, 2, 3)])]
    sources += [(name, "train", sizes) for name, sizes in tasks.PRETRAINING.items()]
    for name, split, (ways, shots, queries) in sources:
        task = FewShot(name, fake_packs())
        ids = task.class_ids[split]
        numbers = 1000 * torch.arange(len(task.images))[:, None] + torch.arange(1, 21)
        task.images = numbers[..., None, None, None]
        change = {"cifarfs": "shift", "omniglot": "distort"}[name]
        with mock.patch.object(tasks, change, lambda images, generator: -images):
            episodes = task.sample(split, 40, random_generator(0, split), (ways, shots, queries))
        x, y, query_x, target = episodes
        for labels, n in ((y, shots), (target, queries)):
            expected = torch.arange(ways).repeat_interleave(n).expand(40, -1)
            assert torch.equal(labels.sort().values, expected), "not as many of each label"
            assert (labels.diff() >= 0).all(1).double().mean() < 0.2, "sorted"
        numbers = torch.cat([x, query_x], dim=1).flatten(1)  # (40, ways * (shots + queries))
        assert (numbers < 0).eq(split == "train").all(), "only training changes images"
        order = torch.cat([y, target], dim=1).argsort()
        numbers = numbers.abs().gather(1, order).view(40, ways, shots + queries)  # by label
        assert numbers.sort().values.diff().all(), "a support image is a query"
        classes = numbers // 1000
        assert (classes == classes[..., :1]).all(), "one label has two classes"
        classes = classes[..., 0]  # (40, ways)
        assert torch.isin(classes, ids).all()
        assert classes.sort().values.diff().all(), "one class has two labels"
        if ways == len(ids):
            assert torch.equal(classes, ids.expand(40, -1)), "a class does not keep its label"
        if name == "omniglot" and split == "train":
            assert (classes // 1623).unique().tolist() == [0, 1, 2, 3], "not all turns"

def test_packing_downloads():
    """CIFAR-100 by class, training images first. 25 characters in order, each by 20 drawers."""
    from PIL import Image
    def cifar(folder, train, download):  # Two pixels hold the class and the part.
        targets = torch.arange(50000 if train else 10000) % 100
        data = torch.zeros(len(targets), 32, 32, 3, dtype=torch.uint8)
        data[:, 1, 2, 0] = targets
        data[:, 3, 4, 2] = not train
        classes = ["a", "b"] * download
        return SimpleNamespace(data=data.numpy(), targets=targets.tolist(), classes=classes)
    def omniglot(folder, background, download):  # black ink on white paper
        target = Path(folder, str(background))
        for (i, name), j in product(enumerate(names), range(20 * download)):
            if background != name.startswith("Beta"):
                (target / name).mkdir(parents=True, exist_ok=True)
                scan = Image.new("1", (105, 105), 1)
                scan.paste(0, (98, 98, 105, 105))
                scan.paste(0, (15 * j // 4, 15 * i // 4, 15 * j // 4 + 4, 15 * i // 4 + 4))
                scan.save(target / name / f"0001_{j + 1:02}.png")
        return SimpleNamespace(target_folder=target)
    alphabets = ["Alpha"] * 21 + ["Zulu"] * 2 + ["Beta"] * 2  # Beta is in the evaluation set.
    names = [f"{alphabet}/character{i:02}" for i, alphabet in enumerate(alphabets)]
    folder = new_folder() / "new"
    shape = (25, 20, 1, 28, 28)
    with quiet(), mock.patch.multiple("torchvision.datasets", CIFAR100=cifar, Omniglot=omniglot), \
         mock.patch.object(tasks, "PACKS", {"omniglot": ("pack", shape)}):
        images, classes = tasks.pack_cifar100("").values()
        in_two_processes(lambda: tasks.load_pack(folder, "omniglot"))  # both at once
    assert images.shape == (100, 600, 3, 32, 32) and classes == ["a", "b"]
    assert (images[:, :, 0, 1, 2] == torch.arange(100)[:, None]).all(), "not in its class"
    assert (images[:, :, 2, 3, 4] == (torch.arange(600) >= 500)).all()
    images, classes = load(folder, "pack").values()
    assert classes == names and images.shape == shape and images.dtype == torch.uint8
    assert os.listdir(folder) == ["pack"]
    assert (images[..., 27, 27] == 255).all() and (images[..., 0, 27] == 0).all(), "ink is 255"
    place = images[:, :, 0, :25, :25].flatten(2).argmax(2)  # (25, 20)
    assert torch.equal(place, 25 * torch.arange(25)[:, None] + torch.arange(20))

def test_broken_downloads():
    """A download is cut, wrong, missing, of too few images, or nobody listens at the port."""
    def answer(connection, *_):  # A GET of /STATUS/LENGTH/... gets LENGTH of 100000 bytes.
        _, status, length, *_ = connection.recv(9999).split(b"/")
        connection.sendall(b"HTTP/1.0 %s\nContent-Length: 100000\n\n" % status)
        connection.sendall(bytes(int(length)))
    server = http.server.ThreadingHTTPServer(("localhost", 0), answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    paths = [f"{server.server_port}/{path}" for path in ("200/50000", "200/100000", "404/0")]
    pack = dict(images=torch.zeros(6, 20, 1, 28, 28, dtype=torch.uint8), classes=[*"abcdef"])
    packers = dict.fromkeys(("pack_cifar100", "pack_omniglot"), lambda folder: pack)
    folder = new_folder()
    cases = product((*paths, "1/nobody", "few"), tasks.PACKS.items())
    for path, (name, (file_name, shape)) in cases:
        url = f"http://localhost:{path}/"
        reason = re.escape(f"not {shape} images") if path == "few" else ""
        line = rf"^no {name} in {folder / file_name} \(.*{reason}.*\): check the network and "
        with quiet(), mock.patch.dict(vars(tasks), packers if path == "few" else {}), \
             mock.patch("torchvision.datasets.CIFAR100.url", url), \
             mock.patch("torchvision.datasets.Omniglot.download_url_prefix", url), \
             TestCase().assertRaisesRegex(ValueError, line + r"--data-dir.*\Z"):
            tasks.load_pack(folder, name)
        assert path == "few" or not os.listdir(folder), f"{path}: {name} left files"

def test_real_packs():
    folder = HERE.parent / "shared" / "data"
    if not folder.is_dir():
        raise SkipTest("no ../shared/data here")
    names = load(folder, "omniglot.pt")["classes"]
    alphabets = [name.split("/")[0] for name in names] * 4  # Quarter-turns are classes.
    omniglot, cifarfs = [FewShot(name, folder).class_ids for name in ("omniglot", "cifarfs")]
    train, val, test = [{alphabets[i] for i in omniglot[split]} for split in SPLITS]
    assert [len(train), len(val), len(test)] == [25, 5, 20] and len(omniglot["test"]) == 659
    assert max(train) < min(val) and not train & test
    assert [len(cifarfs[split]) for split in SPLITS] == [64, 16, 20]

# ------ 4. Training, resuming and measuring, as a user does it ------

TINY = "--device cpu --d-model 16 --d-ff 16 --n-head 2 --batch-size 8"
TINY_COPY = f"{TINY} --task copy --seq-len 2 --delay 3 --vocab-size 6"
TINY_IMAGES = f"{TINY} --task omniglot --filters 4 --batch-size 2 --pretrain-steps 2"
CPU = torch.device("cpu")
train.EVAL_EPISODES = 8

def call(script, argv, *statuses):
    """Run a script, to end with one of `statuses` (or 0) -> its output, or the error line of 2."""
    with quiet():
        try:
            status = script.main(shlex.split(argv)) or 0
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:
            raise AssertionError(argv) from error
        output = (sys.stderr if status == 2 else sys.stdout).getvalue()
    assert status in (statuses or (0,)), f"{argv}: exit status {status}, {output!r}"
    assert status != 2 or re.fullmatch("error: .*\n", output), f"{argv}: {output!r}"
    return output

def trained(argv):
    """Train in a new folder -> the folder."""
    run = new_folder()
    call(train, f"{argv} --out-dir {run}")
    return run

def measured(run, **options):
    """-> the row of a run, and some answers as lines."""
    with quiet():
        return evaluation.measure(run, evaluation.Options(**options), CPU)

@contextlib.contextmanager
def intercepted(owner, name, act=None, first=1):
    """From number `first` on, calls become act(function, *args). -> all calls: args, result."""
    function = getattr(owner, name)
    calls = []
    def wrapper(*args):
        call = SimpleNamespace(args=args)
        calls.append(call)
        changed = act is not None and len(calls) >= first
        call.result = act(function, *args) if changed else function(*args)
        return call.result
    with mock.patch.object(owner, name, wrapper):
        yield calls

def interrupted(argv, before_update, number=signal.SIGTERM):
    """Train until a signal comes, right before an update -> the output."""
    def interrupt(update, *args):
        signal.raise_signal(number)
        return update(*args)
    # SIGTERM must not end the tests where train.py fails. A background job ignores SIGINT.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with intercepted(train, "update", interrupt, before_update) as updates:
        output = call(train, argv, 130)
    assert len(updates) == before_update, f"it went on until update {len(updates)}"
    return output

def log_of(run):
    """The lines of metrics.jsonl, without the times, which differ."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": 0} for line in lines]

def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def assert_same_run(one, other):
    """Checkpoint, best model and log agree bit for bit, but for the times."""
    states = []
    for run in (one, other):
        last, best = [load(run, name) for name in ("ckpt.pt", "best.pt")]
        progress = [last["run"][key] for key in ("step", "best", "losses")]
        states.append([last["generator"], last["optimizer"], last["model"], progress,
                       best["step"], best["model"]])
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert log_of(one) == log_of(other) != []

def test_fast_weights_learn_and_are_used():
    """Without attention only fast weights can answer a cue, and a lesion takes them away."""
    argv = (f"{TINY} --task cue --pairs 2 --cues 3 --window 1 --steps 120 --lr 1e-2 "
            "--batch-size 16 --d-model 32 --d-ff 32 --n-layer 1 --rule")
    for rule in RULES:
        run = new_folder()
        output = call(train, f"{argv} {rule} --out-dir {run}")
        row, answers = measured(run, episodes=200)
        answers = "\n".join(answers)
        names = ["shown", "right", "answered", "lesioned"]
        for text in (output, answers):
            assert re.findall(r"^  ([a-z]+) ", text, re.M) == names[:3 + (rule in PLASTIC)] * 3
        n_fast = 2112 if rule in PLASTIC else 0  # 2 layers of 32 * 32 and 32
        n_slow = sum(p.numel() for p in train.load_run(run / "best.pt")[2].parameters())
        assert f"\n{n_slow:,} slow parameters, and {n_fast:,} fast weights per episode\n" in output
        assert "mse 0.0833 is guessing, 0 perfect" in output
        assert "within 5% of perfect by update" in output
        if rule == "none":
            assert row["score"] > 0.06, "neither attention nor fast weights, and it answers"
        else:
            assert row["score"] < 0.02, f"{rule} has not learned"
            assert row["lesion"] > 0.06, f"{rule} answers without its writes"
            assert not re.search(r"answered +(.*)\n +lesioned +\1", answers)

def test_show():
    """The answers are the model's, and lesioned those of one that writes nothing. It stays."""
    for task in (Copy(3, 2, 9), FewShot("omniglot", fake_packs(), 3, 1, 2)):
        model = small_model(task, "hebbian", eta0=1.0, alpha_init=9.0).float().train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        lines = [line.split() for line in train.show(model, task, "test", CPU, 2)]
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
        episodes = task.sample("test", 2, random_generator(0, "test"))
        rows = dict(shown=episodes.support_x if task.kind == "token" else episodes.support_y,
                    right=episodes.target)
        for name, rule in dict(answered="hebbian", lesioned="none").items():
            model.config.rule = rule
            rows[name] = model.eval()(episodes)[0][:, -episodes.target.size(1):].argmax(-1)
        expected = [[name, *map(str, rows[name][b].tolist())] for b in range(2) for name in rows]
        assert lines == expected
        assert not torch.equal(rows["answered"], rows["lesioned"]), "a lesion does nothing"

def test_updates_and_evaluations():
    """Ten evaluations on the validation episodes of the run's seed."""
    argv = f"{TINY} --task regression --rule none --batch-size 16 --seed 1"
    with intercepted(train, "update") as updates:
        run = trained(f"{argv} --steps 32 --lr 1e-12")
    lines = log_of(run)
    steps = [line["step"] for line in lines]
    assert steps == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 32]
    for line, start in zip(lines, [0, *steps]):
        losses = [update.result for update in updates[start:line["step"]]]
        assert math.isclose(line["train_loss"], sum(losses) / len(losses)), "not the mean"
    assert len({update.result for update in updates}) == 32, "training was not redrawn"
    losses = [line["val_loss"] for line in lines]
    assert max(losses) - min(losses) < 1e-6, "validation was redrawn"
    _, task, model = train.load_run(run / "ckpt.pt")
    episodes = task.sample("val", 8, random_generator(1, "val"))
    out, _ = model.eval()(episodes)
    assert abs(losses[-1] - task.loss(out, episodes.target)) < 1e-5, "not of its seed"
    run = trained(f"{TINY_COPY} --rule none --steps 19")
    assert [line["step"] for line in log_of(run)] == [*range(1, 20)], "not a tenth, rounded down"

def test_best_model():
    """best.pt has the best model, of equal ones the last. A run has learned at 5% from perfect."""
    images = f"{TINY_IMAGES} --data-dir {fake_packs()}"  # Its first score is the encoder's alone.
    cases = [dict(argv=f"{TINY} --task cue", best=2, learned="-", scores=[3.0, 1.0, 2.0, 4.0]),
             dict(argv=TINY_COPY, best=3, learned="2", scores=[0.962, 0.963, 0.963, 0.5]),
             dict(argv=images, best=3, learned="2", scores=[1.0, 0.959, 0.96, 0.97, 0.25])]
    for case in cases:
        scores = torch.tensor(case["scores"], dtype=torch.double)
        results = [dict(losses=score, scores=score) for score in scores]
        with mock.patch.object(train, "evaluate", side_effect=results):
            run = trained(f"{case['argv']} --rule none --steps {case['best']}")
            model = load(run)["model"]
            output = call(train, f"--resume --steps 4 --out-dir {run}")
        best = load(run, "best.pt")
        assert best["step"] == case["best"]
        assert load(run)["run"]["best"] == scores[case["best"] - 5 + len(scores)]
        assert f"within 5% of perfect by update {case['learned']}\n" in output
        torch.testing.assert_close(best["model"], model, rtol=0, atol=0)

def test_encoder_learns_then_encodes():
    """It learns by prototypes and by a layer; then the model and eval.py read its features."""
    def encode(_, task, split, encoder, device):
        assert not encoder.training, "each batch would have a norm of its own"
        task.features[split] = torch.rand(len(task.class_ids[split]), 600, encoder.d_out)
        return split, sum(value.sum().item() for value in encoder.state_dict().values())
    argv = f"{TINY_IMAGES} --task cifarfs --shots 2 --steps 2 --data-dir {fake_packs()}"
    with intercepted(FewShot, "encode_images", encode) as encoded:
        with intercepted(FewShot, "loss") as losses, intercepted(train, "update") as updates:
            run = trained(argv)
        _, outs, targets = zip(*(loss.args for loss in losses))
        assert [out.size(2) for out in outs[:5]] == [64, 64, 64, 64, 5], "the model comes last"
        assert torch.equal(targets[1][0].sort().values[::2], torch.arange(64)), "--shots 2 counts"
        assert torch.equal(targets[1][:, 64:], targets[0]), "the shots, then the queries"
        first = log_of(run)[0]
        assert first["step"] == 0 and updates[0].result != updates[1].result
        assert math.isclose(first["train_loss"], (updates[0].result + updates[1].result) / 2)
        learned = load(run)["model"]["embed.classes.weight"]
        call(train, f"--resume --out-dir {run}")
        measured(run, episodes=2, data_dir=fake_packs())
        splits, encoders = zip(*(call.result for call in encoded))
        assert splits == ("train", "val", "train", "val", "test")
        assert len(set(encoders)) == 1, "an update changes what was pretrained"
        run = trained(f"{argv} --pretrain-steps 0")
        assert not torch.equal(load(run)["model"]["embed.classes.weight"], learned)
        measured(run, episodes=2, data_dir=fake_packs())
        assert len(encoded) == 5, "the features of an encoder that learns do not stay"

def test_pretrained_encoder_stays():
    """It is the same for every rule, and no update changes it; else the encoder learns, too."""
    def encoder(flags):
        with intercepted(FewShot, "loss") as losses:
            run = trained(f"{TINY_IMAGES} --data-dir {fake_packs()} --filters 16 {flags}")
        shapes = [tuple(loss.args[1].shape) for loss in losses]
        assert shapes.count((1, 120, 60)) == 2 * ("--pretrain-steps" not in flags)
        state = load(run)
        updates = {moment["step"].item() for moment in state["optimizer"]["state"].values()}
        assert updates == {state["run"]["step"]}, "AdamW goes on with moments of pretraining"
        return {name: value for name, value in state["model"].items() if "embed.encoder" in name}
    for pretraining, stays in {"": True, "--pretrain-steps 0": False}.items():
        static = encoder(f"--rule none --steps 1 --shots 2 {pretraining}")
        plastic = encoder(f"--rule hebbian --steps 3 {pretraining}")
        assert {torch.equal(static[name], plastic[name]) for name in static} == {stays}

def test_nearest_prototype():
    """A query answers by its cosine with the mean of each class's shots; eval.py scores that."""
    flags = f"--filters 16 --shots 2 --rule none --steps 1 --data-dir {fake_packs()}"
    run = trained(f"{TINY_IMAGES} {flags}")
    row, _ = measured(run, episodes=5, batch_size=2, data_dir=fake_packs())
    _, task, model = train.load_run(run / "best.pt", dict(queries=15))
    embed = model.eval().embed
    generator = random_generator(0, "test")
    right = []
    for n in (2, 2, 1):
        episodes = task.sample("test", n, generator)
        answers, _ = embed.answer(episodes)  # (n, 75, 5)
        right.append((answers.argmax(2) == episodes.target).flatten())
        for x, y, query_x, answer in zip(*episodes[:3], answers):
            shots, queries = [embed.norm(embed.encoder(images)) for images in (x, query_x)]
            means = torch.stack([shots[y == c].mean(0) for c in range(5)])  # (5, F)
            cosines = torch.cosine_similarity(queries[:, None], means, dim=2)  # (75, 5)
            assert_close(answer / 10, cosines, "cosines", 1e-5)
    right = torch.cat(right).double()
    assert len(right) == 375 and 0.25 < right.mean() < 1
    assert abs(row["prototype"] - right.mean()) < 1e-9
    assert f"  nearest prototype  {row['prototype']:.5f}" in "\n".join(evaluation.report(row))

@mock.patch.object(train, "PRETRAIN_INTERVAL", 1)
def test_resumed_run_is_the_same():
    """A command gives the same numbers, however often it stops; another seed gives others."""
    copy = f"{TINY_COPY} --rule gradient --eval-interval 1 --steps 7"
    images = f"{TINY_IMAGES} --rule none --n-layer 1 --data-dir {fake_packs()} --steps 7"
    cases = [dict(argv=copy, before_update=2, saved=1),
             dict(argv=copy, before_update=4, saved=3, number=signal.SIGINT),
             dict(argv=f"{images} --eval-interval 3", before_update=2, saved=-1),  # in pretraining
             dict(argv=f"{images} --eval-interval 3", before_update=6, saved=3),
             dict(argv=f"{images} --eval-interval 4", before_update=3, saved=0)]  # right after it
    whole = {}
    for case in cases:
        saved = case.pop("saved")
        argv = case.pop("argv")
        if argv not in whole:
            whole[argv] = trained(argv)
            assert log_of(whole[argv]) != log_of(trained(f"{argv} --seed 1"))
        part = new_folder()
        output = interrupted(f"{argv} --out-dir {part}", **case)
        assert f"stopped; to go on: python train.py --resume --out-dir {part}\n" in output
        assert load(part)["run"]["step"] == saved
        with (part / "metrics.jsonl").open("a") as log:  # It will be written anew.
            log.write('{"step": 6, "val_metric": 0.5}\n{"step": 7')
        for done in (max(0, saved), 7):  # At the second time nothing is left to do.
            torch.randn(3)
            output = call(train, f"--resume --out-dir {part}")
            assert f", {done}/7 done; " in output and "finished: 7 updates" in output
            assert_same_run(whole[argv], part)
    call(train, f"--resume --steps 9 --eval-interval 3 --lr 0.5 --out-dir {part}")
    assert [line["step"] for line in log_of(part)] == [-1, 0, 4, 7, 9]
    assert {"train_loss", "val_loss", "val_metric", "metric"} < log_of(part)[0].keys()
    last = load(part)
    rate = last["optimizer"]["param_groups"][0]["lr"]
    assert math.isclose(rate, 0.5 * 9 / 25 * 0.05) and last["args"]["lr"] == 0.5

def test_killed_at_any_moment():
    """Kill -9 at random, again and again: what is left loads, and the end is the same. KILLS=30"""
    rng = random.Random(0)
    start = time.time()
    argv = f"{TINY_COPY} --rule hebbian --steps 24 --eval-interval 1"
    whole = trained(argv)
    duration = time.time() - start
    fork = torch.multiprocessing.get_context("fork")
    for _ in range(int(os.environ.get("KILLS", 1))):
        part = new_folder()
        codes = []
        while not codes or codes[-1] != 0:
            command = f"--resume --out-dir {part}" if codes else f"{argv} --out-dir {part}"
            process = fork.Process(target=call, args=(train, command))
            process.start()
            while process.is_alive() and not (part / "metrics.jsonl").exists():
                time.sleep(1e-3)
            process.join(rng.uniform(0, duration) if codes else 0)
            process.kill()
            process.join()
            codes.append(process.exitcode)
            assert codes[-1] in (0, -signal.SIGKILL), f"it failed, {codes[-1]}"
            for path in part.glob("*.pt"):
                train.load_run(path)
        assert_same_run(whole, part)
        assert len(codes) > 1 and not list(part.glob("*.tmp"))

def test_processes_share_a_batch():
    """Two processes have the loss and the gradients that one has, clipped to CLIP if larger."""
    folder = new_folder()
    cases = [*product((Copy(2, 3, 6), Regression(30, 4, 2)), RULES)]
    def learn():
        args = SimpleNamespace(device="cpu", threads=1, batch_size=4)
        device, rank, world = train.prepare(args)
        for i, (task, rule) in enumerate(cases):
            model = small_model(task, rule).train()
            optimizer = mock.Mock(param_groups=[dict(params=[*model.parameters()])])
            episodes = draw(task, 4).to(device, rank, world)
            loss = task.loss(model(episodes)[0], episodes.target)
            value = train.update(loss, optimizer, 0.5, world)
            gradients = [parameter.grad for parameter in model.parameters()]
            torch.save([value, gradients], folder / f"{i}-{rank}-of-{world}")
    in_two_processes(learn)
    learn()
    for i, (task, _) in enumerate(cases):
        one, *two = [load(folder, f"{i}-{name}") for name in ("0-of-1", "0-of-2", "1-of-2")]
        torch.testing.assert_close(two, [one, one], rtol=0, atol=1e-9)
        norm = torch.cat([gradient.flatten() for gradient in one[1]]).norm() / train.CLIP
        assert 0.99 < norm < 1.01 or isinstance(task, Copy), norm

def test_training_in_two_processes():
    """They write what one process does, and each can go on with the other's run."""
    argv = f"{TINY_COPY} --steps 4 --eval-interval 2 --lr 1e-3"
    one = trained(argv)
    two, mixed, new = [new_folder() / "run" for _ in range(3)]
    shutil.copytree(one, mixed)
    in_two_processes(lambda: interrupted(f"{argv} --out-dir {two}", 3))
    assert load(two)["run"]["step"] == 2
    for flags in (f"--out-dir {two}", f"--steps 6 --out-dir {mixed}"):
        in_two_processes(lambda: call(train, f"--resume {flags}"))
    for run in (one, two):
        call(train, f"--resume --steps 6 --out-dir {run}")
    assert [line["step"] for line in log_of(one)] == [2, 4, 6]
    for run, key in product((two, mixed), ("step", "train_loss", "val_loss")):
        for line, expected in zip(log_of(run), log_of(one), strict=True):
            assert abs(line[key] - expected[key]) < 1e-4
    in_two_processes(lambda: call(train, f"{argv} --out-dir {new} --batch-size 3", 2))
    assert not new.exists()

def test_cuda():
    """A GPU gives the losses that the CPU gives, in a process that sees it."""
    program = ("import sys, torch, train\ntorch.cuda.is_available() or sys.exit(77)\n"
               "for argv in sys.argv[1:]: train.main(argv.split())")
    folder = new_folder()
    commands = [f"{TINY_COPY} --rule {rule} --steps 2 --device {device} --out-dir "
                f"{folder}/{rule}-{device}" for rule, device in product(RULES, ("cpu", "cuda"))]
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    process = subprocess.run([sys.executable, "-c", program, *commands], cwd=HERE,
                             env=environment, capture_output=True, text=True)
    if process.returncode == 77:
        raise SkipTest("no CUDA here")
    assert process.returncode == 0, process.stderr
    for rule, key in product(RULES, ("train_loss", "val_loss")):
        assert f"rule {rule}, on cuda" in process.stdout
        cpu, cuda = [[line[key] for line in log_of(folder / f"{rule}-{device}")]
                     for device in ("cpu", "cuda")]
        assert_close(torch.tensor(cuda), torch.tensor(cpu), f"{rule}: {key}", 1e-3)

def test_measured_figures():
    """Scores are of the best model, gates of the last, on test episodes, here one at a time."""
    run = trained(f"{TINY_COPY} --steps 4 --eval-interval 1 --seed 1")
    state = load(run, "best.pt")
    state["model"]["head.bias"][[1, -1]] += 1.0  # the answer 1, and m_t
    torch.save({**state, "step": 2}, run / "best.pt")
    row, _ = measured(run / ".." / run.name, episodes=30, batch_size=1)
    _, task, model = train.load_run(run / "best.pt")
    _, _, last = train.load_run(run / "ckpt.pt")
    generator = random_generator(0, "test")
    parts = zip(*[task.sample("test", 1, generator) for _ in range(30)])
    episodes = tasks.Episodes(*[None if part[0] is None else torch.cat(part) for part in parts])
    with torch.no_grad():
        out, _ = model.eval()(episodes)
        lesioned, _ = model(episodes, write=False)
        _, fast = last.eval()(episodes)
    right, without = [(answer[:, -2:].argmax(-1) == episodes.target).double()  # (30, 2)
                      for answer in (out, lesioned)]
    eta, norm, change = (torch.cat(gate, 1) for gate in (fast.eta, fast.norm, fast.change))
    slow = torch.cat([layer.weight.flatten() for layer in last.plastic_layers()]).norm()
    write = eta * norm  # (30, 7): the last step writes nothing
    assert 0 < right.mean() < 1
    figures = dict(score=right.mean(), interval=1.96 * right.mean(1).std() / 30**0.5,
                   lesion=without.mean(), lesion_interval=1.96 * without.mean(1).std() / 30**0.5,
                   loss=task.loss(out, episodes.target), persistence=eta.mean() / 0.02,
                   cap_share=write.mean() / 0.02, change=change.mean() / slow)
    for key, figure in figures.items():
        assert abs(row[key] - figure) < 1e-5, key
    for key, gate in dict(eta=eta, norm=norm, write=write, change=change).items():
        assert_close(torch.tensor(row["gates"][key]), gate.mean(0), key, 1e-5)
    assert_close(torch.tensor(row["writes"]["all"]), write.mean(0) / 0.02, "writes", 1e-3)
    facts = dict(name=run.name, rule="hebbian", seed=1, chance=0.25, episodes=30, best_step=2,
                 flags="--task copy --rule hebbian --seq-len 2 --delay 3 --vocab-size 6 "
                       "--n-head 2 --d-model 16 --d-ff 16 --steps 4 --batch-size 8 "
                       "--eval-interval 1 --seed 1")
    assert facts.items() <= row.items()
    assert row["steps"] == "item item blank blank blank delimiter recall recall".split()
    for fact in ("cpu", torch.__version__, sys.version.split()[0]):
        assert fact in row["machine"].lower(), f"the machine and the versions: {fact}"

def test_salience():
    """Writes at steps that count are compared with others at the same step, and only there."""
    model = Transformer(Cue(2, 4, 3), Config(rule="hebbian", max_norm=0.5))
    # Step 0 always counts, step 4 never. At step 1, the writes 6 and 2 are compared with 1, 2
    # and 3; at step 2, 9 and 9 with 3, 3 and 3; at step 3, 1 with 4, 4, 4 and 4.
    asked_steps = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2], [0, 3]])
    write = torch.tensor([[7, 6, 3, 4, 7], [7, 2, 3, 4, 7], [7, 1, 9, 4, 7], [7, 2, 9, 4, 7],
                          [7, 3, 3, 1, 7]]).double()
    gates = torch.stack([write.square(), 1 / write, write])  # eta, norm, change
    row = evaluation.gate_figures(model, gates, asked_steps)
    assert math.isclose(row["selectivity"], (4 / 2 + 9 / 3 + 1 / 4) / 3)
    assert math.isclose(row["eta_selectivity"], (20 / (14 / 3) + 81 / 9 + 1 / 16) / 3)
    for kind, first, means in ("counts", 0, [7.0, 4, 9, 1]), ("noise", 1, [2.0, 3, 4, 7]):
        shares = torch.tensor(row["writes"][kind][first:first + 4])  # of eta_0 * max_norm
        assert_close(shares * 0.02 * 0.5, torch.tensor(means), kind, 1e-5)
    row = evaluation.gate_figures(model, gates, torch.tensor([[0, 1]] * 5))
    assert "selectivity" not in row, "nothing can be compared"

def test_intervals():
    """Wilson's where all is right, none of one episode; printed within what a score can be."""
    assert math.isclose(evaluation.interval(torch.ones(600, 5)), 1 - 600 / (600 + 1.96**2))
    assert evaluation.interval(torch.ones(1, 5)) == math.inf
    cases = [("accuracy", 0.99, "0.97000 to 1.00000"), ("accuracy", 0.01, "0.00000 to 0.03000"),
             ("mse", 1.5, "1.48000 to 1.52000")]
    for metric, score, printed in cases:
        row = dict(name="", flags="", best_step=1, metric=metric, score=score, interval=0.02)
        _, line = evaluation.report(dict(row, chance=0.125, episodes=9))
        assert f"{score:.5f}   95% interval {printed}, 9 episodes" in line

def test_kept_rows():
    """A line of --append gives the report of its run: scores in full, the rest in 4 digits."""
    runs = [trained(f"{TINY_COPY} --steps 4 --seed {seed}") for seed in (0, 1)]
    file = new_folder() / "runs.jsonl"
    row, answers = measured(runs[0], episodes=31)
    picture = f"--plot {file}.png" if importlib.util.find_spec("matplotlib") else ""
    output = call(evaluation, f"{runs[0]} --episodes 31 --append {file} {picture}")
    assert not picture or Path(f"{file}.png").read_bytes().startswith(b"\x89PNG")
    assert output.split("\n", 1)[1] == "\n".join(evaluation.report(row, answers)) + "\n"
    assert output.count("31 episodes; guessing 0.25\n") == 2  # the score, the lesion
    words = re.findall(r"[\w.]+", call(evaluation, f"{file}"))
    in_full = re.findall(r"[\w.]+", "\n".join(evaluation.report(row)))
    for word, full in zip(words, in_full, strict=True):
        assert word == full or math.isclose(float(word), float(full), rel_tol=1e-3, abs_tol=2e-5)
    rounded, = evaluation.read_rows(file)
    for key, value in dict(score=row["score"], loss=float(f"{row['loss']:.4g}")).items():
        assert rounded[key] == value, key
    # The same run, measured again, replaces its line; another one joins it.
    call(evaluation, f"{runs[0]} {runs[1]} --episodes 20 --append {file}")
    rows = evaluation.read_rows(file)
    assert [(row["name"], row["episodes"]) for row in rows] == [(run.name, 20) for run in runs]
    for line, row in zip(call(evaluation, f"{file}").splitlines()[1:], rows, strict=True):
        assert line.startswith(row["name"])
        assert f" {row['score']:11.5f} {row['interval']:11.5f} {row['lesion']:11.5f} " in line
    assert call(evaluation, f"{file} --only {runs[1].name[:-1]}?").startswith(f"{runs[1].name}: ")

# ------ 5. Bad input ------

def test_bad_arguments():
    """One line names what is wrong, and nothing is written. The top of a range is allowed."""
    highest = dict(eta0=1, lr=1, alpha_init=1000, max_norm=1e18, seed=2**60, window=10**18)
    argv = " ".join(f"--{name} {value}".replace("_", "-") for name, value in highest.items())
    assert highest.items() <= vars(train.parse_args(argv.split())).items()
    out = new_folder() / "out"
    wrong = """--n-head 3 --d-model 64; --pairs 9 --cues 8 --task cue; --ways 17 --task cifarfs;
        --shots 6 --queries 15 --task omniglot; --steps ten; --lr nan; --alpha-init inf;
        --rule magic; --ablate all; --plastic none; --delay 3 --task cue; --nonsense;
        --alpha 2; --device tpu; --seed 99999999999999999999; --window -1;
        --steps 0; --lr -1; --eta0 2; --alpha-init -1; --max-norm 0; --vocab-size 3; --dim 0"""
    wrong += "; --device cuda" * (not torch.cuda.is_available())
    reasons = {flags: flags.split()[:2] for flags in wrong.split(";")}
    reasons |= {"--resume": ["ckpt.pt"], "--d-ff 4000000000": ["memory", "--batch-size"],
                "--pretrain-steps 5": ["--pretrain-steps", "copy has no encoder"]}
    for flags, words in reasons.items():
        line = call(train, f"{flags} --out-dir {out} --data-dir {fake_packs()}", 2)
        assert all(word in line for word in words) and not out.exists(), f"{flags}: {line}"
    out.write_text("a file")
    assert str(out) in call(train, f"--steps 1 --out-dir {out}", 2)
    assert str(out) in call(evaluation, str(out), 2) and out.read_text() == "a file"
    assert "best.pt" in call(evaluation, str(out.parent), 2)

def test_a_run_is_not_lost():
    """It is not replaced unasked, nor does it go on with flags that do not fit it."""
    run = trained(f"{TINY_COPY} --rule none --steps 1")
    before = files_of(run)
    line = call(train, f"{TINY_COPY} --out-dir {run}", 2)
    assert f"{run} has files: --resume goes on with a run, or remove the folder" in line
    for flags in ("--seed 1", "--pretrain-steps 3", "--delay 4", "--task cue", "--pairs 3",
                  "--n-layer 1", "--rule hebbian"):
        line = call(train, f"--resume --out-dir {run} {flags}", 2)
        assert line == f"error: {flags}: --resume cannot change it\n"
    assert files_of(run) == before
    call(train, f"--resume --out-dir {run} --steps 2 --batch-size 4 --n-layer 2")  # as it was
    (run / "ckpt.pt").unlink()  # What is left is not replaced either.
    before = files_of(run)
    assert f"{run} has files" in call(train, f"{TINY_COPY} --out-dir {run}", 2)
    assert files_of(run) == before

def damages(path, trap):
    """What no command can read in place of a checkpoint or a pack."""
    def saved(state):
        torch.save(state, buffer := io.BytesIO())
        return buffer.getvalue()
    content = path.read_bytes()
    state = load(path.parent, path.name)
    yield from (b"", b"x" * 1000, content[:len(content) // 2], content[:-100], saved([1, 2]),
                saved(dict(args=trap, images=trap, model=trap)))
    if "images" in state:
        few = torch.zeros(3, *state["images"].shape[1:], dtype=torch.uint8)
        floats = torch.zeros(1).expand(state["images"].shape)
        changes = [dict(images=trap), dict(images=few, classes=[*"abc"]), dict(images=floats)]
    else:
        misfits = [dict(d_ff=17), dict(d_ff="wide"), dict(rule="magic")]
        wrong = [trap, None, {"task": "copy"}, *({**state["args"], **misfit} for misfit in misfits)]
        changes = [dict(model={}), dict(model=None), *(dict(args=args) for args in wrong)]
    yield from (saved({**state, **change}) for change in changes)

def test_damaged_files():
    """What is damaged or does not fit: one line, status 2, nothing lost. DAMAGED=200 tries more."""
    folder = new_folder()
    run, pack, rows, new = [folder / name for name in ("run", "cifar100.pt", "rows.jsonl", "new")]
    trap = type("Trap", (), dict(__reduce__=lambda _: (os.mkdir, (str(new),))))()  # runs code
    shutil.copy(fake_packs() / pack.name, pack)
    call(train, f"{TINY_COPY} --rule gradient --steps 4 --eval-interval 1 --out-dir {run}")
    call(evaluation, f"{run} --episodes 4 --append {rows}")
    resume = (train, f"--resume --steps 5 --out-dir {run}")
    images = f"{TINY_IMAGES} --task cifarfs --steps 1 --batch-size 1 --pretrain-steps 0"
    commands = {run / "ckpt.pt": resume, run / "best.pt": (evaluation, f"{run} --episodes 4"),
                pack: (train, f"{images} --data-dir {folder} --out-dir {folder}/images"),
                rows: (evaluation, f"{rows}"), run / "metrics.jsonl": resume}
    binaries = [*commands][:3]
    cases = [(path, content, {2}) for path in binaries for content in damages(path, trap)]
    cases += [(rows, content, {2}) for content in (b"x", b"5", b"[1]", b"{}", b"\xff")]
    torch.save(dict(args=trap, images=trap, model=trap), buffer := io.BytesIO())
    cases += [(rows, buffer.getvalue(), {2}),  # A resume writes the log anew.
              (run / "metrics.jsonl", buffer.getvalue(), {0})]
    rng = random.Random(0)
    for _ in range(int(os.environ.get("DAMAGED", 15))):
        path = rng.choice(binaries)
        content = bytearray(path.read_bytes())
        flips = rng.choice((0, 1, 10, 1000))
        for _ in range(flips):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        cut = len(content) if flips else rng.randrange(len(content))
        cases.append((path, content[:cut], {0, 2}))
    before = files_of(folder)
    for path, content, statuses in cases:
        path.write_bytes(content)
        output = call(*commands[path], *statuses)
        assert not new.exists(), "a file that was loaded ran code"
        if output.startswith("error: "):
            assert path.name in output and files_of(folder) == {**before, path: content}
        shutil.rmtree(folder / "images", ignore_errors=True)
        for file, content in before.items():
            file.write_bytes(content)

def test_faults_lose_nothing():
    """A disk is full where best.pt is renamed or ckpt.pt written, or a loss is nan."""
    def full(function, path, *args):
        if function is not os.replace:
            path.open("wb").write(b"half")
        elif args[0].name != "best.pt":
            return function(path, *args)
        raise OSError(28, "No space left on device")
    argv = f"{TINY_COPY} --steps 6 --eval-interval 1 --lr 1e-12"  # Each step is the best so far.
    whole = trained(argv)
    # Call 1 writes ckpt.pt; then each step writes metrics.jsonl, best.pt and ckpt.pt.
    faults = [dict(owner=os, name="replace", first=8, saved=[2, 2]),
              dict(owner=Path, name="write_bytes", first=7, saved=[1, 2])]
    for fault in faults:
        run = new_folder()
        with intercepted(fault["owner"], fault["name"], full, fault["first"]):
            line = call(train, f"{argv} --out-dir {run}", 2)
        assert "No space left" in line and str(run) in line and not list(run.glob("*.tmp"))
        assert [load(run)["run"]["step"], load(run, "best.pt")["step"]] == fault["saved"]
        call(train, f"--resume --out-dir {run}")
        assert_same_run(run, whole)
    assert "No space left" in call(evaluation, f"{run} --episodes 2 --append /dev/full", 2)
    # A step has an update and a validation batch: call 7 is the loss of update 4.
    run = new_folder()
    with intercepted(Copy, "loss", lambda loss, *args: loss(*args) * math.nan, 7):
        line = call(train, f"{argv} --out-dir {run}", 2)
    assert "loss nan" in line and "--lr" in line and load(run)["run"]["step"] == 3, line
    assert all(value.isfinite().all() for value in load(run)["model"].values())

def known_flags(script):
    """{flag: what argparse knows about it} of train or evaluation."""
    with intercepted(argparse.ArgumentParser, "parse_args", lambda *_: sys.exit(0)) as calls:
        call(script, "")
    actions = calls[0].args[0]._actions
    return {flag.option_strings[-1]: flag for flag in actions if flag.option_strings}

def test_random_arguments():
    """Any arguments: a run, or one line and exit status 2. ARGUMENTS=500 tries so many."""
    rng = random.Random(1)
    outputs = []
    flags = {flag: known.choices or "-1 0 1 1 2 2 3 4 8 30 0.5 nan 1e20 inf x".split()
             for flag, known in known_flags(train).items() if known.nargs != 0}
    del flags["--device"]
    for _ in range(int(os.environ.get("ARGUMENTS", 30))):
        run = new_folder()
        chosen = rng.sample([*flags], rng.choice((1, 2, 4, 8)))
        chosen = [f"{flag} {rng.choice(flags[flag])}" for flag in chosen]
        argv = (f"--task {rng.choice([*tasks.TASKS])} --steps 1 --batch-size 2 --d-model 8 "
                f"--d-ff 8 --filters 2 --device cpu {' '.join(chosen)} --pretrain-steps=0 "
                f"--data-dir {fake_packs()} --out-dir {run}")
        if not call(train, argv, 0, 2).startswith("error: "):
            flag = rng.choice("--seed --batch-size --threads --episodes --delay".split())
            argv = f"{run} --batch-size 2 --episodes 2 {flag} {rng.choice((0, 1, 2, 30))}"
            outputs.append(call(evaluation, f"{argv} --data-dir {fake_packs()}", 0, 2))
    assert not all(output.startswith("error: ") for output in outputs)

def test_flags_are_explained():
    """Help says what each is and its default; the README names none that does not exist."""
    flags = {flag: known.help for flag, known in known_flags(train).items()}
    listed = re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", call(train, "--help"), re.MULTILINE)
    assert sorted(listed) == sorted(flags) and all(flags.values())
    for name, value in train.defaults("copy", "hebbian").items():
        help_text = flags["--" + name.replace("_", "-")]
        assert value in (None, False) or str(value) in help_text, name
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (HERE / "README.md").read_text()))
    unknown = named - {*flags, *known_flags(evaluation), "--standalone", "--nproc_per_node"}
    assert not unknown, f"the README knows flags that nobody has: {sorted(unknown)}"

def test_commands_from_outside():
    """The scripts as processes: exit status, streams, and a folder that is not the project's."""
    folder = new_folder()
    shell = subprocess.getstatusoutput
    python = f"cd {folder} && PYTHONUNBUFFERED= {sys.executable} {HERE}"
    status, output = shell(f"{python}/train.py {TINY_COPY} --rule none --steps 2 2> /dev/null")
    assert status == 0 and "on cpu" in output, output
    run = "out/copy-none-s0"
    assert {*os.listdir(folder / run)} == {"best.pt", "ckpt.pt", "metrics.jsonl"}
    assert shell(f"{python}/eval.py {run} | true") == (0, ""), "an error, as the reader has left"
    status, output = shell(f"{python}/eval.py out/nowhere > /dev/null")
    assert status == 2 and re.fullmatch("error: out/nowhere/best.pt does not load.*", output)
    output = call(train, f"{TINY_COPY} --rule none --steps 1 --out-dir '{folder}/a b'")
    assert output.endswith(f"python eval.py '{folder}/a b'\n")

# ------ 6. The pages of results ------

def test_make_it_your_own():
    """The README's blocks run as they stand there, in a copy of the project."""
    copy = new_folder()
    (copy / "results").mkdir()
    for path in [*HERE.glob("*.py"), *HERE.glob("results/*.py")]:
        shutil.copy(path, copy / path.relative_to(HERE))
    section = (HERE / "README.md").read_text().split("## Make it your own")[1]
    rule, task, *programs = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    branch = '        if self.rule == "gradient":\n'
    for file, old, new in (("plasticity.py", branch, rule + branch),
                           ("model.py", '"gradient")\n', '"gradient", "delta")\n')):
        source = (copy / file).read_text()
        assert source.count(old) == 1, file
        (copy / file).write_text(source.replace(old, new))
    (copy / "tasks.py").write_text((copy / "tasks.py").read_text() + task)
    checks = f"""import train
from {Path(__file__).stem} import *
for task in (Copy(2, 2, 5), Cue(4, 6)):
    check_against_oracle(task, "delta", fold=2)
for argv in ("--task sine --rule delta", "--window 8 --out-dir out/short"):
    train.main(f"{{argv}} --steps 2 --batch-size 2".split())
"""
    (copy / "all.py").write_text("\n".join([checks, *programs]))
    status, output = subprocess.getstatusoutput(f"cd {copy} && {sys.executable} all.py")
    assert status == 0 and "sine, rule delta" in output, output

def seeds(values, key="score", first=0, **figures):
    """The rows of a cell (see results/tables.py): a seed per value, from `first` on."""
    row = {"metric": "accuracy", "episodes": 600, "updates": 500, "score": 0.5, "learned": 9, **figures}
    return [{**row, "seed": seed, key: value} for seed, value in enumerate(values, first)]

def p_of(one, other, key="score"):
    return tables.difference(one, other, key)[1]

def test_students_quantiles():
    for t, freedom, p in [(12.706, 1, 0.05), (4.303, 2, 0.05), (-2.776, 4, 0.05), (2.228, 10, 0.05),
                          (-1.96, 1e4, 0.05), (9.925, 2, 0.01), (0.741, 4, 0.5)]:
        assert abs(tables.p_value(t, freedom) / p - 1) < 0.01, t
    assert abs(tables.p_value(200, 2) / 2.4998e-5 - 1) < 1e-3

def test_t_test():
    """The same seeds are paired; others are compared by Welch's test."""
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), so t = 3.46 with 2 degrees.
    mean, p = tables.t_test({0: 2, 1: 4, 2: 6}, {0: 1, 1: 2, 2: 3})
    assert mean == 2 and abs(p - 0.0742) < 1e-3
    less = seeds([0.3, 0.5, 0.7])
    more = [0.35, 0.56, 0.75]
    assert float(p_of(less, seeds(more))) < 0.05 < float(p_of(less, seeds(more, first=5)))
    # Variances 1 and 5/3 of 3 and 4: t = 1.5 / sqrt(1/3 + 5/12) = 1.732 with 4.959 degrees.
    mean, p = tables.t_test({0: 12, 1: 13, 2: 14}, {5: 10, 6: 11, 7: 12, 8: 13})
    assert mean == 1.5 and abs(p - tables.p_value(1.7321, 4.959)) < 1e-4

def test_what_has_no_p():
    """No p without spread, nor of fewer than three seeds."""
    assert tables.t_test({0: 1, 1: 1}, {0: 1, 1: 1}) == (0, None)
    _, p = tables.t_test({0: 0.8, 1: 0.81, 2: 0.83}, {0: 0.7, 1: 0.71, 2: 0.73})
    assert p is None, "the differences spread by rounding alone"
    assert p_of(seeds([70] * 3, "learned"), seeds([56] * 3, "learned"), "learned") == "-"
    enough = seeds([0.9, 0.8, 0.7])
    for few in ([], [0.5], [0.5, 0.51]):
        assert p_of(seeds(few), enough) == p_of(enough, seeds(few)) == "-"
    assert p_of(seeds([0.5, 0.51, 0.6]), enough) != "-"

def test_what_is_compared_as_logarithms():
    """Ratios, but not accuracies. Never learned counts as a tenth more than all updates."""
    for key, metric, logarithms in [("score", "mse", True), ("persistence", "accuracy", True),
                                    ("learned", "accuracy", True), ("selectivity", "mse", True),
                                    ("score", "accuracy", False), ("lesion", "accuracy", False)]:
        samples = [dict(enumerate(values)) for values in ([9.0, 8.0, 11.0], [30.0, 21.0, 40.0])]
        one, other = [seeds(sample.values(), key, metric=metric) for sample in samples]
        if logarithms:
            samples = [{seed: math.log(x) for seed, x in sample.items()} for sample in samples]
        assert p_of(one, other, key) == f"{tables.t_test(*samples)[1]:.2g}", (key, metric)
    never = seeds([300, None, 280], "learned", updates=500)
    other = seeds([100, 101, 99], "learned")
    assert p_of(never, other, "learned") == p_of(seeds([300, 550, 280], "learned"), other, "learned")

def test_figures():
    errors = seeds([0.03, 0.344], metric="mse")
    errors[0]["learned"] = 1250
    errors[1]["learned"] = None
    texts = {"score": "0.19 ± 0.22", "worst": "0.34", "best": "0.030", "seeds": "2",
             "learned": "1250 (1 of 2)", "lesion": "-"}
    assert {key: tables.figure(errors, key) for key in texts} == texts
    assert tables.figure(seeds([None], "learned"), "learned") == "never"
    assert tables.figure(seeds([1.0] * 3), "score") == "1.000 (≥ 0.994)"  # Wilson's, of 600
    assert tables.figure(seeds([1.0, 0.9997]), "score") == "0.99985 ± 0.00021"
    assert tables.figure(seeds([0.7, 0.9]), "best") == "0.900"
    assert tables.figure(seeds([9, 4, 40], "minutes"), "minutes") == "4.0"  # of the quickest

def test_learned_is_the_first_evaluation_within_5_percent():
    scores = {"accuracy": [0.96, 0.95, 0.95625, 1.0, 0.9], "mse": [0.1, 0.21, 0.2, 0, 4]}
    for metric, chance in {"accuracy": 0.125, "mse": 4}.items():
        curve = {"step": [-10, 10, 20, 30, 40], "val_metric": scores[metric]}  # -10: pretraining
        run = dict(name="a", flags="--task copy --lr 1 --seed 0", metric=metric, chance=chance,
                   curve=curve, seconds=90)
        run = tables.complete(run)
        figures = [run[key] for key in ("learned", "updates", "minutes", "settings")]
        assert figures == [20, 40, 1.5, "--lr 1"]

def test_tables_and_numbers_are_filled_in():
    cells = {"a-none-b": seeds([0.7], prototype=0.9, tried="x"),
             "a-hebbian-b": seeds([0.6, 0.61, 0.62], lesion=0.2, change=2),
             "a-gradient-b": seeds([0.7, 0.72, 0.71], change=2)}
    p = p_of(cells["a-hebbian-b"], cells["a-gradient-b"])
    head = ("| x | static | Hebbian | p: Hebbian, gradient | gradient − Hebbian | encoder alone "
            "| tried | paper's best |\n| - | - |\n")
    rows = "| a-*-b |\n| words <!-- row a-*-b lesion --> | 1 | 2 | 3 | 4 | 5 | 6 | 7 |\n"
    *_, first, second = tables.fill(f"<!-- table score -->\n{head}{rows}", cells).splitlines()
    filled = f"0.700 (one seed) | 0.610 ± 0.010 (3) | {p} | +0.100 | 0.900 | x | -"
    assert first == f"| a-*-b | {filled} |" and float(p) < 0.05
    assert second.endswith("--> | - | 0.200 ± 0.000 (3) | - | - | 0.900 | x | 7 |")
    gates = f"<!-- table change -->\n{head}| a-*-b |\n"
    assert "| 2.0 ± 0.0 (3) |" in tables.fill(gates, cells)
    cells["a-gradient-b"][1]["learned"] = None  # Gates of what has not learned say nothing.
    assert "| 2.0 ± 0.0 (3) |" not in tables.fill(gates, cells)

    numbers = ("It has <!-- a-none-b score -->0.700. Worst: <!-- a-hebbian-b worst -->0.600, best "
               f"(<!-- a-hebbian-b best -->0.620), p = <!-- p a-hebbian-b a-gradient-b score -->{p}; end.")
    old = numbers.replace("0.700", "9").replace("0.600", "?").replace("0.620", "")
    assert tables.fill(old, cells) == tables.fill(numbers, cells) == numbers
    for wrong in ("<!-- c score -->1", "<!-- a-none-b nothing -->1", "<!-- p a-none-b c score -->1",
                  "<!-- p c a-none-b score -->1", "<!-- table x -->\n", gates + "| c | 1 |\n",
                  gates.replace("tried", "tired")):
        with TestCase().assertRaisesRegex(ValueError, "no (run|figure|column) is called|no table"):
            tables.fill(wrong, cells)

def test_pages_come_from_the_results():
    cells = tables.read_cells()
    for name, rows in cells.items():
        assert len({row.get("settings") for row in rows}) == 1, f"{name}: its seeds differ"
    for path in tables.PAGES:
        text = path.read_text()
        assert tables.fill(text, cells) == text, f"{path}: python results/tables.py"
        for line in "".join(match[3] for match in tables.TABLE.finditer(text)).splitlines():
            assert len(re.sub(" <!--.*?-->", "", line)) <= 160, line
    source = "".join(path.read_text() for path in HERE.glob("*.py"))
    idea = (HERE / "README.md").read_text().split("## Make it your own")[0]
    for line in "".join(re.findall(r"```python\n(.*?)```", idea, re.DOTALL)).splitlines():
        assert line in source, f"the README has a line that is nowhere: {line}"

def test_lines_of_results():
    """A malformed line is one clear error; of two lines of one run, the later counts."""
    path = new_folder() / "rows.jsonl"
    good = (HERE / "results" / "runs.jsonl").read_text().splitlines()[0]
    for key in ("name", "metric", "curve", "seconds", None):
        bad = good.replace(f'"{key}"', '"x"') if key else "[1, 2"
        path.write_text(f"{good}\n{bad}\n")
        with TestCase().assertRaisesRegex(ValueError, f"rows.jsonl, line 2 is no row.*{key or ''}"):
            tables.read_cells(path)
    path.write_text(good + "\n" + good.replace('"seconds": ', '"seconds": 1') + "\n")
    rows = tables.read_cells(path)[re.sub(r"-s\d+$", "", json.loads(good)["name"])]
    assert [row["seconds"] for row in rows] == [float(f"1{json.loads(good)['seconds']}")]

def test_pictures_are_drawn():
    if not importlib.util.find_spec("matplotlib"):
        raise SkipTest("no matplotlib here")
    picture = new_folder() / "horizon.png"
    tables.draw(tables.read_cells(), picture)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

# ------ Run them ------

def run(name):
    """Run the test of this name -> its outcome, and the line to print."""
    start = time.time()
    try:
        globals()[name]()
    except SkipTest as reason:
        return "skipped", f"skip  {name}: {reason}"
    except (Exception, SystemExit):
        return "failed", f"FAIL  {name}\n{traceback.format_exc()}"
    return "passed", f"ok    {name}  {time.time() - start:.1f} s"

def main(words):
    pattern = "|".join(words)
    names = [name for name in globals() if name[:5] == "test_" and re.search(pattern, name)]
    if not names:
        sys.exit(f"no test has {' or '.join(words)} in its name")
    outcomes = Counter(passed=0, failed=0)
    with concurrent.futures.ProcessPoolExecutor(2, None, torch.set_num_threads, (1,)) as pool:
        for outcome, line in pool.map(run, names):
            print(line, flush=True)
            outcomes[outcome] += 1
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    sys.exit(1 if outcomes["failed"] else 0)

if __name__ == "__main__":
    main(sys.argv[1:])
