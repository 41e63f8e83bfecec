"""Train a plastic Transformer on any task with any rule.

    python train.py --task copy --rule hebbian              # about a minute
    python train.py --task copy --rule gradient --window 8  # attention is too short
    python train.py --task omniglot --rule hebbian          # downloads images once
    python train.py --resume --out-dir out/copy-hebbian-s0  # go on after a stop
    python eval.py out/copy-hebbian-s0                      # measure the model

--out-dir gets metrics.jsonl (a line per evaluation), best.pt (the model that was best in
validation) and ckpt.pt (the state at the start and after each evaluation, for --resume).
"""
import argparse
import contextlib
import ctypes
import io
import json
import math
import os
import platform
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path
from shlex import join
from statistics import fmean

import torch
from torch import nn

from model import Config, Transformer, nearest_prototype, setting
from tasks import PRETRAINING, TASKS, make_task, random_generator

LR_WARMUP = 25  # updates
EVAL_EPISODES = 160
PRETRAIN_LR = 1e-3
PRETRAIN_INTERVAL = 250  # updates between evaluations
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

@dataclass
class Training:
    """The settings of a run, besides those of model.Config and of its task."""
    task: str = setting("copy", "what to learn", choices=tuple(TASKS))
    steps: int = setting(None, "number of updates", 1)
    batch_size: int = setting(32, "episodes per update", 1)
    lr: float = setting(None, "peak learning rate (warm-up, then cosine)", 1e-12, 1)
    weight_decay: float = setting(0.01, "weight decay of AdamW", 0, 1)
    clip: float = setting(1.0, "largest norm of the gradient", 1e-9, 1e9)
    pretrain_steps: int = setting(0, "updates that pretrain the image encoder", 0)
    seed: int = setting(0, "seed of everything random", 0, 2**30)
    device: str = setting(DEVICE, "where to compute", choices=("cpu", "cuda"))
    threads: int = setting(1, "CPU threads; one is best for small models", 1, 1024)
    out_dir: str = setting(None, "folder of the run (default: out/TASK-RULE-sSEED)")
    data_dir: str = setting("data", "folder of the images, downloaded if need be")
    eval_interval: int = setting(None, "updates per evaluation (default: a tenth)", 1)

