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
from eval import watched_reads
from tasks import random_generator
from train import load_run

NAMES = {"none": "static", "hebbian": "Hebbian", "gradient": "gradient"}
DELAYS = {"20": "copy-+-w8-until", "80": "copy-+-w8-delay80-until",
          "160": "copy-+-w8-delay160-until"}
LENGTHS = {"5": "copy-+-w8-until", "10": "copy-+-w8-len10-until", "20": "copy-+-w8-len20-until"}
COLORS = {"none": "gray", "hebbian": "C0", "gradient": "C1"}

def read_map(model, episodes):
    """Which earlier write each read uses, (T, T): the mean over layers and episodes of the
    norm that a write adds, each read divided by its largest. The first read has no write."""
    rows = []
    for norms in watched_reads(model, episodes):  # of a read: (layers * B, S)
        row = (norms / norms.amax(1, keepdim=True).clamp(min=1e-12)).mean(0)  # (S)
        rows.append(F.pad(row, (0, len(model.position) - len(row))))
    return torch.stack([torch.zeros_like(rows[0]), *rows])

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
    axes.text(steps[-1] + 2, rows[0]["chance"] - 0.06, "guessing", color="gray")
    axes.set_xticks(range(0, steps[-1] + 1, 20))
    axes.set(xlabel="update", ylabel="recall in validation", xlim=(0, 1.25 * steps[-1]),
             ylim=(0, 1.05), title="Copying with attention to 8 steps")

def draw_map(axes, model, task):
    """The map of reads, with the parts of an episode and the reach of attention."""
    episodes = task.sample("test", 32, random_generator(0, "test"))
    values = read_map(model.eval(), episodes)  # (T, T)
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
    axes.set(xlabel="write of step", ylabel="read at step",
             title=f"Which write each read uses ({NAMES[model.config.rule]})",
             xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))

def draw_updates(axes, cells, settings, label):
    """Updates until learned of each seed. A run that never learned is a cross at its cap."""
    for rule, marker, shift in (("hebbian", "o", -0.1), ("gradient", "^", 0.1)):
        for i, setting in enumerate(settings.values()):
            for row in cells[setting.replace("+", rule)]:
                learned = row["updates"] is not None
                place = i + shift + 0.03 * (row["seed"] - 2)
                axes.plot(place, row["updates"] or row["trained"], color=COLORS[rule],
                          marker=marker if learned else "x", markersize=6 if learned else 9)
        axes.plot([], [], color=COLORS[rule], marker=marker, linestyle="", label=NAMES[rule])
    axes.set_xticks(range(len(settings)), settings)
    axes.set(xlabel=label, yscale="log", xlim=(-0.5, len(settings) - 0.5), ylim=(20, 1400))
    axes.set_yticks([30, 100, 300, 1000], ["30", "100", "300", "1000"])
    axes.minorticks_off()

def draw_gates(axes, cells, setting):
    """The gate at other pairs and at pairs that count, before and after training: a line
    per seed."""
    places = []
    labels = []
    for rule, marker in (("hebbian", "o"), ("gradient", "^")):
        for name, line in (("untrained", "dotted"), ("learned", "solid")):
            start = 1.3 * len(places)
            for row in cells[setting.replace("+", rule)]:
                figures = row["untrained"] if name == "untrained" else row
                gates = [figures["gate_noise"], figures["gate_counts"]]
                axes.plot([start, start + 1], gates, color=COLORS[rule], marker=marker,
                          linestyle=line)
            places += [start, start + 1]
            labels += ["other", "counts"]
            axes.text(start + 0.5, 1.05, f"{NAMES[rule]}, {name}", ha="center",
                      color=COLORS[rule])
    axes.set_xticks(places, labels)
    axes.set(ylabel="gate sigmoid(m_t)", xlim=(-0.6, places[-1] + 0.6), ylim=(-0.03, 1.15))

def draw(folder):
    """{file: figure}"""
    from matplotlib.figure import Figure
    cells = tables.read_cells()
    _, task, model = load_run(Path(folder, "best.pt"))
    memory = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = memory.subplots(1, 2)
    draw_curves(left, cells, "copy-*-w8")
    draw_map(right, model, task)

    horizon = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = horizon.subplots(1, 2, sharey=True)
    draw_updates(left, cells, DELAYS, "blanks between five tokens and their recall")
    draw_updates(right, cells, LENGTHS, "tokens, and twenty blanks")
    left.set(ylabel="updates until learned")
    left.legend()

    salience = Figure(figsize=(8, 3.6), layout="constrained")
    axes = salience.subplots()
    draw_gates(axes, cells, "cue-+-w1-noise16-until")
    return {"copy-window-8.png": memory, "horizon.png": horizon, "salience.png": salience}

if __name__ == "__main__":
    for name, figure in draw(sys.argv[1]).items():
        figure.savefig(HERE / name, dpi=110)
