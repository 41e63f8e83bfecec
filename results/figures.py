"""Draw the figures of the pages from runs.jsonl: python results/figures.py (needs matplotlib)"""
from statistics import fmean

from matplotlib.figure import Figure

import tables

NAMES = {"none": "static", "hebbian": "Hebbian", "gradient": "gradient"}
COLORS = {"none": "gray", "hebbian": "C0", "gradient": "C1"}

def draw_learning(cells, experiment, path):
    """Recall by update: a thin line per seed, and a bold line for the mean of a rule."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
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
    axes.set(xlabel="update", ylabel="recall in validation", xlim=(0, 1.2 * steps[-1]))
    figure.savefig(path, dpi=120)

if __name__ == "__main__":
    draw_learning(tables.read_cells(), "copy-*-w8", tables.HERE / "copy-window-8.png")
