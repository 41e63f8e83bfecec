"""Write the tables and figures of README.md and results/README.md anew: python results/tables.py

A page has blocks, `begin NAME` to `end NAME`, and figures in sentences, `CELL KEY` before each, in
HTML comments. A cell: all seeds of one setting (CELL@delay 60: tested at that delay)."""
import math
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from eval import kept, learning_curve  # noqa: E402
from train import defaults  # noqa: E402

RULES = {"none": "static", "hebbian": "Hebbian", "gradient": "gradient"}
# by task: its name, what there is to learn beyond guessing, a short window, the paper's best score
TASKS = {"copy": ("copying, recall", 0.875, 8, "0.745"),
         "cue": ("cue, mse", 1 / 12, 1, "0.053 ± 0.020"),
         "regression": ("regression, mse", 4, 1, "1.546 ± 0.064"),
         "omniglot": ("Omniglot 5-way 1-shot, accuracy", 0.8, 1, "0.237 ± 0.028"),
         "cifarfs": ("CIFAR-FS 5-way 1-shot, accuracy", 0.8, 1, "0.319 ± 0.017")}
NO_SETTING = ("task", "rule", "seed", "device", "threads", "block_size", "eval_interval",
              "eval_batches", "save_interval", "out_dir", "data_dir")
# runs of commit ca3d6a4 and before, which had an eval_batches, began with these by default
OLD = {"copy": dict(steps=500, lr=4e-3), "cue": dict(steps=1000),
       "regression": dict(steps=2500, lr=4e-3), "none": dict(alpha_init=1.0, eta0=0.2),
       "hebbian": dict(alpha_init=8.0, eta0=0.2), "gradient": dict(alpha_init=20.0)}
SCORES = ("seeds", "score", "lesion", "learned")
GATES = ("persistence", "selectivity", "write_norm", "minutes")
# (claim, in which experiments, who, must beat each of whom, by which figure)
CLAIMS = [
    ("1 Hebbian is best in all but cues", "not cue", "hebbian", "gradient none", "score"),
    ("2 Gradient is best at copying over long delays", "long copy", "gradient", "hebbian", "score"),
    ("2 Gradient needs fewer updates for that", "long copy", "gradient", "hebbian", "learned"),
    ("3 Static weights suffice for cues", "cue", "none", "hebbian gradient", "score"),
    ("4 Gradient's updates persist", "all", "gradient", "hebbian", "persistence"),
    ("4 Gradient's updates are large", "all", "gradient", "hebbian", "write_norm"),
    ("4 Hebbian is gated around salient events", "all", "hebbian", "gradient", "selectivity"),
    ("5 Plasticity adds to attention over all steps", "whole", "either rule", "none", "score"),
    ("5 Plasticity adds to attention over a window", "window", "either rule", "none", "score")]

def read_cells():
    """{cell: the rows of its seeds}, what eval.py --json wrote and more, sorted for the tables."""
    cells, order = {}, [*TASKS, *RULES]
    for path in sorted(HERE.glob("*/eval*.json")):
        (row,), run = kept(path), path.parent.name
        args = {"pretrain_steps": row["args"].get("warmup_steps", 0), **row["args"]}  # its old name
        usual, old = defaults(args["task"], args["rule"]), "eval_batches" in args
        usual.update({**OLD.get(args["task"], {}), **OLD[args["rule"]]} if old else {})
        told = " ".join(f"--{name.replace('_', '-')} {args[name]}".removesuffix(".0")
                        for name in usual if name not in NO_SETTING
                        and args.get(name, usual[name]) != usual[name])
        told = f"before: {told}" if old else told
        curve, perfect = learning_curve(path.parent), row["metric"] == "accuracy"
        near = [n for n, score, _ in curve if abs(score - perfect) <= TASKS[row["task"]][1] / 20]
        cell = run[:-3] if run[-3:-1] == "-s" else run + "-early"  # the first had no seed in it
        tested = path.stem[len("eval"):].replace("-delay-", " @delay ")
        shown = ("the paper's budget" if cell.endswith("-paper") else told or "-") + tested
        place = order.index(row["task"]), shown, order.index(row["rule"])
        row.update(run=run, cell=cell + tested.strip(), flags=told + tested, settings=shown,
                   learned=min(near, default=None), minutes=curve[-1][2] / 60, place=place)
        cells.setdefault(row["cell"], []).append(row)
    return dict(sorted(cells.items(), key=lambda cell: cell[1][0]["place"]))

