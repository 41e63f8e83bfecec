"""Measure trained runs on fresh test episodes: score, lesion, and when the model writes.

    python eval.py out/copy-hebbian-s0                    # one run, in full
    python eval.py out/copy-hebbian-s0 --delay 15         # at another delay than trained
    python eval.py results/copy-*-w8-s?                   # of several runs a line each
    python eval.py results/copy-*-w8-s? --plot FILE.png   # how they learned, and what they write

All is measured on best.pt. Runs kept without it, as in results/, have it in their eval.json.
"""
import argparse
import importlib.util
import io
import json
import math
import statistics
from dataclasses import fields
from pathlib import Path

from tasks import TASKS, random_generator, show
from train import add_flags, evaluate, fail, load_run, number, one_line, prepare, save

def measure(run, options, changes, device):
    """All that is said of one run, as a dict that JSON can hold. ValueError where there is none."""
    trained = load_run(Path(run) / "best.pt", changes)[0]["args"]
    if "ways" in trained:
        changes = {"queries": 15, **changes}  # of each class, as in the literature
    for name in {*changes} - {*trained}:
        raise ValueError(f"--{name.replace('_', '-')} is no size of the task of {run}")
    state, task, model = load_run(Path(run) / "best.pt", {"min_delay": None, **changes})
    sizes = {of.name: n for of in fields(task) if isinstance(n := getattr(task, of.name), int)}
    print(f"measuring {run} on {options.episodes} episodes", flush=True)
    model.to(device)

    def test():  # the same episodes each time
        return evaluate(model, task, "test", options.episodes, options.batch_size,
                        random_generator(options.seed, "test"), device)

    result = test()
    row = dict(run=str(run), task=trained["task"], rule=trained["rule"], seed=trained["seed"],
               args=trained, sizes=sizes, step=state["step"], metric=task.metric,
               chance=task.chance, episodes=options.episodes, loss=result["loss"],
               score=result["score"], interval=interval(result["scores"]), gates=result["gates"],
               steps=task.step_names, answers=[*show(model, task, "test", device)])
    if row["gates"]:
        # the lesion: the same model on the same episodes, but nothing is ever written
        model.plasticity.eta0 = 0.0
        lesioned = test()
        row.update(lesion=lesioned["score"], lesion_interval=interval(lesioned["scores"]),
                   **gate_figures(row["gates"], task.step_names, trained["eta0"]))
    return row

def interval(scores):
    """Half the 95% confidence interval of the mean of scores (n,): 1.96 standard errors."""
    return 1.96 * scores.std().item() / math.sqrt(len(scores)) if len(scores) > 1 else math.inf

def gate_figures(gates, steps, eta0):
    # eta_t and eta_t * ||D_t||, means over the steps
    figures = dict(eta=statistics.fmean(gates["eta"]), write_norm=statistics.fmean(gates["write"]))
    figures["persistence"] = figures["eta"] / eta0 if eta0 else None  # the share of eta_0 used
    if {"item"} < {*steps}:
        items = [w for step, w in zip(steps, gates["write"]) if step == "item"]
        others = [w for step, w in zip(steps, gates["write"]) if step != "item"]
        # selectivity: the mean write at the steps that show an item over that at the others
        figures["selectivity"] = statistics.fmean(items) / max(statistics.fmean(others), 1e-12)
    return figures

def report(row):
    """One run as lines of text: its figures, some answers, then a bar for each step's write."""
    yield (f"{row['run']}: {row['task']}, rule {row['rule']}, window {row['args']['window']}, "
           f"seed {row['seed']}, " + "".join(f"{k} {v}, " for k, v in row["sizes"].items())
           + f"best at step {row['step']}")
    yield (f"  test {row['metric']:13} {row['score']:.5f} ± {row['interval']:.5f}   "
           f"(95% interval, {row['episodes']} episodes; guessing {row.get('chance', '?'):.5})")
    gates = row["gates"]
    if gates:
        yield f"  lesioned (eta = 0) {row['lesion']:.5f} ± {row['lesion_interval']:.5f}"
        yield "  " + "   ".join(f"{name.replace('_', ' ')} {row[name]:.5f}" for name in (
            "eta", "write_norm", "persistence", "selectivity") if row.get(name) is not None)
    yield from row.get("answers", ())
    if gates:
        yield f"  {'step':14} {'eta':>8} {'||D||':>9} {'write':>8}   (means of all episodes)"
        names, most = row.get("steps", [""] * len(gates["eta"])), max(*gates["write"], 1e-12)
        for t, figures in enumerate(zip(gates["eta"], gates["d_norm"], gates["write"])):
            bar = "#" * round(40 * gates["write"][t] / most)
            yield "  {:4} {:9} {:8.5f} {:9.3f} {:8.5f} ".format(t, names[t], *figures) + bar

