"""Write the tables and figures of README.md and results/README.md anew: python results/tables.py

A page has blocks, `begin NAME` to `end NAME`, and figures in sentences, `CELL KEY` before each, in
HTML comments. A cell: all seeds of one setting (CELL@delay 60: tested at that delay). With
`python results/tables.py results/horizon.png` it also draws into that file (needs matplotlib)."""
import math
import re
import sys
from itertools import product
from pathlib import Path
from statistics import fmean, stdev, variance

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from eval import kept  # noqa: E402
from train import defaults  # noqa: E402

RULES = {"none": "static", "hebbian": "Hebbian", "gradient": "gradient"}
# by task: its name, what there is to learn beyond guessing, a short window, the paper's best score
TASKS = {"copy": ("copying, recall", 0.875, 8, "0.745"),
         "cue": ("cue, mse", 1 / 12, 1, "0.053 ± 0.020"),
         "regression": ("regression, mse", 4, 1, "1.546 ± 0.064"),
         "omniglot": ("Omniglot 5-way 1-shot, accuracy", 0.8, 1, "0.237 ± 0.028"),
         "cifarfs": ("CIFAR-FS 5-way 1-shot, accuracy", 0.8, 1, "0.319 ± 0.017")}
SPEED = {"copying, 140 updates, 31 steps": "copy-*-w8", "the same, 61 steps": "copy-*-w8-len20",
         "the same, 171 steps": "copy-*-w8-delay160", "cue, 400 updates, 8 steps": "cue-*-w1",
         "regression, 2000 updates, 10 steps": "regression-*-w1"}
IMAGES = [("Omniglot, 5-way 1-shot", "omniglot-*"), ("the same, window 1", "omniglot-*-w1"),
          ("classes of one alphabet", "omniglot-*@alphabet"),
          ("quarter-turns as classes", "omniglot-*@turned"),
          ("20-way 1-shot", "omniglot-*-20way"),
          ("Omniglot, long run, 5-way 1-shot", "omniglot-*-long"),
          ("20-way 1-shot", "omniglot-*-20way-long"),
          ("CIFAR-FS, 5-way 1-shot", "cifarfs-*"), ("the same, window 1", "cifarfs-*-w1"),
          ("5-way 5-shot", "cifarfs-*-5shot"),
          ("CIFAR-FS, long run, 5-way 1-shot", "cifarfs-*-long"),
          ("5-way 5-shot", "cifarfs-*-5shot-long")]
NO_SETTING = """rule seed device threads block_size eval_interval out_dir data_dir resume overwrite
    watch""".split()
SCORES = ("seeds", "score", "lesion", "learned")
GATES = ("persistence", "cap_share", "change", "minutes")
SALIENCE = ("selectivity", "eta_selectivity", "share_of_pairs")
# (name of a block, claim, in which experiments, who (of two either is enough), must beat each of
# whom, by what)
SHORT = dict(task="copy", window=8, seq_len=5, delay=20, n_layer=2, min_delay=None)
def longer(args, size):  # copying as SHORT, but for a larger size
    return all(args[name] == n for name, n in SHORT.items() if name != size) and (
        args[size] > SHORT[size])

CLAIMS = [
    ("1", "1. Hebbian is best in all but cues", lambda a: a["task"] != "cue",
     "hebbian", "gradient none", "score"),
    ("2-delays", "2. Gradient copies best over long delays", lambda a: longer(a, "delay"),
     "gradient", "hebbian", "score"),
    ("2-learned", "2. and learns them in fewer updates", lambda a: longer(a, "delay"),
     "gradient", "hebbian", "learned"),
    ("2-tokens", "2. and copies many tokens best", lambda a: longer(a, "seq_len"),
     "gradient", "hebbian", "score"),
    ("3", "3. Static weights with attention suffice for cues",
     lambda a: a["task"] == "cue" and not a["window"], "none", "hebbian gradient", "suffices"),
    ("4-open", "4. Gradient's eta stays large", lambda a: a["window"],
     "gradient", "hebbian", "persistence"),
    ("4-large", "4. Gradient's writes change more", lambda a: a["window"],
     "gradient", "hebbian", "change"),
    ("4-gated", "4. Hebbian is gated around salient events", lambda a: a.get("noise"),
     "hebbian", "gradient", "selectivity"),
    ("5-whole", "5. Plasticity adds to full attention", lambda a: not a["window"],
     "hebbian gradient", "none", "score"),
    ("5-window", "5. Plasticity adds to a window", lambda a: a["window"],
     "hebbian gradient", "none", "score")]

