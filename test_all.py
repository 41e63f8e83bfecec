"""Every test of the project: python test_all.py [words in their names], or pytest test_all.py.

LONG=2000, KILLS=30, DAMAGED=200 and ARGUMENTS=500 in the environment make some tests try more."""
import argparse
import builtins
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
import resource
import runpy
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
os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")  # CUDA hinders fork.
import torch
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.nn import functional as F
import eval as evaluation
import tasks
import train
from eval import WatchedFastWeights
from model import RULES, Config, Transformer, nearest_neighbour
from plasticity import FastWeights, PlasticLinear, Plasticity, UnrolledFastWeights
from results import figures, tables
from tasks import SPLITS, TASKS, Copy, Cue, Episodes, FewShot, Regression, random_generator

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

def small_model(task, rule, form=UnrolledFastWeights, **sizes):  # in double precision
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, d_model=8, d_ff=12, filters=4, alpha_init=1.0) | sizes
    model = Transformer(task, Config(rule=rule, **sizes)).double()
    model.fast_weights = form
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # No term hides behind a 0 or a 1.
    return model.eval()

def draw(task, batch_size):  # training episodes in double precision
    episodes = task.sample("train", batch_size, random_generator(0, "train"))
    return each_part(episodes, lambda part: part.double() if part.is_floating_point() else part)

def folding(n):  # the unrolled form with another `fold`; a test rarely writes 32 times
    class Folding(UnrolledFastWeights):
        fold = n
        def store(self, eta, u):
            super().store(eta, u)
            assert max([x.size(1) for x in self.past_x.values()] + [0]) == (len(self.eta) + 1) % n
    return Folding

def gradients(model, out):  # {name: gradient} of a random weighting of `out`; none is missing
    weights = torch.randn(out.shape, generator=random_generator(1, "train"), dtype=out.dtype)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(learned, torch.autograd.grad((out * weights).sum(), [*learned.values()])))

def assert_close(a, b, what, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text: f"{what}: {text}")

def check_against_oracle(task, rule, folds=(32,), **sizes):  # -> FastWeights, gradients
    model = small_model(task, rule, **sizes)
    episodes = draw(task, 2)
    oracles = [Oracle(model, episodes, b) for b in range(2)]
    answers = torch.stack([oracle.answers for oracle in oracles])
    expected = gradients(model, answers)
    for form, training in product((FastWeights, *map(folding, folds)), (False, True)):
        model.fast_weights = form
        with torch.set_grad_enabled(training):
            out, fast = model(episodes)
        assert out.requires_grad == training, "evaluation keeps no history"
        assert_close(out, answers, f"{form}: the answer")
        if rule != "none":
            n_writes = len(task.step_names) - (episodes.query_x is None)  # Who reads the last?
            writes = torch.stack([torch.stack(o.writes[:n_writes]) for o in oracles]).unbind(2)
            for steps, truth in zip((fast.eta, fast.norm, fast.change)[:3 - training], writes):
                assert_close(torch.cat(steps, dim=1), truth, f"{form}: eta, n or change")  # (B, T)
            assert writes[0].std() > 0.01 * writes[0].mean(), "constant etas show too little"
        for name, grad in gradients(model, out).items() if training else ():
            scale = max(1.0, expected[name].abs().max().item())
            assert_close(grad / scale, expected[name] / scale, f"{form}: gradient of {name}")
    return fast, expected

def test_oracle():
    both = (Copy(3, 2, 5), Cue(5, 6))
    images = FewShot("omniglot", fake_packs(), 2, 1, 1)
    sources = [(Copy(2, 2, 5), 2), (Cue(4, 6), 2), (Regression(2, 4, 3), 1), (images, 1)]
    cases = [(task, dict(window=n, n_layer=m)) for n, (task, m) in product((0, 1, 3), sources)]
    cases += [(task, dict(folds=(1, 2, 3))) for task in (*both, Cue(1, 6))]
    sizes = [dict(window=n) for n in (1, 2, 4)] + [dict(plastic="last", n_layer=n) for n in (1, 3)]
    cases += [(task, dict(size, folds=(2,))) for size, task in product(sizes, both)]
    for rule, (task, sizes) in product(RULES, cases):
        if rule in PLASTIC:
            check_against_oracle(task, rule, **sizes)
        elif "folds" not in sizes:  # Without fast weights all forms are the same.
            check_against_oracle(task, rule, folds=(), **sizes)

def test_oracle_with_clipping_and_ablations():
    for rule, max_norm in product(PLASTIC, (0.01, 1, 1e9)):  # They clip all writes, some, none.
        fast, _ = check_against_oracle(Copy(2, 2, 5), rule, max_norm=max_norm, eta0=0.1)
        assert max_norm == 1 or (torch.cat(fast.norm, dim=1) > max_norm).eq(max_norm == 0.01).all()
    ablations = ("none", "eta", "alpha", "backward")
    for rule, ablate, task in product(PLASTIC, ablations, (Copy(2, 2, 5), Cue(4, 6))):
        _, grads = check_against_oracle(task, rule, ablate=ablate, folds=(2, 40))
        learned = [name for name in grads if re.search("alpha|beta|w_out", name)]
        w_out_learns = rule == "gradient" and ablate != "backward"
        assert len(learned) == 8 * (ablate in ("none", "eta")) + w_out_learns  # 4 alpha, 4 beta
        assert all((grads[name].abs() > 1e-12).all() for name in learned), "a part does not learn"
        m, *auxiliary = grads["head.weight"][task.n_out:].abs()  # (C) each
        m_learns = ablate in ("none", "alpha") or ablate == "eta" and w_out_learns  # m_t is in L_t
        for grad in (m.max(), grads["head.bias"][task.n_out].abs()):
            assert grad > 1e-8 if m_learns else grad == 0, "m_t learns, or does not"
        assert not w_out_learns or (torch.stack(auxiliary) > 1e-12).all(), "auxiliary outputs learn"

def test_gradcheck():
    forms = (FastWeights, folding(40), folding(2))
    for rule, form, task in product(PLASTIC, forms, (Copy(1, 1, 4), Cue(3, 3))):
        model = small_model(task, rule, form, n_layer=1, n_head=1, d_model=3, d_ff=3)
        params = [*model.parameters()]  # gradcheck changes them in place.
        assert torch.autograd.gradcheck(lambda *_: model(draw(task, 1))[0], params, fast_mode=True)

def test_example_by_numbers():  # the one in the docstring of plasticity.py
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
def fake_packs():  # both packs in the real format; the first pixels of an image number it
    folder = new_folder()
    cifar = [f"class{i:02}" for i in range(64)] + tasks.CIFARFS_VAL + tasks.CIFARFS_TEST
    omniglot = [f"alphabet{i // 33:02}/character{i % 33:02}" for i in range(1623)]
    for classes, (file_name, shape) in zip((cifar, omniglot), tasks.PACKS.values()):
        number = torch.arange(shape[0] * shape[1]).view(*shape[:2], 1, 1, 1)
        images = F.pad(number >> torch.tensor([16, 8, 0]) & 255, (0, shape[4] - 3)).byte()  # a row
        torch.save({"images": images.expand(shape), "classes": sorted(classes)}, folder / file_name)
    return folder

def test_tokens_of_a_step():
    for task in (Cue(4, 6), Regression(2, 4, 5), FewShot("omniglot", fake_packs(), 3, 1, 2)):
        embed = small_model(task, "none").embed
        x, y, query_x, _ = episodes = draw(task, 2)
        if task.kind == "image":
            y = 4.0 * F.one_hot(y, 3)
            x, query_x = [embed.norm(torch.stack([*map(embed.encoder, p)])) for p in (x, query_x)]
        context, queries = embed(episodes)
        assert_close(context, embed.linear(F.pad(torch.cat([x, y], dim=2), (0, 1))), "context")
        tokens = F.pad(F.pad(query_x, (0, y.size(2))), (0, 1), value=1)
        assert_close(queries, embed.linear(tokens), "the queries")

def test_lesion_is_the_slow_model():
    for task, rule, window, form in product((Copy(2, 3, 5), Cue(4, 6)), PLASTIC, (0, 1, 3), FORMS):
        model = small_model(task, rule, form, window=window)
        episodes = draw(task, 2)
        lesioned, fast = model(episodes, write=False)
        assert fast is None and (model(episodes)[0] - lesioned).abs().max() > 1e-4
        model.plasticity.eta0 = 0.0
        assert_close(model(episodes)[0], lesioned, f"{rule}: eta_0 = 0")
        model.config.rule = "none"
        assert_close(model(episodes)[0], lesioned, f"{rule}: no rule")

def test_on_another_device():
    images = FewShot("omniglot", fake_packs(), 1, 1, 2)
    sources = (Copy(2, 0, 5), Cue(2, 3), Regression(2, 2, 2), images)
    for task, rule in [*product(sources, PLASTIC), (images, "none")]:
        form = FastWeights if task is sources[0] else folding(2)
        model = small_model(task, rule, form, plastic="last", window=3).float().to("meta")
        episodes = task.sample("train", 2, random_generator(0, "train")).to("meta")
        out, _ = model(episodes)
        task.loss(out, episodes.target).backward()
        assert out.is_meta and all(p.grad is None or p.grad.is_meta for p in model.parameters())

def test_no_rule_has_parameters_it_does_not_use():
    for rule, (plastic, n) in product(("none", "hebbian", "gradient"), dict(all=4, last=2).items()):
        model = Transformer(Copy(), Config(rule=rule, plastic=plastic, alpha_init=4.0))
        found = Counter((name.split(".")[-1], *p.unique().tolist()) for name, p in
            model.named_parameters() if not re.search(r"\b(weight|bias|position)$", name))
        n *= rule != "none"
        assert found == Counter({("alpha", 4): n, ("beta", 4): n, ("w_out", 1): rule == "gradient"})
        assert len(model.head.bias) == dict(none=10, hebbian=11, gradient=15)[rule]  # m_t, 4 more
        assert not model.embed.token.weight[0].any(), "a blank that says something is echoed"

