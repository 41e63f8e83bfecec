"""Every test of the project: python test_all.py, or pytest test_all.py.

The oracle comes first: the recurrence as the paper writes it, one sequence and one step at a time with an explicit
P_t, in double precision. Everything else in plasticity.py and model.py is only allowed to be faster than it.
"""
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from torch.nn import functional as F

import eval as evaluation
import tasks
import train
from model import Transformer
from plasticity import RULES
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
    layers = [layer for block in model.blocks for layer in (block.up, block.down)]
    P = {layer: torch.zeros_like(layer.weight) for layer in layers}
    p = {layer: torch.zeros_like(layer.bias) for layer in layers}
    past = [[] for _ in model.blocks]  # of each block: (k, v) of every context step

    def plastic(layer, x, read):
        # y_t = (W + P_t) x_t + (b + p_t)
        y = (layer.weight + P[layer]) @ x + (layer.bias + p[layer])
        read[layer] = x, y
        return y

    def step(x):
        """One token (C) -> z_t, what each plastic layer read, and each block's (k, v)."""
        read, new = {}, []
        for block, seen in zip(model.blocks, past):
            attention = block.attention
            q, k, v = attention.qkv(block.norm1(x)).chunk(3)
            new.append((k, v))
            seen = seen + [(k, v)]
            if model.window:
                seen = seen[-model.window:]
            heads = []
            size = len(q) // attention.n_head
            for h in range(attention.n_head):
                part = slice(h * size, (h + 1) * size)
                scores = torch.stack([q[part] @ k_s[part] / math.sqrt(size) for k_s, _ in seen])
                heads.append(sum(w * v_s[part] for w, (_, v_s) in zip(scores.softmax(0), seen)))
            x = x + attention.proj(torch.cat(heads))
            x = x + plastic(block.down, F.gelu(plastic(block.up, block.norm2(x), read)), read)
        return model.head(model.norm(x)), read, new

    answers, etas = [], []
    for t, token in enumerate(context):
        z, read, new = step(token + model.position[t])
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
        eta = model.plasticity.eta0 * torch.sigmoid(z[n_out]) * scale
        etas.append(eta)
        for layer in layers:
            # P_{t+1} = (1 - eta_t) P_t + eta_t * alpha ∘ D_t
            P[layer] = (1 - eta) * P[layer] + eta * layer.alpha * D[layer]
            p[layer] = (1 - eta) * p[layer] + eta * layer.beta * d[layer]
    if queries is not None:  # each reads as if it alone came next, and writes nothing
        answers = [step(query + model.position[len(context)])[0][:n_out] for query in queries]
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
    grads = torch.autograd.grad((out * weights).sum(), list(model.parameters()), allow_unused=True)
    return {name: grad for (name, _), grad in zip(model.named_parameters(), grads)}


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
        assert eta.min() < 0.9 * eta.max(), "every eta is the same, so this shows too little"
    ours, theirs = gradients(model, out), gradients(model, expected)
    for name in ours:
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
        for max_norm in (0, 1e-4, 1, 1e6):
            gates = check_against_oracle(Copy(2, 2, 5), rule, max_norm=max_norm, eta0=0.7)
            clipped = (gates.d_norm > max_norm).double().mean().item() if max_norm else 0.0
            assert clipped == {0: 0.0, 1e-4: 1.0, 1e6: 0.0}.get(max_norm, clipped)


def test_gradcheck():
    for rule in ("hebbian", "gradient"):
        for task in (Copy(1, 1, 4), Cue(3, 3)):
            model = small_model(task, rule, n_layer=1, n_head=1, d_model=3, d_ff=3)
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


def main():
    names = [name for name in globals() if name.startswith("test_")]
    passed = failed = 0
    for name in names:
        began = time.time()
        try:
            globals()[name]()
            passed += 1
            print(f"ok    {name}  {time.time() - began:.1f} s", flush=True)
        except Exception:
            failed += 1
            print(f"FAIL  {name}\n{traceback.format_exc()}", flush=True)
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
