"""The five tasks of arXiv 2510.21908, each a source of batches of episodes.

A task draws B episodes of a split by `sample(split, batch_size, generator)`, has a `loss(out,
target)` to train on and a `score(out, target)` of each answer. It says of itself
    kind         token, vector, image: with vocab_size, n_features, or image_shape and n_classes
    n_out        numbers in an answer; metric, perfect: what its score is called, and the best
    step_names   what each step of its context is; chance: the score of guessing
Its fields are sizes; `shown(episodes)`, if it has that: which step showed what is asked, (B, L)."""
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from torch.nn import functional as F

SPLITS = ("train", "val", "test")  # apart in random numbers; copy: in sequences, images: in classes

class Episodes(NamedTuple):
    """B episodes: (x, y) pairs, then x of queries. In copy support_x is all that is shown."""
    support_x: torch.Tensor  # (B, T) tokens, (B, T, F) or images (B, T, channels, size, size)
    support_y: torch.Tensor  # (B, T, 1) values, or (B, T) labels of images; None in copy
    query_x: torch.Tensor  # (B, Q, F) or (B, Q, channels, size, size) uint8; None in copy
    target: torch.Tensor  # (B, L) tokens of the last L steps, (B, Q, 1) values or (B, Q) labels

    def to(self, device, rank=0, world=1):  # of `world` processes, the share of this one
        return Episodes(*(None if t is None else t[rank::world].to(device) for t in self))

def random_generator(seed, split):
    """A generator for each seed and split: training never draws a test episode's numbers."""
    return torch.Generator().manual_seed(len(SPLITS) * seed + SPLITS.index(split))

def shuffle(generator, *tensors):
    """Tensors (B, N, ...) -> the same with each row's N in a random order, one for all tensors."""
    order = torch.rand(tensors[0].shape[:2], generator=generator).argsort(dim=1)  # (B, N)
    return [of[torch.arange(len(of))[:, None], order] for of in tensors]

class Classification:
    """Cross entropy and accuracy of the last L answers: out (B, >= L, n_out), target (B, L)."""
    metric, perfect = "accuracy", 1.0

    def loss(self, out, target):
        return F.cross_entropy(out[:, -target.size(1):].flatten(0, 1), target.flatten())

    def score(self, out, target):  # (B, L), on the CPU, as MPS has no double precision
        return (out[:, -target.size(1):].argmax(-1) == target).cpu().double()

class SquaredError:
    """Mean squared error of the answers: out (B, Q, 1), target (B, Q, 1)."""
    metric, perfect, kind, n_out, constant = "mse", 0.0, "vector", 1, 1.0

    def loss(self, out, target):
        return F.mse_loss(out, target)

    def score(self, out, target):  # (B, Q)
        return (out - target).cpu().double().square().squeeze(2)

@dataclass
class Copy(Classification):
    """Tokens of 1..V-2, `delay` blanks (0), a delimiter (V-1), a blank to recall each token at."""
    kind = "token"
    seq_len: Annotated[int, "tokens to remember", 2] = 5
    delay: Annotated[int, "blanks before the delimiter", 0] = 20
    vocab_size: Annotated[int, "tokens there are, blank and delimiter included", 5] = 10
    min_delay: Annotated[int, "train on delays from this to --delay, not on that alone", 0] = None
    distractors: Annotated[int, "1: random tokens instead of the blanks", 0, 1] = 0

    def __post_init__(self):
        if self.min_delay is not None and self.min_delay > self.delay:
            raise ValueError(f"--min-delay {self.min_delay} is more than --delay {self.delay}")
        n, self.n_out, self.chance = self.seq_len, self.vocab_size, 1 / (self.vocab_size - 2)
        self.step_names = ["item"] * n + ["blank"] * self.delay + ["delimiter"] + ["recall"] * n

    def sample(self, split, batch_size, generator):
        B, L, V, delay = batch_size, self.seq_len, self.vocab_size, self.delay
        items, wrong = torch.zeros(B, L, dtype=torch.long), torch.ones(B, dtype=torch.bool)
        while wrong.any():
            items[wrong] = torch.randint(1, V - 1, (wrong.sum(), L), generator=generator)
            # a sequence's sum modulo 5 says its split: 0, 1 and 2 train, 3 validates, 4 tests
            wrong = (items.sum(1) % 5 - 2).clamp(min=0) != SPLITS.index(split)  # (B)
        if split == "train" and self.min_delay is not None and self.min_delay < delay:
            delay = torch.randint(self.min_delay, delay + 1, (), generator=generator).item()
        context = F.pad(items, (0, delay + 1 + L))  # (B, T)
        if self.distractors:
            context[:, L:L + delay] = torch.randint(1, V - 1, (B, delay), generator=generator)
        context[:, L + delay] = V - 1
        return Episodes(context, None, None, items)

    def shown(self, episodes):
        return torch.arange(self.seq_len).expand_as(episodes.target)

