"""Train each rule until it has learned, at its own learning rate: python results/runs.py WORDS

A task has a grid of learning rates, and a setting has a cap on the updates. Seed 100, in
some settings also 101, chooses the rate of each rule: the rate that needs the fewest
updates, where a try that does not learn counts as many as it had. Other seeds then train
at this rate. The rate decays by a cosine over all updates of the cap, and a run ends once
it has learned: at the first evaluation, of one per 10 updates, within 5% of perfect.

Tries go to search.jsonl, a line each, and runs to runs.jsonl as eval.py measures them.
Both files say what is done, so that a stopped program goes on. WORDS choose settings.
"""
import concurrent.futures
import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import eval as evaluation
import train

RATES = {"copy": (0.008, 0.004, 0.002), "cue": (0.003, 0.006, 0.0015)}
# Setting of both rules: its flags, most updates, number of seeds, seeds that choose a rate.
SETTINGS = {
    "copy-*-w8-until": ("--task copy --window 8", 1000, 5, 2),
    "copy-*-w8-len10-until": ("--task copy --window 8 --seq-len 10", 1000, 5, 2),
    "copy-*-w8-delay80-until": ("--task copy --window 8 --delay 80", 500, 5, 1),
    "copy-*-w8-len20-until": ("--task copy --window 8 --seq-len 20", 1000, 5, 1),
    "cue-*-w1-pairs32-until": ("--task cue --window 1 --pairs 32 --cues 64", 1000, 5, 1),
    "copy-*-w8-delay160-until": ("--task copy --window 8 --delay 160", 500, 3, 1),
    "cue-*-w1-pairs64-until": ("--task cue --window 1 --pairs 64 --cues 64", 1000, 3, 1),
    "copy-*-w8-len40-until": ("--task copy --window 8 --seq-len 40", 500, 3, 1)}

class Learned(Exception):
    """A run is within 5% of perfect, or has had as many updates as it may have."""

def learn(flags, folder, most=None):
    """Train until learned -> the update, or None, and the number of updates."""
    save_checkpoint = train.save_checkpoint

    def save_and_stop(run, args, *others):
        save_checkpoint(run, args, *others)
        task = train.make_task(vars(args))
        score = run["log"][-1]["val_metric"] if run["log"] else task.chance
        if abs(score - task.perfect) <= abs(task.chance - task.perfect) / 20 + 1e-9:
            raise Learned(run["step"], run["step"])
        if run["step"] == most:
            raise Learned(None, run["step"])

    train.save_checkpoint = save_and_stop
    shutil.rmtree(folder, ignore_errors=True)
    args = train.parse_args([*flags.split(), "--out-dir", str(folder)])
    try:
        train.begin(args)
    except Learned as end:
        return end.args
    finally:
        train.save_checkpoint = save_checkpoint
    return None, args.steps

def names(path):
    return {json.loads(line)["name"]: json.loads(line) for line in path.read_text().splitlines()}

def work(name, rule, out):
    """All tries and runs of a setting and rule that are not in the files yet."""
    flags, cap, seeds, search_seeds = SETTINGS[name]
    rates = RATES[name.split("-")[0]]
    cell = name.replace("*", rule)
    flags = f"{flags} --rule {rule} --steps {cap} --eval-interval 10"
    needed = {rate: 0 for rate in rates}
    for seed in range(100, 100 + search_seeds):
        most = cap
        for rate in rates:
            title = f"search-{cell}-lr{rate}-seed{seed}"
            done = names(HERE / "search.jsonl")
            if title not in done:
                argv = f"{flags} --lr {rate} --seed {seed}"
                learned, updates = learn(argv, out / title, most)
                lines = (out / title / "metrics.jsonl").read_text().splitlines()
                log = [json.loads(line) for line in lines]
                done[title] = dict(
                    name=title, part="until", cell=cell, rule=rule, metric=log[0]["metric"],
                    lr=rate, seed=seed, flags=argv, learned=learned, updates=updates,
                    seconds=round(log[-1]["seconds"]),
                    validation=[[line["step"], round(line["val_metric"], 4)] for line in log])
                with open(HERE / "search.jsonl", "a") as file:
                    file.write(json.dumps(done[title]) + "\n")
            updates = done[title]["learned"] or done[title]["updates"]
            needed[rate] += updates
            if done[title]["learned"]:
                most = min(most, 2 * updates)
    rate = min(rates, key=needed.get)
    for seed in range(seeds):
        title = f"{cell}-s{seed}"
        row = names(HERE / "runs.jsonl").get(title, {"flags": ""})
        usual = train.defaults(row.get("task", "copy"), rule)["lr"]
        found = re.search(r"--lr (\S+)", row["flags"])  # The flags leave the default out.
        if not row["flags"] or float(found[1] if found else usual) != rate:
            learn(f"{flags} --lr {rate} --seed {seed}", out / title)
            evaluation.main([str(out / title), "--append", str(HERE / "runs.jsonl")])

if __name__ == "__main__":
    out = HERE.parent / "out" / "until"
    chosen = [name for name in SETTINGS if any(word in name for word in sys.argv[1:] or [""])]
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        jobs = [pool.submit(work, name, rule, out) for name in chosen
                for rule in ("hebbian", "gradient")]
        for job in jobs:
            job.result()
