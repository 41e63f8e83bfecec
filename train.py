"""Train a plastic Transformer on any task with any rule.

    python train.py --task copy --rule hebbian                     # about a minute on a 2-core CPU
    python train.py --task copy --rule gradient --window 8         # attention too short: fast weights must carry it
    python train.py --task omniglot --rule hebbian                 # downloads and packs Omniglot the first time
    python train.py --resume --out-dir out/copy-hebbian-s0         # go on with a run that was stopped
    torchrun --standalone --nproc_per_node=2 train.py --task copy  # two processes share each batch
    python eval.py out/copy-hebbian-s0                             # what the trained model does, and how

Writes into --out-dir: metrics.jsonl (one JSON object an evaluation), ckpt.pt (all that --resume needs) and best.pt (the
best model on validation data), both with the arguments that rebuild it.
"""
import argparse
import ctypes
import json
import math
import os
import signal
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from model import build_model
from plasticity import ABLATIONS, RULES
from tasks import make_task, random_generator, save

# Every task's own defaults: its sizes, then the model's, then the training's.
SMALL = dict(n_layer=2, d_model=64, d_ff=128, warmup_steps=0)
IMAGES = dict(ways=5, shots=1, queries=5, n_layer=2, d_model=128, d_ff=256, lr=1e-3, batch_size=16)
DEFAULTS = {
    "copy": dict(seq_len=5, delay=20, min_delay=None, vocab_size=10, **SMALL, steps=500, batch_size=32, lr=4e-3),
    "cue": dict(pairs=8, cues=20, **SMALL, steps=1000, batch_size=32, lr=3e-3),
    "regression": dict(dim=3, support=10, queries=50, **{**SMALL, "n_layer": 4}, steps=2500, batch_size=32, lr=4e-3),
    "cifarfs": dict(**IMAGES, steps=800, warmup_steps=2400),
    "omniglot": dict(**IMAGES, steps=1500, warmup_steps=2000),
}
SIZES = ("seq_len", "delay", "min_delay", "vocab_size", "pairs", "cues", "dim", "support", "queries", "ways", "shots")
# The Hebbian rule's large ||D_t|| keeps its eta_t near 0.0002 whatever eta_0 is. The gradient rule's comes near eta_0, and
# as much of what was written is forgotten at every step: 0.2 loses all within 80 blanks before anything is learned.
ETA0 = {"none": 0.2, "hebbian": 0.2, "gradient": 0.02}
ALPHA_INIT = {"none": 1.0, "hebbian": 8.0, "gradient": 20.0}
MAY_CHANGE = ("steps", "eval_interval", "save_interval", "device", "threads", "out_dir", "data_dir")  # with --resume
LR_WARMUP, CLIP, WEIGHT_DECAY = 50, 1.0, 0.01  # updates, gradient norm, AdamW
WARMUP_BATCH = 128  # images in an update of the encoder's warm-up