@dataclass
class Cue(SquaredError):
    """Pairs of a one-hot cue and a reward in [0, 1]; then each cue again, in random order."""
    pairs: Annotated[int, "pairs of a cue and its reward", 1] = 8
    cues: Annotated[int, "cues there are", 1] = 20
    noise: Annotated[int, "pairs among them that nobody asks for, as one more feature says", 0] = 0

    def __post_init__(self):
        if self.pairs > self.cues:
            raise ValueError(f"--pairs {self.pairs} is more than the --cues {self.cues} there are")
        self.n_features, self.chance = self.cues + (self.noise > 0), 1 / 12
        self.step_names = ["pair"] * (self.pairs + self.noise)

    def sample(self, split, batch_size, generator):
        B, N, T = batch_size, self.pairs, self.pairs + self.noise
        cues = torch.rand(B, self.cues, generator=generator).argsort(dim=1)[:, :N]  # all different
        noise = torch.randint(self.cues, (B, self.noise), generator=generator)
        reward = torch.rand(B, T, 1, generator=generator)
        x = torch.eye(self.cues, self.n_features)[torch.cat([cues, noise], dim=1)]  # (B, T, F)
        x[:, :N, self.cues:] = 1.0  # the feature more that there is with noise
        query_x, target = shuffle(generator, x[:, :N], reward[:, :N])  # (B, N, F), (B, N, 1)
        if self.noise:
            x, reward = shuffle(generator, x, reward)
        return Episodes(x, reward, query_x, target)

    def shown(self, episodes):
        return (episodes.query_x @ episodes.support_x.mT).argmax(-1)

@dataclass
class Regression(SquaredError):
    """y = w·x + b with w, b and x ~ N(0, 1), w and b new in each episode."""
    dim: Annotated[int, "inputs", 1] = 3
    support: Annotated[int, "pairs of x and y shown", 1] = 10
    queries: Annotated[int, "x asked for their y", 1] = 10

    def __post_init__(self):
        self.n_features, self.chance, self.constant = self.dim, self.dim + 1.0, 4.0
        self.step_names = ["pair"] * self.support

    def sample(self, split, batch_size, generator):
        B, T = batch_size, self.support
        x = torch.randn(B, T + self.queries, self.dim, generator=generator)  # (B, T + Q, dim)
        w = torch.randn(B, self.dim, 1, generator=generator)
        y = x @ w + torch.randn(B, 1, 1, generator=generator)  # + b, (B, T + Q, 1)
        return Episodes(x[:, :T], y[:, :T], x[:, T:], y[:, T:])