def read_cells():
    """{cell: the rows of its seeds}, what eval.py --json wrote and more, sorted for the tables."""
    cells, order = {}, [*TASKS, *RULES]
    for path in sorted(HERE.glob("*/eval*.json")):
        (row,), cell = kept(path), path.parent.name.rpartition("-s")[0]
        args, usual = row["args"], defaults(row["task"], row["rule"])
        told = " ".join(f"--{name.replace('_', '-')} {args[name]}".removesuffix(".0")
                        for name in usual if name not in NO_SETTING
                        and args.get(name, usual[name]) != usual[name])
        tested = path.stem[len("eval"):].replace("-", "@", 1).replace("-", " ")
        log, perfect = kept(path.parent / "metrics.jsonl"), row["metric"] == "accuracy"
        least = TASKS[row["task"]][1] / 20 + 1e-9  # 5%, and what rounding adds
        near = [at["step"] for at in log
                if at["step"] > 0 and abs(at["val_metric"] - perfect) <= least]
        shown = "the paper's budget" if cell.endswith("-paper") else told or "-"
        place = order.index(row["task"]), shown + tested, order.index(row["rule"])
        row.update(run=path.parent.name, cell=cell + tested, flags=told, settings=shown + tested,
                   alike=str({k: args.get(k, usual[k]) for k in usual if k not in NO_SETTING}),
                   learned=min(near, default=None), minutes=log[-1]["seconds"] / 60, place=place)
        cells.setdefault(row["cell"], []).append(row)
    return dict(sorted(cells.items(), key=lambda cell: cell[1][0]["place"]))

def figure(rows, key):
    """A figure of a cell as text: the mean over its seeds ± their standard deviation."""
    if key == "seeds":
        return str(len(rows))
    name = "score" if key in ("worst", "best") else key
    if name not in (*SCORES, *GATES, *SALIENCE, "prototype", "interval"):
        raise ValueError(f"no figure is called '{key}'")
    accuracy = rows[0]["metric"] == "accuracy"
    known = sorted((row[name] for row in rows if row.get(name) is not None), reverse=accuracy)
    if not known:
        return "never" if key == "learned" else "-"
    # minutes are those of the quickest run: others had to share the machine with more
    values = {"best": known[:1], "worst": known[-1:], "minutes": [min(known)]}.get(key, known)
    mean, digits = fmean(values), 3
    if accuracy and name in ("score", "lesion", "prototype"):
        if mean == 1:  # all right, on the same episodes for each seed: Wilson's lower bound of 95%
            n = rows[0]["episodes"]
            return f"1.000 (≥ {n / (n + 1.96**2):.3f})"
        digits = 5 if mean > 0.9995 else 3
    elif name != "share_of_pairs":  # two significant figures
        digits = min(6, max(0, 1 - math.floor(math.log10(mean)))) if mean else 5
    text = f"{mean:.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
    return text + f" ({len(known)} of {len(rows)})" * (len(known) < len(rows))

def table(head, rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))

def by_rule(cells, kind, key="score"):  # * in the name of the kind stands for the rule
    figures = []
    for rule in RULES:
        rows = cells.get(kind.replace("*", rule))
        said = figure(rows, key) if rows else "-"
        if said != "-" and " of " not in said:
            said += f" ({len(rows)})" if len(rows) > 1 else " (one seed)"
        figures.append(said)
    return figures

def t_test(one, other):
    """The mean of one - other, two dicts by seed, and its two-sided p by Student's t."""
    samples = [[*one.values()], [*other.values()]]  # Welch's
    if one.keys() == other.keys():  # paired by seed
        samples = [[one[seed] - other[seed] for seed in one]]
    mean = fmean(one.values()) - fmean(other.values())
    squares = [variance(of) / len(of) for of in samples]  # of the standard errors
    if sum(squares) <= 1e-20 * mean**2:  # no spread, or none but rounding: no test
        return mean, 1.0
    df = sum(squares)**2 / sum(a**2 / (len(of) - 1) for a, of in zip(squares, samples))
    return mean, p_value(mean / math.sqrt(sum(squares)), df)

def p_value(t, df):
    """How much of Student's density lies beyond ±t: in angles, t = sqrt(df) tan(angle), the
    density is cos(angle)^(df - 1)."""
    def beyond(cut):  # the integral of the density from an angle on
        width = (math.pi / 2 - cut) / 4000
        return width * sum(math.cos(cut + (i + 0.5) * width) ** (df - 1) for i in range(4000))
    return beyond(math.atan(abs(t) / math.sqrt(df))) / beyond(0)

