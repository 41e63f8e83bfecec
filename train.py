"""Train a plastic Transformer on any task with any rule.

    python train.py --task copy --rule hebbian --watch             # half a minute
    python train.py --task copy --rule gradient --window 8         # attention is too short to copy
    python train.py --task omniglot --rule hebbian                 # downloads Omniglot, once
    python train.py --resume --out-dir out/copy-hebbian-s0         # go on with a run that stopped
    python eval.py out/copy-hebbian-s0                             # what the model does, and how

Into --out-dir go metrics.jsonl (a line an evaluation), ckpt.pt (for --resume), best.pt (the best).
"""
import argparse
import contextlib
import ctypes
import json
import math
import os
import signal
import statistics
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn

from model import Config, Transformer
from tasks import TASKS, make_task, random_generator, show

LR_WARMUP, CLIP, WEIGHT_DECAY, EVAL_EPISODES = 25, 1.0, 0.01, 160  # updates, norm, AdamW's, number
PRETRAIN_INTERVAL = 250  # updates between checkpoints

@dataclass
class Training:
    """All settings of a run but those of its model (model.Config) and its episodes (tasks.py)."""
    task: Annotated[Literal[tuple(TASKS)], "what to learn"] = "copy"
    steps: Annotated[int, "updates", 1] = None
    batch_size: Annotated[int, "episodes an update", 1] = 32
    lr: Annotated[float, "learning rate, before warm-up and cosine", 1e-12, 1] = None
    pretrain_steps: Annotated[int, "updates of the encoder before; 0: all learn together", 0] = 0
    seed: Annotated[int, "everything random follows from it", 0, 2**60] = 0
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "auto: the best there is"] = "auto"
    threads: Annotated[int, "CPU threads; more slow the many small operations down", 1] = 1
    out_dir: Annotated[str, "folder of the run, if not out/<task>-<rule>-s<seed>"] = None
    data_dir: Annotated[str, "where the images are, or are downloaded to"] = "data"
    eval_interval: Annotated[int, "updates between checkpoints, if not a tenth of all", 1] = None

def defaults(task, rule):
    """All settings of a run of this task and rule that is told nothing else."""
    settings = {f.name: f.default for of in (TASKS[task][0], Config, Training) for f in fields(of)}
    return {**settings, **TASKS[task][1], "task": task, "rule": rule}

def add_flags(parser, title, settings):
    """A flag for each annotated field, None where it is not given; the last of a name replaces."""
    group = parser.add_argument_group(title)
    for name, hint in get_type_hints(settings, include_extras=True).items():
        if get_origin(hint) is Annotated:
            kind, meaning, *limits = get_args(hint)
            choices, default = get_args(kind) or None, getattr(settings, name)
            said = [str(default)] * (default is not None)
            said += [f"{task} {its[name]}" for task, (_, its) in TASKS.items() if name in its]
            group.add_argument("--" + name.replace("_", "-"), choices=choices,
                               metavar=None if choices else name[0].upper(),
                               type=number(kind, *limits) if limits else None,
                               help=meaning + f" (default: {', '.join(said)})" * bool(said))