def fail(message):
    """End the program as every bad input does: one line, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or float of at least `low` (or above it) and at most `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of type {kind.__name__}") from None
        if not (low < value if above else low <= value) or not value <= high:
            limits = f"{'above' if above else 'at least'} {low}" + ("" if high == math.inf else f" and at most {high}")
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
        return value

    return parse


def add_size_flags(parser, names=SIZES):
    """The sizes of an episode; each belongs to one or two tasks."""
    said = {"seq_len": "copy: tokens to remember", "delay": "copy: blanks before the delimiter",
            "min_delay": "copy: train on delays from this to --delay, default: --delay",
            "vocab_size": "copy: tokens there are", "pairs": "cue: pairs shown", "cues": "cue: cues there are",
            "dim": "regression: inputs", "support": "regression: pairs shown",
            "queries": "regression: queries; images: queries a class", "ways": "images: classes of an episode",
            "shots": "images: labelled images a class"}
    for name in names:
        parser.add_argument("--" + name.replace("_", "-"), type=number(int, 0 if "delay" in name else 1), help=said[name])


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    whole = number(int, 1)
    parser.add_argument("--task", choices=DEFAULTS, default="copy")
    parser.add_argument("--rule", choices=RULES, default="hebbian")
    group = parser.add_argument_group("episodes (defaults by task)")
    add_size_flags(group)
    group = parser.add_argument_group("model")
    group.add_argument("--n-layer", type=whole, help="default by task")
    group.add_argument("--n-head", type=whole, default=4)
    group.add_argument("--d-model", type=whole, help="default by task")
    group.add_argument("--d-ff", type=whole, help="width of the plastic feed-forward, default by task")
    group.add_argument("--dropout", type=number(float, 0, 0.99), default=0.0)
    group.add_argument("--window", type=number(int, 0), default=0, help="attend to the last W steps, itself included; 0: all")
    group.add_argument("--block-size", type=whole, help="learned positions, default: the episode's length")
    group.add_argument("--position", choices=("learned", "rotary"), default="learned", help="absolute or relative")
    group.add_argument("--filters", type=whole, default=64, help="images: filters of the Conv-4 encoder")
    group = parser.add_argument_group("plasticity")
    group.add_argument("--alpha", choices=("full", "outer"), default="full", help="outer: of rank one, faster")
    group.add_argument("--fold", type=number(int, 0), default=32, help="steps between two folds of the fast weights; 0: never")
    group.add_argument("--alpha-init", type=number(float, -1000, 1000), help="where alpha and beta start, default by rule")
    group.add_argument("--eta0", type=number(float, 0, 1), help="largest rate of a write, default by rule")
    group.add_argument("--max-norm", type=number(float, 0), default=1.0, help="a larger write is scaled down; 0: never")
    group.add_argument("--aux-dim", type=number(int, 0), default=4, help="gradient: auxiliary outputs of the head")
    group.add_argument("--ablate", choices=ABLATIONS, default="none", help="what of plasticity is taken away, see README")
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=whole, help="updates, default by task")
    group.add_argument("--batch-size", type=whole, help="episodes an update, default by task")
    group.add_argument("--lr", type=number(float, 0, 1, above=True), help="peak learning rate, default by task")
    group.add_argument("--warmup-steps", type=number(int, 0), help="images: supervised updates of the encoder before")
    group.add_argument("--seed", type=number(int, 0), default=0)
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    group.add_argument("--threads", type=whole, default=1, help="CPU threads; more slow the many small operations down")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast on CUDA")
    group.add_argument("--out-dir", help="default: out/<task>-<rule>-s<seed>")
    group.add_argument("--data-dir", default="data", help="where the image packs are, or are downloaded to")
    group.add_argument("--eval-interval", type=whole, help="updates between evaluations, default: a tenth of --steps")
    group.add_argument("--eval-batches", type=whole, default=10, help="validation batches an evaluation")
    group.add_argument("--save-interval", type=number(float, 0), default=30.0, help="seconds between two checkpoints")
    group = group.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with the run in --out-dir, with its own arguments")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --out-dir")
    group.add_argument("--bench", action="store_true", help="time 20 updates, print one JSON line and write nothing")
    return parser


def parse_args(argv=None):
    """The arguments of a run: those given and the defaults of its task, with --resume those of the run it goes on with."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.out_dir = args.out_dir or f"out/{args.task}-{args.rule}-s{args.seed}"
    if not args.resume:
        return complete(args)
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args)))))  # None where nothing was said
    path = Path(args.out_dir) / "ckpt.pt"
    try:
        saved = load_checkpoint(path)["args"]
        told = [f"--{name.replace('_', '-')}={value}" for name, value in saved.items() if value is not None and value is not False]
    except (ValueError, AttributeError) as error:
        fail(error)
    parser.error = lambda message: fail(f"{path} is not a readable checkpoint of train.py ({message})")
    saved = complete(parser.parse_args(told))
    for name, value in given.items():
        if name in MAY_CHANGE and value is not None:
            setattr(saved, name, value)
        elif value not in (None, getattr(saved, name)) and name != "resume":
            fail(f"--{name.replace('_', '-')} {value}: the run in {args.out_dir} has {getattr(saved, name)}, and only "
                 f"{', '.join('--' + name.replace('_', '-') for name in MAY_CHANGE)} may change")
    saved.resume, saved.out_dir = True, args.out_dir  # where it lies now
    return saved


