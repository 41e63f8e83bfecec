"""Measure trained runs: test score, lesion, gates.

    python eval.py out/copy-hebbian-s0                   # one run in detail
    python eval.py out/copy-*-s*                         # several: one table, mean ± s.d. over seeds, and the claims
    python eval.py results/*                             # the README's tables, from what is kept of its runs
    python eval.py out/copy-hebbian-s0 --delay 15        # how far does it carry?
    python eval.py RUN --json FILE --plot FILE.png

Every figure comes from best.pt, the state that was best on validation data, on fresh test episodes.
"""
import argparse
import importlib.util
import io
import json
import math
import re
import statistics
from pathlib import Path

import torch

from model import build_model
from plasticity import RULES
from tasks import make_task, random_generator, write
from train import add_size_flags, evaluate, fail, load_checkpoint, number, pick_device, prepare_cpu
from train import parse_args as train_args

SIZES = ("seq_len", "delay", "pairs", "support", "queries", "ways", "shots")  # those that a test may change
# Levels to hold a score against; the paper's figures with none, hebbian and gradient (mean ± s.d. of 3 seeds); and what there
# is to learn, the distance from guessing to perfect
REFERENCE = {
    "copy": ("chance 0.125, the right tokens in any order about 0.37; the paper's figures count blanks", ("0.721", "0.727", "0.745"), 0.875),
    "cue": ("guessing the mean 0.083", ("0.053 ± 0.020", "0.065 ± 0.036", "0.064 ± 0.020"), 1 / 12),
    "regression": ("guessing 0 gives 4, least squares 0", ("1.997 ± 0.266", "1.546 ± 0.064", "1.589 ± 0.038"), 4.0),
    "cifarfs": ("chance 1/ways; 5-way 1-shot: ProtoNet 0.555, MAML 0.589, R2D2 0.60 to 0.62",
                ("0.289 ± 0.028", "0.319 ± 0.017", "0.274 ± 0.038"), 0.8),
    "omniglot": ("chance 1/ways; 5-way 1-shot: MAML 0.987, R2D2 0.989", ("0.192 ± 0.020", "0.237 ± 0.028", "0.201 ± 0.012"), 0.8),
}


def interval(scores):
    """Half the width of the 95% confidence interval of the mean of scores (n,), 1.96 standard errors."""
    return 1.96 * scores.std().item() / math.sqrt(len(scores)) if len(scores) > 1 else math.inf


def load_run(run, device, overrides):
    """The task, model (from best.pt), arguments and step of a run, with the task's sizes overridden. Raises ValueError."""
    state = load_checkpoint(Path(run) / "best.pt")
    args = argparse.Namespace(**state["args"])
    trained = vars(args).copy()
    if "ways" in trained and trained["ways"]:
        args.queries = 15  # a class, as in the literature; training may use fewer
        args.n_out = args.ways
    for name, value in overrides.items():
        if value is None:
            continue
        if name != "data_dir" and trained.get(name) is None:
            raise ValueError(f"--{name.replace('_', '-')} is not a size of {args.task}, the task of {run}")
        setattr(args, name, value)
    args.min_delay = None  # of training only
    try:
        task = make_task(args)
        model = build_model(args, task)
        model.load_state_dict(state["model"])
        args.step = int(state["step"])
        args.trained = {name: value for name, value in trained.items() if name not in ("out_dir", "data_dir", "bench")}
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{run}/best.pt does not fit the model its own arguments describe: "
                         + str(error).strip().split("\n")[-1].strip()) from error
    return task, model.to(device), args


def flags(trained):
    """What a run was told beyond its task, rule and seed, as train.py's flags. It says nothing of the places and the machine."""
    usual = vars(train_args(["--task", trained["task"], "--rule", trained["rule"]]))
    other = ("seed", "device", "threads", "eval_interval", "eval_batches", "save_interval", "block_size", "out_dir", "data_dir",
             "resume", "overwrite", "bench")
    return " ".join(f"--{name.replace('_', '-')} {trained[name]}" for name in usual
                    if name not in other and trained.get(name, usual[name]) != usual[name])


def recorded(run):
    """What eval.py --json once wrote about a run that is kept without its checkpoint, as results/ does. Raises ValueError."""
    rows = []
    for path in sorted(Path(run).glob("eval*.json")):
        try:
            for row in json.loads(path.read_text()):
                # the flags are said against the defaults of today, which may not be those of then
                rows.append({**row, "run": str(run), "flags": flags(row["args"])})
                list(table(rows[-1:])), row["sizes"].get("delay", 0) + row["window"]  # what cannot be shown alone is damaged
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not what eval.py --json writes ({error})") from error
    if not rows:
        raise ValueError(f"{run} has no best.pt and no eval.json: name run directories that train.py wrote, or kept results")
    return rows


