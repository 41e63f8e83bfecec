"""Measure trained runs on fresh test episodes: score, lesion, and when the model writes.

    python eval.py out/copy-hebbian-s0                    # one run, in full
    python eval.py out/copy-hebbian-s0 --delay 15         # at another delay than trained
    python eval.py results/copy-*-w8-s?                   # of several runs a line each
    python eval.py results/copy-*-w8-s? --plot FILE.png   # how they learned, and what they write

Scores are those of best.pt, gates those of ckpt.pt, the end of training. Runs that are kept without
them, as in results/, have all in their eval.json.
"""
import argparse
import importlib.util
import json
import math
from dataclasses import fields
from pathlib import Path
from statistics import fmean

import torch

from tasks import TASKS, show
from train import add_flags, evaluate, fail, load_run, number, one_line, prepare, save

GATE_FIGURES = "persistence cap_share change selectivity eta_selectivity share_of_pairs".split()

def measure(run, options, changes, device):
    """All that is said of one run, as a dict that JSON can hold. ValueError where there is none."""
    trained = load_run(Path(run) / "best.pt", {"min_delay": None, **changes})[0]["args"]
    if "ways" in trained:
        changes = {"queries": 15, **changes}  # of each class, as in the literature
    for name in {*changes} - {*trained}:
        raise ValueError(f"--{name.replace('_', '-')} is no size of the task of {run}")
    changes = {"min_delay": None, **changes}
    state, task, model = load_run(Path(run) / "best.pt", changes)
    sizes = {of.name: n for of in fields(task) if isinstance(n := getattr(task, of.name), int)}
    print(f"measuring {run} on {options.episodes} episodes", flush=True)

    def test(answer):  # on the same episodes each time
        return evaluate(answer, task, "test", options.episodes, options.batch_size,
                        options.seed, device)

    if trained.get("pretrain_steps"):
        task.embed("test", model.to(device).eval().embed.encoder, device)
    result = test(model.to(device).eval())
    scores, shown = result["scores"], result["shown"]
    row = dict(run=str(run), task=trained["task"], rule=trained["rule"], seed=trained["seed"],
               args=trained, sizes=sizes, step=state["step"], metric=task.metric,
               chance=task.chance, episodes=options.episodes, loss=result["loss"],
               score=result["score"], interval=interval(scores), steps=task.step_names,
               answers=[*show(model, task, "test", device)], gates=None)
    if shown is not None:  # the mean score of the answers that need step t
        row["by_step"] = [[t, scores[shown == t].mean().item()] for t in shown.unique().tolist()]
    if "ways" in trained:
        row["prototype"] = test(model.embed.nearest_prototype)["score"]
    if result["gates"] is not None:
        model.plasticity.eta0 = 0.0  # the lesion: the same model, but nothing is ever written
        lesioned = test(model)
        row.update(lesion=lesioned["score"], lesion_interval=interval(lesioned["scores"]))
        _, _, model = load_run(Path(run) / "ckpt.pt", changes)
        row.update(gate_figures(test(model.to(device).eval())["gates"], shown, model))
    return row

def interval(scores):
    """Half the 95% interval of the mean of scores (n, L) of n episodes: 1.96 standard errors."""
    scores, n = scores.mean(1), len(scores)
    if n > 1 and scores.eq(1).all():
        return 1.96**2 / (n + 1.96**2)  # Wilson's: n right of n is no certainty
    return 1.96 * scores.std().item() / math.sqrt(n) if n > 1 else math.inf

def gate_figures(gates, shown, model):
    """Of gates (4, n, T) by train.evaluate, where what is asked for was `shown` (n, L)."""
    (eta, _, write, change), rule = gates, model.plasticity  # (n, T) each
    capped = write / rule.eta0 / rule.max_norm  # as a share of the most that these two allow
    slow = [layer.weight for layer in model.modules() if hasattr(layer, "alpha")]
    slow = sum(W.square().sum().item() for W in slow) ** 0.5  # ||W||
    figures = dict(gates=dict(zip(("eta", "d_norm", "write", "change"), gates.mean(1).tolist())),
                   persistence=(eta.mean() / rule.eta0).item(), cap_share=capped.mean().item(),
                   change=change.mean().item() / slow, writes={"": capped.mean(0).tolist()})
    if shown is None:
        return figures
    counts = torch.zeros_like(write, dtype=torch.bool).scatter(1, shown, True)  # (n, T)
    both = counts.any(0) & ~counts.all(0)  # (T): steps that count in some episodes, not in all
    if both.any():
        one, other, eta_one, eta_other = (  # means at steps that count and at the others, (T) each
            (of * kind).sum(0) / kind.sum(0) for of in (capped, eta) for kind in (counts, ~counts))
        more = torch.cat([(write[counts[:, t], t][:, None] - write[~counts[:, t], t]).flatten()
                          for t in both.nonzero().flatten()])  # of all pairs at the same position
        figures.update(selectivity=(one / other)[both].mean().item(),
                       eta_selectivity=(eta_one / eta_other)[both].mean().item(),
                       share_of_pairs=(1 + more.sign().mean().item()) / 2,  # equal is half
                       writes={", counts": one.tolist(), ", noise": other.tolist()})
    return figures