def number(kind, low, high=1e18):
    """An argparse type: an int or a float from `low` to `high`."""
    def number(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
    return number

def parse_args(argv=None):
    """All settings of a run: those given, else those of the run to resume, else the defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="python train.py [--task TASK] [--rule RULE] [flags]",
        allow_abbrev=False, conflict_handler="resolve",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out-dir")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out-dir")
    parser.add_argument("--watch", action="store_true", help="see in the terminal what it writes")
    add_flags(parser, "training", Training)
    add_flags(parser, "model and plasticity", Config)
    for task, (sizes, _) in TASKS.items():
        add_flags(parser, f"episodes of {task}", sizes)
    given = {name: v for name, v in vars(parser.parse_args(argv)).items() if v is not None}
    settings = defaults(given.get("task", "copy"), given.get("rule", "hebbian"))
    given.setdefault("out_dir", "out/{task}-{rule}-s{seed}".format(**{**settings, **given}))
    if given["resume"]:
        settings = load_run(f"{given['out_dir']}/ckpt.pt", given)[0]["args"]
    for name in {*given} - {*settings, "resume", "overwrite", "watch"}:
        raise ValueError(f"--{name.replace('_', '-')} {given[name]}: no size of {settings['task']}")
    args = argparse.Namespace(**{**settings, **given})
    args.eval_interval = args.eval_interval or max(1, args.steps // 10)
    if args.pretrain_steps and "ways" not in settings:
        raise ValueError(f"--pretrain-steps {args.pretrain_steps}: {args.task} has no encoder")
    return args

def learning_rate(step, steps):
    """The schedule, as a share of --lr: a linear warm-up times a cosine that falls to 5%."""
    return min(step / LR_WARMUP, 1) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)

def update(loss, optimizer, lr):
    """One update by the loss of a batch -> the loss. FloatingPointError where it is not finite."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], CLIP)
    if not (loss.isfinite() and norm.isfinite()):
        raise FloatingPointError(f"loss {loss.item()}: try a lower --lr, --eta0 or --alpha-init")
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    return loss.detach()

@torch.no_grad()
def evaluate(model, task, split, n_episodes, batch_size, seed, device):
    """n episodes of a split by a model in .eval() -> loss, score; scores, `shown` (in tasks.py) of
    each answer (n, L); gates (4, n, T): eta_t, ||D_t||, eta_t ||D_t||, eta_t ||alpha ∘ D_t||."""
    losses, scores, shown, gates, generator = [], [], [], [], random_generator(seed, split)
    for start in range(0, n_episodes, batch_size):
        episodes = task.sample(split, min(batch_size, n_episodes - start), generator).to(device)
        shown += [task.shown(episodes).cpu()] if hasattr(task, "shown") else []
        out, fast = model(episodes)
        losses += [task.loss(out, episodes.target).item()] * len(out)
        scores.append(task.score(out, episodes.target))
        if hasattr(fast, "eta"):
            eta, norm, change = (torch.cat(of, 1) for of in (fast.eta, fast.norm, fast.change))
            gates.append(torch.stack([eta, norm, eta * norm, change]).cpu().double())
    scores, shown, gates = (torch.cat(of, -2) if of else None for of in (scores, shown, gates))
    return dict(loss=statistics.fmean(losses), score=scores.mean().item(), scores=scores,
                shown=shown, gates=gates)

def pretrain(run, args, task, model, optimizer, generator, device, rank):
    """Updates -pretrain_steps to 0: an encoder learns to tell classes by nearest prototypes."""
    alone, began = model.embed.nearest_prototype, time.time() - run["seconds"]
    sizes = (task.n_classes, 1, 1) if task.n_classes else (60, 1, 2)  # ways, shots, queries
    steps = args.pretrain_steps
    for step in range(run["step"] + 1, 1):
        model.train()
        episodes = task.sample("train", 1, generator, *sizes).to(device)
        answers, classes = alone(episodes)
        loss = task.loss(answers, episodes.target)
        if classes is not None:  # CIFAR-FS: a layer also names each image's class
            loss += task.loss(classes, torch.cat([episodes.support_y, episodes.target], dim=1))
        loss = update(loss, optimizer, 1e-3 * learning_rate(steps + step, steps)).item()
        run.update(step=step, seconds=time.time() - began, losses=[*run["losses"], loss])
        if step % PRETRAIN_INTERVAL == 0 and not rank:
            model.eval()
            print("encoder alone:", log(run, args, task, alone, device), flush=True)
            save_checkpoint(run, args, model, optimizer, generator)
    optimizer.state.clear()

def train(args, task, model, device, state=None, rank=0, world=1):
    """The one loop, for every task and rule. `state`: where to go on; rank 0 of `world` writes."""
    folder, generator = Path(args.out_dir), random_generator(args.seed, "train")
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=WEIGHT_DECAY)
    run = dict(step=-args.pretrain_steps, seconds=0.0, best=math.inf, losses=[], log=[])
    if state:
        run = state["run"]
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
    elif not rank:
        save_checkpoint(run, args, model, optimizer, generator)
    if args.pretrain_steps:
        if run["step"] <= 0:
            pretrain(run, args, task, model, optimizer, generator, device, rank)
        model.embed.encoder.requires_grad_(False)
    began = time.time() - run["seconds"]
    shared = model if world == 1 else nn.parallel.DistributedDataParallel(
        model, find_unused_parameters=args.task == "cifarfs")  # its embed.classes
    for split in ("train", "val") if args.pretrain_steps else ():
        task.embed(split, model.embed.encoder.eval(), device)
    watching, above = args.watch and sys.stdout.isatty() and args.rule != "none", ""
    for step in range(run["step"] + 1, args.steps + 1):
        model.train(not args.pretrain_steps)  # a pretrained encoder's batch norm stays, too
        episodes = task.sample("train", args.batch_size, generator).to(device, rank, world)
        loss = task.loss(shared(episodes)[0], episodes.target)
        loss = update(loss, optimizer, args.lr * learning_rate(step, args.steps))
        if world > 1:  # each has the loss of its share
            torch.distributed.all_reduce(loss.div_(world))
        if rank:
            continue
        run.update(step=step, seconds=time.time() - began, losses=[*run["losses"], loss.item()])
        if step % args.eval_interval == 0 or step == args.steps:
            line = log(run, args, task, model.eval(), device)
            if watching:  # one episode, drawn over the three lines of the last picture
                one = evaluate(model, task, "val", 1, 1, 0, device)
                line, above = above + line + picture(one["gates"][2, 0], task), "\x1b[3F\x1b[J"
            print(line, flush=True)
            score = run["log"][-1]["val_metric"]
            if abs(score - task.perfect) <= abs(run["best"] - task.perfect):
                run["best"] = score
                save(folder / "best.pt", dict(args=vars(args), step=step, model=model.state_dict()))
            save_checkpoint(run, args, model, optimizer, generator)
    if not rank:
        summary(run, args, task, show(model, task, "val", device))