def overview(rows):
    """Of several runs a line each."""
    names = ("score", "interval", "lesion", "eta", "write_norm", "selectivity")
    yield f"{'run':32} " + " ".join(f"{name:>10}" for name in names)
    for row in rows:
        figures = ["-" if row.get(of) is None else f"{row[of]:.5f}" for of in names]
        yield f"{row['run'][-32:]:32} " + " ".join(f"{figure:>10}" for figure in figures)

def kept(path):
    """The list that --json wrote (.json) or train.py logged (.jsonl). ValueError."""
    try:
        text = path.read_text()
        return json.loads(text if path.suffix == ".json" else f"[{','.join(text.splitlines())}]")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): name a run of train.py") from error

def learning_curve(run):
    """Of each evaluation of a run the update, the validation score and the seconds."""
    return [(r["step"], r["val_metric"], r["seconds"]) for r in kept(Path(run) / "metrics.jsonl")]

def plot(rows, path):
    """Left the validation score by update, a thin line a run and a bold one their mean; right what
    each rule writes at each step, as a share of its largest write."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    curves, strips = figure.subplots(1, 2)
    task, metric, sizes, shares = *(rows[0][k] for k in ("task", "metric", "sizes")), {}
    rules = dict.fromkeys(["none", "hebbian", "gradient", *(row["rule"] for row in rows)])
    for color, rule in zip(("0.5", "C0", "C1", "C2", "C3"), rules):
        group = [row for row in rows if row["rule"] == rule]
        lines = [learning_curve(row["run"]) for row in group]
        for line in lines:
            steps, scores, _ = zip(*line)
            curves.plot(steps, scores, color=color, linewidth=0.6)
        mean = [statistics.fmean(score for _, score, _ in at) for at in zip(*lines)]
        curves.plot(steps[:len(mean)] if mean else [], mean, color=color, linewidth=2)
        if mean:  # the name of the rule, where its curve is half way up
            middle = (min(mean) + max(mean)) / 2
            at = min(range(len(mean)), key=lambda i: abs(mean[i] - middle))
            curves.annotate(f"  {rule}", (steps[at], mean[at]), color=color, va="bottom")
        if group and group[0]["gates"]:
            writes = [statistics.fmean(at) for at in zip(*(row["gates"]["write"] for row in group))]
            shares[rule] = [write / max(1e-12, *writes) for write in writes]
    curves.axhline(rows[0].get("chance", math.nan), color="0.5", linestyle="dashed", linewidth=1)
    curves.set(xlabel="update", ylabel=f"validation {metric}",
               yscale="log" if metric == "mse" else "linear")
    if shares:
        image = strips.imshow([*shares.values()], norm=LogNorm(1e-3, 1), aspect="auto")
        strips.set_yticks(range(len(shares)), shares)
        figure.colorbar(image, label="write / largest")
    if task == "copy":
        n, delay = sizes["seq_len"], sizes["delay"]
        words = [f"{n} items", f"{delay} blanks", "recall"]
        strips.set_xticks([0, n, n + delay + 1], words, ha="left")
    strips.set(xlabel="step of the episode")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=Path(path).suffix[1:] or "png")
    save(path, picture.getvalue())

def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, usage="python eval.py RUN... [flags]", allow_abbrev=False,
        conflict_handler="resolve", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder that train.py wrote")
    parser.add_argument("--gates", action="store_true", help="of several runs all, in full")
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
    names = ["data_dir", *(field.name for task, _ in TASKS.values() for field in fields(task))]
    return options, {k: v for k, v in vars(options).items() if k in names and v is not None}

def main(argv=None):
    with one_line():
        options, changes = parse_args(argv)
        device, _, _ = prepare(options)
        try:
            evaluate_runs(options, changes, device)
        except (LookupError, TypeError) as error:
            raise ValueError(f"what is kept of a run is not what we wrote: {error!r}") from error

def evaluate_runs(options, changes, device):
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
    in_full = len(rows) == 1 or options.gates
    lines = [line for row in rows for line in report(row)] if in_full else overview(rows)
    print("\n".join(lines))

if __name__ == "__main__":
    main()
