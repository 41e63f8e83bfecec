"""Measure trained runs on test episodes: scores with and without writes, and gates.

    python eval.py out/copy-hebbian-s0                     # one run, in full
    python eval.py out/copy-*                              # a line per run
    python eval.py out/copy-* --append results/runs.jsonl  # keep what was measured
    python eval.py results/runs.jsonl --only '*-w8-s?'     # report what was kept

Scores come from best.pt. Gates (m_t, eta_t) and reads come from ckpt.pt, the last update.
"""
import json
import math
import os
import signal
from collections import defaultdict
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean

import torch

from model import Transformer, nearest_neighbour, setting
from plasticity import UnrolledFastWeights
from tasks import random_generator
from train import (CHANGEABLE, DEVICE, add_flags, defaults, errors_as_one_line, evaluate, load_run,
                   new_parser, prepare, show)

@dataclass
class Options:
    only: str = setting("*", "pattern of the runs of a file, such as 'copy-*-s0'")
    append: str = setting(None, "file that gets a line per measured run")
    episodes: int = setting(600, "number of test episodes", 2)
    batch_size: int = setting(20, "episodes per batch; the size changes the draw", 1)
    seed: int = setting(0, "seed of the test episodes", 0, 2**30)
    device: str = setting(DEVICE, "where to compute", choices=("cpu", "cuda"))
    threads: int = setting(1, "CPU threads", 1, 1024)
    data_dir: str = setting("data", "folder of the images, downloaded if need be")

READ_EPISODES = 16  # in which the reads are watched, or fewer if they are long

GATE_FIGURES = {  # means over test episodes and steps
    "gate": "sigmoid(m_t), what the model decides of eta_t",
    "persistence": "eta_t / eta_0; despite its name, a larger one fades writes sooner",
    "change": "what a write adds to the weights / the norm of the slow weights",
    "selectivity": "the write at a pair that is asked for / at noise, at the same step",
    "gate_counts": "sigmoid(m_t) at pairs that are asked for",
    "gate_noise": "sigmoid(m_t) at noise"}

