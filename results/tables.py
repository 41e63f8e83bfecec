"""Fill in the tables and numbers of README.md and results/README.md: python results/tables.py

The figures come from runs.jsonl, a line per run, as eval.py --append writes it. A *cell* is
all seeds of one setting, such as copy-none-w8. Comments on a page say what stands where:

    <!-- table score lesion -->   The rows of the table below show these figures of the
                                  cells that they name: | copying <!-- copy-none-w8 --> |
                                  copy-*-w8 is short for three rules, copy-+-w8 for two, and
                                  copy-none-w8@gate has a figure of its own.
                                  A row that names no cell stays as it is.
    <!-- compare score -->        The rows below show how the second cell that they name
                                  differs from the first. Holm's p counts all rows.
    <!-- CELL FIGURE -->          The number behind the comment is this figure of the cell.
    <!-- CELL CELL FIGURE -->     The number behind it is their difference, or ratio.
"""
import functools
import itertools
import json
import math
import operator
import re
from pathlib import Path
from statistics import fmean, stdev

HERE = Path(__file__).resolve().parent
PAGES = (HERE.parent / "README.md", HERE / "README.md")
SHORT = {"*": ("none", "hebbian", "gradient"), "+": ("hebbian", "gradient")}
RATES = {"copy": 0.008, "cue": 0.003, "regression": 0.002}  # where the flags have no --lr
ACCURACIES = ("score", "lesion", "prototype")  # where the metric is accuracy
TABLE = re.compile(r"(<!-- (table|compare) ([\w ]+) -->\n\|.*\n\|.*\n)((?:\|.*\n)*)")
ROW = re.compile(r"(\| .*<!-- (.+?) -->) \|")  # what a person writes, and the cells
NUMBER = re.compile(r"(<!-- ([a-z]+-\S+ )?([a-z]+-\S+) (\w+) -->)"
                    r"[^\s,();|]*?(?=[.:]?(?:[\s,();|]|$))")  # up to a space or a mark

def read_cells(path=HERE / "runs.jsonl"):
    """{cell: the rows of its seeds}. Of two lines with one name, the later counts."""
    rows = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            rows[row["name"]] = complete(row)
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no row: {error!r}") from error
    cells = {}
    for name, row in rows.items():
        cells.setdefault(re.sub(r"-s\d+$", "", name), []).append(row)
    return cells

def complete(row):
    """A run of runs.jsonl, and what follows from its flags and its curve."""
    perfect = int(row["metric"] == "accuracy")
    tolerance = abs(row["chance"] - perfect) / 20 + 1e-9  # 5%, and rounding
    curve = zip(row["curve"]["step"], row["curve"]["val_metric"])
    learned = [step for step, score in curve if step > 0 and abs(score - perfect) <= tolerance]
    rate = re.search(r"--lr (\S+)", row["flags"])
    trained = row["curve"]["step"][-1]
    facts = dict(updates=min(learned, default=None), trained=trained,
                 pace=row["seconds"] / trained, total=row["seconds"] / 60,
                 rate=float(rate[1]) if rate else RATES.get(row["task"], 0.001))
    for key, value in row.get("untrained", {}).items():  # gates before training
        facts[f"{key}_before"] = value
    gates = list(zip(row.get("gates", {}).get("gate", []), row.get("steps", [])))
    for name in ("item", "blank"):  # of copying
        values = [gate for gate, step in gates if step == name]
        facts[f"gate_{name}s"] = fmean(values) if values else None
    return {**row, **facts}

def fill(text, cells):
    """A page with all its tables and numbers anew."""
    def new_table(match):
        head, kind, keys, lines = match.groups()
        lines = lines.splitlines()
        rows = [(i, *ROW.match(line).groups()) for i, line in enumerate(lines) if "<!--" in line]
        make = table if kind == "table" else compare
        texts = make(keys.split(), [names.split() for _, _, names in rows], cells)
        for (i, words, _), row in zip(rows, texts):
            lines[i] = " | ".join([words, *row]) + " |"
        if any(line.count("|") != head.split("\n")[1].count("|") for line in lines):
            raise ValueError(f"a row has not as many columns as its head: {head}")
        return head + "".join(line + "\n" for line in lines)

    def new_number(match):
        comment, one, other, key = match.groups()
        if one:
            text = difference(find(one.strip(), cells), find(other, cells), key)[1]
            return comment + text.removeprefix("× ").split()[0]
        return comment + figure(find(other, cells), key).split()[0]

    return NUMBER.sub(new_number, TABLE.sub(new_table, text))

def find(name, cells):
    if name not in cells:
        raise ValueError(f"no run is called '{name}'")
    return cells[name]

def table(keys, rows, cells):
    """The texts of each row: the figures `keys` of the cells that it names."""
    texts = []
    for names in rows:
        texts.append([])
        for name in names:
            name, _, own = name.partition("@")
            star = "*" if "*" in name else "+"
            for rule in SHORT[star] if star in name else [""]:
                cell = name.replace(star, rule)
                for key in [own] if own else keys:
                    texts[-1].append("-" if cell == "-" else figure(find(cell, cells), key))
    return texts

