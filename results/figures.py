"""Draw the figures of the pages (needs matplotlib).

    python train.py --window 8 --out-dir out/short && python results/figures.py out/short

The curves are those of runs.jsonl. The map is that of the trained model in the folder.
"""
import sys
from pathlib import Path
from statistics import fmean

import torch
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import tables
from plasticity import FastWeights
from tasks import random_generator
from train import load_run

NAMES = {"none": "static", "hebbian": "Hebbian", "gradient": "gradient"}
COLORS = {"none": "gray", "hebbian": "C0", "gradient": "C1"}

class RecordedFastWeights(FastWeights):
    """FastWeights that keep the input, the signal and the strength of every write."""
    def __init__(self, plasticity):
        super().__init__(plasticity)
        self.writes = []

    def store(self, eta, u):
        super().store(eta, u)
        self.writes.append((eta, dict(self.x), dict(u)))

@torch.no_grad()
def contributions(model, episodes):
    """What each write adds to each read: {layer: (B, T, S, out)}, for T reads and S writes.

    A read P_t x_t is the sum over s of c_ts u_s ∘ (alpha (x_s ∘ x_t)); see plasticity.py.
    The reads are those of the steps and then, if there are any, of the queries.
    """
    model.fast_weights = RecordedFastWeights
    _, fast = model(episodes)
    etas, inputs, signals = zip(*fast.writes)
    S = len(etas)

    c = torch.zeros(len(etas[0]), 0, 1)  # c_ts (B, S, 1) of the writes so far
    left = []  # of each step t, with zeros for the writes to come
    for eta in etas:
        left.append(F.pad(c[:, :, 0], (0, S - c.size(1))))  # (B, S)
        c = torch.cat([(1 - eta) * c, eta], dim=1)
    left.append(c[:, :, 0])

    parts = {}
    for layer, last in fast.x.items():  # the last step or the queries, which write nothing
        x = torch.cat([step[layer] for step in inputs], dim=1)  # (B, S, in)
        u = torch.cat([step[layer] for step in signals], dim=1)  # (B, S, out)
        reads = torch.cat([x, last], dim=1)  # (B, T, in)
        match = (reads[:, :, None] * x[:, None]) @ layer.alpha.mT  # (B, T, S, out)
        shares = torch.stack(left[:S] + left[S:] * last.size(1), dim=1)  # c_ts (B, T, S)
        parts[layer] = shares[..., None] * u[:, None] * match
    return parts

def read_map(model, episodes):
    """Which earlier write each read uses, (T, S): the mean over layers and episodes of the
    norm that a write adds, each read divided by its largest."""
    maps = []
    for part in contributions(model, episodes).values():
        norms = part.norm(dim=-1)  # (B, T, S)
        maps.append((norms / norms.amax(2, keepdim=True).clamp(min=1e-12)).mean(0))
    return torch.stack(maps).mean(0)

def draw_curves(axes, cells, experiment):
    """Recall by update: a thin line per seed, and a bold line for the mean of a rule."""
    for rule, color in COLORS.items():
        rows = cells[experiment.replace("*", rule)]
        steps = rows[0]["curve"]["step"]
        curves = [row["curve"]["val_metric"] for row in rows]
        for curve in curves:
            axes.plot(steps, curve, color=color, linewidth=0.6)
        means = [fmean(scores) for scores in zip(*curves, strict=True)]
        axes.plot(steps, means, color=color, linewidth=2)
        above = {"none": 0.02, "hebbian": 0.0, "gradient": -0.06}[rule]
        axes.text(steps[-1] + 2, means[-1] + above, NAMES[rule], color=color)
    axes.axhline(rows[0]["chance"], color="gray", linestyle="dashed", linewidth=1)
    axes.set(xlabel="update", ylabel="recall in validation", xlim=(0, 1.25 * steps[-1]),
             title="Copying with attention to 8 steps")

def draw_map(axes, model, task):
    """The map of reads, with the parts of an episode and the reach of attention."""
    episodes = task.sample("test", 32, random_generator(0, "test"))
    values = read_map(model.eval(), episodes)  # (T, S)
    axes.imshow(values, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    names = task.step_names
    starts = [0] + [t for t in range(1, len(names)) if names[t] != names[t - 1]]
    ends = starts[1:] + [len(names)]
    for start, end in zip(starts, ends):
        axes.axhline(start - 0.5, color="C2", linewidth=0.5)
        axes.axvline(start - 0.5, color="C2", linewidth=0.5)
    centres = [(start + end - 1) / 2 for start, end in zip(starts, ends)]
    labels = [names[start] for start in starts]
    axes.set_xticks(centres, labels, rotation=45, ha="right")
    axes.set_yticks(centres, labels)
    reach = len(model.blocks) * (model.config.window - 1)
    ends = [reach - 0.5, len(names) - 0.5]
    axes.plot([-0.5, len(names) - 1.5 - reach + 0.5], ends, color="C0", linestyle="dashed")
    axes.text(len(names) - 1, 1, "left of the dashed line:\nbeyond the reach of attention",
              color="C0", ha="right", va="top")
    axes.set(xlabel="write of step", ylabel="read at step", title="Which write each read uses",
             xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))

def main(folder):
    from matplotlib.figure import Figure
    _, task, model = load_run(Path(folder, "best.pt"))
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curves(left, tables.read_cells(), "copy-*-w8")
    draw_map(right, model, task)
    return figure

if __name__ == "__main__":
    main(sys.argv[1]).savefig(HERE / "copy-window-8.png", dpi=110)