def learning_curve(run):
    """The rows of a run's metrics.jsonl. Raises ValueError where there are none or one is damaged."""
    path = Path(run) / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{name: row[name] for name in ("step", "val_metric", "seconds")} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a readable log of train.py ({error})") from error
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def learned(run, task):
    """The update after which validation was first within 5% of perfect, of what there is to learn; None if it never was."""
    perfect = 0 if task in ("cue", "regression") else 1
    near = (row["step"] for row in learning_curve(run) if abs(row["val_metric"] - perfect) <= 0.05 * REFERENCE[task][2])
    return next(near, None)


def measure(run, options, device):
    """Everything eval.py says of one run, as a dict that JSON can hold."""
    task, model, args = load_run(run, device, options.overrides)

    def test():  # the same episodes each time
        return evaluate(model, task, "test", options.episodes, options.batch_size,
                        random_generator(options.seed, "test"), device)

    result = test()
    sizes = {name: getattr(args, name) for name in ("seq_len", "delay", "pairs", "cues", "dim", "support", "ways", "shots",
                                                    "queries") if getattr(args, name, None) is not None}
    tested = " ".join(f"--{name.replace('_', '-')} {options.overrides[name]}" for name in SIZES if options.overrides[name])
    row = dict(run=str(run), task=args.task, rule=args.rule, args=args.trained, flags=flags(args.trained), tested=tested,
               window=args.window, seed=args.seed, sizes=sizes, step=args.step, minutes=learning_curve(run)[-1]["seconds"] / 60,
               learned=learned(run, args.task), metric=task.metric, episodes=options.episodes,
               interval=interval(result["scores"]), **{k: result[k] for k in ("score", "loss", "eta", "write_norm", "gates")})
    if result["gates"]:
        model.plasticity.eta0 = 0.0  # the lesion: nothing is ever written
        lesioned = test()
        row.update(lesion=lesioned["score"], lesion_interval=interval(lesioned["scores"]),
                   persistence=result["eta"] / args.eta0 if args.eta0 else None)
        row["tokens"] = task.describe(task.sample("test", 1, random_generator(options.seed, "test")))
        write = result["gates"]["write"]
        if task.item_steps is not None:
            items = [write[t] for t in task.item_steps]
            others = [write[t] for t in range(len(write)) if t not in task.item_steps]
            row["selectivity"] = statistics.mean(items) / max(statistics.mean(others), 1e-12)
    return row


def report(row):
    """One run as lines of text: figures, then a bar for each step's write."""
    yield (f"{row['run']}: {row['task']}, rule {row['rule']}, window {row['window']}, seed {row['seed']}, "
           + ", ".join(f"{k} {v}" for k, v in row["sizes"].items()) + f", best at step {row['step']}")
    yield (f"  test {row['metric']:12} {row['score']:.5f} ± {row['interval']:.5f}   "
           f"(95% interval, {row['episodes']} episodes)")
    if not row["gates"]:
        return
    yield f"  lesioned (eta = 0) {row['lesion']:.5f} ± {row['lesion_interval']:.5f}"
    yield (f"  mean eta {row['eta']:.5f}   mean write eta * ||D|| {row['write_norm']:.5f}   "
           + ("" if row["persistence"] is None else f"persistence {row['persistence']:.3f}   ")
           + (f"selectivity {row['selectivity']:.2f}" if "selectivity" in row else ""))
    yield f"  {'step':>4}  {'token':<14} {'eta':>8} {'||D||':>9} {'write':>8}"
    gates = row["gates"]
    most = max(max(gates["write"]), 1e-12)
    for t, (eta, d_norm, write) in enumerate(zip(gates["eta"], gates["d_norm"], gates["write"])):
        yield f"  {t:4}  {row['tokens'][t]:<14} {eta:8.5f} {d_norm:9.3f} {write:8.5f} {'#' * round(40 * write / most)}"


def by_experiment(rows):
    """{(task, flags, tested sizes): {rule: the rows of its seeds}}, in the order of the tasks, then of the flags."""
    def order(row):  # the defaults of alpha and eta_0 differ between the rules: the same for all is other flags for each
        alike = re.sub(r"--(alpha-init|eta0) \S+ ?", "", row["flags"])
        return list(REFERENCE).index(row["task"]), alike, row["tested"], RULES.index(row["rule"])

    groups = {}
    for row in sorted(rows, key=order):
        groups.setdefault((row["task"], row["flags"], row["tested"]), {}).setdefault(row["rule"], []).append(row)
    return groups