@dataclass
class FewShot(Classification):
    """`shots` labelled images of each of `ways` classes, then others, whose labels are asked."""
    kind = "image"
    task: str  # cifarfs or omniglot
    data_dir: str
    ways: Annotated[int, "classes of an episode", 1] = 5
    shots: Annotated[int, "labelled images of each class", 1] = 1
    queries: Annotated[int, "images asked for their label, of each class; regression: x", 1] = 5
    turned: Annotated[int, "Omniglot, 1: quarter-turns are classes not in training alone", 0, 1] = 0
    alphabet: Annotated[int, "Omniglot, 1: one alphabet has all classes of an episode", 0, 1] = 0

    def __post_init__(self):
        self.images, names, ids = load_pack(self.data_dir, self.task)
        if self.turned and self.task == "cifarfs":
            raise ValueError("--turned 1: only Omniglot's classes can be turned")
        if self.task == "omniglot":  # in training quarter-turns are always classes
            self.images = torch.cat([self.images.rot90(k, (-2, -1)) for k in range(4)])
            for split in SPLITS if self.turned else ["train"]:  # k turns make class i + k * all
                ids[split] = torch.cat([ids[split] + k * len(names) for k in range(4)])
        n_images, self.image_shape = self.images.size(1), self.images.shape[2:4]  # channels, size
        # an episode's classes are those of one group: of an alphabet, or of all
        names = [name.split("/")[0] * self.alphabet for name in names] * 4
        groups = torch.tensor([names.index(name) for name in names])  # of each class
        self.group = {split: groups[of] for split, of in ids.items()}
        fewest = min(of.unique(return_counts=True)[1].min() for of in self.group.values())
        if self.ways > fewest or self.shots + self.queries > n_images:
            raise ValueError(f"--ways {self.ways}, --alphabet {self.alphabet}: {fewest} classes; "
                             f"--shots {self.shots}, --queries {self.queries}: {n_images} images")
        self.n_out, self.chance, self.embedded = self.ways, 1 / self.ways, {}
        self.step_names = ["image"] * self.ways * self.shots
        self.class_ids, self.n_classes = ids, len(ids["train"]) * (self.task == "cifarfs")

    def take(self, split, classes, index, generator):
        """Images `index` of `classes`, both (*) -> (*, channels, size, size); embedded: (*, F)."""
        if split in self.embedded:
            return self.embedded[split][classes, index]
        images = self.images[self.class_ids[split][classes], index]
        change = distort if self.task == "omniglot" else shift
        return change(images, generator) if split == "train" else images

    @torch.no_grad()
    def embed(self, split, encoder, device):
        """From now on show the mean of what `encoder` says of an image and its mirror image."""
        if self.task == "cifarfs":  # Omniglot's images are distorted anew each time
            images = self.images[self.class_ids[split]].to(device)
            means = [(encoder(of) + encoder(of.flip(-1))) / 2 for of in images]
            self.embedded[split] = torch.stack(means).cpu()  # (classes, images, F)

    def sample(self, split, batch_size, generator, ways=None, shots=None, queries=None):
        B, N, K, Q = batch_size, ways or self.ways, shots or self.shots, queries or self.queries
        group = self.group[split]
        rank = torch.rand(B, len(group), generator=generator)  # (B, classes)
        rank += group != group[rank.argmin(dim=1)][:, None]  # other groups than the first's: last
        # where all classes are shown, each keeps its label
        classes = rank.argsort(dim=1)[:, :N] if N < len(group) else torch.arange(N).expand(B, N)
        index = torch.rand(B, N, self.images.size(1), generator=generator).argsort(dim=2)
        parts, labels = [], torch.arange(N)[:, None]
        for number in (index[..., :K], index[..., K:K + Q]):  # of shots and of queries, (B, N, .)
            part = [of.expand_as(number).flatten(1) for of in (classes[..., None], number, labels)]
            parts.append(shuffle(generator, *part))  # classes, numbers and labels, (B, N * .) each
        shown, asked = ((self.take(split, *of, generator), label) for *of, label in parts)
        return Episodes(*shown, *asked)

# Each task, and its defaults: as many updates as every seed needs to learn, with a margin.
IMAGES = dict(batch_size=16, lr=1e-3, d_model=128, d_ff=256)
TASKS = {"copy": (Copy, dict(steps=140, lr=8e-3)),
         "cue": (Cue, dict(steps=400, lr=3e-3, alpha_init=20.0)),
         "regression": (Regression, dict(steps=2000, lr=2e-3, n_layer=4, queries=50)),
         "cifarfs": (FewShot, dict(IMAGES, steps=1000, pretrain_steps=7000)),
         "omniglot": (FewShot, dict(IMAGES, steps=2000, pretrain_steps=3000))}

def make_task(args):
    """The task of `args`, a dict with its name and sizes. ValueError where they do not fit."""
    task, _ = TASKS[args["task"]]
    return task(**{field.name: args[field.name] for field in fields(task)})

@torch.no_grad()
def show(model, task, split, device, n=3):
    """n episodes as lines: what is shown, right, answered, and answered with nothing written."""
    episodes, rule = task.sample(split, n, random_generator(0, split)), model.plasticity
    shown = episodes.support_x if episodes.support_y is None else episodes.support_y
    lines, eta0 = {"shown": shown, "right": episodes.target}, rule.eta0
    for name in ("answered", "silenced") if rule.rule != "none" else ("answered",):
        rule.eta0 = 0.0 if name == "silenced" else eta0
        out = model.eval()(episodes.to(device))[0][:, -episodes.target.size(1):].cpu()
        lines[name] = out if episodes.target.is_floating_point() else out.argmax(-1)
    rule.eta0 = eta0
    for b in range(n):
        for name, values in lines.items():
            words = " ".join(str(round(value, 2)) for value in values[b].flatten().tolist())
            yield f"  {name:8}  {words[:88]}"