def figure(rows, key):
    """A figure of a cell as text: the mean over its seeds ± the standard deviation."""
    if key == "seeds":
        return str(len(rows))
    name = "score" if key in ("worst", "best") else key
    if name not in SCORES + GATES:
        raise ValueError(f"no figure is called '{key}'")
    accuracy = rows[0]["metric"] == "accuracy"
    values = sorted((row[name] for row in rows if row.get(name) is not None), reverse=accuracy)
    if not values:
        return "never" if key == "learned" else "-"
    values = {"best": values[:1], "worst": values[-1:]}.get(key, values)
    mean, digits = statistics.fmean(values), 3
    if not accuracy or name not in ("score", "lesion"):  # two significant figures
        digits = min(5, max(0, 1 - math.floor(math.log10(mean)))) if mean else 5
    text = f"{mean:.{digits}f}"
    if key == "learned" and len(values) < len(rows):
        return text + f" ({len(values)} of {len(rows)})"
    return text + f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text

def table(head, rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))

def by_rule(cells, kind, key="score"):  # * in the name of the kind stands for the rule
    groups = [cells.get(kind.replace("*", rule)) for rule in RULES]
    return [f"{figure(r, key)} ({len(r)})" if r and figure(r, key) != "-" else "-" for r in groups]

def better(one, other, key):
    """1 if a figure of rows `one` is better than that of rows `other`, -1 worse, 0 neither."""
    means, errors = [], []
    for rows in (one, other):
        values = [row[key] for row in rows]
        means.append(statistics.mean(values))
        n = len(values)  # the score of a single seed has a spread over its episodes
        errors.append(statistics.stdev(values) / math.sqrt(n) if n > 1 else
                      rows[0]["interval"] / 1.96 if key == "score" else math.inf)
    least = TASKS[one[0]["task"]][1] / 100 if key == "score" else 0  # of what there is to learn
    if not abs(means[0] - means[1]) > max(2 * math.hypot(*errors), least):
        return 0
    lower = key == "learned" or (key == "score" and one[0]["metric"] == "mse")
    return 1 if (means[0] < means[1]) == lower else -1

def claims(cells):
    """Each claim as claim, verdict, key, [(1 for it, -1 against it, 0 neither, {rule: rows})]."""
    experiments = {}  # alike but for the rule
    for rows in cells:
        row = rows[0]
        if "--ablate" not in row["flags"]:
            experiments.setdefault((row["task"], row["flags"]), {})[row["rule"]] = rows
    for claim, where, who, whom, key in CLAIMS:
        needed = {"none"} if "none" in (who, whom) else {"hebbian", "gradient"}
        results = []
        for of in experiments.values():  # {rule: rows}
            (row, *_), rules = next(iter(of.values())), [rule for rule in of if rule != "none"]
            about = {"all": True, "cue": row["task"] == "cue", "not cue": row["task"] != "cue",
                     "long copy": row["task"] == "copy" and row["sizes"]["delay"] >= 20,
                     "window": "--window" in row["flags"], "whole": "--window" not in row["flags"]}
            complete = all(row.get(key) is not None for rule in rules for row in of[rule])
            if about[where] and rules and needed <= {*of} and complete:
                if who == "either rule":
                    said = max(better(of[rule], of[whom], key) for rule in rules)
                else:
                    said = min(better(of[who], of[rule], key) for rule in of if rule in whom)
                as_good = who == "none" and said == 0  # that is enough to suffice
                results.append((1 if as_good else said, of))
        plus, minus = (sum(said == sign for said, _ in results) for sign in (1, -1))
        verdict = ("no difference beyond the spread" if not plus and not minus
                   else "does not hold" if not plus else "holds" if plus == len(results)
                   else f"mixed: {plus} for, {minus} against" if minus
                   else f"holds in {plus} of {len(results)}, else no difference")
        if results:
            yield claim, verdict, key, results

