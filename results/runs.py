"""Make the runs of this folder that are missing: python results/runs.py [WORDS]

Until learned: each rule trains at its own learning rate. Seed 100, in some settings also
101, chooses the rate of a rule: the rate that needs the fewest updates, where a try that
does not learn counts as many as it had. With one seed, a try ends where it can no longer
win. Other seeds then train at this rate. The rate decays by a cosine over the most updates
that the setting allows, and a run ends once it has learned: at the first evaluation, of one
per 10 updates, within 5% of perfect. Without a seed that chooses, the first rate is taken.

For a fixed number of updates: regression, each rule at the learning rate whose error on
seed 100 is smallest; as in the paper, with its sizes, its budget and writes that pass no
gradient, and the same with everything learning; static regression for as long as the
gradient rule takes; images without a pretrained encoder, in about equal time for each rule;
and images of which two classes share a label.

Tries go to search.jsonl, a line each, and runs to runs.jsonl as eval.py measures them.
Both files say what is done, so that a stopped program goes on.
"""
import argparse
import concurrent.futures
import json
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import eval as evaluation
import tables
import train

# The seconds of a run are those of its process, because other programs share the machine.
train.time = SimpleNamespace(time=time.process_time)
# The learning rates that are tried, for a task or for one setting.
RATES = {"copy": (0.004, 0.008, 0.002), "cue": (0.003, 0.006, 0.0015),
         "regression": (0.002, 0.004, 0.001), "copy-*-w8-delay160-until": (0.004, 0.008)}
# Setting (here * is two rules): its flags, most updates, number of seeds, seeds that choose a rate.
UNTIL = {
    "copy-*-w8-until": ("--task copy --window 8", 1000, 5, 2),
    "copy-*-w8-len10-until": ("--task copy --window 8 --seq-len 10", 1000, 5, 2),
    "copy-*-w8-delay80-until": ("--task copy --window 8 --delay 80", 500, 5, 1),
    "copy-*-w8-len20-until": ("--task copy --window 8 --seq-len 20", 1000, 5, 1),
    "cue-*-w1-pairs32-until": ("--task cue --window 1 --pairs 32 --cues 64", 1000, 5, 1),
    "copy-*-w8-delay160-until": ("--task copy --window 8 --delay 160", 500, 3, 1),
    "cue-*-w1-pairs64-until": ("--task cue --window 1 --pairs 64 --cues 64", 1000, 3, 1),
    "copy-*-w8-len40-until": ("--task copy --window 8 --seq-len 40", 500, 3, 1),
    "cue-*-w1-noise16-until": ("--task cue --window 1 --noise 16", 2000, 3, 0),
    "cue-*-w1-noise64-until": ("--task cue --window 1 --noise 64", 2000, 3, 0)}
# Setting (* is three rules, + is two): its flags, number of seeds.
TUNED = {"regression-*": ("--task regression", 5),
         "regression-+-w1": ("--task regression --window 1", 5)}
PAPER = "--batch-size 1 --lr 0.001 --clip 5 --alpha-init 0.02 --eta0 0.2"
SMALL = f"{PAPER} --weight-decay 0.0001 --n-layer 2 --d-model 128 --d-ff 256"
LARGE = f"{PAPER} --weight-decay 0.0005 --d-model 256 --d-ff 512 --pretrain-steps 0 --queries 15"
SCRATCH = "--pretrain-steps 0 --batch-size 4 --eval-interval 200 --steps"
MERGED = "--task omniglot --ways 10 --merge 2 --queries 2 --pretrain-steps 1000 --steps 500"
FIXED = {
    "copy-*-paper": (f"--task copy --steps 100 --eval-interval 100 {SMALL}", 3),
    "cue-*-paper": (f"--task cue --steps 400 --eval-interval 400 {SMALL}", 3),
    "regression-*-paper": ("--task regression --steps 750 --eval-interval 750 --queries 10 "
                           + SMALL, 3),
    "omniglot-*-paper": (f"--task omniglot --shots 5 --steps 500 --eval-interval 500 {LARGE}", 3),
    "cifarfs-*-paper": (f"--task cifarfs --steps 400 --eval-interval 400 {LARGE}", 3),
    "regression-none-long": ("--task regression --steps 8000", 5),
    "omniglot-none-scratch": (f"--task omniglot {SCRATCH} 1000", 3),  # about equal minutes
    "omniglot-hebbian-scratch": (f"--task omniglot {SCRATCH} 970", 3),
    "omniglot-gradient-scratch": (f"--task omniglot {SCRATCH} 850", 3),
    "cifarfs-none-scratch": (f"--task cifarfs {SCRATCH} 2000", 3),
    "cifarfs-hebbian-scratch": (f"--task cifarfs {SCRATCH} 1940", 3),
    "cifarfs-gradient-scratch": (f"--task cifarfs {SCRATCH} 1700", 3),
    "merged-*": (MERGED, 3),
    "merged-+-w1": (f"{MERGED} --window 1", 3)}

class Ended(Exception):
    """A run is within 5% of perfect, or has had as many updates as it may have."""

