"""Fill in the tables of README.md and results/README.md, and the numbers in their sentences.

    python results/tables.py                      # from runs.jsonl and search.jsonl
    python results/tables.py results/horizon.png  # draws this picture, too (matplotlib)

A cell is all seeds of one setting, such as copy-hebbian-w8. An experiment is the cells of
one name but for the rule, such as copy-*-w8. Comments on a page say what to fill in:

    <!-- table KEY -->       The first column below names cells or experiments. The head names
                             figures, rules (with their figure KEY) or "p: Hebbian, static".
    <!-- row NAME KEY -->    This row of a table shows other words than its name.
    <!-- CELL KEY -->        The number behind it is this figure of a cell.
    <!-- p CELL CELL KEY --> The number behind it is Student's p of their difference.
"""
import json
import math
import re
import sys
from pathlib import Path
from statistics import fmean, stdev, variance

HERE = Path(__file__).resolve().parent
PAGES = (HERE.parent / "README.md", HERE / "README.md")
RULES = {"none": "static", "hebbian": "Hebbian", "gradient": "gradient"}
GATES = ("gate", "persistence", "change", "selectivity", "gate_counts", "gate_noise")
SCORES = ("score", "best", "worst", "lesion", "prototype")
FIGURES = (*SCORES, *GATES, "seeds", "interval", "learned", "minutes")

TABLE = re.compile(r"(<!-- table (\w+) -->\n)((?:\|.*\n)*)")
ROW = re.compile(r"<!-- row (\S+) ?(\w*) -->")
NUMBER = re.compile(r"<!-- (?!table |row )(?:p (\S+) )?(\S+) (\w+) -->"
                    r"[^\s,();|]*?(?=[.:]?(?:[\s,();|]|$))")  # up to a space or a mark
HORIZON = {  # what the picture shows: (size, experiment) of each of its columns
    "blanks": [(20, "copy-*-w8")] + [(n, f"copy-*-w8-delay{n}") for n in (40, 80, 160)],
    "tokens": [(5, "copy-*-w8")] + [(n, f"copy-*-w8-len{n}") for n in (10, 20, 40)],
    "pairs of 64 cues": [(n, f"cue-*-w1-pairs{n}") for n in (4, 8, 16, 32, 64)]}

def read_cells(runs=HERE / "runs.jsonl", search=HERE / "search.jsonl"):
    """{cell: the rows of its seeds}. A line of search.jsonl is a cell of its own."""
    rows = {}  # by name: of two lines with one name, the later counts
    for path in (runs, search):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                rows[row["name"]] = complete(row) if path == runs else row
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
    settings = re.sub(r"--(task|rule|seed) \S+ ?", "", row["flags"]).strip() or "-"
    if "-paper-" in row["name"]:
        settings = "the paper's budget"
    return dict(row, settings=settings, learned=min(learned, default=None),
                updates=row["curve"]["step"][-1], minutes=row["seconds"] / 60)

def fill(text, cells):
    """A page with all its tables and numbers anew."""
    def new_number(match):
        other, name, key = match.groups()
        if name not in cells or other not in (None, *cells):
            raise ValueError(f"no run is called '{name}', or none '{other}'")
        if other is None:
            return f"<!-- {name} {key} -->" + figure(cells[name], key).split()[0]
        return f"<!-- p {other} {name} {key} -->" + difference(cells[other], cells[name], key)[1]

    text = TABLE.sub(lambda match: match[1] + table(match[3].splitlines(), match[2], cells), text)
    return NUMBER.sub(new_number, text)

def table(lines, key, cells):
    """A table: its first column says what goes down, its head what goes across."""
    if len(lines) < 3:
        raise ValueError(f"no table follows <!-- table {key} -->")
    head, dashes, *rows = [line.strip("| ").split(" | ") for line in lines]
    filled = [head, dashes]
    for label, *old in rows:
        words = ROW.search(label)
        name, row_key = words.groups() if words else (label, "")
        old += ["-"] * (len(head) - 1 - len(old))  # A new row may be no more than its name.
        texts = [entry(name, *column, row_key or key, cells) for column in zip(head[1:], old)]
        filled.append([label, *texts])
    return "".join(f"| {' | '.join(row)} |\n" for row in filled)

def entry(name, title, old, key, cells):
    """The text in the row of a name and the column of a title, in place of the `old` text."""
    by_rule = {RULES[rule]: cells.get(name.replace("*", rule), []) for rule in RULES}
    rows = by_rule["static"] or by_rule["Hebbian"] or by_rule["gradient"]
    if not rows:
        raise ValueError(f"no run is called '{name}'")
    if title in by_rule:
        plastic = by_rule["Hebbian"] + by_rule["gradient"]
        if key in GATES and None in [row["learned"] for row in plastic]:
            return "-"  # Gates of a model that has not learned say nothing.
        text = figure(by_rule[title], key)
        seeds = len(by_rule[title])
        if text == "-" or " of " in text:
            return text
        return f"{text} ({seeds})" if seeds > 1 else f"{text} (one seed)"
    pair = re.fullmatch(r"(p: )?(\w+)(?:, | − )(\w+)", title)
    if pair:
        mean, p = difference(by_rule[pair[2]], by_rule[pair[3]], key)
        return p if pair[1] else mean
    if title in ("encoder alone", *FIGURES):
        return figure(rows, "prototype" if title == "encoder alone" else title)
    if title == "paper's best":  # typed by hand
        return old
    if title not in rows[0]:
        raise ValueError(f"no column is called '{title}'")
    value = rows[0][title]
    return f"{value:.3f}" if isinstance(value, float) else RULES.get(value, str(value))