def compare(one, other, key):
    """1 if rows `one` are better than rows `other` by a figure, -1 worse, 0 neither; and p."""
    name = "score" if key == "suffices" else key
    least = TASKS[one[0]["task"]][1] / 100 if name == "score" else 0  # of what there is to learn
    lower = name == "learned" or name == "score" and one[0]["metric"] == "mse"  # is better
    a, b = ({row["seed"]: row[name] for row in rows}
            for rows in ((other, one) if lower else (one, other)))  # a > b: one is better
    if name == "learned":  # never counts as after a tenth more than all updates
        late = 1.1 * one[0]["args"]["steps"]
        a, b = ({seed: value or late for seed, value in of.items()} for of in (a, b))
    if key == "suffices" and compare(one, other, "score")[0] != -1:  # surely not worse by `least`
        mean, p = t_test({seed: value + least for seed, value in a.items()}, b)
        return int(p < 0.05 and mean > 0), p
    size = fmean(a.values()) - fmean(b.values())
    if name != "score" or lower:  # what lives on a scale of ratios
        a, b = ({seed: math.log(value + 1e-12) for seed, value in of.items()} for of in (a, b))
    mean, p = t_test(a, b)
    shows = p < 0.05 and abs(size) >= least and size * mean > 0
    return (1 if mean > 0 else -1) if shows else 0, p

def claims(cells):
    """Each claim as name, claim, verdict, key, [(sign, p, {rule: rows})], one of an experiment."""
    experiments = {}  # alike but for the rule
    for rows in cells:
        if rows[0]["args"].get("ablate", "none") == "none" and "@" not in rows[0]["cell"]:
            experiments.setdefault(rows[0]["alike"], {})[rows[0]["rule"]] = rows
    for name, claim, where, who, whom, key in CLAIMS:
        results = []
        for by_rule in experiments.values():
            ones, others = ([rule for rule in of.split() if rule in by_rule] for of in (who, whom))
            rows = [row for rule in ones + others for row in by_rule[rule]]
            tried = ones and others and where(rows[0]["args"])
            learned = [row["learned"] is not None for row in rows]
            if key in ("learned", "suffices"):  # where nobody learned there is nothing to tell
                tried = tried and any(learned)
            elif key != "score":  # gates of a model that has not learned say nothing
                tried = tried and all(learned) and all(key in row for row in rows)
            if not tried:
                continue
            sign, p = None, math.nan
            if others == whom.split() and min(len(by_rule[rule]) for rule in ones + others) >= 3:
                found = [compare(by_rule[a], by_rule[b], key) for a, b in product(ones, others)]
                # to be best is to beat each; of two who may, one is enough
                sign = (max if " " in who else min)(sign for sign, _ in found)
                decided = [p for of, p in found if of == sign]
                p = min(decided) if " " in who and sign == 1 else max(decided)
            results.append((sign, p, by_rule))
        plus, minus, neither = ([sign for sign, _, _ in results].count(n) for n in (1, -1, 0))
        of = plus + minus + neither
        verdict = ("too few seeds" if not of else "not shown" if not plus + minus
                   else "holds" if plus == of else "does not hold" if minus == of
                   else "mixed" if plus and minus
                   else f"shown in {plus} of {of}" if plus else f"the opposite in {minus} of {of}")
        if results:
            yield name, claim, f"{verdict} ({plus}, {minus}, {neither})", key, results

def claim_blocks(found):
    blocks, brief = {}, []
    for name, claim, verdict, key, results in found:
        lines, key = [], "score" if key == "suffices" else key
        results.sort(key=lambda of: [1, 0, -1, None].index(of[0]))
        for sign, p, of in results:
            cell = [rows[0]["cell"].replace("-" + rule, "") for rule, rows in of.items()][0]
            lines.append([{1: "+", -1: "−", 0: "=", None: "?"}[sign], cell, *by_rule(of, "*", key),
                          "-" if sign is None or p == 1 else f"{p:.2g}"])
        blocks["claim-" + name] = f"**{claim}**, by {key}: {verdict}.\n\n" + table(
            ["", "experiment", *RULES.values(), "p"], lines)
        brief.append([claim, verdict])
    blocks["claims"] = table(["claim", "verdict (experiments for, against, neither)"], brief)
    return blocks

def quarters(cells):
    """The mean score of answers to what the four quarters of an episode showed, of all seeds."""
    for cell, rows in cells.items():
        if re.fullmatch("copy-.*-w8-len40|cue-.*-w1-pairs(32|64)", cell):
            means = [fmean(score for _, score in at) for at in zip(*(r["by_step"] for r in rows))]
            n = len(means) // 4
            yield [f"{cell}, {rows[0]['metric']}",
                   *(f"{fmean(means[i * n:i * n + n]):.3f}" for i in range(4))]