def test_finite_at_the_edges():
    edges = [("hebbian", *x) for x in ((8, 1, 1), (0.05, 1, 1e9), (8, 1, 1e-9))]  # or they multiply
    edges += [("gradient", *x) for x in ((20, 0.02, 1), (1, 1, 1), (1, 1, 1e9), (8, 1, 1e-9))]
    long = Copy(2, int(os.environ.get("LONG", 40)) - 5, 6)
    sources = (long, FewShot("omniglot", fake_packs(), 1, 1, 1), Regression(2, 4, 3))
    for task, (rule, alpha_init, eta0, norm), form in product(sources, edges, FORMS):
        torch.manual_seed(0)
        model = Transformer(task, Config(1, 2, 8, 12, 0, 4, rule, "all", alpha_init, eta0, norm))
        model.fast_weights = form
        episodes = task.sample("train", 1, random_generator(0, "train"))
        for tensor in [*model.parameters(), *episodes] if isinstance(task, Regression) else ():
            torch.nn.init.zeros_(tensor)
        out, _ = model(episodes)
        task.loss(out, episodes.target).backward()
        for tensor in [out, *[p.grad for p in model.parameters() if p.grad is not None]]:
            assert tensor.isfinite().all(), f"{task}, {model.config}"

# ------ 3. Tasks and splits ------
def terminal(encoding="utf-8"):  # a stream that keeps what is printed
    return io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)

def quiet(encoding="utf-8"):  # What is printed goes into another sys.stdout and sys.stderr.
    return mock.patch.multiple(sys, stdout=terminal(encoding), stderr=terminal(encoding))

def in_two_processes(work):  # as torchrun does it; none may fail
    address = dict(MASTER_ADDR="localhost", MASTER_PORT=str(get_free_port()), WORLD_SIZE="2")
    def begin(rank):
        os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
        work()
    torch.multiprocessing.start_processes(begin, nprocs=2, start_method="fork")

def load(folder, name="ckpt.pt"):
    return torch.load(folder / name, weights_only=True)

def test_random_streams_and_copy_episodes():
    pairs = [*product(range(5), SPLITS)] * 2
    assert len({tuple(random_generator(*pair).get_state().tolist()) for pair in pairs}) == 15
    task = Copy(3, 5, 6)
    for split, remainders in {"train": {0, 1, 2}, "val": {3}, "test": {4}}.items():
        shown, _, _, items = task.sample(split, 1000, random_generator(0, split))
        assert shown.tolist() == [[*row, 0, 0, 0, 0, 0, 5, 0, 0, 0] for row in items.tolist()]
        rows = [row for row in product((1, 2, 3, 4), repeat=3) if sum(row) % 5 in remainders]
        assert sorted({*map(tuple, items.tolist())}) == rows
        out = 20 * F.one_hot(F.pad(items, (9, 0)), 6).float()  # The last three steps count.
        assert task.score(out, items).eq(1).all() and task.loss(out, items) < 1e-6
        assert task.score(out.roll(1, 1), items).mean() < 0.5 and task.chance == 1 / 4

def test_cue_episodes():
    for noise in (0, 1, 30):
        task = Cue(8, 20, noise)
        x, y, query_x, target = batch = task.sample("train", 100, random_generator(0, "train"))
        assert x.shape == (100, 8 + noise, 20 + bool(noise))
        counts = x[..., -1] == 1 if noise else x.sum(-1) == 1  # (B, T)
        assert counts.sum(1).eq(8).all() and counts.double().mean(0).min() > 0.05
        cues = x[..., :20]
        counting = cues * counts[..., None]
        assert cues.sum(-1).eq(1).all() and counting.sum(1).le(1).all()
        assert noise < 30 or (cues - counting).sum((0, 1)).min() > 50, "noise: any cue"
        assert abs(y.mean() - 0.5) < 0.05 and 0 <= y.min() and y.max() <= 1
        assert abs(y.var() / task.chance - 1) < 0.07, "chance is the loss of answering 0.5"
        assert torch.equal(query_x[..., :20] @ (counting.mT @ y), target), "noise counts"
        asked_steps = task.asked_steps(batch)  # (B, Q)
        assert torch.equal(y[..., 0].gather(1, asked_steps), target[..., 0])
        assert torch.equal(counts.nonzero()[:, 1].view(100, 8), asked_steps.sort().values)
        assert (asked_steps.diff() > 0).all(1).double().mean() < 0.2, "in the order of the pairs"

def test_regression_episodes():
    for dim in (1, 3, 8):
        task = Regression(dim, support=10, queries=7)
        x, y, query_x, target = draw(task, 5000)
        fit = torch.linalg.lstsq(F.pad(x, (0, 1), value=1.0), y).solution  # (B, dim + 1, 1)
        assert task.loss(F.pad(query_x, (0, 1), value=1.0) @ fit, target) < 1e-8
        assert abs(task.loss(torch.zeros_like(target), target) / task.chance - 1) < 0.04, "for 0"