def log(run, args, task, model, device):
    """Evaluate, always on the same episodes, and add a line to metrics.jsonl -> one to print."""
    result = evaluate(model, task, "val", EVAL_EPISODES, args.batch_size, args.seed, device)
    row = dict(step=run["step"], train_loss=statistics.fmean(run["losses"]), metric=task.metric,
               val_loss=result["loss"], val_metric=result["score"], seconds=run["seconds"])
    run.update(losses=[], log=[*run["log"], row])
    lines = "".join(json.dumps(of) + "\n" for of in run["log"])
    save(Path(args.out_dir) / "metrics.jsonl", lines.encode())
    return (f"step {run['step']}/{args.steps}  validation loss {result['loss']:.4f}  {task.metric} "
            f"{result['score']:.4f}  after {run['seconds']:.0f} s")

def picture(writes, task):
    """Two more lines: each step's write as a bar, and the initial of what it shows."""
    shares = (writes / writes.max().clamp(min=1e-12))[:72].tolist()  # no wider than a terminal
    bars = [" ▁▂▃▄▅▆▇█"[math.ceil(8 * share)] for share in shares]
    return f"\nwrites {''.join(bars)}\nsteps  {''.join(name[0] for name in task.step_names[:72])}"

def summary(run, args, task, answers):
    """Say what it answers, how long it took, when it was nearly perfect, and what to do now."""
    near = abs(task.chance - task.perfect) / 20 + 1e-9  # 5% of what there is to learn
    learned = [row["step"] for row in run["log"]
               if row["step"] > 0 and abs(row["val_metric"] - task.perfect) <= near]
    print(*answers, f"finished: {run['step']} updates, {run['seconds']:.0f} s; best {task.metric} "
          f"{run['best']:.4f}; within 5% of perfect by update {learned[0] if learned else '-'}",
          f"now: python eval.py {quote(args.out_dir)}", sep="\n")

