"""Measure trained runs: test score, lesion, gates.

    python eval.py out/copy-hebbian-s0                   # one run in detail
    python eval.py out/copy-*-s*                         # several: one table, mean ± s.d. over seeds
    python eval.py out/copy-hebbian-s0 --delay 15        # how far does it carry?
    python eval.py RUN --json FILE --plot FILE.png

Every figure comes from best.pt, the state that was best on validation data, on fresh test episodes.
"""
import argparse
import importlib.util
import json
import math
import statistics
from pathlib import Path

import torch

from model import build_model
from tasks import make_task, random_generator
from train import add_size_flags, evaluate, fail, number, pick_device, prepare_cpu
from train import parse_args as train_args

SIZES = ("seq_len", "delay", "pairs", "support", "queries", "ways", "shots")  # those that a test may change


def interval(scores):
    """Half the width of the 95% confidence interval of the mean of scores (n,), 1.96 standard errors."""
    return 1.96 * scores.std().item() / math.sqrt(len(scores)) if len(scores) > 1 else math.inf


def load_checkpoint(path):
    """What train.py saved at `path`, and the arguments in it. Raises ValueError where there is none or it is damaged."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: name a run directory that train.py wrote")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        return state, argparse.Namespace(**state["args"])
    except Exception as error:  # a damaged or foreign file can fail in any way; whichever it is, the file is what is wrong
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not a readable checkpoint of train.py ({reason})") from error


def load_run(run, device, overrides):
    """The task, model (from best.pt), arguments and step of a run, with the task's sizes overridden. Raises ValueError."""
    state, args = load_checkpoint(Path(run) / "best.pt")
    trained = vars(args).copy()
    if "ways" in trained and trained["ways"]:
        args.queries = 15  # a class, as in the literature; training may use fewer
        args.n_out = args.ways
    args.flags = flags(trained)
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
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{run}/best.pt does not fit the model its own arguments describe: "
                         + str(error).strip().split("\n")[-1].strip()) from error
    return task, model.to(device), args, state["step"]


def flags(trained):
    """What a run was told beyond its task, rule and seed, as train.py's flags. It says nothing of the places and the machine."""
    usual = vars(train_args(["--task", trained["task"], "--rule", trained["rule"]]))
    other = ("seed", "out_dir", "data_dir", "device", "threads", "eval_interval", "eval_batches", "block_size", "bench")
    return " ".join(f"--{name.replace('_', '-')} {trained[name]}" for name in usual
                    if name not in other and trained.get(name, usual[name]) != usual[name])


def recorded(run):
    """What eval.py --json once wrote about a run that is kept without its checkpoint, as results/ does. Raises ValueError."""
    rows = []
    for path in sorted(Path(run).glob("eval*.json")):
        try:
            rows += [{**row, "run": str(run)} for row in json.loads(path.read_text())]
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is not what eval.py --json writes ({error})") from error
    if not rows:
        raise ValueError(f"{run} has neither best.pt nor eval.json: name directories that train.py wrote, or kept results")
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


def measure(run, options, device):
    """Everything eval.py says of one run, as a dict that JSON can hold."""
    task, model, args, step = load_run(run, device, options.overrides)

    def test():  # the same episodes each time
        return evaluate(model, task, "test", options.episodes, options.batch_size,
                        random_generator(options.seed, "test"), device)

    result = test()
    sizes = {name: getattr(args, name) for name in ("seq_len", "delay", "pairs", "cues", "dim", "support", "ways", "shots",
                                                    "queries") if getattr(args, name, None) is not None}
    tested = " ".join(f"--{name.replace('_', '-')} {options.overrides[name]}" for name in SIZES if options.overrides[name])
    row = dict(run=str(run), task=args.task, rule=args.rule, flags=args.flags, tested=tested, window=args.window, seed=args.seed, sizes=sizes, step=step,
               minutes=learning_curve(run)[-1]["seconds"] / 60, metric=task.metric, episodes=options.episodes,
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


def table(rows):
    """Several runs as lines of text: a row a task, its sizes, window and rule; mean ± s.d. over the seeds."""
    groups = {}
    for row in rows:
        key = (row["task"], " ".join(str(v) for v in row["sizes"].values()), row["window"], row["rule"])
        groups.setdefault(key, []).append(row)
    yield "| task | sizes | window | rule | seeds | metric | test | lesioned | persistence | selectivity | write | minutes |"
    yield "|" + " --- |" * 12
    for (name, _, window, rule), group in groups.items():
        sizes = ", ".join(f"{k} {v}" for k, v in group[0]["sizes"].items())

        def cell(key, digits):
            values = [row[key] for row in group if row.get(key) is not None]
            if not values:
                return "-"
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.{digits}f}{spread}"

        digits = 3 if group[0]["metric"] == "accuracy" else 5
        yield (f"| {name} | {sizes} | {window or 'all'} | {rule} | {len(group)} | {group[0]['metric']} | "
               f"{cell('score', digits)} | {cell('lesion', digits)} | {cell('persistence', 3)} | "
               f"{cell('selectivity', 2)} | {cell('write_norm', 3)} | {cell('minutes', 1)} |")


def plot(rows, path):
    """Learning curves (from each run's metrics.jsonl) and mean writes at each step, as a picture."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, gates) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for row in rows:
        name = f"{row['task']} {row['rule']}, window {row['window'] or 'all'}, seed {row['seed']}"
        lines = learning_curve(row["run"])
        (curve,) = curves.plot([line["step"] for line in lines], [line["val_metric"] for line in lines], label=name)
        if row["gates"]:
            gates.plot(row["gates"]["write"], color=curve.get_color())
    if all(row["metric"] == "mse" for row in rows):
        curves.set_yscale("log")
    curves.set(xlabel="update", ylabel="validation " + " / ".join(sorted({row["metric"] for row in rows})))
    gates.set(xlabel="step of the episode", ylabel="mean write, eta * ||D||")
    curves.legend(fontsize="small")
    figure.savefig(path, dpi=120)
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
            rows.append(measure(run, options, device))
            print("\n".join(report(rows[-1])), flush=True)
        if len(rows) > 1:
            print("\n".join(table(rows)))
        if options.json:
            Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
        if options.plot:
            plot(rows, options.plot)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
