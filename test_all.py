"""Every test of the project: python test_all.py, or pytest test_all.py.

The oracle comes first: the recurrence as the paper writes it, one sequence and one step at a time with an explicit
P_t, in double precision. Everything else in plasticity.py and model.py is only allowed to be faster than it.
"""
import collections
import concurrent.futures
import contextlib
import http.server
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
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import eval as evaluation
import tasks
import train
from model import Cache, Transformer
from plasticity import RULES, FastWeights, SharedMatrix
from tasks import Copy, Cue, Episodes, FewShot, Regression, random_generator

HERE = Path(__file__).parent


# ---------------------------------------------------------------- the oracle

def oracle(model, episodes):
    """Section 1 of the paper, literally -> the answers (B, Q or T, n_out) and the eta_t of each write (B, T)."""
    answers, etas = [], []
    for b in range(len(episodes.target)):
        one = Episodes(*(None if t is None else t[b:b + 1] for t in episodes))
        context, queries = model.embed(one)
        answer, eta = oracle_sequence(model, context[0], None if queries is None else queries[0])
        answers.append(answer)
        etas.append(eta)
    return torch.stack(answers), torch.stack(etas)


def oracle_sequence(model, context, queries):
    """One sequence: context (T, C), queries (Q, C) or None."""
    rule, n_out = model.rule, model.plasticity.n_out
    outer = model.blocks[0].up.outer
    layers = [layer for block in model.blocks for layer in (block.up, block.down)]
    P = {layer: torch.zeros_like(layer.weight) for layer in layers}
    p = {layer: torch.zeros_like(layer.bias) for layer in layers}
    past = [[] for _ in model.blocks]  # of each block: (k, v) of every context step
    ablate = model.plasticity.ablate

    def turn(x, t):
        """Rotary positions as complex numbers: channel j and channel j + D/2 of x (D) are one, times e^(i t speed_j)."""
        half = len(x) // 2
        speed = torch.tensor([10000.0 ** (-j / max(1, half - 1)) for j in range(half)], dtype=torch.float32)
        turned = torch.complex(x[:half], x[half:]) * torch.exp(1j * (t * speed).double())
        return torch.cat([turned.real, turned.imag])

    def plastic(layer, x, read):
        # y_t = (W + P_t) x_t + (b + p_t)
        y = (layer.weight + P[layer]) @ x + (layer.bias + p[layer])
        read[layer] = x, y
        return y

    def step(x, t):
        """One token (C) at position t -> z_t, what each plastic layer read, and each block's (k, v)."""
        read, new = {}, []
        for block, seen in zip(model.blocks, past):
            attention = block.attention
            q, k, v = attention.qkv(block.norm1(x)).chunk(3)
            size = len(q) // attention.n_head
            if model.position is None:
                q, k = (torch.cat([turn(part, t) for part in whole.split(size)]) for whole in (q, k))
            new.append((k, v))
            seen = seen + [(k, v)]
            if model.window:
                seen = seen[-model.window:]
            heads = []
            for h in range(attention.n_head):
                part = slice(h * size, (h + 1) * size)
                scores = torch.stack([q[part] @ k_s[part] / math.sqrt(size) for k_s, _ in seen])
                heads.append(sum(w * v_s[part] for w, (_, v_s) in zip(scores.softmax(0), seen)))
            x = x + attention.proj(torch.cat(heads))
            x = x + plastic(block.down, F.gelu(plastic(block.up, block.norm2(x), read)), read)
        return model.head(model.norm(x)), read, new

    def place(token, t):
        return token if model.position is None else token + model.position[t]

    answers, etas = [], []
    for t, token in enumerate(context):
        z, read, new = step(place(token, t), t)
        answers.append(z[:n_out])
        for seen, kv in zip(past, new):
            seen.append(kv)
        if rule == "none":
            continue
        if rule == "gradient":
            # L_t = mean((w_out ∘ z_t)²), g_t = dL_t/dy_t
            L = ((model.plasticity.w_out * z) ** 2).mean()
            g = dict(zip(layers, torch.autograd.grad(L, [read[layer][1] for layer in layers], create_graph=True)))
            D = {layer: -torch.outer(g[layer], read[layer][0]) for layer in layers}
            d = {layer: -g[layer] for layer in layers}
        else:
            D = {layer: torch.outer(read[layer][1], read[layer][0]) for layer in layers}
            d = {layer: read[layer][1] for layer in layers}
        norm = torch.sqrt(sum((D[layer] ** 2).sum() for layer in layers))
        scale = torch.ones_like(norm) if model.plasticity.max_norm == 0 else (model.plasticity.max_norm / norm).clamp(max=1)
        eta = model.plasticity.eta0 * (1 if ablate == "eta" else torch.sigmoid(z[n_out])) * scale
        if ablate == "backward":
            eta, D, d = eta.detach(), {k: v.detach() for k, v in D.items()}, {k: v.detach() for k, v in d.items()}
        etas.append(eta)
        for layer in layers:
            # P_{t+1} = (1 - eta_t) P_t + eta_t * alpha ∘ D_t
            alpha = torch.outer(layer.alpha_post, layer.alpha_pre) if outer else layer.alpha
            P[layer] = (1 - eta) * P[layer] + eta * alpha * D[layer]
            p[layer] = (1 - eta) * p[layer] + eta * layer.beta * d[layer]
    if queries is not None:  # each reads as if it alone came next, and writes nothing
        answers = [step(place(query, len(context)), len(context))[0][:n_out] for query in queries]
    return torch.stack(answers), torch.stack(etas) if etas else torch.zeros(0)


def small_model(task, rule, seed=0, **sizes):
    """A small model in double precision whose every parameter is random, so that no term hides behind a 0 or a 1."""
    torch.manual_seed(seed)
    model = Transformer(task, rule, **{**dict(n_layer=2, n_head=2, d_model=8, d_ff=12, filters=4), **sizes}).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def draw(task, batch_size, seed=0, split="train"):
    """Episodes with double-precision features."""
    return Episodes(*(t.double() if t is not None and t.is_floating_point() else t
                      for t in task.sample(split, batch_size, random_generator(seed, split))))