def complete(args):
    """Fill in what depends on the task, the rule and the number of updates."""
    defaults = DEFAULTS[args.task]
    for name in SIZES:
        if getattr(args, name) is not None and name not in defaults:
            fail(f"--{name.replace('_', '-')} is not a size of --task {args.task}")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.warmup_steps and "ways" not in defaults:
        fail(f"--warmup-steps warms up an image encoder, --task {args.task} has none")
    args.eta0 = ETA0[args.rule] if args.eta0 is None else args.eta0
    args.alpha_init = ALPHA_INIT[args.rule] if args.alpha_init is None else args.alpha_init
    args.eval_interval = args.eval_interval or max(1, args.steps // 10)
    return args


def load_checkpoint(path):
    """What train.py saved at `path`. Raises ValueError where there is none or it is damaged; it never runs code from it."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: name a run directory that train.py wrote")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        vars(argparse.Namespace(**state["args"]))
        return state
    except Exception as error:  # a damaged or foreign file can fail in any way; whichever it is, the file is what is wrong
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not a readable checkpoint of train.py ({reason})") from error


def pick_device(name, dtype="float32"):
    """The torch device of --device; auto takes CUDA, then MPS, then the CPU. Raises ValueError for one that is absent."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    if not there[name]:
        raise ValueError(f"--device {name}: this machine or this build of PyTorch has none, try --device cpu")
    if dtype == "bfloat16" and name != "cuda":
        raise ValueError(f"--dtype bfloat16 needs CUDA, the device is {name}")
    return torch.device(name)


def join(device):
    """Meet the other processes that torchrun started -> this one's rank, their number and its device; 0, 1 without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def sums(*values):
    """Each number summed over the processes."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.tolist()


def prepare_cpu(threads):
    """Limit PyTorch's threads, and let glibc reuse large blocks, which it maps and unmaps by default: page faults cost a third."""
    torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back


def warm_up(model, task, args, device, generator, say, signals):
    """Train the image encoder as a plain classifier of the training classes; the classifier's head is thrown away.

    True if a signal ended it. It is not saved in between: a run that is resumed from before its first update begins it again.
    """
    encoder = model.embed.encoder
    head = nn.Linear(encoder.d_out, task.n_classes("train")).to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3, weight_decay=WEIGHT_DECAY)
    for step in range(1, args.warmup_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * learning_rate(step, args.warmup_steps)
        images, classes = task.sample_images(WARMUP_BATCH, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = head(encoder(images.to(device)))
            loss = F.cross_entropy(logits.float(), classes.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if sums(len(signals))[0]:
            return True
        say(lambda: f"encoder warm-up {step}/{args.warmup_steps}  loss {loss.item():.3f}  "
            f"accuracy {(logits.argmax(-1).cpu() == classes).float().mean():.3f}")
    return False


def learning_rate(step, steps):
    """The schedule, as a share of the peak: linear warm-up, then a cosine down to 5%."""
    return min(step / LR_WARMUP, 1.0) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def update(model, task, optimizer, episodes, dtype):
    """One update on a batch of episodes -> answers, Gates and the loss. FloatingPointError, and no update, if it is not finite."""
    with torch.autocast(episodes.target.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        out, gates = model(episodes)
        loss = task.loss(out, episodes.target)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    if not (loss.isfinite() and norm.isfinite()):
        raise FloatingPointError(f"loss {loss.item()}, gradient norm {norm.item()}")
    optimizer.step()
    return out.detach(), gates, loss.item()


def bench(args, task, model, device):
    """3 updates to warm up, 20 timed ones, then 5 batches evaluated -> one JSON line. Nothing is written."""
    import resource  # here, as Windows has none
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    generator = random_generator(args.seed, "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=WEIGHT_DECAY)

    def seconds(work):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def learn():
        update(model, task, optimizer, task.sample("train", args.batch_size, generator).to(device), args.dtype)

    with FlopCounterMode(display=False) as counter:  # of every matrix product and convolution; elementwise work is not in it
        learn()
    gflop = counter.get_total_flops() / 1e9
    for _ in range(2):
        learn()
    times = [seconds(learn) for _ in range(20)]
    median = statistics.median(times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    evaluation = statistics.median(seconds(lambda: evaluate(model, task, "val", args.batch_size, args.batch_size, generator,
                                                            device, args.dtype)) for _ in range(5))
    row = dict(task=args.task, rule=args.rule, alpha=args.alpha, fold=args.fold, batch_size=args.batch_size,
               context_steps=task.context_length, device=str(device), threads=args.threads, seconds_per_update=median,
               fastest=min(times), slowest=max(times), sequences_per_second=args.batch_size / median,
               context_steps_per_second=args.batch_size * task.context_length / median, peak_rss_bytes=peak,
               peak_cuda_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
               gflop_per_update=gflop, gflop_per_second=gflop / median, seconds_per_evaluation=evaluation)
    print(json.dumps(row))


@torch.no_grad()
def evaluate(model, task, split, n_episodes, batch_size, generator, device, dtype="float32"):
    """Read n_episodes of a split and score them -> dict.

    loss, score             means over the episodes
    scores                  (n_episodes,) float64, one an episode
    eta, write_norm         mean eta_t and eta_t * ||D_t||, None without plasticity
    gates                   eta, d_norm and write of each step, lists of T means; None without plasticity
    """
    was_training = model.training
    model.eval()
    loss, scores, etas, d_norms = 0.0, [], [], []
    for start in range(0, n_episodes, batch_size):
        episodes = task.sample(split, min(batch_size, n_episodes - start), generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            out, gates = model(episodes)
        loss += task.loss(out, episodes.target).item() * len(out) / n_episodes
        scores.append(task.score(out, episodes.target))
        if gates is not None:
            etas.append(gates.eta.cpu())
            d_norms.append(gates.d_norm.cpu())
    model.train(was_training)
    result = dict(loss=loss, scores=torch.cat(scores), eta=None, write_norm=None, gates=None)
    result["score"] = result["scores"].mean().item()
    if etas:
        eta, d_norm = torch.cat(etas).double(), torch.cat(d_norms).double()  # (n_episodes, T) each
        write = eta * d_norm
        result.update(eta=eta.mean().item(), write_norm=write.mean().item(),
                      gates={"eta": eta.mean(0).tolist(), "d_norm": d_norm.mean(0).tolist(), "write": write.mean(0).tolist()})
    return result


def say_every(seconds):
    """A function that prints the line it is given (as a function), but at most one every few seconds."""
    last = -math.inf

    def say(line):
        nonlocal last
        if time.time() - last >= seconds:
            print(line(), flush=True)
            last = time.time()

    return say


def restore(state, out_dir, model, optimizer, generator):
    """Put a checkpoint back, cut metrics.jsonl back to what it knew -> its progress. Raises ValueError where one is damaged."""
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]["state"]})
        generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])  # dropout
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])
        run = argparse.Namespace(step=int(state["step"]), rows=int(state["rows"]), seconds=float(state["seconds"]),
                                 losses=[float(loss) for loss in state["losses"]],
                                 best=None if state["best"] is None else float(state["best"]))
        moments = {p: {name: value.shape for name, value in of.items()} for p, of in optimizer.state.items()}
        if moments != {p: {"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape} for p in model.parameters()
                       if run.step and p.requires_grad}:
            raise ValueError("the optimizer's state is not that of this model")
    except Exception as error:  # as in load_checkpoint
        reason = str(error).strip().split("\n")[-1].strip()
        raise ValueError(f"{out_dir / 'ckpt.pt'} is not a whole checkpoint of train.py ({reason})") from error
    path = out_dir / "metrics.jsonl"
    try:
        rows = path.read_bytes().splitlines(keepends=True)[:run.rows]
        if len(rows) < run.rows or not all(row.endswith(b"\n") and "val_metric" in json.loads(row) for row in rows):
            raise ValueError(f"{run.rows} whole rows are wanted")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the log that belongs to ckpt.pt ({error}): --overwrite begins again") from error
    os.truncate(path, sum(map(len, rows)))  # by every process, to the same length
    return run


def train(args, task, model, device, state=None, rank=0, world=1):
    """The one loop, for every task and rule: update, and now and then say, evaluate and save.

    Each of `world` processes takes its share of every batch and all step by the mean gradient; the one of rank 0 speaks and writes.

    `state`, a checkpoint, goes on where it was taken: what follows is what would have followed. Ctrl-C and SIGTERM finish the
    update, save, and exit with 130 or 143. Raises FloatingPointError where the loss is no longer finite, OSError where nothing
    can be written; ckpt.pt and best.pt are then the last good ones.
    """
    out_dir = Path(args.out_dir)
    generator = random_generator(args.seed, "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=WEIGHT_DECAY)
    # losses since the last evaluation; the rows of metrics.jsonl
    run = argparse.Namespace(step=0, rows=0, seconds=0.0, losses=[], best=None)
    if state:
        run = restore(state, out_dir, model, optimizer, generator)
    kept = {name: value for name, value in vars(args).items() if name not in ("resume", "overwrite", "bench")}
    say, began, saved, busy, updates = say_every(math.inf if rank else 5), time.time() - run.seconds, -math.inf, 0.0, 0
    signals, stopped = [], False

    def checkpoint():
        nonlocal saved
        if rank:
            return
        run.seconds = time.time() - began
        save(out_dir / "ckpt.pt", dict(vars(run), args=kept, model=model.state_dict(), optimizer=optimizer.state_dict(),
                                       generator=generator.get_state(), random=torch.get_rng_state(),
                                       cuda=torch.cuda.get_rng_state_all() if device.type == "cuda" else []))
        saved = time.time()

    def tell(line):
        if not rank:
            print(line, flush=True)

    def stop(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # asked again, it ends at once

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with open(os.devnull if rank else out_dir / "metrics.jsonl", "a") as metrics:
            if not run.step:
                checkpoint()
                if args.warmup_steps:
                    stopped = warm_up(model, task, args, device, generator, say, signals)
                    saved = -math.inf  # worth a checkpoint after the first update
            if rank:
                torch.manual_seed(args.seed + 1000003 * rank + run.step)  # a dropout of its own
            shared = DistributedDataParallel(model) if world > 1 else model
            while run.step < args.steps and not stopped:
                step, started = run.step + 1, time.time()
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * learning_rate(step, args.steps)
                episodes = task.sample("train", args.batch_size, generator).share(rank, world).to(device)
                try:
                    out, gates, loss = update(shared, task, optimizer, episodes, args.dtype)
                except FloatingPointError as error:
                    raise FloatingPointError(f"update {step}, rule {args.rule}: {error}") from error
                loss, stopped = sums(loss / world, len(signals))  # any of them may have got the signal
                run.step = step
                run.losses.append(loss)
                busy, updates = busy + time.time() - started, updates + 1
                rate = args.batch_size * updates / busy
                say(lambda: f"step {step}/{args.steps}  loss {loss:.4f}  {task.metric} "
                    f"{task.score(out, episodes.target).mean():.4f}" + (f"  eta {gates.eta.mean():.4f}" if gates else "")
                    + f"  {rate:.0f} sequences/s  {(args.steps - step) * args.batch_size / rate:.0f} s left")
                if step % args.eval_interval == 0 or step == args.steps:
                    # the same validation episodes each time, so that the best is the best on equal terms
                    result = evaluate(model, task, "val", args.eval_batches * args.batch_size, args.batch_size,
                                      random_generator(args.seed, "val"), device, args.dtype)
                    row = dict(step=step, train_loss=sum(run.losses) / len(run.losses), val_loss=result["loss"],
                               val_metric=result["score"], metric=task.metric, eta=result["eta"],
                               write_norm=result["write_norm"], sequences_per_second=rate, seconds=time.time() - began)
                    metrics.write(json.dumps(row) + "\n")
                    metrics.flush()
                    run.rows, run.losses, busy, updates = run.rows + 1, [], 0.0, 0
                    if run.best is None or (result["score"] > run.best if task.higher_is_better else result["score"] < run.best):
                        run.best = result["score"]
                        if not rank:
                            save(out_dir / "best.pt", dict(args=kept, model=model.state_dict(), step=step, val_metric=run.best))
                    tell(f"step {step}/{args.steps}  validation loss {row['val_loss']:.4f}  {task.metric} "
                         f"{row['val_metric']:.4f}  after {row['seconds']:.0f} s")
                if time.time() - saved >= args.save_interval:
                    checkpoint()
            if run.step:
                checkpoint()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if run.step < args.steps:
        tell(f"stopped after update {run.step}; to go on: python train.py --resume --out-dir {out_dir}")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])
    if run.best is not None:
        tell(f"best validation {task.metric} {run.best:.4f}; now: python eval.py {out_dir}")


def main(argv=None):
    args = parse_args(argv)
    prepare_cpu(args.threads)
    out_dir = Path(args.out_dir)
    try:  # all that can be wrong with the arguments, before anything is written
        device = pick_device(args.device, args.dtype)
        torch.manual_seed(args.seed)
        task = make_task(args)
        model = build_model(args, task).to(device)
        args.block_size = model.block_size  # eval.py may try longer episodes, the positions stay those trained
        if args.bench:
            return bench(args, task, model, device)
        there = [name for name in ("ckpt.pt", "best.pt", "metrics.jsonl") if (out_dir / name).exists()]
        if there and not (args.resume or args.overwrite):
            raise ValueError(f"--out-dir {out_dir} has the {there[0]} of a run: --resume goes on with it, --overwrite replaces it")
        if args.batch_size % int(os.environ.get("WORLD_SIZE", 1)):
            raise ValueError(f"--batch-size {args.batch_size}: must be a multiple of the {os.environ['WORLD_SIZE']} processes")
        rank, world, device = join(device)
        state = load_checkpoint(out_dir / "ckpt.pt") if args.resume else None
        if world > 1:
            dist.barrier()  # nobody writes before all have looked
        out_dir.mkdir(parents=True, exist_ok=True)
        for path in [] if rank else [*out_dir.glob("*.pt.*.tmp"), *(out_dir / name for name in there if args.overwrite)]:
            path.unlink()  # half a checkpoint, where a run was killed; the run that is replaced
        if not rank:
            print(f"{args.task} with the rule {args.rule}: {sum(p.numel() for p in model.parameters()):,} parameters, "
                  f"on {device}, into {out_dir}", flush=True)
        train(args, task, model.to(device), device, state, rank, world)
    except FloatingPointError as error:
        clip = "" if args.rule == "none" or 0 < args.max_norm <= 1 else "--max-norm 1, "
        fail(f"{error}: try {clip}a lower --lr, --eta0 or --alpha-init; what {out_dir} holds is from before")
    except (ValueError, OSError) as error:
        fail(f"--out-dir {out_dir}: {error}" if getattr(error, "filename", "") is None else error)  # a full disk names no file
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