def figure(rows, key):
    """A figure of a cell as text: the mean over its seeds ± their standard deviation."""
    if key not in FIGURES:
        raise ValueError(f"no figure is called '{key}'")
    if key == "seeds":
        return str(len(rows))
    name = "score" if key in ("best", "worst") else key
    known = sorted(row[name] for row in rows if row.get(name) is not None)
    if not known:
        return "never" if rows and key == "learned" else "-"

    accuracy = rows[0]["metric"] == "accuracy" and key in SCORES
    values = known
    if key == "minutes":  # of the quickest run: the others shared the machine with more
        values = known[:1]
    elif key in ("best", "worst"):
        values = known[-1:] if accuracy == (key == "best") else known[:1]
    mean = fmean(values)
    if accuracy and mean == 1:  # Wilson's lower bound of 95%, where n of n are right
        n = rows[0]["episodes"]
        return f"1.000 (≥ {n / (n + 1.96**2):.3f})"
    digits = 3
    if mean == 0 or accuracy and mean > 0.9995:
        digits = 5
    elif not accuracy:  # two significant figures
        digits = min(6, max(0, 1 - math.floor(math.log10(mean))))
    text = f"{mean:.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    return text + (f" ({len(known)} of {len(rows)})" if len(known) < len(rows) else "")

def difference(one, other, key):
    """Of two cells the difference of means and Student's two-sided p, as texts, or "-"."""
    samples = [sample(rows, key) for rows in (one, other)]
    if any(len(values) < 3 or None in values.values() for values in samples):
        return "-", "-"
    mean, p = t_test(*samples)
    return f"{mean:+.3f}", "-" if p is None else f"{p:.2g}"

def sample(rows, key):
    """{seed: value} for the t-test: accuracies as they are, ratios as their logarithms."""
    values = {row["seed"]: row.get(key) for row in rows}
    if key == "learned":  # Never counts as a tenth more than all updates.
        values = {row["seed"]: row["learned"] or 1.1 * row["updates"] for row in rows}
    accuracy = key in SCORES and rows and rows[0]["metric"] == "accuracy"
    if accuracy or None in values.values():
        return values
    return {seed: math.log(value + 1e-12) for seed, value in values.items()}

def t_test(one, other):
    """The mean of one - other, two dicts by seed, and p, or None where nothing spreads.
    The same seeds are paired; others are compared by Welch's test."""
    samples = [list(one.values()), list(other.values())]
    if one.keys() == other.keys():
        samples = [[one[seed] - other[seed] for seed in one]]
    mean = fmean(one.values()) - fmean(other.values())
    squares = [variance(values) / len(values) for values in samples]
    if sum(squares) <= 1e-20 * mean**2:  # no spread, or that of rounding
        return mean, None
    parts = [square**2 / (len(values) - 1) for square, values in zip(squares, samples)]
    return mean, p_value(mean / math.sqrt(sum(squares)), sum(squares)**2 / sum(parts))

def p_value(t, freedom):
    """The share of Student's density beyond ±t: where t = sqrt(freedom) tan(angle), the
    density of the angle is cos(angle)^(freedom - 1)."""
    def beyond(start):  # the integral from this angle to 90 degrees
        width = (math.pi / 2 - start) / 4000
        angles = [start + (i + 0.5) * width for i in range(4000)]
        return width * sum(math.cos(angle) ** (freedom - 1) for angle in angles)
    return beyond(math.atan(abs(t) / math.sqrt(freedom))) / beyond(0)

def draw(cells, path):
    """Score and updates until learned, by size: a dot per seed, and their mean."""
    from matplotlib.figure import Figure
    picture = Figure(figsize=(11, 5.5), layout="constrained")
    grid = picture.subplots(2, 3, sharex="col")
    for column, (name, experiments) in enumerate(HORIZON.items()):
        sizes = [size for size, _ in experiments]
        for rule, color in {"hebbian": "C0", "gradient": "C1"}.items():
            for axes, key in zip(grid[:, column], ("score", "learned")):
                means = []
                for size, experiment in experiments:
                    rows = cells[experiment.replace("*", rule)]
                    values = [row[key] or math.nan for row in rows]
                    axes.plot([size] * len(values), values, ".", color=color)
                    means.append(fmean(values))
                axes.plot(sizes, means, color=color, label=rule)
                ylabel = rows[0]["metric"] if key == "score" else "update when learned"
                axes.set(xlabel=name, xticks=sizes, ylabel=ylabel)
        grid[0, column].axhline(rows[0]["chance"], color="gray", linestyle="dashed")
    grid[0, -1].set(yscale="log")  # errors
    grid[0, -1].legend(loc="center left")
    picture.savefig(path, dpi=100)

if __name__ == "__main__":
    cells = read_cells()
    for path in PAGES:
        path.write_text(fill(path.read_text(), cells))
    for path in sys.argv[1:]:
        draw(cells, path)