def compare(keys, rows, cells):
    """The texts of each row: how the figure of its second cell differs from the first's."""
    results = [difference(*[find(name, cells) for name in names], keys[0]) for names in rows]
    smaller = sorted(p for _, _, p, _ in results if p is not None)
    texts = []
    for seeds, text, p, flips in results:
        holm = None
        if p is not None:  # Holm 1979: the k-th smallest p counts n - k + 1 times.
            holm = min(1, max(q * (len(smaller) - k) for k, q in enumerate(smaller) if q <= p))
        numbers = ["-" if q is None else f"{q:.2g}" for q in (p, flips, holm)]
        texts.append([str(seeds), text, *numbers])
    return texts

def figure(rows, key):
    """A figure of a cell as text: the mean over its seeds ± their standard deviation."""
    if key == "learned":
        return f"{sum(row['updates'] is not None for row in rows)} of {len(rows)}"
    if key in ("updates", "minutes"):
        return until_learned(rows, key)
    if key in ("total", "pace"):  # of the quickest run: others shared the machine
        return f"{min(row[key] for row in rows):.2g}"
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        raise ValueError(f"no figure is called '{key}'")
    accuracy = rows[0]["metric"] == "accuracy"
    mean = fmean(values)
    digits = 3
    if not (accuracy and key in ACCURACIES) and mean:  # two significant figures
        digits = min(6, max(0, 1 - math.floor(math.log10(abs(mean)))))
    spread = f"{stdev(values):.{digits}f}" if len(values) > 1 else "0"
    return f"{mean:.{digits}f}" + (f" ± {spread}" if float(spread) else "")

def until_learned(rows, key):
    """Updates or minutes until learned: the median and the range. A seed that has not learned
    counts as more than all others. The minutes are those at the pace of the quickest run."""
    scale = min(row["pace"] for row in rows) / 60 if key == "minutes" else 1
    known = sorted(scale * row["updates"] for row in rows if row["updates"] is not None)
    form = "{:.2g}" if key == "minutes" else "{:.0f}"
    caps = [scale * row["trained"] for row in rows if row["updates"] is None]
    texts = [form.format(x) for x in known] + [f"over {form.format(x)}" for x in caps]
    middle = texts[len(texts) // 2]
    return middle if texts[0] == texts[-1] else f"{middle} ({texts[0]} to {texts[-1]})"

def difference(one, other, key):
    """How the second cell differs from the first, over the seeds that both have: the number
    of seeds; the mean difference, or ratio, with its 95% interval as text; Student's p; and
    the share of all flips of signs with a mean as large. None where there is no such p."""
    accuracy = one[0]["metric"] == "accuracy" and key in ACCURACIES
    samples = [sample(rows, key, accuracy) for rows in (one, other)]
    pairs = [(samples[0][seed], samples[1][seed]) for seed in samples[0] if seed in samples[1]]
    changes = [b - a for a, b in pairs if a is not None and b is not None]
    if len(changes) < 3:
        return len(changes), "-", None, None
    mean = fmean(changes)
    error = stdev(changes) / math.sqrt(len(changes))
    half = quantile(len(changes) - 1) * error
    ends = (mean, mean - half, mean + half)
    if accuracy:
        text = "{:+.3f} ({:+.3f} to {:+.3f})".format(*ends)
    else:
        text = "× {:.2g} ({:.2g} to {:.2g})".format(*map(math.exp, ends))
    signs = itertools.product((1, -1), repeat=len(changes))
    means = [abs(fmean(map(operator.mul, changes, flips))) for flips in signs]
    share = sum(x >= means[0] * (1 - 1e-9) for x in means) / len(means)
    if error <= 1e-10 * abs(mean):  # no spread, or that of rounding
        return len(changes), text, None, share
    return len(changes), text, p_value(mean / error, len(changes) - 1), share

def sample(rows, key, accuracy):
    """{seed: value} to be compared: accuracies as they are, all else as logarithms. A run
    that never learned counts as if it had learned at its last update."""
    values = {row["seed"]: row.get(key) for row in rows}
    if key not in rows[0] and key != "minutes":
        raise ValueError(f"no figure is called '{key}'")
    if key in ("updates", "minutes"):
        scale = min(row["pace"] for row in rows) if key == "minutes" else 1
        values = {row["seed"]: scale * (row["updates"] or row["trained"]) for row in rows}
    if accuracy:
        return values
    return {seed: None if x is None else math.log(x + 1e-12) for seed, x in values.items()}

@functools.cache
def quantile(freedom):
    """The t beyond which, on both sides, 5% of Student's density lie."""
    low = 0
    high = 100
    while high - low > 1e-4:
        middle = (low + high) / 2
        if p_value(middle, freedom) > 0.05:
            low = middle
        else:
            high = middle
    return high

def p_value(t, freedom):
    """The share of Student's density beyond ±t: where t = sqrt(freedom) tan(angle), the
    density of the angle is cos(angle)^(freedom - 1)."""
    def beyond(start):  # the integral from this angle to 90 degrees
        width = (math.pi / 2 - start) / 2000
        angles = [start + (i + 0.5) * width for i in range(2000)]
        return width * sum(math.cos(angle) ** (freedom - 1) for angle in angles)
    return beyond(math.atan(abs(t) / math.sqrt(freedom))) / beyond(0)

if __name__ == "__main__":
    cells = read_cells()
    for path in PAGES:
        path.write_text(fill(path.read_text(), cells))