def gradients(model, out):
    """d(a fixed random weighting of out)/d(parameter), for every parameter by name."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(learned, torch.autograd.grad((out * weights).sum(), list(learned.values()), allow_unused=True)))


def assert_close(a, b, what, tolerance=1e-9):
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"{what} differs by {difference:.2e}"


def check_against_oracle(task, rule, **sizes):
    model, episodes = small_model(task, rule, **sizes), draw(task, 2)
    out, gates = model(episodes)
    expected, eta = oracle(model, episodes)
    assert_close(out, expected, "the answer")
    if rule != "none":
        assert_close(gates.eta, eta[:, :gates.eta.size(1)], "eta")
        assert eta.std() > 0.01 * eta.mean(), "every eta is the same, so this shows too little"
    ours, theirs = gradients(model, out), gradients(model, expected)
    for name in ours:
        if model.plasticity.ablate == "backward" and name == "plasticity.w_out":
            assert ours[name] is None and theirs[name] is None
            continue
        assert ours[name] is not None and theirs[name] is not None, f"no gradient reaches {name}"
        scale = max(1.0, theirs[name].abs().max().item())
        assert_close(ours[name] / scale, theirs[name] / scale, f"the gradient of {name}")
    with torch.no_grad():  # evaluation keeps no history, and must say the same
        assert_close(model(episodes)[0], expected, "the answer without gradients")
    return gates


def test_oracle_without_queries():
    for rule in RULES:
        for window in (0, 1, 3):
            check_against_oracle(Copy(2, 2, 5), rule, window=window)


def test_oracle_with_queries():
    for rule in RULES:
        for window in (0, 1, 3):
            check_against_oracle(Cue(4, 6), rule, window=window)
            check_against_oracle(Regression(2, 4, 3), rule, window=window, n_layer=1)


def test_oracle_with_and_without_clipping():
    for rule in ("hebbian", "gradient"):
        for max_norm in (0, 0.01, 1, 1e6):
            gates = check_against_oracle(Copy(2, 2, 5), rule, max_norm=max_norm, eta0=0.1)
            clipped = (gates.d_norm > max_norm).double().mean().item() if max_norm else 0.0
            assert clipped == {0: 0.0, 0.01: 1.0, 1e6: 0.0}.get(max_norm, clipped)


def test_oracle_with_folding():
    for rule in ("hebbian", "gradient"):
        for outer in (False, True):
            for fold in (0, 1, 2, 3):  # 0 never folds but for the queries; nor does the 32 of all other tests
                check_against_oracle(Copy(3, 2, 5), rule, fold=fold, outer=outer)
                check_against_oracle(Cue(5, 6), rule, fold=fold, outer=outer)
            for window in (1, 2, 4):  # shorter than the fold, as long, and longer
                check_against_oracle(Copy(3, 2, 5), rule, fold=2, outer=outer, window=window)
            check_against_oracle(Cue(5, 6), rule, fold=2, outer=outer, window=2)
    check_against_oracle(Copy(3, 2, 5), "none", fold=2)
    check_against_oracle(Cue(1, 6), "gradient", fold=2)  # one query


def test_oracle_with_rotary_positions():
    for rule in RULES:
        for window in (0, 3):
            for task in (Copy(2, 2, 5), Regression(2, 4, 2)):
                check_against_oracle(task, rule, window=window, position="rotary")
    model = Transformer(Copy(2, 2, 5), "hebbian", d_model=8, d_ff=8, position="rotary", block_size=4)  # no longest episode
    assert model(Copy(2, 40, 5).sample("test", 2, random_generator(0, "test")))[0].shape == (2, 45, 5)


def test_oracle_with_ablations():
    for rule in ("hebbian", "gradient"):
        for ablate in ("eta", "alpha", "backward"):
            for sizes in (dict(fold=0), dict(fold=2), dict(fold=2, outer=True)):
                for task in (Copy(2, 2, 5), Cue(4, 6)):
                    check_against_oracle(task, rule, ablate=ablate, **sizes)
            model = small_model(Copy(2, 2, 5), rule, ablate=ablate)
            grads = gradients(model, model(draw(Copy(2, 2, 5), 2))[0])
            assert any("alpha" in name or "beta" in name for name in grads) == (ablate == "eta")
            # the neuromodulator's row: without it, m_t is but one more number of the gradient rule's internal loss
            moves = (grads["head.weight"][model.plasticity.n_out] != 0).any()
            assert moves == (ablate == "alpha" or ablate == "eta" and rule == "gradient")


def test_shared_matrix():
    torch.manual_seed(0)
    M, xs, loss_of = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(3, 2, 1, 4, dtype=torch.float64), []
    for shared in (True, False):
        M, xs = M.detach().requires_grad_(), xs.detach().requires_grad_()
        reader = SharedMatrix(M.tanh(), 3)
        total = 0
        for x in xs[:2]:  # one slot stays empty
            y = reader.read(x) if shared else x @ M.tanh().mT
            # as the gradient rule does: a derivative of the read is part of what is learned from
            dx, = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            total = total + y.sin().sum() + dx.pow(2).sum()
        total = total + (xs[2] @ reader.matrix.mT).cos().sum()  # and another use of the matrix
        partial, = torch.autograd.grad(total, xs, retain_graph=True)  # a pass that does not get as far as M changes nothing
        again, first = torch.autograd.grad(total, [xs, M], retain_graph=True)
        second, = torch.autograd.grad(total, M)
        assert_close(partial, again, "the gradient of x")
        assert_close(first, second, "the second pass")
        loss_of.append((total, again, first))
    for what, ours, theirs in zip(("the value", "the gradient of x", "the gradient of M"), *loss_of):
        assert_close(ours, theirs, what)


def test_what_is_kept_does_not_grow():
    task = Copy(3, 20, 5)
    model = small_model(task, "hebbian", fold=4)
    sizes, calls = [], []
    write, step = FastWeights.write, Cache.attend
    try:  # watch the real ones
        FastWeights.write = lambda self, z: (write(self, z), sizes.append(max([len(p[0]) for p in self.pre.values()] or [0])))
        Cache.attend = lambda self, q, dropout: (calls.append(self.k.size(2)), step(self, q, dropout))[1]
        model(draw(task, 2))
    finally:
        FastWeights.write, Cache.attend = write, step
    assert len(sizes) == task.context_length - 1, "a step wrote that nobody reads after, or one did not"
    assert max(sizes) == 3 and min(sizes) == 0 and max(calls) == 4, (sizes, calls)


def test_gradcheck():
    for rule, outer, fold in (("hebbian", False, 0), ("gradient", False, 2), ("hebbian", True, 2), ("gradient", True, 0)):
        for task in (Copy(1, 1, 4), Cue(3, 3)):
            model = small_model(task, rule, n_layer=1, n_head=1, d_model=3, d_ff=3, outer=outer, fold=fold)
            episodes = draw(task, 1)
            names = [name for name, _ in model.named_parameters()]
            values = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]

            def answer(*values):
                return torch.func.functional_call(model, dict(zip(names, values)), (episodes,))[0]

            assert torch.autograd.gradcheck(answer, values, fast_mode=True)


def test_gradients_reach_what_the_paper_detaches():
    for rule in ("hebbian", "gradient"):
        for task in (Copy(2, 2, 5), Cue(4, 6)):
            model = small_model(task, rule)
            grads = gradients(model, model(draw(task, 2))[0])
            n_out = task.n_out
            for name in ("head.weight", "head.bias"):
                assert grads[name][n_out].abs().max() > 1e-8, f"the neuromodulator's row of {name} does not learn"
            learned = [name for name in grads if name.endswith(("alpha", "beta", "w_out"))]
            assert len(learned) == 8 + (rule == "gradient")
            for name in learned:
                assert (grads[name].abs() > 1e-12).all(), f"parts of {name} do not learn"
            if rule == "gradient":  # the auxiliary outputs are in L_t only, so they learn by second order alone
                assert (grads["head.weight"][n_out + 1:].abs() > 1e-12).all()


def test_no_rule_has_parameters_it_does_not_use():
    task = Copy(2, 2, 5)
    models = {rule: Transformer(task, rule, d_model=8, d_ff=12, aux_dim=4) for rule in RULES}
    assert [models[rule].head.out_features for rule in RULES] == [5, 5 + 1, 5 + 1 + 4]
    for rule, ends in (("none", ()), ("hebbian", ("alpha", "beta")), ("gradient", ("alpha", "beta", "w_out"))):
        extra = {name.split(".")[-1] for name, _ in models[rule].named_parameters()} & {"alpha", "beta", "w_out"}
        assert extra == set(ends), f"{rule} carries {extra}"
    assert (models["gradient"].plasticity.w_out == 1).all() and (models["hebbian"].blocks[0].up.alpha == 1).all()


# ---------------------------------------------------------------- the model

def test_parallel_and_stepwise_agree():
    for task in (Copy(3, 4, 6), Cue(5, 6)):
        for window in (0, 1, 3):
            model, episodes = small_model(task, "none", window=window), draw(task, 3)
            assert_close(model(episodes)[0], model(episodes, stepwise=True)[0], f"with window {window}, the answer")


def test_a_query_does_not_see_the_others():
    with fake_packs() as folder:
        for task in (Cue(4, 6), Regression(2, 4, 5), FewShot("omniglot", folder, 3, 1, 2)):
            for rule in RULES:
                for window in (0, 2):
                    model, episodes = small_model(task, rule, window=window), draw(task, 2)
                    whole = model(episodes)[0]
                    other = torch.roll(episodes.query_x, 1, dims=0)  # other queries, but for the last
                    other[:, -1] = episodes.query_x[:, -1]
                    changed = model(episodes._replace(query_x=other))[0]
                    assert_close(whole[:, -1], changed[:, -1], "the last query's answer")
                    assert (whole[:, 0] - changed[:, 0]).abs().max() > 1e-6
                    alone = model(episodes._replace(query_x=episodes.query_x[:, -1:]))[0]
                    assert_close(whole[:, -1:], alone, "the answer to a query alone")


def test_window_limits_what_is_seen():
    task = Copy(3, 4, 6)
    for window, sees in ((1, False), (4, False), (5, True), (0, True)):
        model, episodes = small_model(task, "none", window=window, n_layer=1), draw(task, 1)
        other = episodes.support_x.clone()
        other[:, 0] = 5 - other[:, 0]  # another first token
        changed = model(episodes)[0][:, 4] - model(episodes._replace(support_x=other))[0][:, 4]
        assert (changed.abs().max() > 1e-9) == sees, f"window {window}"


def test_fast_weights_carry_the_context_without_attention():
    task = Cue(4, 6)
    for rule, sees in (("none", False), ("hebbian", True), ("gradient", True)):
        model, episodes = small_model(task, rule, window=1), draw(task, 2)
        changed = model(episodes)[0] - model(episodes._replace(support_y=1 - episodes.support_y))[0]
        assert (changed.abs().max() > 1e-6) == sees, rule


def test_lesion_is_the_slow_model():
    task = Copy(2, 3, 5)
    for rule in ("hebbian", "gradient"):
        model, slow, episodes = small_model(task, rule), small_model(task, "none"), draw(task, 2)
        slow.load_state_dict({name: value[:5] if name.startswith("head") else value
                              for name, value in model.state_dict().items() if name in slow.state_dict()})
        assert (model(episodes)[0] - slow(episodes)[0]).abs().max() > 1e-4
        model.plasticity.eta0 = 0.0
        assert_close(model(episodes)[0], slow(episodes)[0], f"lesioned {rule}")


def test_finite_where_inputs_and_writes_vanish():
    task = Regression(2, 4, 3)
    for rule in ("hebbian", "gradient"):
        for max_norm in (0.0, 1.0, math.inf):
            model = Transformer(task, rule, d_model=8, d_ff=12, max_norm=max_norm)
            for parameter in model.parameters():
                torch.nn.init.zeros_(parameter)  # then y, g and ||D|| are exactly 0
            nothing = Episodes(torch.zeros(2, 4, 2), torch.zeros(2, 4, 1), torch.zeros(2, 3, 2), torch.zeros(2, 3, 1))
            out, _ = model(nothing)
            out.sum().backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is None or parameter.grad.isfinite().all(), f"{rule}, max_norm {max_norm}: {name}"


def test_finite_at_the_edges():
    """Long contexts, eta_0 of 1, no clipping, one sequence, one class, one image. LONG=2000 makes the contexts so long.

    Without clipping the Hebbian rule multiplies what it wrote: with alpha from 0.5 or so it overflows, as its equations say.
    """
    steps = int(os.environ.get("LONG", 60))
    long = Copy(2, steps - 3, 6)
    with fake_packs() as packs:
        few_shot = FewShot("omniglot", packs, 1, 1, 1)
        for rule, eta0, alpha_init, max_norm in (("hebbian", 1.0, 8.0, 1.0), ("gradient", 0.02, 20.0, 1.0), ("gradient", 1.0, 1.0, 1.0),
                                                 ("hebbian", 1.0, 0.05, 0.0), ("gradient", 1.0, 1.0, math.inf)):
            for task, dtype in ((long, torch.float32), (long, torch.bfloat16), (few_shot, torch.float32), (few_shot, torch.bfloat16)):
                torch.manual_seed(0)
                model = Transformer(task, rule, n_layer=1, n_head=2, d_model=8, d_ff=8, filters=4, eta0=eta0, max_norm=max_norm,
                                    alpha_init=alpha_init)
                episodes = task.sample("train", 1, random_generator(0, "train"))
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    out, _ = model(episodes)
                    loss = task.loss(out, episodes.target)
                loss.backward()
                what = f"{rule}, eta_0 {eta0}, max_norm {max_norm}, {type(task).__name__}, {dtype}"
                assert out.isfinite().all(), what
                for name, parameter in model.named_parameters():
                    assert parameter.grad is None or parameter.grad.isfinite().all(), f"{what}: {name}"


def test_bfloat16_follows_float32():
    for rule in RULES:
        for task in (Copy(3, 4, 6), Copy(3, 40, 6), Cue(4, 6)):  # the second folds
            torch.manual_seed(0)
            model, episodes = Transformer(task, rule), task.sample("train", 8, random_generator(0, "train"))
            exact, _ = model(episodes)
            with torch.autocast("cpu", torch.bfloat16):
                out, gates = model(episodes)
                loss = task.loss(out, episodes.target)
            loss.backward()
            assert out.dtype == torch.float32 and (gates is None or gates.eta.dtype == torch.float32)
            assert_close(out, exact, f"{rule} in bfloat16", 0.05)
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---------------------------------------------------------------- the tasks

@contextlib.contextmanager
def fake_packs():
    """A folder with both packs in the real format; an image's first pixels hold its class and its number."""
    with tempfile.TemporaryDirectory() as folder:
        for name, (file_name, shape) in tasks.PACKS.items():
            n_classes, n_images, _, _, size = shape
            images = torch.zeros(n_classes, n_images, 1, size if name == "omniglot" else 1, size, dtype=torch.uint8)
            which, number = torch.meshgrid(torch.arange(n_classes), torch.arange(n_images), indexing="ij")
            for i, value in enumerate((which // 256, which % 256, number // 256, number % 256)):
                images[:, :, 0, 0, i] = value.byte()
            images[:, :, 0, 0, 4] = 255  # an image that was not turned or flipped has this here
            if name == "cifarfs":
                names = sorted(tasks.CIFARFS_VAL + tasks.CIFARFS_TEST + [f"class{i:02}" for i in range(64)])
            else:
                names = [f"{'A' if i < 964 else 'B'}{i // 33:02}/character{i % 33:02}" for i in range(1623)]
            torch.save({"images": images.expand(shape), "classes": names}, Path(folder) / file_name)
        yield folder


def identify(images):
    """(..., channels, size, size) of a fake pack -> class, image number and quarter-turns, (...) each."""
    turned = torch.stack([images.rot90(-k, (-2, -1))[..., 0, 0, :5].long() for k in range(4)])  # (4, ..., 5)
    turns = (turned[..., 4] == 255).long().argmax(0)
    first = turned.gather(0, turns[None, ..., None].expand(1, *turns.shape, 5))[0]
    return first[..., 0] * 256 + first[..., 1], first[..., 2] * 256 + first[..., 3], turns


def test_copy_episodes():
    task = Copy(seq_len=3, delay=4, vocab_size=6)
    episodes = task.sample("train", 200, random_generator(0, "train"))
    items, rest = episodes.support_x[:, :3], episodes.support_x[:, 3:]
    assert episodes.support_x.shape == (200, 11) and (items == episodes.target).all()
    assert sorted(items.unique().tolist()) == [1, 2, 3, 4]
    assert (rest == torch.tensor([0, 0, 0, 0, 5, 0, 0, 0])).all()
    # recall is scored at the last three steps, not at the blanks before
    out = F.one_hot(torch.cat([torch.zeros(200, 8, dtype=torch.long), items], 1), 6).float()
    assert task.score(out, episodes.target).eq(1).all() and task.score(out.roll(1, 1), episodes.target).mean() < 0.5
    # delays from 2 to 5 in training, always 5 in a test; the delimiter stands three before the end's recall
    task, generator = Copy(seq_len=3, delay=5, vocab_size=6, min_delay=2), random_generator(0, "train")
    for split, delays in (("train", {2, 3, 4, 5}), ("test", {5})):
        batches = [task.sample(split, 2, generator) for _ in range(50)]
        assert {b.support_x.size(1) - 7 for b in batches} == delays
        assert all((b.support_x[:, -4] == 5).all() and (b.support_x[:, :3] == b.target).all() for b in batches)


def test_cue_episodes():
    task = Cue(pairs=8, cues=20)
    episodes = task.sample("train", 100, random_generator(0, "train"))
    assert episodes.support_x.sum(-1).eq(1).all() and episodes.support_x.sum(1).le(1).all()  # one-hot, all different
    for b in range(100):
        reward = {x.argmax().item(): y.item() for x, y in zip(episodes.support_x[b], episodes.support_y[b])}
        assert [reward[x.argmax().item()] for x in episodes.query_x[b]] == episodes.target[b, :, 0].tolist()
    assert abs(episodes.target.mean() - 0.5) < 0.05 and 0 <= episodes.target.min() and episodes.target.max() <= 1
    ordered = (episodes.query_x == episodes.support_x).all(-1).double().mean()
    assert ordered < 0.2, "the queries come in the order of the pairs"


def test_regression_episodes():
    task = Regression(dim=3, support=10, queries=7)
    episodes = draw(task, 500)
    ones = torch.ones(500, 10, 1, dtype=torch.double)
    fit = torch.linalg.lstsq(torch.cat([episodes.support_x, ones], -1), episodes.support_y).solution  # (B, dim + 1, 1)
    answer = torch.cat([episodes.query_x, ones[:, :7]], -1) @ fit
    assert task.loss(answer, episodes.target) < 1e-8  # least squares gives 0, guessing 0 gives 4
    assert abs(task.loss(torch.zeros_like(answer), episodes.target).item() - 4) < 0.5


def test_distorted_images():
    """Two blobs: the middle between them says how far an image was shifted, their difference how it was turned and scaled."""
    y, x = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
    blobs = torch.stack([torch.exp(-((x - at) ** 2 + y**2) / 4) for at in (-6, 6)])  # (channels, size, size)
    images = (blobs * 255).round().byte().expand(4, 100, 2, 28, 28)
    out = tasks.distort(images, random_generator(0, "train"))
    assert out.dtype == torch.uint8 and out.shape == images.shape
    assert torch.equal(out, tasks.distort(images, random_generator(0, "train")))
    mass = out.flatten(0, 1).double()  # (400, 2, 28, 28)
    centre = torch.stack([(mass * t).sum((-2, -1)) / mass.sum((-2, -1)) for t in (x, y)], -1)  # (400, 2 blobs, x and y)
    apart = centre[:, 1] - centre[:, 0]
    angle, scale = torch.atan2(apart[:, 1], apart[:, 0]).rad2deg(), 12 / apart.norm(dim=1)
    shift = centre.mean(1) * scale[:, None] / 14  # of half the width; the turn mixes the two
    mixed = 0.15 * (math.cos(math.radians(10)) + math.sin(math.radians(10)))
    for what, away, most in (("angle", angle, 10), ("scale", scale - 1, 0.15),
                             ("shift across", shift[:, 0], mixed), ("shift down", shift[:, 1], mixed)):
        assert away.abs().max() < 1.03 * most and away.min() < -0.75 * most and away.max() > 0.75 * most, (what, away.aminmax())
        assert abs(away.mean()) < 0.15 * most, f"{what}: {away.mean()} on the average"
    assert torch.stack([angle, scale, *shift.T]).corrcoef().triu(1).abs().max() < 0.2, "two of them go together"


def test_few_shot_episodes():
    distorted = []

    def straight(images, generator):
        distorted.append(images.flatten(0, -4).size(0))
        return images

    with fake_packs() as folder, mock.patch.object(tasks, "distort", straight):
        for name in ("omniglot", "cifarfs"):
            task = FewShot(name, folder, ways=5, shots=2, queries=3)
            seen = {}
            for split in tasks.SPLITS:
                distorted.clear()
                episodes = task.sample(split, 40, random_generator(0, split))
                assert sum(distorted) == (40 * 25 if name == "omniglot" and split == "train" else 0)
                assert episodes.support_x.shape[:2] == (40, 10) and episodes.query_x.shape[:2] == (40, 15)
                images = torch.cat([episodes.support_x, episodes.query_x], 1)  # (B, 25, channels, size, size)
                labels = torch.cat([episodes.support_y, episodes.target], 1)  # (B, 25)
                flipped = images[..., 0, -1, -5:].flip(-1)[..., 4] == 255
                straight = torch.where(flipped[..., None, None, None], images.flip(-1), images) if name == "cifarfs" else images
                kind, number, turns = identify(straight)
                for b in range(40):
                    assert labels[b].bincount().tolist() == [5] * 5
                    for label in range(5):
                        one = labels[b] == label
                        assert len({*zip(kind[b, one].tolist(), turns[b, one].tolist())}) == 1, "one label, two classes"
                        assert len(number[b, one].unique()) == 5, "a support image is a query too"
                    assert len({*zip(kind[b].tolist(), turns[b].tolist())}) == 5, "one class, two labels"
                seen[split] = set(kind.flatten().tolist())
                assert seen[split] <= set(task.class_ids[split])
                if name == "omniglot":
                    assert set(turns.flatten().tolist()) == ({0, 1, 2, 3} if split == "train" else {0})
                else:
                    assert flipped.any() == (split == "train") and not flipped.all()
                for part in (episodes.support_y, episodes.target):  # sorted queries would give the class away
                    assert (part.diff() >= 0).all(1).double().mean() < 0.2, "the labels come sorted"
            assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"] and not seen["val"] & seen["test"]
            images, classes = task.sample_images(50, random_generator(0, "train"))
            flipped = images[..., 0, -1, -5:].flip(-1)[..., 4] == 255
            kind, _, turns = identify(torch.where(flipped[:, None, None, None], images.flip(-1), images)
                                      if name == "cifarfs" else images)
            ids = torch.tensor(task.class_ids["train"])
            assert (ids[classes % len(ids)] == kind).all()
            assert name == "cifarfs" or (classes // len(ids) == turns).all()


def test_class_splits():
    with fake_packs() as folder:
        for name, sizes in (("cifarfs", (64, 16, 20)), ("omniglot", (964 - 139, 139, 659))):
            ids = FewShot(name, folder).class_ids  # the fake pack's last 5 alphabets have 4 x 33 + 7 characters
            assert tuple(len(ids[split]) for split in tasks.SPLITS) == sizes
            assert sorted(ids["train"] + ids["val"] + ids["test"]) == list(range(sum(sizes)))
    assert len(set(tasks.CIFARFS_VAL)) == 16 and len(set(tasks.CIFARFS_TEST)) == 20


def test_random_streams_are_apart():
    draws = {(seed, split): torch.rand(4, generator=random_generator(seed, split)) for seed in range(5)
             for split in tasks.SPLITS}
    assert len({tuple(values.tolist()) for values in draws.values()}) == 15
    assert torch.equal(draws[3, "val"], torch.rand(4, generator=random_generator(3, "val")))


def test_packing_downloads():
    """Packs what torchvision would have downloaded: small pictures laid out as the real data sets are."""
    import numpy
    import torchvision
    from PIL import Image

    class FakeCIFAR100:
        classes = [f"c{i:03}" for i in range(100)]

        def __init__(self, root, train, download):
            assert download
            n = 500 if train else 100
            self.targets = [i % 100 for i in range(100 * n)]  # mixed, as in the real one
            self.data = numpy.zeros((100 * n, 32, 32, 3), numpy.uint8)
            self.data[:, 1, 2, 0] = self.targets
            self.data[:, 3, 4, 2] = 0 if train else 1

    class FakeOmniglot:
        def __init__(self, root, background, download):
            self.target_folder = Path(root) / ("images_background" if background else "images_evaluation")
            for alphabet in ("Zulu", "Alpha") if background else ("Beta",):
                for character in (2, 1):
                    folder = self.target_folder / alphabet / f"character{character:02}"
                    folder.mkdir(parents=True)
                    for drawer in range(20):
                        scan = Image.new("1", (105, 105), 1)  # white paper
                        scan.paste(0, (0, 0, 15 * character, 15))  # black ink
                        scan.save(folder / f"0001_{drawer + 1:02}.png")

    real = torchvision.datasets.CIFAR100, torchvision.datasets.Omniglot
    torchvision.datasets.CIFAR100, torchvision.datasets.Omniglot = FakeCIFAR100, FakeOmniglot
    try:
        with tempfile.TemporaryDirectory() as folder:
            images, classes = tasks.pack_cifar100(folder)
            assert images.shape == (100, 600, 3, 32, 32) and classes == FakeCIFAR100.classes
            assert (images[:, :, 0, 1, 2] == torch.arange(100)[:, None]).all(), "an image stands in another class"
            assert (images[:, :, 2, 3, 4] == (torch.arange(600) >= 500)).all(), "the training images come first"
            path = Path(folder) / "new" / "omniglot.pt"
            with quiet():
                fails("expected (1623, 20, 1, 28, 28)", tasks.make_pack, path, "omniglot")  # 6 characters are not Omniglot
                assert not list(path.parent.iterdir()), "a refused download left something"
                with mock.patch.dict(tasks.PACKS, omniglot=(path.name, (6, 20, 1, 28, 28))):
                    # two at once, as two runs that start together
                    statuses = in_processes(2, lambda: tasks.make_pack(path, "omniglot"))
            assert statuses == [0, 0] and os.listdir(path.parent) == [path.name]
            pack = torch.load(path, weights_only=True)
            assert pack["classes"] == [f"{a}/character0{c}" for a in ("Alpha", "Zulu", "Beta") for c in (1, 2)]
            assert pack["images"].shape == (6, 20, 1, 28, 28) and pack["images"].dtype == torch.uint8
            assert (pack["images"][..., 0, 0] == 255).all() and (pack["images"][..., 27, 27] == 0).all(), "ink is 255"
    finally:
        torchvision.datasets.CIFAR100, torchvision.datasets.Omniglot = real


def fails(reason, function, *args):
    """Call what must raise a ValueError of one line with `reason` in it."""
    try:
        function(*args)
    except ValueError as error:
        assert reason in str(error) and "\n" not in str(error), f"{reason!r} is not said: {error}"
    else:
        raise AssertionError(f"accepted: {args}")


class Broken(http.server.BaseHTTPRequestHandler):
    """A server of data sets: /cut ends in the middle, /wrong is something else, /missing is not there."""

    def do_GET(self):
        self.send_response(404 if self.path.startswith("/missing") else 200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(b"x" * (50000 if self.path.startswith("/cut") else 100000))

    def log_message(self, *_):
        pass


def test_broken_downloads():
    """torchvision's own downloads from a server that fails: one line, and nothing left that a next start could take up."""
    from torchvision.datasets import CIFAR100, Omniglot

    server = http.server.ThreadingHTTPServer(("localhost", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://localhost:{server.server_port}"
    with tempfile.TemporaryDirectory() as folder, quiet(), contextlib.redirect_stderr(io.StringIO()):
        for how in ("cut", "wrong", "missing"):
            with mock.patch.object(CIFAR100, "url", f"{address}/{how}"), \
                 mock.patch.object(Omniglot, "download_url_prefix", f"{address}/{how}"):
                for name in tasks.PACKS:
                    fails(f"cannot download {name} into --data-dir {folder}", tasks.load_pack, folder, name)
                    assert not os.listdir(folder), f"{how}: {name} left {os.listdir(folder)}"
        server.shutdown()
        server.server_close()
        with mock.patch.object(CIFAR100, "url", f"{address}/nobody"):  # nobody listens there any more
            fails("check the network", tasks.load_pack, folder, "cifarfs")


def test_real_packs():
    """The packs in ../shared/data, where they are there: the split that the README describes."""
    folder = HERE.parent / "shared" / "data"
    if not folder.is_dir():
        raise Skip("no ../shared/data here")
    ids = FewShot("omniglot", folder).class_ids
    names = torch.load(folder / "omniglot.pt", weights_only=True, mmap=True)["classes"]
    alphabets = {split: {names[i].split("/")[0] for i in ids[split]} for split in tasks.SPLITS}
    assert [len(alphabets[split]) for split in tasks.SPLITS] == [25, 5, 20] and len(ids["test"]) == 659
    assert max(alphabets["train"]) < min(alphabets["val"]) and not alphabets["train"] & alphabets["test"]
    assert [len(FewShot("cifarfs", folder).class_ids[split]) for split in tasks.SPLITS] == [64, 16, 20]


# ---------------------------------------------------------------- training and evaluation, as a user runs them

class Skip(Exception):
    """Raised by a test that cannot run here, with the reason."""


@contextlib.contextmanager
def quiet():
    """Catch what is printed -> (stdout, stderr) as StringIO."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        yield out, err


TINY = "--d-model 16 --d-ff 16 --n-head 2 --batch-size 8 --eval-batches 2 --device cpu".split()
TINY_COPY = [*TINY, *"--task copy --seq-len 2 --delay 3 --vocab-size 6".split()]


def run_train(*argv):
    with quiet() as (out, _):
        train.main([str(a) for a in (*argv, *(() if {"--resume", "--bench"} & {*argv} else ("--overwrite",)))])
    return out.getvalue()


def run_eval(*argv):
    with quiet() as (out, _):
        evaluation.main([str(a) for a in argv])
    return out.getvalue()


def refused(main, *argv):
    """Run a command that must end in one line on stderr and exit status 2 -> that line."""
    with quiet() as (_, err):
        try:
            main([str(a) for a in argv])
        except SystemExit as stop:
            assert stop.code == 2, f"exit status {stop.code}"
        else:
            raise AssertionError(f"{argv} was accepted")
    line = err.getvalue()
    assert line.startswith("error: ") and line.count("\n") == 1, f"not one clear line: {line!r}"
    return line


def metrics_of(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def test_same_command_same_numbers():
    with fake_packs() as packs, tempfile.TemporaryDirectory() as folder:
        every = ["--steps", 4, "--eval-interval", 2]
        for argv in ([*TINY_COPY, *every, "--rule", "gradient", "--dropout", 0.1],
                     [*TINY, *every, *"--task omniglot --rule hebbian --filters 4 --batch-size 2".split(),
                      *"--warmup-steps 2 --data-dir".split(), packs]):
            rows = []
            for run, seed in (("a", 0), ("b", 0), ("c", 1)):
                run_train(*argv, "--seed", seed, "--out-dir", f"{folder}/{run}")
                rows.append([{k: v for k, v in row.items() if k not in ("seconds", "sequences_per_second")}
                             for row in metrics_of(f"{folder}/{run}")])
            assert rows[0] == rows[1] != rows[2]
            assert [row["step"] for row in rows[0]] == [2, 4]
            assert {"train_loss", "val_loss", "val_metric", "metric", "eta", "write_norm"} < rows[0][0].keys()


def test_fast_weights_learn_and_are_used():
    """Without attention to the past only fast weights can answer a cue: they learn to, and lose it when lesioned."""
    argv = [*TINY, *"--task cue --pairs 2 --cues 3 --window 1 --steps 120 --lr 1e-2 --batch-size 16".split(),
            *"--d-model 32 --d-ff 32 --n-layer 1 --eval-interval 120".split()]
    for rule in RULES:
        with tempfile.TemporaryDirectory() as folder:
            run_train(*argv, "--rule", rule, "--out-dir", folder)
            run_eval(folder, "--episodes", 200, "--json", f"{folder}/e.json")
            (row,) = json.loads(Path(f"{folder}/e.json").read_text())
            chance = row["score"] if rule == "none" else row["lesion"]
            assert chance > 0.06, f"{rule}: an error of {chance:.4f} where guessing the mean gives 0.083"
            assert rule == "none" or row["score"] < 0.02, f"{rule}: an error of {row['score']:.4f}"


def test_evaluation_of_a_run():
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        run_train(*TINY_COPY, "--rule", "hebbian", "--steps", 4, "--eval-interval", 1, "--block-size", 9, "--out-dir", run)
        best = max(metrics_of(run), key=lambda row: (row["val_metric"], -row["step"]))
        text = run_eval(run, "--episodes", 30, "--json", f"{folder}/e.json")
        (row,) = json.loads(Path(f"{folder}/e.json").read_text())
        assert row["step"] == best["step"] and f"{row['score']:.5f} ± {row['interval']:.5f}" in text
        assert len(row["tokens"]) == 8 and len(row["gates"]["write"]) == 7  # the last step writes nothing
        # the figures again, from the model itself
        task, model, args = evaluation.load_run(run, torch.device("cpu"), {})
        episodes = task.sample("test", 30, random_generator(0, "test"))
        with torch.no_grad():
            out, gates = model.eval()(episodes)
        scores = (out[:, -2:].argmax(-1) == episodes.target).double().mean(1)
        assert abs(row["score"] - scores.mean()) < 1e-6
        assert abs(row["interval"] - 1.96 * scores.std() / 30**0.5) < 1e-6
        write = (gates.eta * gates.d_norm).mean(0)
        assert_close(torch.tensor(row["gates"]["write"]), write, "the mean write", 1e-5)
        assert abs(row["selectivity"] - write[:2].mean() / write[2:].mean()) < 1e-4
        assert abs(row["persistence"] - gates.eta.mean() / 0.2) < 1e-5
        # other sizes: what fits is measured, what does not is refused
        assert "delay 4" in run_eval(run, "--delay", 4, "--episodes", 10)
        assert "positions" in refused(evaluation.main, run, "--delay", 5)
        assert "--ways" in refused(evaluation.main, run, "--ways", 5)
        # several runs: one row for both seeds
        run_train(*TINY_COPY, "--rule", "hebbian", "--steps", 4, "--seed", 1, "--block-size", 9, "--out-dir", f"{folder}/b")
        text = run_eval(run, f"{folder}/b", "--episodes", 10, "--json", f"{folder}/eval.json")
        text = text[text.index("| task"):]
        rows = json.loads(Path(f"{folder}/eval.json").read_text())
        scores = torch.tensor([row["score"] for row in rows], dtype=torch.float64)
        assert f"| hebbian | [2]({run}) | {scores.mean():.3f} ± {scores.std():.3f} |" in text.splitlines()[2]
        # kept without the checkpoints, they give the same table; files beside them are passed over
        (Path(folder) / "kept").mkdir()
        os.replace(f"{folder}/eval.json", f"{folder}/kept/eval.json")
        assert run_eval(f"{folder}/kept", __file__) == text.replace(f"({run})", f"({folder}/kept)")
        (Path(folder) / "kept/eval.json").write_text('[{"run": ')
        assert "eval.json is not" in refused(evaluation.main, f"{folder}/kept")
        assert "no eval.json" in refused(evaluation.main, folder)


def test_claims_follow_from_the_figures():
    def rows(task, rule, scores, flags="", **more):
        metric = "mse" if task in ("cue", "regression") else "accuracy"
        return [dict(task=task, rule=rule, flags=flags, tested="", window="window" in flags, score=score, metric=metric, run="a/b",
                     interval=0.1, sizes={"delay": 20}, **{k: v[i] if isinstance(v, list) else v for k, v in more.items()})
                for i, score in enumerate(scores)]

    def verdict(number, *groups):
        found = [line.split(" | ")[1] for line in evaluation.claims(sum(groups, [])) if line.startswith(f"| {number}")]
        return found[0].split(":")[0] if found else None

    unsupported = "not supported, no difference beyond the spread"
    low, high, wide = [0.5, 0.51, 0.52], [0.8, 0.81, 0.82], [0.1, 0.8, 1.0]
    # better by more than two standard errors and more than a hundredth of what there is to learn, the right way round
    assert verdict(2, rows("copy", "hebbian", low), rows("copy", "gradient", high)) == "holds"
    assert verdict(2, rows("copy", "hebbian", high), rows("copy", "gradient", low)) == "does not hold"
    assert verdict(2, rows("copy", "hebbian", low), rows("copy", "gradient", wide)) == unsupported
    assert verdict(2, rows("copy", "hebbian", [0.990, 0.990]), rows("copy", "gradient", [0.998, 0.998])) == unsupported
    assert verdict(1, rows("regression", "hebbian", [0.9, 0.91]), rows("regression", "gradient", [2.1, 2.0])) == "holds"
    assert verdict(1, rows("regression", "hebbian", [2.1, 2.0]), rows("regression", "gradient", [0.9, 0.91])) == "does not hold"
    both = [*rows("copy", "hebbian", high), *rows("copy", "gradient", low), *rows("omniglot", "hebbian", low),
            *rows("omniglot", "gradient", high)]
    assert verdict(1, both) == "holds only where marked +"
    best_of_two = [*rows("copy", "hebbian", high), *rows("copy", "gradient", high), *rows("copy", "none", low)]
    assert verdict(1, best_of_two) == unsupported  # it must be better than either
    # only runs with the same flags are compared, and ablations are not among them
    assert verdict(2, rows("copy", "hebbian", low, "--steps 9"), rows("copy", "gradient", high)) is None
    assert verdict(2, rows("copy", "hebbian", low, "--ablate eta"), rows("copy", "gradient", high, "--ablate eta")) is None
    for score, expected in ((0.0002, "holds"), (0.08, "does not hold")):
        assert verdict(3, rows("cue", "none", [score] * 2), rows("cue", "hebbian", [0.0001] * 2)) == expected
    soon, late = dict(learned=[100, 150, 100]), dict(learned=[300, 250, 350])
    assert verdict("2 Gradient needs fewer", rows("copy", "hebbian", high, **late), rows("copy", "gradient", high, **soon)) == "holds"
    assert verdict("2 Gradient needs fewer", rows("copy", "hebbian", high, **soon), rows("copy", "gradient", high, **late)) == "does not hold"
    never = dict(learned=[300, None, 350])
    assert verdict("2 Gradient needs fewer", rows("copy", "hebbian", high, **never), rows("copy", "gradient", high, **soon)) is None
    gates = [*rows("copy", "hebbian", high, persistence=0.1, write_norm=2.0),
             *rows("copy", "gradient", high, persistence=0.2, write_norm=1.0)]
    assert verdict("4 Gradient's updates persist", gates) == "holds"
    assert verdict("4 Gradient's updates are large", gates) == "does not hold"
    assert verdict("4 Hebbian", gates) is None
    gates += [*rows("cue", "hebbian", high, persistence=0.3, write_norm=2.0),
              *rows("cue", "gradient", high, persistence=0.2, write_norm=1.0)]
    assert verdict("4 Gradient's updates persist", gates) == "holds only where marked +"
    # what the spread over seeds does not support is not held, one seed has none
    wide = dict(persistence=[0.1, 0.2, 0.6])
    assert verdict("4 Gradient's updates persist", rows("copy", "hebbian", high, persistence=0.1),
                   rows("copy", "gradient", high, **wide)) == unsupported
    assert verdict("4 Gradient's updates persist", rows("copy", "hebbian", [1.0], persistence=0.1),
                   rows("copy", "gradient", high, persistence=0.9)) == unsupported
    window = "--window 1"
    assert verdict("5 Plasticity adds to attention over a window", rows("cue", "none", [0.083] * 2, window),
                   rows("cue", "hebbian", [0.001] * 2, window)) == "holds"


def test_best_is_the_lowest_error():
    with tempfile.TemporaryDirectory() as folder:
        run_train(*TINY, *"--task regression --support 3 --rule none --steps 6 --eval-interval 1 --lr 0.5 --out-dir".split(), folder)
        errors = [row["val_metric"] for row in metrics_of(folder)]
        state, last = (train.load_checkpoint(f"{folder}/{name}.pt") for name in ("best", "ckpt"))
        assert state["step"] == 1 + errors.index(min(errors)) and last["step"] == 6 and len(set(errors)) == 6


def test_validation_episodes_stay_the_same():
    with tempfile.TemporaryDirectory() as folder:
        run_train(*TINY, *"--task cue --rule none --steps 3 --eval-interval 1 --lr 1e-12 --out-dir".split(), folder)
        rows = metrics_of(folder)
        assert max(row["val_loss"] for row in rows) - min(row["val_loss"] for row in rows) < 1e-6, "validation was redrawn"
        assert len({row["train_loss"] for row in rows}) == 3


def test_gradients_are_clipped():
    """The norm the optimizer sees is CLIP where the gradient is larger."""
    norms = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = watched
    try:
        with tempfile.TemporaryDirectory() as folder:  # targets of a variance near 31 make gradients far larger than 1
            run_train(*TINY, *"--task regression --dim 30 --rule none --steps 3 --out-dir".split(), folder)
    finally:
        torch.optim.AdamW.step = step
    assert len(norms) == 3 and all(0.99 * train.CLIP < norm < 1.01 * train.CLIP for norm in norms), norms


def test_evaluation_with_fewer_classes():
    with fake_packs() as packs, tempfile.TemporaryDirectory() as folder:
        run_train(*TINY, *"--task omniglot --rule none --ways 4 --filters 4 --steps 1 --warmup-steps 0 --batch-size 2 --out-dir".split(), folder,
                  "--data-dir", packs)
        text = run_eval(folder, "--ways", 3, "--episodes", 4)
        assert "ways 3" in text and "queries 15" in text
        assert "--ways 5" in refused(evaluation.main, folder, "--ways", 5)


def test_bench_prints_one_json_line_and_writes_nothing():
    with tempfile.TemporaryDirectory() as folder:
        for argv in (["--rule", "none"], "--rule gradient --alpha outer --fold 2 --delay 3".split(), ["--task", "cue"]):
            out = Path(folder) / "out"
            row = json.loads(run_train(*argv, *"--n-layer 1 --d-model 8 --d-ff 8 --batch-size 2 --bench --out-dir".split(), out))
            assert not out.exists()
            assert row["sequences_per_second"] == 2 / row["seconds_per_update"] and row["peak_rss_bytes"] > 2**25
            assert math.isclose(row["context_steps_per_second"], row["context_steps"] * row["sequences_per_second"])
            assert row["fastest"] <= row["seconds_per_update"] <= row["slowest"] and row["gflop_per_second"] > 0
    # by hand: y = x Wᵀ of T = 3 steps with B = 2 takes 2 B T in out operations, and as much again for dx and for dW
    flops = {}
    for d_ff in (8, 16):
        argv = "--rule none --seq-len 1 --delay 0 --n-layer 1 --d-model 8 --batch-size 2 --bench".split()
        flops[d_ff] = json.loads(run_train(*argv, "--d-ff", d_ff))["gflop_per_update"] * 1e9
    assert abs(flops[16] - flops[8] - 3 * 2 * (2 * 2 * 3 * 8 * 8)) < 1, flops


def test_bad_arguments():
    with fake_packs() as packs, tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        for argv, said in (
                ("--n-head 3 --d-model 64", "--n-head 3"), ("--task cue --pairs 9 --cues 8", "--pairs 9"),
                ("--task omniglot --shots 6 --queries 15", "--shots 6"), ("--task cifarfs --ways 17", "--ways 17"),
                ("--window -1", "--window"), ("--delay 40 --block-size 31", "--block-size"), ("--steps 0", "--steps"),
                ("--steps ten", "--steps"), ("--lr nan", "--lr"), ("--lr -1", "--lr"), ("--eta0 2", "--eta0"),
                ("--alpha-init inf", "--alpha-init"), ("--max-norm -1", "--max-norm"), ("--dropout 1", "--dropout"),
                ("--rule magic", "--rule"), ("--fold -1", "--fold"), ("--alpha rank2", "--alpha"), ("--ablate all", "--ablate"),
                ("--position rotary --d-model 12 --n-head 4", "--position rotary"), ("--delay 5 --min-delay 6", "--min-delay 6"),
                ("--task cue --delay 3", "--delay"), ("--vocab-size 3", "--vocab-size"),
                ("--warmup-steps 5", "--warmup-steps"), ("--dtype bfloat16 --device cpu", "--dtype"), ("--nonsense", "--nonsense"),
                *([] if torch.cuda.is_available() else [("--device cuda", "--device cuda")])):
            assert said in refused(train.main, *argv.split(), "--out-dir", out, "--data-dir", packs), argv
            assert not out.exists(), f"{argv} wrote something"
        out.write_text("a file")
        assert str(out) in refused(train.main, "--steps", 1, "--out-dir", out) and out.read_text() == "a file"
        assert "no best.pt" in refused(evaluation.main, folder)
        assert str(out) in refused(evaluation.main, out)


def test_damaged_packs_and_checkpoints():
    with fake_packs() as packs, tempfile.TemporaryDirectory() as folder:
        argv = ["--task", "omniglot", "--data-dir", folder, "--out-dir", f"{folder}/run"]
        surprise = Path(folder) / "surprise"
        pack, good = Path(folder) / "omniglot.pt", (Path(packs) / "omniglot.pt").read_bytes()
        for content in (b"", b"not a pack", good[:len(good) // 2], good[:-100]):
            pack.write_bytes(content)
            assert "omniglot.pt" in refused(train.main, *argv) and pack.read_bytes() == content
        for content in ([1, 2], {"images": torch.zeros(3, 20, 1, 28, 28, dtype=torch.uint8), "classes": list("abc")},
                        {"images": torch.zeros(1623, 20, 1, 28, 28), "classes": ["a"] * 1623}, {"images": Surprise(surprise)}):
            torch.save(content, pack)
            assert "omniglot.pt" in refused(train.main, *argv)
        run = Path(folder) / "copy"
        run_train(*TINY_COPY, "--steps", 1, "--out-dir", run)
        best = run / "best.pt"
        good = best.read_bytes()
        state = torch.load(best, weights_only=True)
        for content in (b"", good[:-200], b"x" * 1000):
            best.write_bytes(content)
            assert "best.pt" in refused(evaluation.main, run)
        for changed in (dict(args={**state["args"], "d_ff": 17}), dict(args={"task": "copy"}), dict(model={}),
                        dict(args=Surprise(surprise))):
            torch.save({**state, **changed}, best)
            assert "best.pt" in refused(evaluation.main, run)
        assert not surprise.exists(), "a file that was loaded ran code"


def interrupted(argv, at, number=signal.SIGTERM):
    """Run train.py until update `at`, during which the signal comes -> what it printed. It must exit with 128 + the signal."""
    done, real = 0, train.update

    def update(*args):
        nonlocal done
        done += 1
        if done == at:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_DFL  # asked again, it would end at once
        return real(*args)

    train.update = update
    try:
        with quiet() as (out, _):
            train.main([str(a) for a in argv])
    except SystemExit as stop:
        assert stop.code == 128 + number, stop.code
        return out.getvalue()
    finally:
        train.update = real
    raise AssertionError("the signal was ignored")


def assert_same_run(one, other):
    """The same parameters, optimizer and metrics.jsonl, bit for bit but for the times."""
    a, b = (train.load_checkpoint(f"{run}/ckpt.pt") for run in (one, other))
    assert a["step"] == b["step"] and a["best"] == b["best"] and torch.equal(a["random"], b["random"])
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    for i, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][i][name]) for name, value in moments.items())
    rows = [[{k: v for k, v in row.items() if k not in ("seconds", "sequences_per_second")} for row in metrics_of(run)]
            for run in (one, other)]
    assert rows[0] == rows[1] and rows[0]
    best = [train.load_checkpoint(f"{run}/best.pt") for run in (one, other)]
    assert best[0]["step"] == best[1]["step"] and all(torch.equal(v, best[1]["model"][k]) for k, v in best[0]["model"].items())


def test_resumed_run_is_the_same():
    with fake_packs() as packs, tempfile.TemporaryDirectory() as folder:
        whole, part = f"{folder}/whole", f"{folder}/part"
        for argv in ([*TINY_COPY, *"--rule gradient --dropout 0.1".split()],
                     [*TINY, *"--task omniglot --rule hebbian --filters 4 --batch-size 2 --warmup-steps 2 --data-dir".split(), packs]):
            argv = [*argv, *"--steps 7 --eval-interval 2".split()]
            run_train(*argv, "--out-dir", whole)
            for at, number in ((1, signal.SIGTERM), (3, signal.SIGINT)) if "copy" in argv else ((5, signal.SIGTERM),):
                said = interrupted([*argv, "--overwrite", "--out-dir", part], at, number)
                assert f"python train.py --resume --out-dir {part}" in said
                state = train.load_checkpoint(f"{part}/ckpt.pt")
                assert state["step"] == at and state["rows"] == at // 2
                # what a crash after the checkpoint left in the log is done again
                with open(f"{part}/metrics.jsonl", "a") as log:
                    log.write('{"step": 6, "val_metric": 0.5}\n{"step": 7, "val')
                torch.randn(3)
                run_train("--resume", "--out-dir", part)
                assert_same_run(whole, part)
            assert "best validation" in run_train("--resume", "--out-dir", part)  # finished: nothing is left to do
            assert_same_run(whole, part)
        run_train("--resume", "--steps", 9, "--eval-interval", 3, "--out-dir", part)  # these may change
        assert [row["step"] for row in metrics_of(part)] == [2, 4, 6, 7, 9]


def test_killed_at_any_moment():
    """kill -9, at random, again and again: what is there can be loaded and the run ends as if nothing had happened.

    KILLS=30 makes it 30 runs.
    """
    if not hasattr(os, "fork"):
        raise Skip("needs fork")
    with tempfile.TemporaryDirectory() as folder:
        whole, part = f"{folder}/whole", f"{folder}/part"
        argv = [*TINY_COPY, *"--rule hebbian --steps 24 --eval-interval 3 --save-interval 0 --out-dir".split()]
        began = time.time()
        run_train(*argv, whole)
        took, rng, killed = time.time() - began, random.Random(0), 0
        for run in range(int(os.environ.get("KILLS", 1))):
            shutil.rmtree(part, ignore_errors=True)
            for life in range(100):
                resume = Path(f"{part}/ckpt.pt").exists()
                child = os.fork()
                if not child:
                    with contextlib.suppress(BaseException):
                        run_train(*(["--resume", "--out-dir", part] if resume else [*argv, part]))
                        os._exit(0)
                    os._exit(1)
                for wait in range(0 if life else 30_000):  # the first life lasts to its first row, and is killed for certain
                    if Path(f"{part}/metrics.jsonl").exists():
                        break
                    time.sleep(1e-3)
                time.sleep(rng.uniform(0, took) if life else 0)
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
                killed += status == signal.SIGKILL
                assert status in (0, signal.SIGKILL), f"the run failed, {status}"
                if not status:
                    break
                for name in ("ckpt.pt", "best.pt"):
                    if (Path(part) / name).exists():
                        train.load_checkpoint(f"{part}/{name}")
            assert_same_run(whole, part)
            assert not list(Path(part).glob("*.tmp"))
        assert killed


def in_processes(world, work):
    """Call work() in `world` forked processes that find what torchrun would tell them -> their exit statuses."""
    if not hasattr(os, "fork"):
        raise Skip("needs fork")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank),
                              LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            status = 1
            try:
                work()
                status = 0
            except SystemExit as stop:
                status = stop.code
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_processes_share_a_batch():
    """Two processes take the same gradients as one, for every rule, with the encoder's batch norm across them."""
    with fake_packs() as packs, tempfile.TemporaryDirectory() as folder:
        tasks = [Copy(2, 3, 6), FewShot("omniglot", packs, 3, 1, 2)]

        def learn():
            rank, world, _ = train.join(torch.device("cpu"))
            for rule in RULES:
                for task in tasks:
                    model = small_model(task, rule, filters=4).train()
                    shared = model if world == 1 else DistributedDataParallel(model)
                    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
                    train.update(shared, task, optimizer, draw(task, 4).share(rank, world), "float32")
                    found = {name: p.grad for name, p in model.named_parameters()}
                    found.update((name, value.double()) for name, value in model.named_buffers())  # the running statistics
                    torch.save(found, f"{folder}/{rule}-{type(task).__name__}-{rank}-of-{world}")

        assert in_processes(2, learn) == [0, 0]
        learn()
        for rule in RULES:
            for task in tasks:
                one, *two = (torch.load(f"{folder}/{rule}-{type(task).__name__}-{of}") for of in ("0-of-1", "0-of-2", "1-of-2"))
                for found in two:
                    for name, value in one.items():
                        assert_close(found[name], value, f"{rule}, {type(task).__name__}, {name}")


def test_training_in_two_processes():
    """One writes; what it writes is what one process alone does, and each can go on with the other's run."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [*TINY_COPY, *"--rule hebbian --steps 4 --eval-interval 2 --lr 1e-3 --out-dir".split()]
        one, two, more = f"{folder}/one", f"{folder}/two", ["--resume", "--steps", 6, "--out-dir"]
        run_train(*argv, one)

        def stopped():  # the signal reaches one of them; both finish the same update
            run_train_until = interrupted if os.environ["RANK"] == "1" else (lambda argv, at: run_train(*argv))
            run_train_until([*argv, two], 2)

        assert in_processes(2, stopped) == [128 + signal.SIGTERM, 0] and train.load_checkpoint(f"{two}/ckpt.pt")["step"] == 2
        assert in_processes(2, lambda: run_train("--resume", "--out-dir", two)) == [0, 0]
        shutil.copytree(one, f"{folder}/from-one")
        run_train(*more, one)
        assert in_processes(2, lambda: run_train(*more, f"{folder}/from-one")) == [0, 0]
        run_train(*more, two)
        rows = metrics_of(one)
        assert [row["step"] for row in rows] == [2, 4, 6]
        for run in (two, f"{folder}/from-one"):
            for row, expected in zip(metrics_of(run), rows, strict=True):
                assert abs(row["train_loss"] - expected["train_loss"]) < 1e-4
                assert abs(row["val_loss"] - expected["val_loss"]) < 1e-4
        assert in_processes(2, lambda: refused(train.main, *argv, f"{folder}/new", "--batch-size", 3)) == [0, 0]
        assert not Path(f"{folder}/new").exists()


def test_what_may_not_be_resumed():
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        argv = [*TINY_COPY, *"--rule none --steps 4 --eval-interval 2 --out-dir".split(), run]
        assert "no ckpt.pt" in refused(train.main, *argv, "--resume")
        interrupted(argv, 3)
        before = {path.name: path.read_bytes() for path in run.iterdir()}

        def untouched(*flags):
            line = refused(train.main, *flags, "--out-dir", run)
            assert {path.name: path.read_bytes() for path in run.iterdir()} == before, flags
            return line

        assert "--resume goes on with it, --overwrite replaces it" in untouched(*argv[:-2])
        assert "--resume" in untouched("--resume", "--overwrite")
        for flags, old in (("--n-layer 1", 2), ("--rule hebbian", "none"), ("--lr 0.5", 0.004), ("--seed 1", 0), ("--delay 4", 3)):
            line = untouched("--resume", *flags.split())
            assert flags in line and f"has {old}," in line, line
        good = torch.load(run / "ckpt.pt", weights_only=True)
        for name in ("model", "optimizer", "generator", "random", "step", "rows", "losses", "best"):
            for content in ({k: v for k, v in good.items() if k != name}, {**good, name: "nonsense"}):
                torch.save(content, run / "ckpt.pt")
                before["ckpt.pt"] = (run / "ckpt.pt").read_bytes()
                assert "ckpt.pt" in untouched("--resume"), name
        for change in (dict(d_ff="wide"), dict(d_ff=17), dict(rule="magic"), dict(surprise=1), dict(lr=[1.0])):
            torch.save({**good, "args": {**good["args"], **change}}, run / "ckpt.pt")
            before["ckpt.pt"] = (run / "ckpt.pt").read_bytes()
            assert "ckpt.pt" in untouched("--resume"), change
        torch.save(good, run / "ckpt.pt")
        before["ckpt.pt"] = (run / "ckpt.pt").read_bytes()
        for log in (b"", b'{"step": 2, "val_met', b'{"step": 2}\n', b'{"step": 2, "val_metric": 0.5}', b"[]\n", b"\xff\n"):
            (run / "metrics.jsonl").write_bytes(log)
            before["metrics.jsonl"] = log
            assert "metrics.jsonl" in untouched("--resume"), log


def test_faults_lose_nothing():
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        argv = [*TINY_COPY, *"--rule gradient --steps 6 --eval-interval 1 --save-interval 0 --out-dir".split(), run, "--overwrite"]

        def failing(module, name, at, error):
            """Replace a function by one whose call number `at` and those after it fail -> the one line of the run."""
            real, calls = getattr(module, name), 0

            def broken(*args, **kwargs):
                nonlocal calls
                calls += 1
                return real(*args, **kwargs) if calls < at else error(real, *args, **kwargs)

            setattr(module, name, broken)
            try:
                return refused(train.main, *argv)
            finally:
                setattr(module, name, real)

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        def not_finite(real, model, *rest):
            with torch.no_grad():
                model.head.weight.fill_(math.inf)
            return real(model, *rest)

        line = failing(os, "fsync", 5, full)
        assert "No space left" in line and str(run) in line, line
        assert not list(run.glob("*.tmp"))
        step = train.load_checkpoint(run / "ckpt.pt")["step"]
        assert 0 < step < 6 and torch.load(run / "best.pt", weights_only=True)["step"] <= step + 1
        run_train("--resume", "--out-dir", run)
        table = run / "eval.json"
        run_eval(run, "--episodes", 4, "--json", table)
        before = table.read_bytes()
        with mock.patch.object(os, "fsync", full):
            assert str(table) in refused(evaluation.main, run, "--episodes", 2, "--json", table) and table.read_bytes() == before
        with mock.patch.object(json, "dumps", full):  # stands for a full disk under metrics.jsonl, which names no file
            assert f"--out-dir {run}" in refused(train.main, *argv)
        run_train(*argv)
        line = failing(train, "update", 4, not_finite)
        assert "update 4, rule gradient: loss nan" in line and "--lr" in line, line
        state = train.load_checkpoint(run / "ckpt.pt")
        assert state["step"] == 3 and all(value.isfinite().all() for value in state["model"].values())


def ends_well(main, *argv):
    """Run a command that may succeed or fail, but must fail with one line and exit status 2 -> did it succeed?"""
    with quiet() as (_, err):
        try:
            main([str(a) for a in argv])
            return True
        except SystemExit as stop:
            line = err.getvalue()
            assert stop.code == 2 and line.startswith("error: ") and line.count("\n") == 1, f"{argv}: {stop.code}, {line!r}"
            return False
        except BaseException as error:
            raise AssertionError(f"{' '.join(map(str, argv))} ended in {type(error).__name__}: {error}") from error


def test_damaged_files():
    """Truncations, flipped bits and foreign pickles: one line and exit 2, or a file that loads. DAMAGED=200 tries so many."""
    rng = random.Random(0)
    with fake_packs() as packs, tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        run, kept, data, surprise = folder / "run", folder / "kept", folder / "data", folder / "surprise"
        run_train(*TINY_COPY, *"--rule gradient --steps 4 --eval-interval 1 --out-dir".split(), run)
        kept.mkdir()
        run_eval(run, "--episodes", 4, "--json", kept / "eval.json")
        shutil.copytree(packs, data)
        few_shot = [*TINY, *"--task omniglot --rule none --filters 4 --batch-size 1 --eval-batches 1 --steps 1 --warmup-steps 0 --out-dir".split()]
        resume = (train.main, ["--resume", "--steps", 5, "--out-dir", run])
        read = {run / "ckpt.pt": resume, run / "metrics.jsonl": resume, run / "best.pt": (evaluation.main, [run, "--episodes", 4]),
                kept / "eval.json": (evaluation.main, [kept, kept]),
                data / "omniglot.pt": (train.main, [*few_shot, folder / "other", "--overwrite", "--data-dir", data])}
        torch.save({"args": Surprise(surprise), "images": Surprise(surprise), "model": Surprise(surprise)}, folder / "pickle.pt")
        foreign, refusals = (folder / "pickle.pt").read_bytes(), 0
        for _ in range(int(os.environ.get("DAMAGED", 15))):
            path = rng.choice(list(read))
            main, argv = read[path]
            before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            damaged = bytearray(before[path])
            how = rng.choice(("cut", "flip", "flip", "foreign"))
            if how == "cut":
                del damaged[rng.randrange(len(damaged)):]
            elif how == "flip":
                for _ in range(rng.choice((1, 10, 1000))):
                    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            path.write_bytes(foreign if how == "foreign" else damaged)
            wrong = path.read_bytes()
            well = ends_well(main, *argv)
            refusals += not well
            assert not (well and how == "foreign") and not surprise.exists(), f"{path}: {how}"
            for p in folder.rglob("*"):
                if p.is_file() and not well and folder / "other" not in p.parents:
                    assert p.read_bytes() == (wrong if p == path else before[p]), f"{how} in {path} changed {p}"
            for p, content in before.items():
                p.write_bytes(content)
        assert refusals


def test_random_arguments():
    """Any arguments: a run, or one line and exit 2. ARGUMENTS=500 tries so many."""
    rng = random.Random(0)
    values = {"--task": "copy cue regression cifarfs omniglot nonsense", "--rule": "none hebbian gradient magic", "--seq-len": "0 1 3",
              "--delay": "0 3 -1", "--min-delay": "0 2 9", "--vocab-size": "2 3 5", "--pairs": "1 3 9", "--cues": "2 4", "--dim": "1 3",
              "--support": "1 3 x", "--queries": "0 1 2 30", "--ways": "1 3 999", "--shots": "1 2 19 20", "--n-layer": "0 1 2",
              "--n-head": "1 2 3", "--d-model": "1 4 6", "--d-ff": "1 8", "--dropout": "0 0.5 1 nan", "--window": "0 1 3 -1",
              "--block-size": "1 40", "--position": "learned rotary polar", "--filters": "1 2", "--alpha": "full outer",
              "--fold": "0 1 2 -3", "--alpha-init": "-1 0 8 inf", "--eta0": "0 1 1.5 nan", "--max-norm": "0 1 inf -1",
              "--aux-dim": "0 2", "--ablate": "none eta alpha backward", "--steps": "0 1 2", "--batch-size": "1 2 0",
              "--lr": "1e-3 1 0 2", "--warmup-steps": "0 1", "--seed": "0 7 -1 99999999999999999999", "--device": "cpu tpu",
              "--threads": "1 0", "--dtype": "float32 bfloat16", "--eval-interval": "1 5", "--eval-batches": "1 2",
              "--save-interval": "0 nan"}
    outcomes = []
    with fake_packs() as packs, tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        for _ in range(int(os.environ.get("ARGUMENTS", 30))):
            argv = ["--task", rng.choice(("copy", "cue", "regression", "cifarfs", "omniglot")), "--steps", 1, "--batch-size", 2,
                    "--d-model", 8, "--d-ff", 8, "--filters", 2, "--eval-batches", 1, "--device", "cpu"]
            for flag in rng.sample(list(values), rng.choice((1, 2, 4, 8))):
                argv += [flag, rng.choice(values[flag].split())]
            if ends_well(train.main, *argv, "--warmup-steps=0", "--data-dir", packs, "--out-dir", run, *rng.choice(([], ["--overwrite"]))):
                size = rng.choice(("--delay", "--ways", "--shots", "--support", "--queries", "--episodes"))
                outcomes.append(ends_well(evaluation.main, run, "--batch-size", 2, "--episodes", 2, size, rng.choice((1, 2, 30))))
        assert True in outcomes


def test_readme_names_every_flag():
    """The README's table against the parser, both ways."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        train.parse_args(["--help"])
    flags = set(re.findall(r"^  (?:-\w, )?(--[a-z][a-z0-9-]+)", text.getvalue(), re.MULTILINE)) - {"--help"}
    table = set(re.findall(r"^\| `(--[a-z0-9-]+)` \|", (HERE / "README.md").read_text(), re.MULTILINE))
    assert flags == table, f"not in both: {flags ^ table}"


def test_readme_tables_come_from_the_results():
    """What stands between the README's markers is what the command in the first of them prints."""
    text = (HERE / "README.md").read_text()
    before = os.getcwd()
    os.chdir(HERE)  # the links in the tables are relative
    try:
        printed = run_eval(*sorted(Path("results").iterdir()))
    finally:
        os.chdir(before)
    tables = re.search(r"<!-- tables: python eval.py results/\* -->\n(.*)<!-- end of tables -->", text, re.DOTALL)[1]
    assert printed.strip() == tables.strip(), "fill the README in anew"


class Surprise:
    """A pickle that makes a folder when it is loaded without weights_only."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_commands_from_outside():
    """The scripts as processes: exit status, streams, and a folder that is not the project's."""
    with tempfile.TemporaryDirectory() as folder:
        def command(*argv):
            return subprocess.Popen([sys.executable, *map(str, argv)], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

        good = command(HERE / "train.py", *TINY_COPY, "--rule", "none", "--steps", 2)
        bad = command(HERE / "eval.py", "out/nowhere")
        said, complaint = good.communicate()[0], bad.communicate()[1]
        assert good.returncode == 0 and "on cpu" in said, said
        assert sorted(p.name for p in (Path(folder) / "out/copy-none-s0").iterdir()) == ["best.pt", "ckpt.pt", "metrics.jsonl"]
        assert bad.returncode == 2 and complaint == (
            "error: out/nowhere has no best.pt and no eval.json: name run directories that train.py wrote, or kept results\n")


def run(name):
    """One test, by its name -> its outcome and the line to print."""
    began = time.time()
    try:
        globals()[name]()
    except Skip as reason:
        return "skipped", f"skip  {name}: {reason}"
    except (Exception, SystemExit):
        return "failed", f"FAIL  {name}\n{traceback.format_exc()}"
    return "passed", f"ok    {name}  {time.time() - began:.1f} s"


def main():
    names = [name for name in globals() if name.startswith("test_")]
    outcomes = collections.Counter(passed=0, failed=0)
    # two at a time; everything here is small, so one thread each
    with concurrent.futures.ProcessPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for outcome, line in pool.map(run, names):
            print(line, flush=True)
            outcomes[outcome] += 1
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    sys.exit(1 if outcomes["failed"] else 0)


if __name__ == "__main__":
    main()