def distort(images, generator):
    """Images (*, channels, size, size) uint8, each turned, scaled and shifted a little."""
    flat = images.flatten(0, -4)  # (N, channels, size, size)
    u = torch.rand(4, flat.size(0), generator=generator) * 2 - 1  # (4, N) in [-1, 1]
    angle, scale, (right, down) = torch.deg2rad(10 * u[0]), 1 + 0.15 * u[1], 0.15 * u[2:]
    cos, sin = scale * angle.cos(), scale * angle.sin()  # (N)
    theta = torch.stack([cos, -sin, right, sin, cos, down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, flat.shape, align_corners=False)  # from where, (N, size, size, 2)
    return F.grid_sample(flat.float(), grid, align_corners=False).round().byte().view_as(images)

def shift(images, generator):
    """Images (*, channels, size, size) uint8, half mirrored, each moved by <= 2 pixels on black."""
    x, size = images.flatten(0, -4), images.size(-1)  # (N, channels, size, size)
    x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(-1), x)
    x = F.pad(x, (2, 2, 2, 2)).unfold(2, size, 1).unfold(3, size, 1)  # (N, channels, 5, 5, ...)
    down, right = torch.randint(5, (2, len(x)), generator=generator)  # (N) each
    return x[torch.arange(len(x)), :, down, right].view_as(images)

# CIFAR-100's class-disjoint split by Bertinetto et al., ICLR 2019: all other classes train.
CIFARFS_VAL = """beaver otter flatfish shark lamp television beetle butterfly sea camel cattle
    crab crocodile maple_tree motorcycle tractor""".split()
CIFARFS_TEST = """whale poppy rose sweet_pepper telephone bed table wardrobe leopard plain
    chimpanzee fox snail worm baby man woman bicycle pickup_truck rocket""".split()
# Omniglot: the background set trains, its last 5 alphabets validate, the evaluation set tests
OMNIGLOT = range(813), range(813, 964), range(964, 1623)
PACKS = {"cifarfs": ("cifar100.pt", (100, 600, 3, 32, 32)),  # classes, images, channels, size, size
         "omniglot": ("omniglot.pt", (1623, 20, 1, 28, 28))}

def load_pack(data_dir, name):
    """Images (classes, images, channels, size, size) uint8, classes' names, rows of each split."""
    path, shape = Path(data_dir, PACKS[name][0]), PACKS[name][1]
    try:
        if not path.exists():
            print(f"{path} is not there: downloading and packing {name}, once", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as root:  # half a download stays here
                pack = pack_cifar100(root) if name == "cifarfs" else pack_omniglot(root)
                torch.save(pack, f"{root}/pack")
                Path(root, "pack").replace(path)
        images, classes = torch.load(path, weights_only=True, mmap=True).values()
        if images.dtype != torch.uint8 or images.shape != shape or len(classes) != shape[0]:
            raise ValueError(f"not {shape} images in bytes")
        rows = OMNIGLOT
        if name == "cifarfs":
            train = [c for c in classes if c not in CIFARFS_VAL + CIFARFS_TEST]
            rows = [[classes.index(c) for c in part] for part in (train, CIFARFS_VAL, CIFARFS_TEST)]
        return images, classes, dict(zip(SPLITS, map(torch.tensor, rows)))
    except Exception as error:  # a download or a damaged file can fail in any way
        raise ValueError(f"no {name} in {path} ({error!r}): check the network and --data-dir, and "
                         "delete the file if it is there, to download it again") from error

def pack_cifar100(root):
    from torchvision.datasets import CIFAR100
    train, test = (CIFAR100(root, train=part, download=True) for part in (True, False))
    images = torch.cat([torch.from_numpy(of.data) for of in (train, test)]).permute(0, 3, 1, 2)
    order = torch.tensor(train.targets + test.targets).argsort(stable=True)  # by class, train first
    return {"images": images[order].contiguous().unflatten(0, (100, 600)), "classes": train.classes}

def pack_omniglot(root):
    from PIL import Image, ImageOps
    from torchvision.datasets import Omniglot
    from torchvision.transforms.functional import pil_to_tensor
    images, classes = [], []
    for background in (True, False):
        folder = Path(Omniglot(root, background=background, download=True).target_folder)
        for file in sorted(folder.glob("*/*/*.png")):  # Alphabet/characterNN/..., 20 of each
            scan = ImageOps.invert(Image.open(file).convert("L"))  # ink is 255
            images.append(pil_to_tensor(scan.resize((28, 28), Image.BILINEAR)))
            classes.append("/".join(file.parts[-3:-1]))
    return {"images": torch.stack(images).unflatten(0, (-1, 20)), "classes": classes[::20]}