def depth(cells):
    """Fast weights in all of four blocks, or in the last of them alone."""
    pairs = [("copy-{}-w8-4all", "copy-{}-w8-4last"), ("regression-{}-w1", "regression-{}-w1-last")]
    for (every, last), rule in product(pairs, ("hebbian", "gradient")):
        two = [cells[name.format(rule)] for name in (every, last) if name.format(rule) in cells]
        for key in ("score", "learned") if len(two) == 2 else ():
            p = compare(*two, key)[1] if min(map(len, two)) >= 3 else 1
            yield [two[0][0]["cell"], key, *(figure(rows, key) for rows in two),
                   "-" if p == 1 else f"{p:.2g}"]

def tries(rows):
    """Settings that were tried with each rule, on validation: the last score, when learned."""
    found = {}  # flags: {rule: what is said}
    for row in rows:
        if row.get("grid"):
            flags = re.sub("--task |--rule .*? | --seed .*", "", row["flags"])
            rule = re.search("--rule (.*?) ", row["flags"])[1]
            learned = row["learned"] or "never"
            found.setdefault(flags, {})[rule] = f"{row['validation'][-1][1]:.5f}, {learned}"
    return [[flags, *(of.get(rule, "-") for rule in RULES)] for flags, of in found.items()]

def images(cells):
    """The reader's scores in all kinds of episodes, and those of its encoder, alike for all."""
    for name, kind in IMAGES:
        rows = max((cells.get(kind.replace("*", rule), ()) for rule in RULES),
                   key=lambda of: sum("prototype" in row for row in of))
        if rows:
            static, gradient = ({row["seed"]: row["score"] for row in cells.get(
                kind.replace("*", rule), ())} for rule in ("none", "gradient"))
            more = "-"
            if len(static) > 2 and static.keys() == gradient.keys():
                more = "{:+.3f} (p = {:.2g})".format(*t_test(gradient, static))
            yield [name, *by_rule(cells, kind), figure(rows, "prototype"), more]

def image_blocks(cells):
    """What was tried with the encoder and the reader; line n of images.jsonl is cell images-n."""
    rows, blocks = kept(HERE / "images.jsonl"), {}
    for n, of in enumerate(rows, 1):
        if of["part"] != "reader":
            of["score"] = of["validation"]["1-shot"] if "validation" in of else of["val"]
        cells[f"images-{n}"] = [dict(of, metric="accuracy")]
    rows = sorted(rows, key=lambda of: of["task"])
    blocks["images"] = table(["accuracy", *RULES.values(), "encoder alone",
                              "gradient − static"], images(cells))
    blocks["encoders"] = table(["encoder", "updates × images", "minutes", "1-shot", "5-shot"], [
        [f"{of['task']}, {of['tried']}", f"{of['updates']} × {of['images']}",
         f"{of['minutes']:.1f}", *(f"{of['validation'][k]:.3f}" for k in ("1-shot", "5-shot"))]
        for of in rows if of["part"] == "encoder" and of.get("page", True)])
    blocks["sweep"] = table(["CIFAR-FS", "updates × images", "1-shot", "5-shot",
                             "mirrored: 1-shot", "5-shot"], [
        [of["tried"], f"{of['updates']} × {of['images']}",
         *(f"{of[key][k]:.3f}" for key in ("validation", "mirrored") for k in ("1-shot", "5-shot"))]
        for of in rows if of["part"] == "sweep" and of["page"]])
    blocks["curves"] = table(["encoder", "updates", "minutes", "train loss", "training classes",
                              "validation", "test"], [
        [f"{of['task']}, {of['tried']}", str(of["updates"]), f"{of['minutes']:.0f}",
         *(f"{of[key]:.3f}" for key in ("train_loss", "train", "val", "test"))]
        for of in rows if of["part"] == "curve" and of.get("page", True)])
    blocks["readers"] = table(["encoder", "reader", "updates", "minutes", "score",
                               "encoder alone"], [
        [f"{of['task']}, {of['encoder']}", f"{RULES[of['rule']]}, {of['tried']}",
         str(of["updates"]), *(f"{of[k]:.{n}f}" for k, n in (
             ("minutes", 1), ("score", 3), ("prototype", 3)))]
        for of in rows if of["part"] == "reader" and of["page"]])
    return blocks