def test_distorted_and_shifted_images():
    place = torch.arange(28) - 13.5 + 1j * (torch.arange(28)[:, None] - 13.5)
    blobs = torch.stack([torch.exp(-(place - centre).abs() ** 2 / 4) for centre in (-6, 6)])
    gray = 100 + 50 * F.one_hot(torch.tensor(15 * 32 + 12), 32 * 32).view(32, 32)  # a bright pixel
    def change(how, images):
        out, again = [how(images, random_generator(0, "train")) for _ in range(2)]
        assert out.dtype == torch.uint8 and out.shape == images.shape and torch.equal(out, again)
        return out.flatten(0, 1).double()
    mass = change(tasks.distort, (255 * blobs).round().byte().expand(4, 100, 2, 28, 28))
    out = change(tasks.shift, gray.byte().expand(4, 200, 3, 32, 32))  # (800, 3, 32, 32)
    left, right = ((mass * place).sum((-2, -1)) / mass.sum((-2, -1))).T  # the centres, (400)
    turn = 12 / (right - left)  # and scale
    shift = (left + right) / (right - left) * 6 / 14 / 0.15
    u = torch.stack([turn.angle().rad2deg() / 10, (turn.abs() - 1) / 0.15, shift.real, shift.imag])
    assert u.abs().max() < 1.03 and u.amin(1).max() < -0.9 and u.amax(1).min() > 0.9, "the range"
    assert u.mean(1).abs().max() < 0.15 and u.corrcoef().triu(1).abs().max() < 0.2, "they go along"
    place = out.flatten(2).argmax(2)  # (800, 3)
    column = place[:, 0] % 32  # near 12 or, mirrored, near 19
    move = torch.stack([place[:, 0] // 32 - 15, column - torch.where(column > 15, 19, 12)], dim=1)
    _, counts = place[:, 0].unique(return_counts=True)
    assert (place == place[:, :1]).all() and move.abs().max() == 2 and len(counts) == 50
    assert counts.max() < 40 and torch.equal((out[:, 0] > 0).sum((1, 2)), (32 - move.abs()).prod(1))

def test_encoded_images():
    encoder = functools.partial(torch.mean, dim=(-3, -2), dtype=torch.double)  # of each column
    for name, split in product(tasks.PACKS, ("val", "test")):
        task = FewShot(name, fake_packs(), 5, 2, 3)
        episodes = task.sample("test", 4, random_generator(0, "test"))
        task.encode_images(split, encoder, "cpu")
        encoded = task.sample("test", 4, random_generator(0, "test"))
        for part, found in zip(episodes, encoded):
            if (name, split) == ("cifarfs", "test") and part.ndim > 2:
                part = (encoder(part) + encoder(part.flip(-1))) / 2
            assert_close(found, part, f"{name} {split}")

def test_splits_of_fake_and_real_images():
    real = HERE.parent / "shared" / "data"
    for folder in [fake_packs()] + [real] * real.is_dir():
        images, classes = load(folder, "cifar100.pt").values()
        task = FewShot("cifarfs", folder)
        train, val, test = [[classes[i] for i in task.class_ids[split]] for split in SPLITS]
        assert torch.equal(task.images, images) and sorted(train + val + test) == classes
        assert val == tasks.CIFARFS_VAL and test == tasks.CIFARFS_TEST
        assert [len(part) for part in (train, val, test)] == [64, 16, 20]
        images, classes = load(folder, "omniglot.pt").values()
        task = FewShot("omniglot", folder)
        ids = torch.arange(4 * 1623).view(4, 1623)
        assert all(torch.equal(task.images[ids[k]], images.rot90(k, (-2, -1))) for k in range(4))
        for split, part in zip(SPLITS, (ids[:, :813].flatten(), ids[0, 813:964], ids[0, 964:])):
            assert torch.equal(task.class_ids[split], part)
    if not real.is_dir():
        raise SkipTest("only the fake ones: no ../shared/data here")
    alphabets = [name.split("/")[0] for name in classes] * 4  # Quarter-turns are classes.
    train, val, test = [{alphabets[i] for i in task.class_ids[split]} for split in SPLITS]
    assert [*map(len, (train, val, test))] == [25, 5, 20]
    assert max(train) < min(val) and not train & test

def test_few_shot_episodes():
    sources = [*product(tasks.PACKS, SPLITS, [(5, 2, 3)])]
    sources += [(name, "train", sizes) for name, sizes in tasks.PRETRAINING.items()]
    for name, split, (N, K, Q) in sources:  # ways, shots, queries
        task = FewShot(name, fake_packs())
        ids = task.class_ids[split]
        task.images = torch.arange(1, 20 * len(task.images) + 1).view(-1, 20, 1, 1, 1)
        with mock.patch.object(tasks, "shift" if name == "cifarfs" else "distort", lambda x, _: -x):
            x, y, query_x, target = task.sample(split, 40, random_generator(0, split), (N, K, Q))
        for labels, n in ((y, K), (target, Q)):
            assert F.one_hot(labels, N).sum(1).eq(n).all(), "not as many of each label"
            assert (labels.diff() >= 0).all(1).double().mean() < 0.2, "sorted"
        numbers = torch.cat([x, query_x], dim=1).flatten(1)  # (40, N * (K + Q))
        assert (numbers < 0).eq(split == "train").all(), "only training changes images"
        numbers = numbers.abs().gather(1, torch.cat([y, target], dim=1).argsort()).view(40, N, -1)
        assert numbers.sort().values.diff().all(), "a support image is a query"
        classes, others = ((numbers - 1) // 20).aminmax(dim=2)  # (40, N) each
        assert torch.equal(classes, others), "one label has two classes"
        assert torch.isin(classes, ids).all() and classes.sort().values.diff().all(), "two labels"
        assert N < len(ids) or torch.equal(classes, ids.expand(40, -1)), "labels do not stay"
        assert (name, split) != ("omniglot", "train") or len((classes // 1623).unique()) == 4
    task = FewShot("cifarfs", fake_packs(), ways=16, shots=1, queries=1)
    task.images = torch.arange(20 * len(task.images)).view(-1, 20, 1, 1, 1)
    x, y, *_ = task.sample("val", 40, random_generator(0, "val"))
    classes = (x.flatten(1) // 20).gather(1, y.argsort())  # (40, N)
    assert len(classes[:, 0].unique()) > 5, "an episode with all classes numbers them anew"

def test_merged_labels():
    task = FewShot("omniglot", fake_packs(), ways=6, shots=2, queries=3, merge=2)
    assert (task.n_out, task.chance, len(task.step_names)) == (3, 1 / 3, 12)
    task.images = torch.arange(20 * len(task.images)).view(-1, 20, 1, 1, 1)
    x, y, query_x, target = task.sample("test", 9, random_generator(0, "test"))
    for images, labels, n in ((x, y, 2), (query_x, target, 3)):
        assert F.one_hot(labels, 3).sum(1).eq(2 * n).all(), "not as many of each label"
        classes = images.flatten(1) // 20  # (9, N)
        for b, label in product(range(9), range(3)):
            assert [*Counter(classes[b, labels[b] == label].tolist()).values()] == [n, n]
    pairs = {tuple(sorted(set((x[b].flatten()[y[b] == 0] // 20).tolist()))) for b in range(9)}
    assert len(pairs) == 9, "classes meet at random"
    _, y, *_ = task.sample("test", 2, random_generator(0, "test"), (6, 1, 1))
    assert F.one_hot(y, 6).sum(1).eq(1).all(), "pretraining merges no labels"
    features = torch.tensor([[1.0, 0], [-1, 0.5], [0, 1], [-1, -0.1], [0.2, 1]])[None]  # (1, 5, 2)
    episodes = Episodes(None, torch.tensor([[2, 2, 0]]), None, None)
    answers = nearest_neighbour(features, episodes)
    assert answers.argmax(2).tolist() == [[2, 0]] and answers.dtype == torch.float32
    episodes = episodes._replace(support_y=torch.tensor([[2, 1, 0]]))
    answers = nearest_neighbour(features[:, [0, 1, 2, 4]], episodes)
    assert answers.tolist() == [[[1, 0, 0]]], "labels that are no answer keep a column"

def test_packing_downloads():
    from PIL import Image
    def cifar(folder, train, download):  # Two pixels hold the class and the part.
        labels = torch.arange(50000 if train else 10000) % 100
        data = torch.zeros(len(labels), 32, 32, 3, dtype=torch.uint8)
        data[:, [1, 3], [2, 4], [0, 2]] = F.pad(labels[:, None], (0, 1), value=not train).byte()
        return SimpleNamespace(data=data.numpy(), targets=labels.tolist(), classes="ab" * download)
    def omniglot(folder, background, download):  # black ink on white paper
        target = Path(folder, str(background))
        for (i, name), j in product(enumerate(names), range(20 * download)):
            if background != (name[0] == "B"):
                (target / name).mkdir(parents=True, exist_ok=True)
                scan = Image.new("1", (105, 105), 1)
                scan.paste(0, (98, 98, 105, 105))
                scan.paste(0, (15 * j // 4, 15 * i // 4, 15 * j // 4 + 4, 15 * i // 4 + 4))
                scan.save(target / name / f"0001_{j + 1:02}.png")
        return SimpleNamespace(target_folder=target)
    names = [f"{letter}/{i:02}" for i, letter in enumerate(21 * "A" + "ZZBB")]  # B: evaluation set
    folder = new_folder() / "new"
    shape = (25, 20, 1, 28, 28)
    with quiet(), mock.patch.multiple("torchvision.datasets", CIFAR100=cifar, Omniglot=omniglot), \
         mock.patch.object(tasks, "PACKS", {"omniglot": ("pack", shape)}):
        images, classes = tasks.pack_cifar100("").values()
        in_two_processes(lambda: tasks.load_pack(folder, "omniglot"))  # both at once
    assert images.shape == (100, 600, 3, 32, 32) and classes == "ab"
    assert (images[:, :, 0, 1, 2] == torch.arange(100)[:, None]).all(), "not in its class"
    assert (images[:, :, 2, 3, 4] == (torch.arange(600) >= 500)).all()
    images, classes = load(folder, "pack").values()
    assert images.shape == shape and images.dtype == torch.uint8 and os.listdir(folder) == ["pack"]
    assert (images[..., 27, 27] == 255).all() and (images[..., 0, 27] == 0).all(), "ink is 255"
    place = images[:, :, 0, :25, :25].flatten(2).argmax(2)  # (25, 20)
    assert classes == names and torch.equal(place, torch.arange(625).view(25, 25)[:, :20])

def test_broken_downloads():
    def answer(connection, *_):  # A GET of /STATUS/LENGTH/... gets LENGTH of 100000 bytes.
        _, status, length, *_ = connection.recv(9999).split(b"/")
        connection.sendall(b"HTTP/1.0 %s\nContent-Length: 100000\n\n" % status + bytes(int(length)))
    server = http.server.ThreadingHTTPServer(("localhost", 0), answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    paths = [f"{server.server_port}/{path}" for path in ("200/50000", "200/100000", "404/0")]
    pack = dict(images=torch.zeros(6, 20, 1, 28, 28, dtype=torch.uint8), classes=[*"abcdef"])
    packers = dict.fromkeys(("pack_cifar100", "pack_omniglot"), lambda folder: pack)
    folder = new_folder()
    for path, (name, (file, shape)) in product((*paths, "1/nobody", "few"), tasks.PACKS.items()):
        url = f"http://localhost:{path}/"
        reason = re.escape(f"not {shape} images") if path == "few" else ""
        line = rf"^no {name} in {folder / file} \(.*{reason}.*\): check the network and "
        with quiet(), mock.patch.dict(vars(tasks), packers if path == "few" else {}), \
             mock.patch("torchvision.datasets.CIFAR100.url", url), \
             mock.patch("torchvision.datasets.Omniglot.download_url_prefix", url), \
             TestCase().assertRaisesRegex(ValueError, line + r"--data-dir.*\Z"):
            tasks.load_pack(folder, name)
        assert path == "few" or not os.listdir(folder), f"{path}: {name} left files"

# ------ 4. Training, resuming and measuring, as a user does it ------
TINY = "--device cpu --d-model 16 --d-ff 16 --n-head 2 --batch-size 8"
TINY_COPY = f"{TINY} --task copy --seq-len 2 --delay 3 --vocab-size 6"
TINY_IMAGES = f"{TINY} --task omniglot --filters 4 --batch-size 2 --pretrain-steps 2"
CPU = torch.device("cpu")
train.EVAL_EPISODES = 8
tasks.load_pack = functools.cache(tasks.load_pack)  # To make the quarter-turns takes a while.

def call(script, argv, *statuses, encoding="utf-8"):
    """Run a script, to end with one of `statuses` (or 0) -> its output, or the line of 2 or 130."""
    with quiet(encoding):
        try:
            status = script.main(shlex.split(argv)) or 0
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:
            raise AssertionError(argv) from error
        stream = sys.stderr if status in (2, 130) else sys.stdout
        output = stream.buffer.getvalue().decode(encoding)
    assert status in (statuses or (0,)), f"{argv}: exit status {status}, {output!r}"
    lines = {2: "error: .*\n", 130: "(stopped.*\n)?"}  # One process says it for all.
    assert re.fullmatch(lines.get(status, "(?s:.*)"), output), f"{argv}: {output!r}"
    return output

def trained(argv):  # -> the new folder of the run
    run = new_folder()
    call(train, f"{argv} --out-dir {run}")
    return run

def measured(run, **options):  # -> its row, and some answers as lines
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
        call.result = act(function, *args) if act and len(calls) >= first else function(*args)
        return call.result
    with mock.patch.object(owner, name, wrapper):
        yield calls

def interrupted(argv, before_update, number=signal.SIGTERM):
    """Train until a signal comes, right before an update -> the output."""
    def interrupt(update, *args):
        return signal.raise_signal(number) or update(*args)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Should train.py fail, the tests go on.
    signal.signal(signal.SIGINT, signal.default_int_handler)  # A background job ignores it.
    with intercepted(train, "update", interrupt, before_update) as updates:
        output = call(train, argv, 130)
    assert len(updates) == before_update, f"it went on until update {len(updates)}"
    return output

def log_of(run):  # -> a list per figure, without the times, which differ
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {key: [line[key] for line in lines] for key in lines[0] if key != "seconds"}

def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def assert_same_run(one, other):
    """Checkpoint, best model and log agree bit for bit, but for the times."""
    states = []
    for run in (one, other):
        last = load(run)
        last["run"] = [last["run"][key] for key in ("step", "best", "losses")]
        states.append([last | {"args": 0}, load(run, "best.pt") | {"args": 0}])
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert log_of(one) == log_of(other)

def test_commands_from_outside():  # in one process, as to import torch takes a while
    folder = new_folder()
    run = "out/copy-none-s0"
    scripts = {"train.py": f"{TINY_COPY} --rule none --steps 2", "eval.py": f"{run} --episodes 4"}
    program = "import runpy, sys\n" + "".join(
        f"sys.argv = {[script, *argv.split()]}\n"
        f"runpy.run_path('{HERE}/{script}', run_name='__main__')\n"
        for script, argv in scripts.items())
    (folder / "both.py").write_text(program)
    # sed leaves when eval.py has begun.
    shell = (f"cd {folder} && PYTHONPATH={HERE} PYTHONUNBUFFERED= {sys.executable} both.py "
             "2> errors | sed /^measuring/q")
    status, output = subprocess.getstatusoutput(shell)
    assert status == 0 and "on cpu" in output and output.endswith(f"{run} on 4 episodes"), output
    assert {*os.listdir(folder / run)} == {"best.pt", "ckpt.pt", "metrics.jsonl"}
    assert not (folder / "errors").read_text(), "an error, as the reader has left"
    output = call(train, f"{TINY_COPY} --rule none --steps 1 --out-dir '{folder}/a b'")
    assert output.endswith(f"python eval.py '{folder}/a b'\n")

def test_make_it_your_own():
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
    checks = f"""from {Path(__file__).stem} import *
for task in (Copy(2, 2, 5), Cue(4, 6)):
    check_against_oracle(task, "delta", folds=(2,))
for argv in ("--task sine --rule delta", "--window 8 --out-dir out/short"):
    train.main(f"{{argv}} --steps 2 --batch-size 2".split())"""
    (copy / "all.py").write_text("\n".join([checks, *programs]))
    def begin():  # as python all.py, but torch is there already
        for name in (*"plasticity model tasks train eval results".split(), Path(__file__).stem):
            sys.modules.pop(name, None)
        sys.path[:0] = [str(copy)]
        os.chdir(copy)
        with (copy / "output").open("w") as output, contextlib.redirect_stdout(output):
            runpy.run_path("all.py", run_name="__main__")
    process = torch.multiprocessing.get_context("fork").Process(target=begin)
    process.start()
    process.join()
    output = (copy / "output").read_text()
    assert process.exitcode == 0 and "sine, rule delta" in output, output

def test_fast_weights_learn_and_are_used():
    argv = (f"{TINY} --task cue --pairs 2 --cues 3 --window 1 --steps 120 --lr 1e-2 "
            "--batch-size 16 --d-model 32 --d-ff 32 --n-layer 1")
    for rule in RULES:
        run = new_folder()
        output = call(train, f"{argv} --rule {rule} --out-dir {run}")
        row, answers = measured(run, episodes=200)
        answers = "\n".join(answers)
        names = ["shown", "right", "answered", "lesioned"][:3 + (rule in PLASTIC)] * 3
        assert all(re.findall(r"^  ([a-z]+) ", s, re.M) == names for s in (output, answers)), rule
        n_fast = 2 * (32 * 32 + 32) if rule in PLASTIC else 0
        n_slow = sum(p.numel() for p in train.load_run(run / "best.pt")[2].parameters())
        assert (f"mse 0.0833 is guessing, 0 perfect\n{n_slow:,} slow parameters, and {n_fast:,} "
                "fast weights per episode\n") in output
        # Attention is too short: only fast weights can answer, and a lesion takes them away.
        assert row["score"] < 0.02 if rule in PLASTIC else row["score"] > 0.06, rule
        assert rule == "none" or row["lesion"] > 0.06, f"{rule} answers without its writes"
        assert not re.search(r"answered +(.*)\n +lesioned +\1", answers)

def test_show():
    for task, shown in ((Copy(3, 2, 9), 0), (FewShot("omniglot", fake_packs(), 3, 1, 2), 1)):
        model = small_model(task, "hebbian", eta0=1.0, alpha_init=9.0).float().train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        lines = [line.split() for line in train.show(model, task, "test", CPU, 2)]
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
        episodes = task.sample("test", 2, random_generator(0, "test"))
        rows = dict(shown=episodes[shown], right=episodes.target)  # shown: support_x, support_y
        for name, rule in dict(answered="hebbian", lesioned="none").items():
            model.config.rule = rule
            rows[name] = model.eval()(episodes)[0][:, -episodes.target.size(1):].argmax(-1)
        assert lines == [[name, *map(str, rows[name][b].tolist())] for b in (0, 1) for name in rows]
        assert not torch.equal(rows["answered"], rows["lesioned"]), "a lesion does nothing"

def test_updates_and_evaluations():
    argv = f"{TINY} --task regression --rule none --batch-size 16 --seed 1"
    with intercepted(train, "update") as updates:
        run = trained(f"{argv} --steps 32 --lr 1e-12")
    steps, means, losses = [log_of(run)[key] for key in ("step", "train_loss", "val_loss")]
    assert steps == [*range(3, 31, 3), 32]
    values = [update.result for update in updates]
    for start, stop, mean in zip([0, *steps], steps, means):
        assert math.isclose(mean, sum(values[start:stop]) / (stop - start)), "not the mean"
    assert len(set(values)) == 32, "training was not redrawn"
    assert max(losses) - min(losses) < 1e-6, "validation was redrawn"
    _, task, model = train.load_run(run / "ckpt.pt")
    episodes = task.sample("val", 8, random_generator(1, "val"))
    assert abs(losses[-1] - task.loss(model.eval()(episodes)[0], episodes.target)) < 1e-5, "seed"
    assert log_of(trained(f"{TINY_COPY} --rule none --steps 19"))["step"] == [*range(1, 20)]

def test_best_model():  # The last of equal ones; images first score without the model.
    cases = [(f"{TINY} --task cue", 2, [3.0, 1.0, 2.0, 4.0]),
             (TINY_COPY, 3, [0.962, 0.963, 0.963, 0.5]),
             (f"{TINY_IMAGES} --data-dir {fake_packs()}", 3, [1.0, 0.959, 0.96, 0.97, 0.25])]
    for argv, step, scores in cases:
        results = [dict(losses=s, scores=s) for s in torch.tensor(scores, dtype=torch.double)]
        with mock.patch.object(train, "evaluate", side_effect=results):
            run = trained(f"{argv} --rule none --steps {step}")
            model = load(run)["model"]
            output = call(train, f"--resume --steps 4 --out-dir {run} --data-dir {fake_packs()}")
        best = load(run, "best.pt")
        assert best["step"] == step and load(run)["run"]["best"] == scores[step - 5]
        assert f"best {'mse' if 'cue' in argv else 'accuracy'} {scores[step - 5]:.4f}\n" in output
        torch.testing.assert_close(best["model"], model, rtol=0, atol=0)

def test_encoder_learns_then_encodes():
    def encode(_, task, split, encoder, device):
        assert not encoder.training, "each batch would have a norm of its own"
        task.features[split] = torch.rand(len(task.class_ids[split]), 600, encoder.d_out)
        return split, sum(value.sum().item() for value in encoder.state_dict().values())
    argv = f"{TINY_IMAGES} --task cifarfs --shots 2 --steps 2 --data-dir {fake_packs()}"
    with intercepted(FewShot, "encode_images", encode) as encoded:
        with intercepted(FewShot, "loss") as losses, intercepted(train, "update") as updates:
            run = trained(argv)
        call(train, f"--resume --out-dir {run} --data-dir {fake_packs()}")
        runs = [run, trained(f"{argv} --pretrain-steps 0")]  # What learns is encoded each time.
        for folder in runs:
            measured(folder, episodes=2, data_dir=fake_packs())
    _, outs, targets = zip(*(loss.args for loss in losses))
    assert [out.size(2) for out in outs[:5]] == [64, 64, 64, 64, 5], "the model comes last"
    assert torch.equal(targets[1][0].sort().values[::2], torch.arange(64)), "--shots 2 counts"
    assert torch.equal(targets[1][:, 64:], targets[0]), "the shots, then the queries"
    one, two, *_ = [update.result for update in updates]
    facts = [log_of(run)[key][0] for key in ("step", "train_loss")]
    assert facts == [0, (one + two) / 2] and one != two
    splits, encoders = zip(*(call.result for call in encoded))
    assert splits == ("train", "val", "train", "val", "test")
    assert len(set(encoders)) == 1, "an update changes what was pretrained"
    assert not torch.equal(*[load(folder)["model"]["embed.classes.weight"] for folder in runs])

def test_pretrained_encoder_stays_and_answers_by_prototypes():
    def encoder(flags, pretrained):  # -> the run, its encoder
        with intercepted(FewShot, "loss") as losses:
            run = trained(f"{TINY_IMAGES} --data-dir {fake_packs()} --filters 16 --rule {flags}")
        assert sum(loss.args[1].shape == (1, 120, 60) for loss in losses) == 2 * pretrained
        state = load(run)
        updates = {moment["step"].item() for moment in state["optimizer"]["state"].values()}
        assert updates == {state["run"]["step"]}, "AdamW goes on with moments of pretraining"
        return run, [value for name, value in state["model"].items() if "embed.encoder" in name]
    for flags, stays in ("--pretrain-steps 0", False), ("", True):
        run, static = encoder(f"none --steps 1 --shots 2 {flags}", stays)
        plastic_run, plastic = encoder(f"hebbian --steps 3 {flags}", stays)
        assert {torch.equal(*pair) for pair in zip(static, plastic, strict=True)} == {stays}
    row, _ = measured(run, episodes=5, batch_size=2, data_dir=fake_packs())
    _, task, model = train.load_run(run / "best.pt", dict(queries=15, data_dir=fake_packs()))
    embed = model.eval().embed
    generator = random_generator(0, "test")
    right = []
    neighbours = []
    for n in (2, 2, 1):
        episodes = task.sample("test", n, generator)
        answers, _ = embed.answer(episodes)  # (n, 75, 5)
        right += (answers.argmax(2) == episodes.target).flatten().tolist()
        for x, y, query_x, target, answer in zip(*episodes, answers):
            shots, queries = [embed.norm(embed.encoder(images)) for images in (x, query_x)]
            means = torch.stack([shots[y == c].mean(0) for c in range(5)])  # (5, F)
            assert_close(answer, 10 * torch.cosine_similarity(queries[:, None], means, 2), "", 1e-4)
            nearest = torch.cosine_similarity(queries[:, None], shots, 2).argmax(1)  # (75)
            neighbours += (y[nearest] == target).tolist()
    assert abs(row["neighbour"] - sum(neighbours) / 375) < 1e-9
    file = new_folder() / "rows.jsonl"
    file.touch()
    evaluation.append_row(file, row)
    assert json.loads(file.read_text())["neighbour"] == row["neighbour"], "scores keep all digits"
    plastic_row, _ = measured(plastic_run, episodes=2, batch_size=2, data_dir=fake_packs())
    _, task, last = train.load_run(plastic_run / "ckpt.pt", dict(queries=15, data_dir=fake_packs()))
    torch.manual_seed(0)
    untrained = Transformer(task, last.config).eval()
    untrained.embed.encoder = last.eval().embed.encoder
    untrained.embed.norm = last.embed.norm
    with torch.no_grad():
        _, fast = untrained(task.sample("test", 2, random_generator(0, "test")))
    persistence = torch.cat(fast.eta, dim=1).mean() / last.config.eta0
    assert abs(plastic_row["untrained"]["persistence"] / persistence - 1) < 1e-6
    score = sum(right) / len(right)
    assert len(right) == 375 and 0.25 < score < 1 and abs(row["prototype"] - score) < 1e-9
    assert f"  nearest prototype  {row['prototype']:.5f}" in "\n".join(evaluation.report(row))

@mock.patch.object(train, "PRETRAIN_INTERVAL", 1)
def test_resumed_run_is_the_same():
    copy = f"{TINY_COPY} --rule gradient --steps 7 --eval-interval 1"
    images = f"{TINY_IMAGES} --rule none --n-layer 1 --data-dir {fake_packs()} --steps 7"
    rare = f"{images} --eval-interval 3"
    cases = [(copy, 1, 2), (copy, 3, 4, signal.SIGINT), (rare, -1, 2), (rare, 3, 6),
             (f"{images} --eval-interval 4", 0, 3)]  # saved: -1 in pretraining, 0 right after it
    whole = {argv: trained(argv) for argv in {case[0] for case in cases}}
    for argv, run in whole.items():
        assert log_of(run) != log_of(trained(f"{argv} --seed 1"))
    for argv, saved, *stop in cases:  # before an update, by a signal
        part = new_folder()
        output = interrupted(f"{argv} --out-dir {part}", *stop)
        command, resume = output.split("stopped; to go on: python train.py ")
        assert not command and resume.startswith(f"--resume --out-dir {part}")
        assert load(part)["run"]["step"] == saved
        with (part / "metrics.jsonl").open("a") as log:  # It will be written anew.
            log.write('{"step": 6, "val_metric": 0.5}\n{"step": 7')
        for done in (max(0, saved), 7):  # At the second time nothing is left to do.
            torch.randn(3)
            output = call(train, resume)
            assert f", {done}/7 done; " in output and "finished: 7 updates" in output
            assert_same_run(whole[argv], part)
    call(train, f"{resume.strip()} --steps 9 --eval-interval 3 --lr 0.5")
    assert log_of(part)["step"] == [-1, 0, 4, 7, 9]
    assert {"train_loss", "val_loss", "val_metric", "metric"} < log_of(part).keys()
    rate = load(part)["optimizer"]["param_groups"][0]["lr"]
    assert math.isclose(rate, 0.5 * 9 / 25 * 0.05) and load(part)["args"]["lr"] == 0.5

def test_weight_decay_and_clip():
    small = trained(f"{TINY_COPY} --rule none --steps 1 --lr 1e-9 --weight-decay 1 --clip 1e-9")
    group, = load(small)["optimizer"]["param_groups"]
    moments = [state["exp_avg"].norm() for state in load(small)["optimizer"]["state"].values()]
    assert group["weight_decay"] == 1 and 0 < torch.stack(moments).norm() < 1.01e-10

def test_killed_at_any_moment():  # KILLS=30 tries more.
    rng = random.Random(0)
    start = time.time()
    argv = f"{TINY_COPY} --rule hebbian --steps 24 --eval-interval 1"
    whole = trained(argv)
    duration = time.time() - start
    fork = torch.multiprocessing.get_context("fork")
    for _ in range(int(os.environ.get("KILLS", 1))):
        part = new_folder()
        codes = []
        while codes[-1:] != [0]:
            command = f"{'--resume' if codes else argv} --out-dir {part}"
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

def test_two_processes_share_batches_and_train():
    folder = new_folder()
    cases = [*product((Copy(2, 3, 6), Regression(30, 4, 2)), RULES)]
    def learn():
        device, rank, world = train.prepare(SimpleNamespace(device="cpu", threads=1, batch_size=4))
        for i, (task, rule) in enumerate(cases):
            model = small_model(task, rule).train()
            optimizer = mock.Mock(param_groups=[dict(params=[*model.parameters()])])
            episodes = draw(task, 4).to(device, rank, world)
            loss = task.loss(model(episodes)[0], episodes.target)
            loss = train.update(loss, optimizer, 0.5, 2.0, world)
            torch.save([loss, *[p.grad for p in model.parameters()]], folder / f"{i}-{rank}{world}")
    in_two_processes(learn)
    learn()
    for i, (task, _) in enumerate(cases):
        one, *two = [load(folder, f"{i}-{name}") for name in ("01", "02", "12")]
        torch.testing.assert_close(two, [one, one], rtol=0, atol=1e-9)
        norm = torch.cat([gradient.flatten() for gradient in one[1:]]).norm() / 2
        assert 0.99 < norm < 1.01 or isinstance(task, Copy), f"a large one is clipped: {norm}"
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
    assert log_of(one)["step"] == [2, 4, 6]
    for run, key in product((two, mixed), ("step", "train_loss", "val_loss")):
        assert_close(log_of(run)[key], log_of(one)[key], key, 1e-4)
    in_two_processes(lambda: call(train, f"{argv} --out-dir {new} --batch-size 3", 2))
    assert not new.exists()

def test_cuda():
    if not (shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists()):
        raise SkipTest("no CUDA here")
    program = ("import sys, torch, train\ntorch.cuda.is_available() or sys.exit(77)\n"
               "for argv in sys.argv[1:]: train.main(argv.split())")
    folder = new_folder()
    commands = [f"{TINY_COPY} --rule {rule} --steps 2 --device {device} --out-dir "
                f"{folder}/{rule}-{device}" for rule, device in product(RULES, ("cpu", "cuda"))]
    process = subprocess.run([sys.executable, "-c", program, *commands], cwd=HERE, text=True,
                             capture_output=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": "0"})
    if process.returncode == 77:
        raise SkipTest("no CUDA here")
    assert process.returncode == 0, process.stderr
    for rule, key in product(RULES, ("train_loss", "val_loss")):
        assert f"rule {rule}, on cuda" in process.stdout
        cpu, cuda = [log_of(folder / f"{rule}-{device}")[key] for device in ("cpu", "cuda")]
        assert_close(cuda, cpu, f"{rule}: {key}", 1e-3)

def test_measured_figures():
    run = trained(f"{TINY_COPY} --steps 4 --eval-interval 1 --seed 1")
    state = load(run, "best.pt")
    state["model"]["head.bias"][[1, -1]] += 1.0  # the answer 1, and m_t
    torch.save({**state, "step": 2}, run / "best.pt")
    row, answers = measured(run / ".." / run.name, episodes=12, batch_size=1)
    _, task, model = train.load_run(run / "best.pt")
    last = train.load_run(run / "ckpt.pt")[2].eval()
    generator = random_generator(0, "test")
    parts = zip(*[task.sample("test", 1, generator) for _ in range(12)])
    episodes = Episodes(*[None if part[0] is None else torch.cat(part) for part in parts])
    with torch.no_grad():
        outs = [model.eval()(episodes, write)[0] for write in (True, False)]
        _, fast = last(episodes)
    right, lesioned = [(out[:, -2:].argmax(-1) == episodes.target).double() for out in outs]
    eta, norm, change = (torch.cat(gate, 1) for gate in (fast.eta, fast.norm, fast.change))
    slow = torch.cat([layer.weight.flatten() for layer in last.plastic_layers()]).norm()
    write = eta * norm  # (12, 7): the last step writes nothing
    figures = dict(score=right.mean(), interval=1.96 * right.mean(1).std() / 12**0.5,
                   lesion=lesioned.mean(), lesion_interval=1.96 * lesioned.mean(1).std() / 12**0.5,
                   loss=task.loss(outs[0], episodes.target), persistence=eta.mean() / 0.02,
                   gate=(eta / (0.02 * (1 / norm).clamp(max=1))).mean(),
                   change=change.mean() / slow)
    for key, figure in figures.items():
        assert abs(row[key] - figure) < 1e-5, key
    for key, gate in dict(eta=eta, norm=norm, write=write, change=change).items():
        assert_close(torch.tensor(row["gates"][key]), gate.mean(0), key, 1e-5)
    facts = dict(name=run.name, rule="hebbian", seed=1, chance=0.25, episodes=12, best_step=2,
                 steps="item item blank blank blank delimiter recall recall".split(),
                 machine=f"CPU, torch {torch.__version__}, Python {sys.version.split()[0]}",
                 flags="--task copy --rule hebbian --seq-len 2 --delay 3 --vocab-size 6 --n-head 2 "
                       "--d-model 16 --d-ff 16 --steps 4 --batch-size 8 --eval-interval 1 --seed 1")
    assert facts.items() <= row.items() and 0 < right.mean() < 1
    torch.manual_seed(1)
    _, fast = Transformer(task, last.config).eval()(episodes)
    untrained = row["untrained"]
    assert abs(untrained["persistence"] - torch.cat(fast.eta, dim=1).mean() / 0.02) < 1e-6
    assert untrained["gate"] != row["gate"]

def test_kept_rows():
    run, other = [trained(f"{TINY_COPY} --steps 4 --eval-interval 1 --seed {i}") for i in (1, 2)]
    row, answers = measured(run, episodes=12, batch_size=1)
    file = new_folder() / "runs.jsonl"
    output = call(evaluation, f"{run} --episodes 12 --batch-size 1 --append {file}")
    assert output.split("\n", 1)[1] == "\n".join(evaluation.report(row, answers)) + "\n"
    figures = [f" {row[key]:.5f} ± {row[half]:.5f} (95% interval), 12 episodes; guessing 0.25\n"
               for key, half in (("score", "interval"), ("lesion", "lesion_interval"))]
    assert all(figure in output for figure in figures)
    texts = [call(evaluation, f"{file}"), "\n".join(evaluation.report(row))]
    for word, full in zip(*[re.findall(r"[\w.]+", text) for text in texts], strict=True):
        assert word == full or math.isclose(float(word), float(full), rel_tol=1e-3, abs_tol=2e-5)
    rounded, = evaluation.read_rows(file)
    assert (rounded["score"], rounded["loss"]) == (row["score"], float(f"{row['loss']:.4g}"))
    call(evaluation, f"{run} {other} --episodes 20 --append {file}")  # replaces a line, adds one
    rows = evaluation.read_rows(file)
    assert [(row["name"], row["episodes"]) for row in rows] == [(run.name, 20), (other.name, 20)]
    for line, row in zip(call(evaluation, f"{file}").splitlines()[1:], rows, strict=True):
        assert line[:68] == "{name:32} {score:11.5f} {interval:11.5f} {lesion:11.5f}".format(**row)
    assert call(evaluation, f"{file} --only {other.name[:-1]}?").startswith(f"{other.name}: ")
    kept = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) + 100, limits[1]))  # as a full disk
    try:
        assert str(file) in call(evaluation, f"{run} --episodes 2 --append {file}", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == kept, "half a line is left"

def test_salience_and_intervals():
    model = Transformer(Cue(2, 4, 3), Config(rule="hebbian", max_norm=0.5))
    # Step 0 always counts, step 4 never. At step 1, the writes 6 and 2 are compared with 1, 2
    # and 3; at step 2, 9 and 9 with 3, 3 and 3; at step 3, 1 with 4, 4, 4 and 4.
    asked_steps = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2], [0, 3]])
    steps = [[7.0] * 5, [6, 2, 1, 2, 3], [3, 3, 9, 9, 3], [4, 4, 4, 4, 1], [7] * 5]
    write = torch.tensor(steps).double().T
    gates = torch.stack([write.square(), 1 / write, write])  # eta, norm, change
    row = evaluation.gate_figures(model, gates, asked_steps)
    assert math.isclose(row["selectivity"], (4 / 2 + 9 / 3 + 1 / 4) / 3)
    def gate(*writes):  # the mean of eta_t / (eta_0 min(1, max_norm / n_t)), as n_t = 1 / write
        return sum(w**2 / (0.02 * min(1, 0.5 * w)) for w in writes) / len(writes)
    assert math.isclose(row["gate_counts"], (gate(6, 2) + gate(9, 9) + gate(1)) / 3)
    assert math.isclose(row["gate_noise"], (gate(1, 2, 3) + gate(3, 3, 3) + gate(4, 4, 4, 4)) / 3)
    assert "selectivity" not in evaluation.gate_figures(model, gates, torch.tensor([[0, 1]] * 5))
    assert math.isclose(evaluation.interval(torch.ones(600, 5)), 1 - 600 / (600 + 1.96**2))

def test_which_write_each_read_uses():
    for task, rule in product((Copy(3, 2, 5), Cue(4, 6)), PLASTIC):
        model = small_model(task, rule, FastWeights)
        episodes = draw(task, 2)
        with intercepted(FastWeights, "read") as reads, torch.no_grad():
            answers, _ = model(episodes)
        fast = defaultdict(list)  # layer: P_t x_t + p_t (B, 1, out) of each step, then query
        for read in reads:
            _, layer, x = read.args
            fast[layer] += (read.result - layer(x)).split(1, dim=1)
        assert all(not values[0].any() and values[-1].any() for values in fast.values())
        with intercepted(WatchedFastWeights, "terms") as terms, torch.no_grad():
            norms = evaluation.watched_reads(model, episodes)
        left = {layer: iter(values[1:]) for layer, values in fast.items()}
        for read in terms:
            assert_close(read.result.sum(1, keepdim=True), next(left[read.args[1]]),
                         f"{rule}: the terms of all writes are the read")
        assert not any([*values] for values in left.values()), "a read without terms"
        parts = [[call.result.norm(dim=2) for call in terms if call.args[1] is layer]
                 for layer in model.plastic_layers()]
        for norm, *layers in zip(norms, *parts, strict=True):
            assert_close(norm, torch.cat(layers), "norms")
        assert model.fast_weights is FastWeights, "the model stays as it was"
        assert_close(model(episodes)[0], answers, "answers")

def test_reads_in_words():
    task = Cue(2, 4)
    first = [[1.0], [1.0], [1.0], [1.0]]  # of step 1, in two layers and two episodes: (4, 1)
    queries = [[[2.0, 1], [2, 1], [2, 1], [1, 2]], [[1, 2], [3, 2], [1, 2], [1, 2]]]
    reads = [torch.tensor(norms) for norms in (first, *queries)]
    episodes = SimpleNamespace()
    with mock.patch.object(Cue, "asked_steps", lambda *_: torch.tensor([[0, 1]] * 2)):
        row = evaluation.read_figures(task, episodes, reads)
    # In both episodes the first query asks for the write 0, and the second for the write 1.
    assert row == dict(reads=dict(write=[0], share=[1.0]), reads_asked=6 / 8)
    copy = [torch.tensor(norms) for norms in ([[1.0]] * 4, [[1.0, 2], [2, 1], [2, 1], [2, 1]])]
    nothing = torch.zeros(4, 3)
    row = evaluation.read_figures(Copy(2, 0), None, copy + [nothing])
    assert row == dict(reads=dict(write=[0, 0, -1], share=[1.0, 0.75, 1.0]))
    gates = dict(eta=[0.1] * 4, norm=[1.0] * 4, write=[0.1, 0.2, 0.1, 0.1])
    row |= dict(steps="item item delimiter recall recall".split(), gates=gates)
    lines = [*evaluation.report_steps(row)]
    assert [line.split()[5:7] for line in lines[2:4]] == [["item", "0,"]] * 2
    assert lines[3].split()[7] == "75%" and lines[2].endswith("#" * 30)
    assert lines[4].split()[5:] == ["-", "#" * 15] and len(lines) == 6
    assert lines[5].split() == "4 recall - - - -".split()

# ------ 5. Bad input ------
def test_bad_arguments():
    highest = dict(eta0=1, lr=1, alpha_init=1000, max_norm=1e18, seed=2**30, window=10**6)
    argv = " ".join(f"--{name} {value}".replace("_", "-") for name, value in highest.items())
    assert highest.items() <= vars(train.parse_args(argv.split())).items(), "tops of ranges"
    out = new_folder() / "out"
    wrong = """--n-head 3 --d-model 64; --pairs 9 --cues 8 --task cue; --ways 17 --task cifarfs;
        --shots 6 --queries 15 --task omniglot; --merge 2 --ways 5 --task omniglot;
        --steps ten; --lr nan; --alpha-init inf;
        --rule magic; --ablate all; --plastic none; --delay 3 --task cue; --nonsense;
        --alpha 2; --device tpu; --device cuda; --seed 1073741825; --window -1;
        --steps 0; --lr -1; --eta0 2; --alpha-init -1; --max-norm 0; --vocab-size 3; --dim 0;
        --delay 8000; --seq-len 1001; --noise 5001; --support 5001; --batch-size 1000000000"""
    reasons = {flags: flags.split()[:2] for flags in wrong.split(";")}
    reasons |= {"--resume": ["ckpt.pt"], "--d-model 1000000": ["memory", "--batch-size"],
                "--pretrain-steps 5": ["--pretrain-steps", "copy has no encoder"]}
    for flags, words in reasons.items():
        line = call(train, f"{flags} --out-dir {out} --data-dir {fake_packs()}", 2)
        assert all(word in line for word in words) and not out.exists(), f"{flags}: {line}"
    for environ in (dict(WORLD_SIZE="0"), dict(WORLD_SIZE="2"), dict(WORLD_SIZE="x")):
        with mock.patch.dict(os.environ, environ):
            assert "error" in call(train, f"--out-dir {out}", 2)
    for name in ("", "-dash"):
        assert "--out-dir" in call(train, f"--out-dir={name}", 2) and not out.exists()
    out.write_text("a file")
    assert str(out) in call(train, f"--steps 1 --out-dir {out}", 2)
    assert str(out) in call(evaluation, str(out), 2) and out.read_text() == "a file"
    assert "best.pt" in call(evaluation, str(out.parent), 2)

def test_a_run_is_not_lost():
    run = trained(f"{TINY_COPY} --rule none --steps 1")
    before = files_of(run)
    again = (train, f"{TINY_COPY} --out-dir {run}", 2)
    assert f"{run} has files: --resume goes on with a run, or remove the folder" in call(*again)
    for new in "seed 1;pretrain-steps 3;delay 4;task cue;pairs 3;n-layer 1;rule hebbian".split(";"):
        line = call(train, f"--resume --out-dir {run} --{new}", 2)
        assert re.fullmatch(f"error: --{new}: (--resume cannot change|copy has no) .*\n", line)
    assert files_of(run) == before
    call(train, f"--resume --out-dir {run} --steps 2 --batch-size 4 --n-layer 2")  # as it was
    (run / "ckpt.pt").unlink()  # What is left is not replaced either.
    before = files_of(run)
    assert f"{run} has files" in call(*again) and files_of(run) == before

def damages(path, trap):  # what no command can read in place of a checkpoint or a pack
    def saved(state):
        torch.save(state, buffer := io.BytesIO())
        return buffer.getvalue()
    content = path.read_bytes()
    state = load(path.parent, path.name)
    yield from (saved(dict(args=trap, images=trap, model=trap)), saved([1, 2]), b"", b"x" * 1000,
                content[:len(content) // 2], content[:-100])
    if "images" in state:
        few = torch.zeros(3, *state["images"].shape[1:], dtype=torch.uint8)
        floats = torch.zeros(1).expand(state["images"].shape)
        changes = [dict(images=trap), dict(images=few, classes=[*"abc"]), dict(images=floats)]
    else:
        misfits = [dict(d_ff=17), dict(d_ff="wide"), dict(rule="magic"), dict(delay=300_000_000),
                   dict(n_head=1, d_model=10**6), dict(steps=1.5), dict(steps=True), dict(pairs=3),
                   dict(delay=None), dict(lr=None), dict(seed=[1])]
        wrong = [trap, None, {"task": "copy"}, *(state["args"] | misfit for misfit in misfits)]
        changes = [dict(model={}), dict(model=None), *(dict(args=args) for args in wrong)]
        weight = state["model"]["blocks.0.up.weight"]
        for odd in (weight[:1, :1].expand_as(weight), weight[1:], weight.to("meta")):
            changes.append(dict(model=state["model"] | {"blocks.0.up.weight": odd}))
    if "run" in state:  # Without its parts the content is that of best.pt.
        run = state["run"]
        optimizer = state["optimizer"]
        yield from (saved({key: part for key, part in state.items() if key != gone})
                    for gone in ("run", "optimizer", "generator"))
        wrong = [dict(step="4"), dict(step=-1), dict(best=None), dict(losses=["x"]), dict(log=[5]),
                 dict(log=[{"step": 4}]), dict(log=[run["log"][0] | {"val_loss": "x"}]),
                 dict(log=[]), dict(best=math.nan)]
        changes += [dict(run=run | change) for change in wrong]
        moments = optimizer["state"][0] | {"exp_avg": torch.zeros(3)}
        changes += [dict(optimizer=optimizer | {"state": state}) for state in (
            None, {0: {}}, {0: moments}, {999: optimizer["state"][0]},
            {0: optimizer["state"][0] | {"step": torch.tensor(-1.0)}})]
        changes += [dict(generator=torch.zeros(3, dtype=torch.uint8)), dict(generator=None)]
    yield from (saved(state | change) for change in changes)

def test_damaged_files():
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
    trapped = next(damages(pack, trap))
    row = json.loads(rows.read_text())
    misfits = [{key: row[key] for key in row if key != gone}
               for gone in ("name", "flags", "score", "task", "rule", "curve")]
    misfits += [row | {"score": None}, row | {"gates": 3}, row | {"curve": {"step": [1]}},
                row | {"name": 5}, row | {"score": 10**400}]
    contents = (b"x", b"5", b"[1]", b"{}", b"\xff", rows.read_bytes()[:-1],  # no end of line
                *(json.dumps(x).encode() + b"\n" for x in misfits))
    cases += [(rows, content, {2}) for content in (trapped, *contents)]
    cases.append((run / "metrics.jsonl", trapped, {0}))  # A resume writes the log anew.
    rng = random.Random(0)
    for _ in range(int(os.environ.get("DAMAGED", 15))):
        path = rng.choice(binaries)
        content = bytearray(path.read_bytes())
        flips = rng.choice((0, 1, 10, 1000))
        for _ in range(flips):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        length = len(content) if flips else rng.randrange(len(content))
        cases.append((path, content[:length], {0, 2}))
    before = files_of(folder)
    for path, content, statuses in cases:
        path.write_bytes(content)
        tasks.load_pack.cache_clear()
        output = call(*commands[path], *statuses)
        assert not new.exists(), "a file that was loaded ran code"
        if output.startswith("error: "):
            assert path.name in output and files_of(folder) == {**before, path: content}
        shutil.rmtree(folder / "images", ignore_errors=True)
        for file, content in before.items():
            file.write_bytes(content)

def test_faults_lose_nothing():
    def full(function, path, *args):  # a full disk, where best.pt is renamed or at a write
        if function.__name__ == "open":
            function(path, *args).write(b"half")
        elif args[0].name != "best.pt":
            return function(path, *args)
        raise OSError(28, "No space left on device")
    argv = f"{TINY_COPY} --steps 6 --eval-interval 1 --lr 1e-12"  # Each step is the best so far.
    # First come ckpt.pt and metrics.jsonl; then each step writes metrics, best and ckpt.
    for owner, name, first, saved in ((os, "replace", 9, [2, 2]), (builtins, "open", 8, [1, 2])):
        run = new_folder()
        with intercepted(owner, name, full, first):
            line = call(train, f"{argv} --out-dir {run}", 2)
        assert "No space left" in line and str(run) in line and not list(run.glob("*.tmp"))
        assert [load(run)["run"]["step"], load(run, "best.pt")["step"]] == saved
        call(train, f"--resume --out-dir {run}")
        assert_same_run(run, trained(argv))
    assert "No space left" in call(evaluation, f"{run} --episodes 2 --append /dev/full", 2)
    # A step has an update and a validation batch: call 7 is the loss of update 4.
    run = new_folder()
    with intercepted(Copy, "loss", lambda loss, *args: loss(*args) * math.nan, 7):
        line = call(train, f"{argv} --out-dir {run}", 2)
    assert "loss nan" in line and "--lr" in line and load(run)["run"]["step"] == 3, line
    assert all(value.isfinite().all() for value in load(run)["model"].values())

def test_what_is_missing_linked_or_planted():
    argv = f"{TINY_COPY} --rule none --steps 2 --eval-interval 1"
    run = trained(argv)
    target = new_folder() / "target"
    planted = new_folder() / "planted"
    log = (run / "metrics.jsonl").read_text()
    (run / "best.pt").unlink()
    shutil.move(run / "metrics.jsonl", target)
    (run / "metrics.jsonl").symlink_to(target)
    (run / "best.pt.tmp").symlink_to(planted)
    planted.write_text("")
    output = call(train, f"--resume --out-dir {run}")
    assert "best.pt is missing: the model of ckpt.pt replaces it" in output
    assert (run / "metrics.jsonl").is_symlink() and target.read_text() == log
    assert not planted.read_bytes() and not list(run.glob("*.tmp"))
    assert load(run, "best.pt")["step"] == 2 and "finished: 2 updates" in output
    call(evaluation, f"{run} --episodes 2")
    target.unlink()
    os.mkfifo(target)  # Like a device, it must stay.
    reader = os.open(target, os.O_RDWR | os.O_NONBLOCK)
    call(train, f"--resume --out-dir {run}")
    assert os.read(reader, 10**6).decode() == log and target.is_fifo()
    call(evaluation, f"{run} --episodes 2 --append {target}")
    assert json.loads(os.read(reader, 10**6))["name"] == run.name and target.is_fifo()
    os.close(reader)

def test_a_stranger_takes_no_folder_and_no_memory():
    run = trained(f"{TINY_IMAGES} --rule none --steps 1 --data-dir {fake_packs()}")
    folder = new_folder()
    for name in ("ckpt.pt", "best.pt"):
        state = load(run, name)
        torch.save(state | {"args": state["args"] | {"data_dir": f"{folder}/new"}}, run / name)
    with mock.patch.object(train.Training, "data_dir", str(fake_packs())):
        call(train, f"--resume --out-dir {run}")
    call(evaluation, f"{run} --episodes 2 --data-dir {fake_packs()}")
    assert not os.listdir(folder)
    torch.save(state | {"args": state["args"] | {"d_ff": 10**5}}, run / "best.pt")
    with intercepted(train, "Transformer") as models:
        call(evaluation, f"{run} --data-dir {fake_packs()}", 2)
    assert not models, "a small file took much memory"

def test_nothing_is_measured_in_vain():
    copy = trained(f"{TINY_COPY} --rule none --steps 1")
    cue = trained(f"{TINY} --task cue --rule none --steps 1")
    folder = new_folder()
    rows = new_folder() / "rows"
    rows.write_text("half a li")
    for flags in ("--append {}/no/rows", "--append {}", f"--append {rows}"):
        with intercepted(evaluation, "measure") as calls:
            call(evaluation, f"{copy} {flags.format(folder)}", 2)
        assert not calls and not os.listdir(folder), flags
    rows.unlink()
    call(evaluation, f"{copy} {cue} --episodes 2 --append {rows}")

def test_runs_that_are_mixed_or_not_finite():
    one, other = [trained(f"{TINY_COPY} --rule {rule} --steps 1") for rule in PLASTIC[:2]]
    shutil.copy(other / "ckpt.pt", one)
    line = call(evaluation, f"{one} --episodes 2", 2)
    assert line == f"error: {one} has best.pt and ckpt.pt of different runs\n"
    state = load(other)
    state["model"]["head.bias"][-1] = math.nan
    torch.save(state, other / "ckpt.pt")
    rows = new_folder() / "rows"
    call(evaluation, f"{other} --episodes 2 --append {rows}")
    assert "nan" in call(evaluation, f"{rows}"), "a file that --append wrote is read"

def test_terminals_that_cannot_print():
    run = new_folder() / "é"
    argv = f"{TINY_COPY} --rule none --steps 3 --eval-interval 1 --out-dir {run}"
    def broken(print, *lines, **options):
        if lines[0].startswith("step 2"):
            raise OSError("closed")
        print(*lines, **options)
    with mock.patch("builtins.print", functools.partial(broken, print)):
        assert "closed" in call(train, argv, 2, encoding="ascii")
    assert load(run)["run"]["step"] == 2
    assert r"\xe9" in call(train, f"--resume --out-dir {run}", encoding="ascii")
    assert r"\xe9" in call(evaluation, f"{run} --episodes 2", encoding="ascii")

def test_ctrl_c():
    def twice(*_):  # The second comes while the first is on its way.
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            with mock.patch.object(os, "_exit") as end:
                signal.raise_signal(signal.SIGINT)
            end.assert_called_with(130)
    run = trained(f"{TINY_COPY} --rule none --steps 1")
    new = new_folder() / "new"
    cases = [(evaluation, "measure", evaluation, f"{run}"), (train, "load_run", train, "--resume"),
             (train, "make_task", train, "--steps 1"), (train, "parse_args", train, "")]
    for owner, name, script, argv in cases:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with intercepted(owner, name, twice):
            where = f"--out-dir {run if '--resume' in argv else new}" if script is train else ""
            assert call(script, f"{argv} {where}", 130) == "stopped\n" and not new.exists(), name
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with intercepted(os, "replace", lambda *_: signal.raise_signal(signal.SIGINT)):
        call(train, f"--resume --out-dir {run}", 130)
    assert not list(run.glob("*.tmp"))

def known_flags(script):  # {flag: what argparse knows about it} of train or evaluation
    with intercepted(argparse.ArgumentParser, "parse_args", lambda *_: sys.exit(0)) as calls:
        call(script, "")
    parser = calls[0].args[0]
    return {flag.option_strings[-1]: flag for flag in parser._actions if flag.option_strings}

def test_random_arguments():
    rng = random.Random(1)
    outputs = []
    flags = {flag: known.choices or "-1 0 1 1 2 2 3 4 8 30 0.5 nan 1e20 inf x".split()
             for flag, known in known_flags(train).items() if known.nargs != 0}
    for _ in range(int(os.environ.get("ARGUMENTS", 30))):
        run = new_folder()
        chosen = rng.sample([*flags], rng.choice((1, 2, 4, 8)))
        chosen = [f"{flag} {rng.choice(flags[flag])}" for flag in chosen]
        argv = (f"--task {rng.choice([*tasks.TASKS])} --steps 1 --batch-size 2 --d-model 8 "
                f"--d-ff 8 --filters 2 {' '.join(chosen)} --pretrain-steps=0 --device=cpu "
                f"--data-dir {fake_packs()} --out-dir {run}")
        if not call(train, argv, 0, 2).startswith("error: "):
            flag = rng.choice("--seed --batch-size --threads --episodes --delay".split())
            argv = f"{run} --batch-size 2 --episodes 2 {flag} {rng.choice((0, 1, 2, 30))}"
            outputs.append(call(evaluation, f"{argv} --data-dir {fake_packs()}", 0, 2))
    assert not all(output.startswith("error: ") for output in outputs)

def test_requirements():
    lines = (HERE / "requirements.txt").read_text().splitlines()[1:]
    oldest = [tuple(map(int, re.findall(r"\d+", line))) for line in lines]
    assert oldest >= [(2, 6), (0, 21)], "older ones run code that is in a file"

def test_flags_are_explained():
    flags = {flag: known.help for flag, known in known_flags(train).items()}
    listed = re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", call(train, "--help"), re.MULTILINE)
    assert sorted(listed) == sorted(flags) and all(flags.values())
    for name, value in train.defaults("copy", "hebbian").items():
        assert str(value) in flags["--" + name.replace("_", "-")] or value in (None, False), name
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (HERE / "README.md").read_text()))
    unknown = named - {*flags, *known_flags(evaluation), "--standalone", "--nproc_per_node"}
    assert not unknown, f"the README knows flags that nobody has: {sorted(unknown)}"

# ------ 6. The pages of results ------
def seeds(values, key="score", first=0, **figures):  # rows of a cell, of seeds from `first` on
    row = dict(metric="accuracy", score=0.5, updates=9, trained=500, pace=6.0) | figures
    return [{**row, "seed": seed, key: value} for seed, value in enumerate(values, first)]

def test_students_quantiles():
    for t, freedom, p in [(12.706, 1, 0.05), (4.303, 2, 0.05), (-2.776, 4, 0.05), (2.228, 10, 0.05),
                          (-1.96, 1e4, 0.05), (9.925, 2, 0.01), (0.741, 4, 0.5)]:
        assert abs(tables.p_value(t, freedom) / p - 1) < 0.01, t
        assert p != 0.05 or abs(tables.quantile(freedom) / abs(t) - 1) < 1e-3
    assert abs(tables.p_value(200, 2) / 2.4998e-5 - 1) < 1e-3

def test_differences():
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), so t = 3.46 with 2 degrees, and
    # 4.303 / sqrt(3) = 2.484. Of 8 flips of signs two have a mean as large. Seed 3 is alone.
    one = seeds([1.0, 2.0, 3.0, 9.0])
    number, text, p, share = tables.difference(one, seeds([2.0, 4.0, 6.0]), "score")
    assert (number, text, share) == (3, "+2.000 (-0.484 to +4.484)", 0.25)
    assert abs(p - 0.0742) < 1e-3
    *_, p, share = tables.difference(seeds([1.0] * 4), seeds([2.0, 1.5, 0.7, 2.0]), "score")
    assert share == 4 / 16 and p > 0.05  # Signs ++++, +++ with a - on the 0.3, and their mirrors.
    # Errors and updates are ratios: their logarithms are 0, log 2 and log 4.
    one, other = [seeds([1.0 * x, 2.0 * x, 3.0 * x], metric="mse") for x in (1, 1)]
    for row, factor in zip(other, (1, 2, 4)):
        row["score"] *= factor
        row["updates"] *= factor
    for key in ("score", "updates", "minutes"):
        number, text, p, _ = tables.difference(one, other, key)
        assert (number, text) == (3, "× 2 (0.36 to 11)") and abs(p - 0.2254) < 1e-3, key
    never = seeds([500, None, 500], "updates")
    assert tables.difference(never, seeds([500] * 3, "updates"), "updates")[1].startswith("× 1 ")
    for few in (seeds([1.0, 2.0]), seeds([1.0, 2.0, 3.0], first=9), seeds([1.0, 2.0, None])):
        assert tables.difference(one, few, "score")[1:] == ("-", None, None)
    assert tables.difference(seeds([0.7, 0.71, 0.73]), seeds([0.8, 0.81, 0.83]), "score")[2] is None

def test_holm():
    ps = iter([0.01, 0.04, None, 0.03])
    with mock.patch.object(tables, "difference", lambda *_: (3, "x", next(ps), 0.25)):
        rows = tables.compare(["score"], ["cc"] * 4, {"c": []})
    assert [row[-1] for row in rows] == ["0.03", "0.06", "-", "0.06"]
    assert rows[0] == ["3", "x", "0.01", "0.25", "0.03"]

def test_figures():
    errors = seeds([0.03, 0.344, 0.1], metric="mse")
    for row, updates in zip(errors, (100, None, 300)):
        row["updates"] = updates
    errors[1]["pace"] = 3.0
    texts = {"score": "0.16 ± 0.16", "pace": "3",
             "learned": "2 of 3", "updates": "300 (100 to over 500)",
             "minutes": "15 (5 to over 25)"}
    assert {key: tables.figure(errors, key) for key in texts} == texts
    assert tables.figure(seeds([1.0] * 3), "score") == "1.000"
    assert tables.figure(seeds([0.7, 0.9]), "score") == "0.800 ± 0.141"
    assert tables.figure(seeds([90, 90], "updates"), "updates") == "90"
    assert tables.figure(seeds([0.0123, 0.0127], "change"), "change") == "0.013"

def test_learned_is_the_first_evaluation_within_5_percent():
    scores = {"accuracy": [0.96, 0.95, 0.95625, 1.0, 0.9], "mse": [0.1, 0.21, 0.2, 0, 4]}
    for metric, chance in {"accuracy": 0.125, "mse": 4}.items():
        curve = {"step": [-10, 10, 20, 30, 40], "val_metric": scores[metric]}  # -10: pretraining
        row = dict(name="a", task="copy", flags="--task copy --seed 0", metric=metric,
                   chance=chance, curve=curve, seconds=120, untrained={"gate": 0.4},
                   gates={"gate": [0.7, 0.5, 0.2]}, steps="item item blank recall".split())
        figures = dict(updates=20, trained=40, pace=3, total=2, rate=TASKS["copy"][1]["lr"],
                       gate_items=0.6, gate_blanks=0.2)
        assert {**row, **figures, "gate_before": 0.4} == tables.complete(row)
    other = tables.complete(row | {"flags": "--lr 0.5 --seed 0", "gates": {}})
    assert (other["rate"], other["gate_items"]) == (0.5, None)
    assert tables.RATES == {task: TASKS[task][1]["lr"] for task in tables.RATES}

def test_tables_and_numbers_are_filled_in():
    cells = {"a-none-b": seeds([0.7, 0.8, 0.6]), "a-hebbian-b": seeds([0.6] * 3, lesion=0.2),
             "a-gradient-b": seeds([0.8, 0.9, 0.7], lesion=0.3)}
    head = "<!-- table score lesion -->\n| x | y | H | L | G | L |\n| - | - | - | - | - | - |\n"
    rows = ("| words: of | 1 <!-- a-+-b --> | 0.600 | 0.200 | 0.800 ± 0.100 | 0.300 |\n"
            "| one | 2 <!-- a-none-b@pace -@x a-hebbian-b --> | 6 | - | 0.600 | 0.200 |\n")
    star = ("<!-- table score -->\n| x | s | H | G |\n| - | - | - | - |\n"
            "| typed | 1 | 2 | 3 |\n| w <!-- a-*-b --> |\n")
    compare = ("<!-- compare score -->\n| x | n | d | p | f | h |\n| - | - | - | - | - | - |\n"
               "| w <!-- a-none-b a-gradient-b --> |\n")
    numbers = ("It has <!-- a-none-b score -->0.700. Lesioned: <!-- a-hebbian-b lesion -->0.200, "
               "(<!-- a-gradient-b score -->0.800), <!-- a-none-b a-gradient-b score -->+0.100;\n")
    filled = tables.fill(f"{head}{rows}\n{star}\n{compare}\n{numbers}", cells)
    assert f"{head}{rows}\n" in filled and numbers in filled
    assert "| typed | 1 | 2 | 3 |\n" in filled
    assert "| w <!-- a-*-b --> | 0.700 ± 0.100 | 0.600 | 0.800 ± 0.100 |\n" in filled
    assert "b --> | 3 | +0.100 (+0.100 to +0.100) | - | 0.25 | - |\n" in filled
    for old, new in (("0.200 |", "9 |"), ("0.700.", "?."), ("0.800)", ")"), ("+0.100;", "-1;")):
        assert tables.fill(filled.replace(old, new), cells) == filled, "it is filled in anew"
    for wrong in ("<!-- c-d score -->1", "<!-- a-none-b nothing -->1", star.replace("a-*", "c-*"),
                  star.replace("| G ", ""), compare.replace("score", "nothing")):
        with TestCase().assertRaisesRegex(ValueError, "no (run|figure) is called|as many columns"):
            tables.fill(wrong, cells)

def test_pages_come_from_the_results():
    cells = tables.read_cells()
    for path in tables.PAGES:
        text = path.read_text()
        assert tables.fill(text, cells) == text, f"{path}: python results/tables.py"
        shown = re.sub(" <!--.*?-->", "", text).splitlines()
        assert all(len(line) <= 140 and line.count("|") <= 7 for line in shown
                   if line.startswith("|")), f"{path}: a wide table"
        for name in cells.keys() & {*re.findall(r"[a-z]+-[\w-]+", text)}:
            assert len({re.sub("--seed .*", "", row["flags"]) for row in cells[name]}) == 1, name
    source = "".join(path.read_text() for path in HERE.glob("*.py"))
    idea = (HERE / "README.md").read_text().split("## Make it your own")[0]
    for line in "".join(re.findall(r"```python\n(.*?)```", idea, re.DOTALL)).splitlines():
        assert line in source, f"the README has a line that is nowhere: {line}"

def test_figures_are_drawn():
    run = trained(f"{TINY_COPY} --rule hebbian --steps 1 --window 2")
    _, task, model = train.load_run(run / "best.pt")
    values = figures.read_map(model.eval(), task.sample("test", 3, random_generator(0, "test")))
    assert values.shape == (8, 8) and not values.triu().any() and values[1, 0] == 1
    assert (values.amax(1)[1:] > 0.5).all() and values.max() == 1
    if not importlib.util.find_spec("matplotlib"):
        raise SkipTest("no matplotlib here")
    for name, figure in figures.draw(run).items():
        picture = new_folder() / name
        figure.savefig(picture)
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

def test_lines_of_results():
    path = new_folder() / "rows.jsonl"
    good = (HERE / "results" / "runs.jsonl").read_text().splitlines()[0]
    for key in ("name", "metric", "curve", "seconds", None):
        bad = good.replace(f'"{key}"', '"x"') if key else "[1, 2"
        path.write_text(f"{good}\n{bad}\n")
        with TestCase().assertRaisesRegex(ValueError, f"rows.jsonl, line 2 is no row.*{key or ''}"):
            tables.read_cells(path)
    path.write_text(good + "\n" + good.replace('"seconds": ', '"seconds": 1') + "\n")
    rows = tables.read_cells(path)[re.sub(r"-s\d+$", "", json.loads(good)["name"])]  # the later
    assert [row["seconds"] for row in rows] == [float(f"1{json.loads(good)['seconds']}")]

def run(name):  # -> the outcome of this test, and the line to print
    start = time.time()
    try:
        globals()[name]()
    except SkipTest as reason:
        return "skipped", f"skip  {name}: {reason}"
    except (Exception, SystemExit):
        return "failed", f"FAIL  {name}\n{traceback.format_exc()}"
    return "passed", f"ok    {name}  {time.time() - start:.1f} s"

def main(words):
    names = [name for name in globals() if name[:5] == "test_" and re.search("|".join(words), name)]
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