def learn(flags, folder, most=None):
    """Train until learned -> the update, or None, and the number of updates."""
    save_checkpoint = train.save_checkpoint

    def save_and_stop(run, args, *others):
        save_checkpoint(run, args, *others)
        task = train.make_task(vars(args))
        score = run["log"][-1]["val_metric"] if run["log"] else task.chance
        if abs(score - task.perfect) <= abs(task.chance - task.perfect) / 20 + 1e-9:
            raise Ended(run["step"], run["step"])
        if run["step"] == most:
            raise Ended(None, run["step"])

    train.save_checkpoint = save_and_stop
    shutil.rmtree(folder, ignore_errors=True)
    args = train.parse_args([*flags.split(), "--out-dir", str(folder)])
    try:
        train.begin(args)
    except Ended as end:
        return end.args
    finally:
        train.save_checkpoint = save_checkpoint
    return None, args.steps

def rows_of(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["name"]: row for row in rows}

def choose(cell, flags, rule, rates, cap, search_seeds, out):
    """The learning rate of a cell that needs the fewest updates."""
    needed = dict.fromkeys(rates, 0)
    for seed in range(100, 100 + search_seeds):
        most = cap
        for rate in rates:
            row = attempt(cell, f"{flags} --lr {rate} --seed {seed}", rule, out, learn, most)
            updates = row["learned"] or row["updates"]
            needed[rate] += updates
            if row["learned"]:  # A later seed may win back what this one loses.
                most = min(most, updates if search_seeds == 1 else 2 * updates)
    return min(rates, key=needed.get)

def attempt(cell, flags, rule, out, trainer, *limits):
    """A try of a learning rate as its row of search.jsonl, which is made if need be."""
    args = train.parse_args(flags.split())
    title = f"search-{cell}-lr{args.lr}-seed{args.seed}"
    done = rows_of(HERE / "search.jsonl")
    if title not in done:
        learned, updates = trainer(flags, out / title, *limits)
        lines = (out / title / "metrics.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        done[title] = dict(
            name=title, part="until", cell=cell, rule=rule, metric=log[0]["metric"],
            lr=args.lr, seed=args.seed, flags=flags, learned=learned, updates=updates,
            seconds=round(log[-1]["seconds"]),
            validation=[[line["step"], round(line["val_metric"], 4)] for line in log])
        with open(HERE / "search.jsonl", "a") as file:
            file.write(json.dumps(done[title]) + "\n")
    return done[title]

def until(name, rule, out, data_dir):
    """The runs of a setting that end once learned, at the rate that learns soonest."""
    flags, cap, seeds, search_seeds = UNTIL[name]
    cell = name.replace("*", rule)
    flags = f"{flags} --rule {rule} --steps {cap} --eval-interval 10"
    rates = RATES.get(name) or RATES[name.split("-")[0]]
    rate = choose(cell, flags, rule, rates, cap, search_seeds, out)
    for seed in range(seeds):
        run(learn, f"{flags} --lr {rate} --seed {seed}", out / f"{cell}-s{seed}", data_dir)

def tuned(name, rule, out, data_dir):
    """The runs of a setting at the learning rate with the smallest error of seed 100."""
    flags, seeds = TUNED[name]
    cell = re.sub(r"[*+]", rule, name)
    flags = f"{flags} --rule {rule}"
    errors = {}
    for rate in RATES["regression"]:
        row = attempt(cell, f"{flags} --lr {rate} --seed 100", rule, out, train_all)
        errors[rate] = min(error for _, error in row["validation"])
    rate = min(errors, key=errors.get)
    for seed in range(seeds):
        run(train_all, f"{flags} --lr {rate} --seed {seed}", out / f"{cell}-s{seed}", data_dir)

def fixed(name, rule, out, data_dir):
    """The runs of a setting for a fixed number of updates."""
    flags, seeds = FIXED[name]
    cell = re.sub(r"[*+]", rule, name)
    variants = {cell: ""}
    if name.endswith("paper") and rule != "none":
        variants = {cell: "--ablate backward", f"{cell}-learning": ""}
    for title, more in variants.items():
        for seed in range(seeds):
            run(train_all, f"{flags} --rule {rule} {more} --seed {seed} --data-dir {data_dir}",
                out / f"{title}-s{seed}", data_dir)

def rules_of(name):
    for star, rules in tables.SHORT.items():
        if star in name:
            return rules
    return [name.split("-")[1]]

def train_all(flags, folder):
    """Train for all updates -> None in place of the update that learned, and their number."""
    shutil.rmtree(folder, ignore_errors=True)
    train.main([*flags.split(), "--out-dir", str(folder)])
    return None, train.parse_args(flags.split()).steps

def run(trainer, flags, folder, data_dir):
    """Train and measure, unless runs.jsonl has a run of this name and these flags."""
    expected = evaluation.flags_of(vars(train.parse_args(flags.split())))
    row = rows_of(HERE / "runs.jsonl").get(folder.name, {"flags": ""})
    if row["flags"] != expected:
        trainer(flags, folder)
        kept = str(HERE / "runs.jsonl")
        evaluation.main([str(folder), "--append", kept, "--data-dir", data_dir])

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*", default=[""],
                        help="in the names of cells, which run in this order")
    parser.add_argument("--data-dir", default="data", help="folder of the images")
    given = parser.parse_args()
    out = HERE.parent / "out" / "runs"
    jobs = [(fixed, name, rule) for name in FIXED for rule in rules_of(name)]
    jobs += [(tuned, name, rule) for name in TUNED for rule in rules_of(name)]
    jobs += [(until, name, rule) for name in UNTIL for rule in ("hebbian", "gradient")]
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        pending = [pool.submit(make, name, rule, out, given.data_dir)
                   for word in given.words for make, name, rule in jobs
                   if word in re.sub(r"[*+]", rule, name)]
        for job in pending:
            job.result()