def main(argv=None):
    with one_line():
        args = parse_args(argv)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        try:
            begin(args)
        except KeyboardInterrupt:
            print("stopped; to go on: python train.py --resume --out-dir", quote(args.out_dir))
            sys.exit(130)

def begin(args):
    """Make what a run needs, anew or from its checkpoint, and train."""
    device, rank, world = prepare(args)
    torch.manual_seed(args.seed)
    state, path = None, Path(args.out_dir) / "ckpt.pt"
    if args.resume:
        state, task, model = load_run(path, vars(args))
    elif path.exists() and not (args.overwrite or rank):  # the first may have begun
        raise ValueError(f"{path} is there: --resume goes on with it, --overwrite replaces it")
    else:
        task = make_task(vars(args))
        model = Transformer(task, args)
    args.block_size = model.block_size  # as many positions for other episodes, too
    path.parent.mkdir(parents=True, exist_ok=True)
    if not rank:
        for name in () if state else ("best.pt", "metrics.jsonl", "eval.json"):  # of an older run
            (path.parent / name).unlink(missing_ok=True)
        done = f"{max(0, state['run']['step']) if state else 0}/{args.steps} done"
        print(f"{args.task}, rule {args.rule}, on {device}, in {args.out_dir}, {done};"
              f" {task.metric} {task.chance:.3g} is guessing, {task.perfect:g} perfect", flush=True)
    train(args, task, model.to(device), device, state, rank, world)

# ------ Saving and loading, devices, torchrun: nothing below is about learning. ------

def fail(message):  # as every bad input does: one line, exit status 2
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

@contextlib.contextmanager
def one_line():
    """Whatever a user can mend ends the program with one line."""
    try:
        yield
    except BrokenPipeError:  # who read our output has left, as head does
        os._exit(1)  # at once, as what is left to print has nowhere to go
    except (ValueError, OSError, FloatingPointError) as error:
        fail(error)
    except (RuntimeError, MemoryError) as error:
        if "memory" in repr(error).lower():
            fail("out of memory: try a smaller --batch-size, --d-model, --d-ff or --n-layer")
        raise

def save(path, content):
    """Write bytes or what torch.save takes, beside the place, then rename: no file is ever half."""
    temporary = Path(f"{path}.tmp")
    try:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is torch.save's word for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}".split("\n")[0]) from error

def save_checkpoint(run, args, model, optimizer, generator):
    parts = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), run=run)
    parts.update(args=vars(args), generator=generator.get_state())
    save(Path(args.out_dir) / "ckpt.pt", parts)

def load_run(path, changes=()):
    """-> checkpoint, task, model, with some settings changed. ValueError where it does not fit."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")  # runs no code
        args = argparse.Namespace(**{**state["args"], **dict(changes)})
        task = make_task(vars(args))
        model = Transformer(task, args)
        model.load_state_dict(state["model"])
        return state, task, model
    except Exception as error:  # a damaged or foreign file can fail in any way
        reason = str(error).strip().split("\n")[-1].strip()
        raise ValueError(f"{path} does not load ({reason}): name a run of train.py") from error

def prepare(args):
    """The device of a run; its rank among the processes that torchrun started, and their number."""
    torch.set_num_threads(args.threads)
    if sys.platform == "linux":  # to map large blocks of memory anew each time costs a third
        ctypes.CDLL("libc.so.6").mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own
        ctypes.CDLL("libc.so.6").mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(name for name in there if there[name]) if args.device == "auto" else args.device
    if not there[name]:
        raise ValueError(f"--device {name}: there is none here, try --device cpu")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size}: no multiple of the {world} processes")
    if world == 1:
        return torch.device(name), 0, 1
    torch.distributed.init_process_group("nccl" if name == "cuda" else "gloo")
    return torch.device(name, int(os.environ["LOCAL_RANK"])), torch.distributed.get_rank(), world

if __name__ == "__main__":
    main()