def draw(cells, path):
    """Of both rules score and updates until learned, by blanks, tokens and pairs: a thin line a
    seed, a bold one their mean, which stops where a seed has not learned."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    columns = zip(figure.subplots(2, 3, sharex="col").T, ("delay", "seq_len", "pairs"),
                  ("blanks", "tokens", "pairs of 64 cues"), (
        r"copy-RULE-w8(-delay\d+)?", r"copy-RULE-w8(-len\d+)?", r"cue-RULE-w1-pairs\d+"))
    for (column, size, name, kind), rule in product(columns, ("hebbian", "gradient")):
        kind = re.compile(kind.replace("RULE", rule))
        of = [rows for cell, rows in cells.items() if kind.fullmatch(cell)]
        of.sort(key=lambda rows: rows[0]["sizes"][size])
        column[0].axhline(of[0][0]["chance"], color="0.5", linestyle="dashed", linewidth=1)
        sizes, color = [rows[0]["sizes"][size] for rows in of], {"hebbian": "C0"}.get(rule, "C1")
        for axes, key in zip(column, ("score", "learned")):
            axes.set(xlabel=name, xscale="log",
                     ylabel=of[0][0]["metric"] if key == "score" else "update when learned")
            axes.set_xticks(sizes, sizes)
            axes.minorticks_off()
            values = [{row["seed"]: row[key] or math.nan for row in rows} for rows in of]
            mean = [fmean(by_seed.values()) for by_seed in values]
            axes.plot(sizes, mean, color=color, linewidth=2, label=rule)
            for seed in range(5):
                line = [by_seed.get(seed, math.nan) for by_seed in values]
                axes.plot(sizes, line, color=color, linewidth=0.6)
    column[0].set(yscale="log")
    column[0].legend()
    figure.savefig(path, dpi=120)

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
    blocks = claim_blocks(claims(cells.values()))
    blocks["headline"] = table(["copying recall, mean ± s.d. (seeds)", *RULES.values()], [
        ["attention over all steps", *by_rule(cells, "copy-*")],
        ["attention over the last 8 steps", *by_rule(cells, "copy-*-w8")],
        ["the same, fast weights silenced (lesion)", *by_rule(cells, "copy-*-w8", "lesion")]])
    for task, (name, _, window, paper) in TASKS.items():
        scores = (*SCORES[:3], "minutes") if "shot" in name else SCORES
        rows = [of for cell, of in cells.items() if of[0]["task"] == task and "@" not in cell]
        blocks[task] = "\n\n".join(
            table(["settings", "rule", *keys], [
                [of[0]["settings"], f"[{of[0]['rule']}]({of[0]['run']})" if keys is scores
                 else of[0]["rule"], *(figure(of, key) for key in keys)] for of in rows])
            for keys in ((scores,) if "shot" in name else (scores, GATES)))
        results += [[name, *by_rule(cells, f"{task}-*"), paper],
                    [f"the same, window {window}", *by_rule(cells, f"{task}-*-w{window}"), "-"]]
    blocks["results"] = table(["mean ± s.d. (seeds)", *RULES.values(), "paper's best"], results[2:])
    blocks["paper"] = table(["the paper's budget", *RULES.values()], [
        [name, *by_rule(cells, f"{task}-*-paper")] for task, (name, *_) in TASKS.items()])
    blocks["salience"] = table(["experiment", "seeds", *SALIENCE, "score"], [
        [name, *(figure(rows, key) for key in ("seeds", *SALIENCE, "score"))]
        for name, rows in cells.items() if "eta_selectivity" in rows[0]])
    blocks["by-step"] = table(["answers to what was shown in the", "first quarter", "second",
                               "third", "last"], quarters(cells))
    blocks["speed"] = table(["minutes", *RULES.values()], [
        [name, *by_rule(cells, kind, "minutes")] for name, kind in SPEED.items()])
    blocks["depth"] = table(["experiment", "", "all blocks", "the last", "p"], depth(cells))
    blocks["delays"] = table(["tested at a delay of", "10", "20", "60", "80"], [
        [name, *(figure(cells[f"{name}@delay {n}"], "score") for n in (10, 20, 60, 80))]
        for name in cells if re.fullmatch("copy-.*-mix-[a-z]+", name)])
    blocks.update(image_blocks(cells))
    tuning = kept(HERE / "tuning.jsonl")
    blocks["tries"] = table(["score, and update when learned", *RULES.values()], tries(tuning))
    for n, of in enumerate(tuning, 1):  # line n is cell tuning-n
        metric = "accuracy" if "--task copy" in of["flags"] else "mse"
        cells[f"tuning-{n}"] = [dict(of, metric=metric, score=of["validation"][-1][1])]
    return {path: fill(path.read_text(), cells, blocks)
            for path in (HERE / "README.md", HERE.parent / "README.md")}

if __name__ == "__main__":
    for picture in sys.argv[1:]:
        draw(read_cells(), picture)
    for path, text in pages().items():
        path.write_text(text)