def train(args, task, model, optimizer, generator, run, device, rank, world):
    """The one training loop, for every task and rule. It goes on after run["step"].

    `run`, from begin(), is the progress that ckpt.pt keeps. Steps below 1 pretrain the
    image encoder alone. Step 1 freezes it and begins to train the rest. Without
    pretraining, all is trained. Of `world` processes, that of rank 0 writes files.
    """
    start = time.time() - run["seconds"]
    for step in range(run["step"] + 1, args.steps + 1):
        if step == 1:
            freeze_encoder(args, task, model, device)
            optimizer.state.clear()  # AdamW forgets the pretraining.

        if step <= 0:
            model.train()
            loss = encoder_loss(args, task, model, generator, device)
            lr = PRETRAIN_LR * schedule(step + args.pretrain_steps, args.pretrain_steps)
            interval = PRETRAIN_INTERVAL
        else:
            model.train(not args.pretrain_steps)  # False freezes batch norm, too.
            episodes = task.sample("train", args.batch_size, generator)
            episodes = episodes.to(device, rank, world)
            out, _ = model(episodes)
            loss = task.loss(out, episodes.target)
            lr = args.lr * schedule(step, args.steps)
            interval = args.eval_interval or max(1, args.steps // 10)

        loss = update(loss, optimizer, lr, args.clip, world)
        run["step"] = step
        run["seconds"] = time.time() - start
        run["losses"].append(loss)
        if rank == 0 and (step % interval == 0 or step == args.steps):
            model.eval()
            line = validate(run, args, task, model, device)
            save_checkpoint(run, args, model, optimizer, generator)
            print(line, flush=True)  # after saving: a closed pipe loses nothing

def encoder_loss(args, task, model, generator, device):
    """The encoder's loss: find the nearest prototype and, on CIFAR-FS, the class."""
    episodes = task.sample("train", 1, generator, PRETRAINING[args.task]).to(device)
    features = model.embed.features(episodes)  # (1, T + Q, E)
    loss = task.loss(nearest_prototype(features, episodes), episodes.target)
    if task.n_classes:
        labels = torch.cat([episodes.support_y, episodes.target], 1)  # (1, T + Q)
        loss = loss + task.loss(model.embed.classes(features), labels)
    return loss

def freeze_encoder(args, task, model, device):
    """Freeze a pretrained encoder. On CIFAR-FS it encodes each image once, now."""
    if args.pretrain_steps:
        model.embed.encoder.requires_grad_(False).eval()
        for split in ("train", "val"):
            task.encode_images(split, model.embed.encoder, device)

def schedule(step, steps):
    """The share of the peak learning rate: linear warm-up times a cosine to 5%."""
    warmup = min(step / LR_WARMUP, 1)
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return warmup * (0.05 + 0.95 * cosine)

def update(loss, optimizer, lr, clip, world=1):
    """Update the model once -> the loss. FloatingPointError if it is not finite."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    loss = loss.detach()
    if world > 1:  # Each process has the loss and gradients of its share.
        gradients = [p.grad for p in parameters if p.grad is not None]
        for tensor in [loss, *gradients]:
            torch.distributed.all_reduce(tensor)
            tensor /= world
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    if not (loss.isfinite() and norm.isfinite()):
        flags = "--lr, --eta0, --alpha-init or --max-norm"
        raise FloatingPointError(f"loss {loss}, gradient {norm}: lower {flags}")
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    return loss.item()

def validate(run, args, task, model, device):
    """Evaluate on validation episodes, save, and return a line about the scores."""
    step = run["step"]
    answer = model if step > 0 else model.embed.answer  # the encoder alone
    result = evaluate(answer, task, "val", args, EVAL_EPISODES, device)
    loss = result["losses"].mean().item()
    score = result["scores"].mean().item()
    run["log"].append(dict(step=step, train_loss=fmean(run["losses"]), metric=task.metric,
                           val_loss=loss, val_metric=score, seconds=run["seconds"]))
    run["losses"] = []
    save_log(run, args)
    if step > 0 and abs(score - task.perfect) <= abs(run["best"] - task.perfect):
        save_best(run, args, model)
    return (f"{'step' if step > 0 else 'encoder alone: step'} {step}/{args.steps}  "
            f"validation loss {loss:.4f}  {task.metric} {score:.4f}  "
            f"after {run['seconds']:.0f} s")

@torch.no_grad()
def evaluate(answer, task, split, options, n, device):
    """Let a model, or a function like one, answer n episodes -> losses (n, 1), each the mean
    of its batch; scores (n, L); for cues asked_steps (n, Q); with writes, gates (3, n, T):
    eta_t, n_t, change."""
    generator = random_generator(options.seed, split)
    parts = defaultdict(list)
    for start in range(0, n, options.batch_size):
        size = min(options.batch_size, n - start)
        episodes = task.sample(split, size, generator).to(device)
        out, fast = answer(episodes)
        parts["losses"].append(task.loss(out, episodes.target).double().expand(size, 1))
        parts["scores"].append(task.score(out, episodes.target))
        if hasattr(task, "asked_steps"):
            parts["asked_steps"].append(task.asked_steps(episodes))
        if fast is not None:
            gates = [torch.cat(gate, 1) for gate in (fast.eta, fast.norm, fast.change)]
            parts["gates"].append(torch.stack(gates).double())
    return {name: torch.cat(part, dim=-2).cpu() for name, part in parts.items()}  # along n

@torch.no_grad()
def show(model, task, split, device, n=3):
    """Yield n episodes as lines. The lesioned model is the one that writes nothing."""
    episodes = task.sample(split, n, random_generator(0, split)).to(device)
    shown = episodes.support_x if episodes.support_y is None else episodes.support_y
    lines = {"shown": shown, "right": episodes.target}
    for name, write in (("answered", True), ("lesioned", False)):
        if write or model.config.rule != "none":
            out, _ = model.eval()(episodes, write)
            out = out[:, -episodes.target.size(1):]
            lines[name] = out if episodes.target.is_floating_point() else out.argmax(-1)
    for b in range(n):
        for name, values in lines.items():
            numbers = values[b].flatten().tolist()
            yield f"  {name:8}  " + " ".join(str(round(x, 2)) for x in numbers)[:88]

def main(argv=None):
    with errors_as_one_line():
        args = parse_args(argv)
        try:
            begin(args)
        except KeyboardInterrupt as error:
            if Path(args.out_dir, "ckpt.pt").exists():
                advice = f"stopped; to go on: python train.py --resume --out-dir {place(args)}"
                error.args = (advice,)
            raise

def begin(args):
    """Make what a run needs, anew or from its checkpoint, and train."""
    device, rank, world = prepare(args)
    torch.manual_seed(args.seed)
    folder = Path(args.out_dir)
    if rank == 0 and not args.resume and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} has files: --resume goes on with a run, or remove the folder")
    if args.resume:
        state, task, model = load_run(folder / "ckpt.pt", vars(args))
    else:
        task = make_task(vars(args))
        model = Transformer(task, args)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay)
    generator = random_generator(args.seed, "train")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    run = dict(step=-args.pretrain_steps, seconds=0.0, best=math.inf, losses=[], log=[],
               machine=f"{name}, torch {torch.__version__}, Python {platform.python_version()}")
    if args.resume:
        with loading(folder / "ckpt.pt"):
            run = restore(state, optimizer, generator)
        if run["step"] >= 1:
            freeze_encoder(args, task, model, device)

    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if run["best"] < math.inf and not (folder / "best.pt").exists():
            print(f"{folder / 'best.pt'} is missing: the model of ckpt.pt replaces it", flush=True)
            save_best(run, args, model)
        if not args.resume:
            save_checkpoint(run, args, model, optimizer, generator)
        save_log(run, args)
        slow = sum(parameter.numel() for parameter in model.parameters())
        fast = sum(p.weight.numel() + p.bias.numel() for p in model.plastic_layers())
        print(f"{args.task}, rule {args.rule}, on {device}, in {args.out_dir}, "
              f"{max(0, run['step'])}/{args.steps} done; {task.metric} "
              f"{task.chance:.3g} is guessing, {task.perfect:g} perfect\n"
              f"{slow:,} slow parameters, and {fast:,} fast weights per episode", flush=True)
    train(args, task, model, optimizer, generator, run, device, rank, world)
    if rank == 0:
        print(*show(model, task, "val", device), sep="\n")
        print(f"finished: {run['step']} updates, {run['seconds']:.0f} s; best {task.metric} "
              f"{run['best']:.4f}\nnow: python eval.py {place(args)}")

# ------ Flags, files, devices, torchrun: nothing below is about learning. ------
CHANGEABLE = ("resume", "out_dir", "data_dir", "device", "threads", "steps", "lr", "batch_size",
              "eval_interval")  # the settings that --resume may change

def parse_args(argv=None):
    """All settings of a run: flags, else those to resume, else the defaults."""
    given = vars(train_parser().parse_args(argv))
    settings = defaults(given.get("task", "copy"), given.get("rule", "hebbian"))
    settings["out_dir"] = "out/{task}-{rule}-s{seed}".format(**{**settings, **given})
    if "resume" in given:
        path = Path(given.get("out_dir", settings["out_dir"]), "ckpt.pt")
        state, _, _ = load_run(path, {name: given[name] for name in CHANGEABLE if name in given})
        settings = {**state["args"], "out_dir": str(path.parent), "data_dir": Training.data_dir}
    for name, value in given.items():
        flag = f"--{name}".replace("_", "-")
        if name not in settings:
            raise ValueError(f"{flag} {value}: {settings['task']} has no such size")
        if "resume" in given and name not in CHANGEABLE and value != settings[name]:
            raise ValueError(f"{flag} {value}: --resume cannot change {settings[name]}")
    args = argparse.Namespace(**{**settings, **given})
    if args.pretrain_steps and args.task not in PRETRAINING:
        raise ValueError(f"--pretrain-steps: {args.task} has no encoder to pretrain")
    return args

def train_parser():
    parser = new_parser(__doc__, "python train.py [--task TASK] [--rule RULE] [flags]")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out-dir")
    add_flags(parser, "training", Training)
    add_flags(parser, "model and plasticity", Config)
    for task in dict.fromkeys(task for task, _ in TASKS.values()):
        add_flags(parser, f"episodes of {task.__name__}", task)
    return parser

def defaults(task, rule):
    """All settings of a run of this task and rule that is told nothing else."""
    task_class, task_defaults = TASKS[task]
    settings = {"resume": False}
    for group in (task_class, Config, Training):  # Training last: its data_dir counts.
        settings.update({field.name: field.default for field in fields(group)})
    return {**settings, **task_defaults, "task": task, "rule": rule}

def new_parser(description, usage):
    """A parser of the flags given, or ValueError. A later flag replaces one of its name."""
    def refuse(message):
        raise ValueError(message)
    parser = argparse.ArgumentParser(
        description=description, usage=usage, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, conflict_handler="resolve",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    return parser

def add_flags(parser, title, settings, tasks=TASKS):
    """A flag per setting. Its help names the default, and each task's own one."""
    group = parser.add_argument_group(title)
    for field in fields(settings):
        if not field.metadata:
            continue
        shown = [] if field.default is None else [str(field.default)]
        for name, (_, task_defaults) in tasks.items():
            if field.name in task_defaults:
                shown.append(f"{name} {task_defaults[field.name]}")
        default = f" (default: {', '.join(shown)})" if shown else ""
        choices = field.metadata["choices"]
        group.add_argument(f"--{field.name}".replace("_", "-"), type=limited(field),
                           choices=choices, help=field.metadata["help"] + default,
                           metavar=None if choices else field.name[0].upper())

def limited(field):  # a type for argparse, with the limits of a setting
    low, high = field.metadata["limits"]

    def number(text):
        value = field.type(text)
        if field.type is str and (not text or text.startswith("-")):
            raise argparse.ArgumentTypeError(f"'{text}' is no name: begin it with ./")
        if field.type is not str and not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    return number

def stop(number, frame):
    """The first signal raises KeyboardInterrupt. The second ends all at once."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(130))
    raise KeyboardInterrupt

@contextlib.contextmanager
def errors_as_one_line():
    """What a user can mend ends the program with one line. So does Ctrl-C."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # One may be closed.
        stream.reconfigure(errors="backslashreplace")  # for a terminal that lacks a character
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # Background jobs ignore it.
        signal.signal(signal.SIGINT, stop)
    try:
        yield
        print(end="", flush=True)  # The last error of a full disk or a closed pipe comes here.
    except KeyboardInterrupt as stopped:
        if os.environ.get("RANK", "0") == "0":  # one process of torchrun
            print(str(stopped) or "stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # The reader of our output has left.
        os._exit(1)
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise  # a fault of ours
        if isinstance(error, (MemoryError, RuntimeError)):
            error = "out of memory: lower --batch-size, or train a smaller model"
        print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)

def save(path, content):
    """Write bytes, or a dict by torch.save, beside the file, then rename: none is ever half."""
    if isinstance(content, dict):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
    path = Path(os.path.realpath(path))  # A link stays, and its target is replaced.
    temporary = Path(f"{path}.tmp")
    try:
        if path.exists() and not path.is_file():  # such as /dev/null
            path.write_bytes(content)
            return
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # x: never through a planted link
            file.write(content)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"{path} cannot be written: {error}") from error
        raise