def measure(folder, options, device):
    """Measure a run -> its figures, as a dict for JSON; some of its answers, as lines."""
    changes = {"data_dir": options.data_dir}
    best, task, model = load_run(folder / "best.pt", changes)
    last, _, last_model = load_run(folder / "ckpt.pt", changes)
    args = last["args"]
    if any(args[key] != best["args"][key] for key in args if key not in CHANGEABLE):
        raise ValueError(f"{folder} has best.pt and ckpt.pt of different runs")
    model.to(device).eval()
    last_model.to(device).eval()
    print(f"measuring {folder} on {options.episodes} episodes", flush=True)
    if task.kind == "image":  # 15 per class, as in the literature, if there are as many
        task = replace(task, queries=min(15, task.images.size(1) - task.shots))
    if args["pretrain_steps"]:
        task.encode_images("test", model.embed.encoder, device)

    def test(answer):  # on the same episodes each time
        return evaluate(answer, task, "test", options, options.episodes, device)

    result = test(model)
    scores = result["scores"]
    row = dict(name=folder.resolve().name, task=args["task"], rule=args["rule"],
               seed=args["seed"], flags=flags_of(args), metric=task.metric,
               chance=task.chance, episodes=options.episodes, best_step=best["step"],
               loss=result["losses"].mean().item(), score=scores.mean().item(),
               interval=interval(scores), steps=task.step_names)
    if task.kind == "image":
        row.update(encoder_figures(model, task, test))
    if args["rule"] != "none":
        lesioned = test(lambda episodes: model(episodes, write=False))["scores"]
        row["lesion"] = lesioned.mean().item()
        row["lesion_interval"] = interval(lesioned)
        row.update(gate_figures(last_model, **test(last_model)))
        torch.manual_seed(args["seed"])  # gives the weights that train.begin() starts with
        untrained = Transformer(task, last_model.config).to(device).eval()
        if args["pretrain_steps"]:
            untrained.embed.encoder = last_model.embed.encoder
            untrained.embed.norm = last_model.embed.norm
        figures = gate_figures(untrained, **test(untrained))
        row["untrained"] = {key: figures[key] for key in GATE_FIGURES if key in figures}
        n = max(1, min(READ_EPISODES, 10_000 // len(task.step_names)))
        episodes = task.sample("test", n, random_generator(options.seed, "test"))
        reads = watched_reads(last_model, episodes.to(device))
        row.update(read_figures(task, episodes, reads))

    run = last["run"]
    row.update(seconds=run["seconds"], machine=run["machine"])
    row["curve"] = {key: [line[key] for line in run["log"]]
                    for key in ("step", "train_loss", "val_loss", "val_metric")}
    return row, list(show(model, task, "test", device))

def encoder_figures(model, task, test):
    """The scores of the encoder alone, by the nearest prototype and the nearest image."""
    figures = dict(prototype=test(model.embed.answer)["scores"].mean().item())
    if len(task.step_names) > task.n_out:  # With one image per label, both are the same.
        def nearest(episodes):
            return nearest_neighbour(model.embed.features(episodes), episodes), None
        figures["neighbour"] = test(nearest)["scores"].mean().item()
    return figures

def flags_of(args):
    """The settings of a run that differ from the defaults, as flags."""
    flags = f"--task {args['task']} --rule {args['rule']}"
    left_out = "task rule seed device threads out_dir data_dir resume".split()
    for name, default in defaults(args["task"], args["rule"]).items():
        if name not in left_out and args[name] != default:
            flags += f" --{name.replace('_', '-')} {args[name]}".removesuffix(".0")
    return f"{flags} --seed {args['seed']}"

def interval(scores):
    """How far the 95% interval of a mean of scores (n, L) reaches from that mean."""
    n = len(scores)
    means = scores.mean(1)  # (n)
    if means.eq(1).all():  # No spread: Wilson's interval reaches this far below 1.
        return 1.96**2 / (n + 1.96**2)
    return 1.96 * means.std().item() / math.sqrt(n)

def gate_figures(model, gates, asked_steps=None, **_):
    """How much a model writes, and when; gates and asked_steps: see train.evaluate."""
    eta, norm, change = gates  # (n, T) each
    rule = model.plasticity
    # eta_t = eta_0 * sigmoid(m_t) * min(1, max_norm / n_t)
    gate = eta / (rule.eta0 * (rule.max_norm / norm).clamp(max=1))
    write = eta * norm
    slow = torch.cat([layer.weight.flatten() for layer in model.plastic_layers()]).norm()
    steps = dict(eta=eta, norm=norm, write=write, change=change, gate=gate)
    figures = dict(gates={key: values.mean(0).tolist() for key, values in steps.items()},
                   gate=gate.mean().item(), persistence=(eta.mean() / rule.eta0).item(),
                   change=(change.mean() / slow).item())
    if asked_steps is None:
        return figures

    # At one step, some episodes show a pair that is asked for, and others show noise.
    asked = torch.zeros_like(write, dtype=torch.bool).scatter(1, asked_steps, True)
    both = asked.any(0) & ~asked.all(0)  # (T)
    if both.any():
        def mean_of(values, chosen):  # (n, T) -> a mean per step with both
            return ((values * chosen).sum(0) / chosen.sum(0))[both]

        ratio = mean_of(write, asked) / mean_of(write, ~asked)
        figures["selectivity"] = ratio.mean().item()
        figures["gate_counts"] = mean_of(gate, asked).mean().item()
        figures["gate_noise"] = mean_of(gate, ~asked).mean().item()
    return figures

class WatchedFastWeights(UnrolledFastWeights):
    """Fast weights that note how much each earlier write adds to each read."""
    fold = 10**9  # Every write stays a term of the sum.

    def __init__(self, plasticity):
        super().__init__(plasticity)
        self.added = defaultdict(list)  # layer: (B, S) per read, of the S writes before it

    def read(self, layer, x):
        y = []
        for x_t in x.split(1, dim=1):  # the step, or each query
            y.append(super().read(layer, x_t))
            if layer in self.past_x:
                self.added[layer].append(self.terms(layer, x_t).norm(dim=2).detach())
        return torch.cat(y, dim=1)

    def terms(self, layer, x_t):
        """c_ts u_s ∘ (alpha (x_s ∘ x_t) + beta) for each earlier write s: (B, S, out)."""
        match = (self.past_x[layer] * x_t) @ layer.alpha.mT + layer.beta
        return self.c * self.past_u[layer] * match

@torch.no_grad()
def watched_reads(model, episodes):
    """How much each of the S earlier writes adds to a read, as a norm (layers * B, S): for
    each step after the first, then for each query."""
    usual = model.fast_weights
    model.fast_weights = WatchedFastWeights
    _, fast = model(episodes)
    model.fast_weights = usual
    return [torch.cat(norms).cpu() for norms in zip(*fast.added.values())]

def read_figures(task, episodes, reads):
    """Which earlier write adds most to the read of a step, and in what share of layers and
    episodes. With cues: in what share of queries it is the write of the pair asked for."""
    strongest = [norms.argmax(1).where(norms.amax(1) > 0, -1) for norms in reads]  # -1: none
    T = len(task.step_names)
    steps = strongest[:T - 1]  # of steps 1 to T - 1, (layers * B) each
    writes = [step.mode().values.item() for step in steps]  # the most frequent
    shares = [(step == write).double().mean().item() for step, write in zip(steps, writes)]
    figures = dict(reads=dict(write=writes, share=shares))
    if hasattr(task, "asked_steps"):
        asked = task.asked_steps(episodes).T[:, None]  # (Q, 1, B)
        queries = torch.stack(strongest[T - 1:])  # (Q, layers * B)
        queries = queries.view(len(asked), -1, asked.size(2))  # (Q, layers, B)
        figures["reads_asked"] = (queries == asked).double().mean().item()
    return figures

def report(row, answers=()):
    """One run as lines: its figures, some answers, and a bar for each step's write."""
    yield f"{row['name']}: {row['flags']}; best at update {row['best_step']}"
    for title, key, half in ((f"test {row['metric']}", "score", "interval"),
                             ("lesioned (eta = 0)", "lesion", "lesion_interval")):
        if key in row or key == "score":
            yield (f"  {title:18} {row[key]:.5f} ± {row[half]:.5f} (95% interval), "
                   f"{row['episodes']} episodes; guessing {row['chance']:.5}")
    for key in ("prototype", "neighbour"):
        if key in row:
            yield f"  nearest {key:10} {row[key]:.5f}   (the encoder alone)"
    yield from answers
    if "gates" in row:
        for key in [key for key in GATE_FIGURES if key in row]:
            untrained = row.get("untrained", {}).get(key, math.nan)  # Old rows have none.
            yield f"  {key:18} {row[key]:.5f}   untrained {untrained:.5f}   {GATE_FIGURES[key]}"
        if "reads_asked" in row:
            yield (f"  {'reads_asked':18} {row['reads_asked']:.5f}   share of queries to whose "
                   "reads the pair asked for adds most")
        yield from report_steps(row)

def report_steps(row):
    """For each step what it writes, and which earlier write adds most to its read, in how
    many percent of layers and episodes."""
    gates = row["gates"]
    uses = ["-"]
    reads = row.get("reads", dict(write=[], share=[]))  # Old rows have none.
    for write, share in zip(reads["write"], reads["share"]):
        uses.append(f"{row['steps'][write]} {write}, {share:.0%}" if write >= 0 else "-")
    largest = max(*gates["write"], 1e-12)
    yield f"  {'step':14} {'eta':>8} {'norm':>9} {'write':>8}   reads most"
    for t, name in enumerate(row["steps"]):
        use = uses[t] if t < len(uses) else "-"
        if t < len(gates["write"]):
            eta, norm, write = [gates[key][t] for key in ("eta", "norm", "write")]
            yield (f"  {t:4} {name:9} {eta:8.5f} {norm:9.3f} {write:8.5f}   {use:16} "
                   f"{'#' * round(max(0, 30 * write / largest))}")
        else:  # The last step of copying reads, and writes nothing.
            yield f"  {t:4} {name:9} {'-':>8} {'-':>9} {'-':>8}   {use}"

def overview(rows):  # a line per run
    keys = ("score", "interval", "lesion", "gate", "persistence", "change", "selectivity")
    yield f"{'run':32} " + " ".join(f"{key:>11}" for key in keys)
    for row in rows:
        figures = [f"{row[key]:.5f}" if key in row else "-" for key in keys]
        yield f"{row['name'][-32:]:32} " + " ".join(f"{figure:>11}" for figure in figures)

def read_rows(path):
    """The rows of a file of --append. Of two rows with one name, the later counts."""
    rows = {}
    try:
        text = path.read_text()
        if text and not text.endswith("\n"):
            raise ValueError("its last line has no end")
        for row in map(json.loads, text.splitlines()):
            _ = [*report(row), *overview([row])]  # raises where a figure is missing
            fmean(row["curve"]["step"] + row["curve"]["val_metric"])
            if not all(isinstance(row[key], str) for key in ("name", "task", "rule")):
                raise ValueError("a name is no text")
            rows[row["name"]] = row
    except Exception as error:  # A damaged or foreign file can fail in any way.
        raise ValueError(f"{path} cannot be read ({error}): name a file of --append") from error
    return list(rows.values())

def append_row(path, row):
    """Add a line to a file. Scores keep all digits, other fractions only four."""
    scores = {key: row[key] for key in ("score", "lesion", "prototype", "neighbour")
              if key in row}
    short = json.loads(json.dumps(row), parse_float=lambda x: float(f"{float(x):.4g}"))
    short["curve"]["val_metric"] = row["curve"]["val_metric"]
    size = path.stat().st_size
    try:
        with open(path, "a") as file:
            file.write(json.dumps({**short, **scores}) + "\n")
    except OSError as error:
        if path.is_file():
            os.truncate(path, size)  # A full disk takes half a line, which nobody can read.
        raise OSError(f"{path} cannot be written: {error}") from error

def parse_args(argv=None):
    parser = new_parser(__doc__, "python eval.py RUN... [flags]")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="a folder of train.py, or a file of --append")
    add_flags(parser, "options", Options, tasks={})
    given = vars(parser.parse_args(argv))
    runs = given.pop("runs")
    options = Options(**given)
    # What cannot be written is found out before everything is measured.
    if options.append:
        open(options.append, "a").close()
    if options.append and Path(options.append).is_file():
        read_rows(Path(options.append))
    return runs, options

def main(argv=None):
    with errors_as_one_line():
        runs, options = parse_args(argv)
        device, _, world = prepare(options)
        if world > 1:
            raise ValueError("eval.py measures in one process: start it without torchrun")
        rows = []
        answers = []
        try:
            for path in runs:
                if path.is_file():
                    rows += [row for row in read_rows(path) if fnmatch(row["name"], options.only)]
                    continue
                row, answers = measure(path, options, device)
                rows.append(row)
                if options.append:
                    append_row(Path(options.append), row)
        finally:  # Even after an error or Ctrl-C, print what was measured.
            if rows:
                print("\n".join(overview(rows) if len(rows) > 1 else report(rows[0], answers)))
        if not rows:
            raise ValueError(f"--only {options.only}: no run of the file has such a name")

if __name__ == "__main__":
    try:
        main()
    finally:  # Python takes a while to end, and Ctrl-C comes too late then.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