def label(*names):
    """The names of an experiment, the last of them the sizes it was tested with, as the tables have them."""
    return " ".join(filter(None, [*names[:-1], names[-1] and f"(tested with {names[-1]})"]))


def mean(rows, key):
    """Mean and standard error of a figure over the seeds; of one seed's score, over its episodes."""
    values = [row[key] for row in rows]
    if len(values) > 1:
        return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    return values[0], rows[0]["interval"] / 1.96 if key == "score" else math.inf


def table(rows):
    """Several runs as lines of text: a row an experiment and rule; ± is the s.d. over seeds, the interval that of one run."""
    yield ("| task, metric | flags | rule | runs | test | 95% interval | lesioned | persistence | selectivity | write | learned "
           "| minutes | paper |")
    yield "|" + " --- |" * 13
    for (task, told, tested), rules in by_experiment(rows).items():
        told = label(told, tested)
        digits = 3 if next(iter(rules.values()))[0]["metric"] == "accuracy" else 5
        for rule, group in rules.items():

            def cell(key, digits, spread=True):
                values = [row[key] for row in group if row.get(key) is not None]
                if not values:
                    return "-"
                spread = f" ± {statistics.stdev(values):.{digits}f}" if spread and len(values) > 1 else ""
                return f"{statistics.mean(values):.{digits}f}{spread}"

            # beside our defaults, and beside the paper's own training on single sequences
            paper = "-" if told and group[0]["args"]["batch_size"] > 1 else REFERENCE[task][1][RULES.index(rule)]
            yield (f"| {task}, {group[0]['metric']} | {told or '-'} | {rule} | [{len(group)}]({group[0]['run']}) | "
                   f"{cell('score', digits)} | {cell('interval', digits, False)} | {cell('lesion', digits)} | "
                   f"{cell('persistence', 3)} | {cell('selectivity', 1)} | {cell('write_norm', 3)} | {cell('learned', 0, False)} | "
                   f"{cell('minutes', 1, False)} | {paper} |")
    seen = {row["task"] for row in rows}
    yield ""
    yield "Levels: " + "; ".join(f"{task}: {levels}" for task, (levels, _, _) in REFERENCE.items() if task in seen) + "."


def better(one, other, key="score"):
    """Is a figure of rows `one` better than that of rows `other`: 1 yes, -1 worse, 0 neither.

    A difference counts if it is more than two standard errors, and in scores more than a hundredth of what there is to learn.
    """
    (a, se_a), (b, se_b) = mean(one, key), mean(other, key)
    least = 0.01 * REFERENCE[one[0]["task"]][2] if key == "score" else 0.0
    if not abs(a - b) > max(2 * math.hypot(se_a, se_b), least):
        return 0
    return 1 if (a > b) == (key != "score" or one[0]["metric"] == "accuracy") else -1


def claims(rows):
    """The paper's claims (section 4 of its results) as lines of text, each with the verdict that the figures give."""
    groups = by_experiment(row for row in rows if "--ablate" not in row["flags"])

    def line(claim, wanted, outcome, key="score"):
        """`outcome` says of the rules of an experiment that is `wanted` if they are for the claim (1), against it (-1) or neither."""
        found = {names: rules for names, rules in groups.items() if wanted(names[0], rules)
                 and all(row.get(key) is not None for rule in rules if rule != "none" for row in rules[rule])}
        outcomes = [outcome(rules) for rules in found.values()]
        verdict = ("holds" if {*outcomes} == {1} else "holds only where marked +" if 1 in outcomes
                   else "does not hold" if -1 in outcomes else "not supported, no difference beyond the spread")
        counts = f"{outcomes.count(1)} for it, {outcomes.count(-1)} against, {outcomes.count(0)} within the spread"
        figures = [f"{'−=+'[value + 1]} [{label(*names)}]({next(iter(rules.values()))[0]['run']}): " + ", ".join(
            "{} {:.4g} ± {:.2g} ({})".format(rule, *mean(group, key), len(group)).replace(" ± inf", "") for rule, group in rules.items()
            if group[0].get(key) is not None)
            for (names, rules), value in zip(found.items(), outcomes)]
        return f"| {claim} | {verdict}: {counts} | {'<br>'.join(figures)} |" if found else ""

    def both(task, rules):
        return {"hebbian", "gradient"} <= set(rules)

    yield line("1 Hebbian is best in copying, regression and few-shot", lambda task, r: task != "cue" and both(task, r),
               lambda r: min(better(r["hebbian"], r[other]) for other in r if other != "hebbian"))
    yield line("2 Gradient is best at copying over long delays",
               lambda task, r: task == "copy" and both(task, r) and r["gradient"][0]["sizes"]["delay"] >= 20,
               lambda r: better(r["gradient"], r["hebbian"]))
    yield line("2 Gradient needs fewer updates to copy over long delays, where both learn it",
               lambda task, r: task == "copy" and both(task, r) and r["gradient"][0]["sizes"]["delay"] >= 20,
               lambda r: better(r["hebbian"], r["gradient"], "learned"), "learned")
    yield line("3 Static weights suffice for cues", lambda task, r: task == "cue" and "none" in r and len(r) > 1,
               lambda r: -1 if any(better(r[rule], r["none"]) == 1 for rule in r) else 1)
    yield line("4 Gradient's updates persist (mean eta / eta_0)", both,
               lambda r: better(r["gradient"], r["hebbian"], "persistence"), "persistence")
    yield line("4 Gradient's updates are large (mean write, eta times the norm of D)", both,
               lambda r: better(r["gradient"], r["hebbian"], "write_norm"), "write_norm")
    yield line("4 Hebbian is gated around salient events (selectivity)", both,
               lambda r: better(r["hebbian"], r["gradient"], "selectivity"), "selectivity")
    for regime, where in (("over the whole episode", False), ("over a window", True)):
        yield line(f"5 Plasticity adds to attention {regime}",
                   lambda task, r: "none" in r and len(r) > 1 and bool(r["none"][0]["window"]) == where,
                   lambda r: max(better(r[rule], r["none"]) for rule in r if rule != "none"))