def save_log(run, args):
    lines = "".join(json.dumps(line) + "\n" for line in run["log"])
    save(Path(args.out_dir) / "metrics.jsonl", lines.encode())

def save_best(run, args, model):
    run["best"] = run["log"][-1]["val_metric"]
    best = dict(args=vars(args), step=run["step"], model=model.state_dict())
    save(Path(args.out_dir) / "best.pt", best)

def save_checkpoint(run, args, model, optimizer, generator):
    state = dict(run=run, args=vars(args), model=model.state_dict(),
                 optimizer=optimizer.state_dict(), generator=generator.get_state())
    save(Path(args.out_dir) / "ckpt.pt", state)

def place(args):  # the folders of a run, as a command names them
    data_dir = ["--data-dir", args.data_dir] if args.data_dir != Training.data_dir else []
    return join([args.out_dir, *data_dir])

@contextlib.contextmanager
def loading(path):
    """ValueError with one line where a damaged or foreign file fails in any way."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise ValueError(f"{path} does not load ({reason}): name a run of train.py") from error

def load_run(path, changes=()):
    """-> checkpoint, task, model, with settings changed. ValueError if it fails.
    A stranger's file has no more power than flags, and names no data folder."""
    with loading(path):
        state = torch.load(path, weights_only=True, map_location="cpu")
        flags = {name: value for name, value in state["args"].items()
                 if name != "resume" and (name, value) != ("eval_interval", None)}
        argv = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()
                if isinstance(value, (int, float, str))]
        known = defaults(flags["task"], flags["rule"])
        if vars(train_parser().parse_args(argv)) != flags or known.keys() != state["args"].keys():
            raise ValueError("it has other settings than the flags")
        if Path(path).name == "ckpt.pt":
            check_run(state["run"], state["args"])
    settings = {**state["args"], "data_dir": Training.data_dir, **dict(changes)}
    task = make_task(settings)
    with loading(path):
        wide = [x for name, x in state["model"].items() if name.endswith(".up.weight")]
        shape = (settings["d_ff"], settings["d_model"])
        if [x.shape for x in wide if x.is_contiguous()] != [shape] * settings["n_layer"]:
            raise ValueError("its weights have other sizes than its settings")
        model = Transformer(task, argparse.Namespace(**settings))
        model.load_state_dict(state["model"])
        return state, task, model