def report(row):
    """One run as lines of text: its figures, some answers, then a bar for each step's write."""
    yield (f"{row['run']}: {row['task']}, rule {row['rule']}, window {row['args']['window']}, "
           f"seed {row['seed']}, " + "".join(f"{k} {v}, " for k, v in row["sizes"].items() if v)
           + f"best at step {row['step']}")
    for name, key, half in ((f"test {row['metric']}", "score", "interval"),
                            ("lesioned (eta = 0)", "lesion", "lesion_interval")):
        if key in row:
            low, high = max(0, row[key] - row[half]), row[key] + row[half]
            high = min(high, 1) if row["metric"] == "accuracy" else high
            yield (f"  {name:18} {row[key]:.5f}   95% interval {low:.5f} to {high:.5f}, "
                   f"{row['episodes']} episodes; guessing {row['chance']:.5}")
    if "prototype" in row:
        yield f"  nearest prototype  {row['prototype']:.5f}   (the encoder alone, same episodes)"
    if "by_step" in row:
        yield "  by step shown " + " ".join(f"{score:.3g}" for _, score in row["by_step"])[:86]
    yield from row["answers"]
    if gates := row["gates"]:
        yield "  " + "   ".join(f"{name.replace('_', ' ')} {row[name]:.5f}"
                                for name in GATE_FIGURES if name in row)
        yield f"  {'step':14} {'eta':>8} {'||D||':>9} {'write':>8}   (means of all episodes)"
        most = max(*gates["write"], 1e-12)
        for t, figures in enumerate(zip(gates["eta"], gates["d_norm"], gates["write"])):
            bar = "#" * round(40 * gates["write"][t] / most)
            yield "  {:4} {:9} {:8.5f} {:9.3f} {:8.5f} ".format(t, row["steps"][t], *figures) + bar

def overview(rows):
    names = ("score", "interval", "lesion", *GATE_FIGURES[:4])
    yield f"{'run':32} " + " ".join(f"{name:>11}" for name in names)
    for row in rows:
        figures = ["-" if row.get(of) is None else f"{row[of]:.5f}" for of in names]
        yield f"{row['run'][-32:]:32} " + " ".join(f"{figure:>11}" for figure in figures)

def kept(path):
    """The list that --json wrote (.json) or train.py logged (.jsonl). ValueError."""
    try:
        text = path.read_text()
        return json.loads(text if path.suffix == ".json" else f"[{','.join(text.splitlines())}]")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): name a run of train.py") from error

def plot(rows, path):
    """Left the validation score by update, a thin line a run and a bold one their mean; right what
    each rule writes at each step, as a share of the most that eta_0 and max_norm allow."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    (left, right), strips = figure.subplots(1, 2), {}
    rules = dict.fromkeys(["none", "hebbian", "gradient", *(row["rule"] for row in rows)])
    for color, rule in zip(("0.5", "C0", "C1", "C2", "C3"), rules):
        group = [row for row in rows if row["rule"] == rule]
        lines = [[(at["step"], at["val_metric"]) for at in kept(Path(row["run"]) / "metrics.jsonl")]
                 for row in group]
        for line in lines:
            left.plot(*zip(*line), color=color, linewidth=0.6)
        if lines:
            mean = [(at[0][0], fmean(score for _, score in at)) for at in zip(*lines)]
            left.plot(*zip(*mean), color=color, linewidth=2, label=rule)
        for kind in group[0].get("writes", ()) if group else ():
            writes = zip(*(row["writes"][kind] for row in group))
            strips[rule + kind] = [fmean(at) for at in writes]
    left.axhline(rows[0]["chance"], color="0.5", linestyle="dashed", linewidth=1)
    left.set(xlabel="update", ylabel=f"validation {rows[0]['metric']}",
             yscale="log" if rows[0]["metric"] == "mse" else "linear")
    left.legend()
    if strips:
        image = right.imshow([*strips.values()], norm=LogNorm(1e-3, 1), aspect="auto")
        right.set_yticks(range(len(strips)), strips)
        figure.colorbar(image, label="write / its cap")
    steps = rows[0]["steps"]
    names = [name for name in dict.fromkeys(steps) if steps.count(name) > 1]
    right.set_xticks([steps.index(name) for name in names], names, ha="left")
    right.set(xlabel="step of the episode")
    figure.savefig(path, dpi=120)

def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, usage="python eval.py RUN... [flags]", allow_abbrev=False,
        conflict_handler="resolve", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder that train.py wrote")
    parser.add_argument("--json", metavar="FILE", help="write all that is measured")
    parser.add_argument("--plot", metavar="FILE", help="draw it (needs matplotlib)")
    parser.add_argument("--episodes", type=number(int, 1), default=600, help="how many (600)")
    parser.add_argument("--batch-size", type=number(int, 1), default=20, help="at once (20)")
    parser.add_argument("--seed", type=number(int, 0, 2**60), default=0, help="of the episodes (0)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--threads", type=number(int, 1), default=1, help="of the CPU (1)")
    parser.add_argument("--data-dir", help="where the images are")
    for task, (sizes, _) in TASKS.items():
        add_flags(parser, f"episodes of {task}, if not as trained", sizes)
    options = parser.parse_args(argv)
    if options.plot and not importlib.util.find_spec("matplotlib"):
        fail("--plot needs matplotlib: pip install matplotlib")
    names = [field.name for task, _ in TASKS.values() for field in fields(task)]
    return options, {k: v for k, v in vars(options).items() if k in names and v is not None}

def main(argv=None):
    with one_line():
        options, changes = parse_args(argv)
        device, _, _ = prepare(options)
        rows, others = [], changes or (options.episodes, options.seed) != (600, 0)  # than are kept
        for run in options.runs:
            best, file = Path(run) / "best.pt", Path(run) / "eval.json"
            if best.exists() or others or not file.exists():
                rows.append(measure(run, options, changes, device))
            else:
                rows.append({**kept(file)[0], "run": run})
        if options.json:
            save(options.json, (json.dumps(rows, indent=1) + "\n").encode())
        if options.plot:
            plot(rows, options.plot)
        print("\n".join(report(*rows) if len(rows) == 1 else overview(rows)))

if __name__ == "__main__":
    main()