def plot(rows, path):
    """Learning curves (from each run's metrics.jsonl) and mean writes at each step, as a picture."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, gates) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colors = {}
    for row in rows:  # the seeds of an experiment share a color and a line of the legend
        name = " ".join(filter(None, (row["task"], row["rule"], row["flags"])))
        lines = learning_curve(row["run"])
        (curve,) = curves.plot([line["step"] for line in lines], [line["val_metric"] for line in lines],
                               color=colors.get(name), label=name if name not in colors else None)
        colors[name] = curve.get_color()
        if row["gates"]:
            gates.plot(row["gates"]["write"], color=colors[name])
    shown = [row for row in rows if row["gates"] and row["episodes"] == 1]
    if shown:  # not a mean: the writes of one episode, whose tokens stand below
        tokens = shown[0]["tokens"][:len(shown[0]["gates"]["write"])]
        gates.set_xticks(range(len(tokens)), tokens, fontsize="small", rotation=90 if max(map(len, tokens)) > 2 else 0)
    if all(row["metric"] == "mse" for row in rows):
        curves.set_yscale("log")
    curves.set(xlabel="update", ylabel="validation " + " / ".join(sorted({row["metric"] for row in rows})))
    gates.set(xlabel="step of the episode", ylabel=f"{'' if shown else 'mean '}write, eta * ||D||", yscale="log")
    curves.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=Path(path).suffix[1:] or "png")
    write(Path(path), picture.getbuffer())
    plt.close(figure)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories that train.py wrote")
    parser.add_argument("--episodes", type=number(int, 1), default=600, help="fresh test episodes")
    parser.add_argument("--batch-size", type=number(int, 1), default=20)
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the test episodes")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--threads", type=number(int, 1), default=1, help="CPU threads")
    parser.add_argument("--data-dir", help="default: where the run had it")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    parser.add_argument("--plot", metavar="FILE.png", help="draw learning curves and gates (needs matplotlib)")
    add_size_flags(parser.add_argument_group("episodes (default: as trained, images with 15 queries a class)"), SIZES)
    options = parser.parse_args(argv)
    options.overrides = {name: getattr(options, name) for name in (*SIZES, "data_dir")}
    if options.plot and not importlib.util.find_spec("matplotlib"):
        fail("--plot needs matplotlib: pip install matplotlib")
    return options


def main(argv=None):
    options = parse_args(argv)
    prepare_cpu(options.threads)
    try:
        device = pick_device(options.device)
        rows = []
        for run in options.runs:
            if Path(run).is_file():  # beside the runs in results/*
                continue
            if not (Path(run) / "best.pt").exists():
                rows += recorded(run)
                continue
            rows.append(measure(run, options, device))
            print("\n".join(report(rows[-1])), flush=True)
        if not rows:
            raise ValueError(f"{options.runs[0]} is a file: name run directories that train.py wrote, or kept results")
        if len(rows) > 1:
            print("\n".join(table(rows)))
            print("\n".join(["", "| claim | verdict | figures |", "| --- | --- | --- |", *filter(None, claims(rows))]))
        if options.json:
            write(Path(options.json), (json.dumps(rows, indent=1) + "\n").encode())
        if options.plot:
            plot(rows, options.plot)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