def check_run(run, args):
    """ValueError if the `run` of a checkpoint cannot go on: see begin() for its parts."""
    known = dict(step=0, seconds=0.0, best=0.0, losses=[], log=[], machine="")
    line = dict(step=0, train_loss=0.0, metric="", val_loss=0.0, val_metric=0.0, seconds=0.0)
    for values, like in [(run, known), *((logged, line) for logged in run["log"])]:
        if {key: type(values[key]) for key in values} != {key: type(like[key]) for key in like}:
            raise ValueError("it has no run to go on with")
    if run["losses"] or run["step"] < -args["pretrain_steps"] or math.isnan(run["best"]) or (
            run["best"] < math.inf and not run["log"]):
        raise ValueError("its run has a step, losses or a best score that cannot be")

def restore(state, optimizer, generator):
    """Restore what a checkpoint has besides the model -> its run."""
    groups = optimizer.state_dict()["param_groups"]  # train.update sets the learning rate.
    optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
    for parameter, moments in optimizer.state.items():
        alike = (parameter.shape, parameter.dtype, parameter.stride())
        kinds = {name: (x.shape, x.dtype, x.stride()) for name, x in moments.items()}
        step = kinds.pop("step")
        if kinds != dict(exp_avg=alike, exp_avg_sq=alike) or step[0] or moments["step"] < 1:
            raise ValueError("its optimizer is of another model")
    generator.set_state(state["generator"])
    return state["run"]

def prepare(args):
    """-> the device; the rank of this process, and their number (torchrun)."""
    torch.set_num_threads(args.threads)
    with contextlib.suppress(OSError):  # Only glibc needs this, for a third of the time.
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: map no large block anew
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is none here, try --device cpu")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return torch.device(args.device), 0, 1
    if world < 1 or "LOCAL_RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE {world} without LOCAL_RANK: start by torchrun, or unset it")
    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size}: no multiple of {world} processes")
    # Python handles no signal while C++ waits for the other processes.
    handlers = {number: signal.signal(number, signal.SIG_DFL)
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    except RuntimeError as error:
        raise ValueError(f"the processes of torchrun do not meet: {error}") from error
    for number, handler in handlers.items():
        signal.signal(number, handler)
    rank = torch.distributed.get_rank()
    return torch.device(args.device, int(os.environ["LOCAL_RANK"])), rank, world

if __name__ == "__main__":
    try:
        main()
    finally:  # Python takes a while to end, and Ctrl-C comes too late then.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