def claim_blocks(found):
    short, full = [], []  # each claim with one experiment, and with all
    for claim, verdict, key, results in found:
        lines = {1: [], -1: [], 0: []}
        for said, of in results:
            name = [rows[0]["cell"].replace("-" + rule, "") for rule, rows in of.items()][0]
            lines[said].append(["−=+"[said + 1], name, *by_rule(of, "*", key)])
        verdict += f" ({len(lines[1])}, {len(lines[-1])}, {len(lines[0])})"
        full += [f"**{claim}** ({key}): {verdict}",
                 table(["", "experiment", *RULES.values()], lines[1] + lines[-1] + lines[0])]
        _, name, *figures = (max(lines[1], lines[-1], key=len) or lines[0])[0]
        said = [f"{r} {f.split()[0]}" for r, f in zip(RULES.values(), figures) if f != "-"]
        short.append([claim, verdict, f"{name}, {key}: {', '.join(said)}"])
    return table(["claim", "verdict (for, against, neither)", "example, w8: window 8"], short), full

def speed():
    runs, key, rows = kept(HERE / "bench-paper-size.jsonl"), "seconds_per_update", []
    for i in range(5):  # three rounds of five lines, `none` first
        ms, times, rate, peak = map(statistics.median, zip(*(
            (1000 * run[key], run[key] / none[key], run["sequences_per_second"],
             run["peak_rss_bytes"] / 1e9) for run, none in zip(runs[i::5], runs[::5]))))
        name = runs[i]["rule"] + ", `--alpha outer`" * (runs[i]["alpha"] == "outer")
        rows.append([name, f"{ms:.0f}", f"{times:.1f}", f"{rate:.0f}", f"{peak:.1f}"])
    return table(["rule", "ms an update", "times none", "sequences/s", "GB"], rows)

def fill(text, cells, blocks):
    def new(match):
        block, cell, key = match.groups()
        if block in blocks:
            return f"<!-- begin {block} -->\n{blocks[block]}\n<!-- end {block} -->"
        if cell in cells:
            return f"<!-- {cell} {key} -->" + figure(cells[cell], key).split()[0]
        raise ValueError(f"there is no '{block or cell}'")
    return re.sub(r"<!-- begin (.+?) -->\n.*?<!-- end \1 -->|<!-- (\S+(?:@delay \d+)?) (\w+) -->"
                  r"[^\s,();|]*?(?=[.:]?(?:[\s,();|]|$))", new, text, flags=re.S)

def pages():
    """{path: what it should say} of both pages; nothing is written."""
    cells, results = read_cells(), []
    brief, full = claim_blocks(claims(cells.values()))
    blocks = {"claims": brief, "verdicts": "\n\n".join(full), "speed": speed()}
    blocks["headline"] = table(["copying recall, mean ± s.d. (seeds)", *RULES.values()], [
        ["attention over all steps", *by_rule(cells, "copy-*")],
        ["attention over the last 8 steps", *by_rule(cells, "copy-*-w8")],
        ["the same, fast weights silenced (lesion)", *by_rule(cells, "copy-*-w8", "lesion")]])
    for task, (name, _, window, paper) in TASKS.items():
        blocks[task] = "\n\n".join(table(["settings", "rule", *keys], [
            [r["settings"], f"[{r['rule']}]({r['run']})", *(figure(of, key) for key in keys)]
            for of in cells.values() if (r := of[0])["task"] == task]) for keys in (SCORES, GATES))
        results += [[name, *by_rule(cells, f"{task}-*"), paper],
                    [f"the same, window {window}", *by_rule(cells, f"{task}-*-w{window}"), "-"]]
    blocks["results"] = table(["mean ± s.d. (seeds)", *RULES.values(), "paper's best"], results[2:])
    for n, of in enumerate(kept(HERE / "tuning.jsonl"), 1):  # line n is cell tuning-n
        metric = "accuracy" if "--task copy" in of["flags"] else "mse"
        cells[f"tuning-{n}"] = [dict(of, metric=metric, score=of["validation"][-1][1])]
    return {path: fill(path.read_text(), cells, blocks)
            for path in (HERE / "README.md", HERE.parent / "README.md")}

if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
