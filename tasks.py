"""The five tasks of arXiv 2510.21908, each a source of episodes.

An episode shows a context step by step, then asks. A task is a dataclass whose fields
are the sizes of an episode, limited to 10,000 steps. sample(split, batch_size, generator)
draws episodes, loss(out, target) trains a model, score(out, target) rates answers. And:

    kind         "token", "vector" or "image"; each has more sizes, for model.Embed
    n_out        number of outputs per answer
    step_names   what each step of the context is
    metric       the name of the score; `chance`, the score of a guess; `perfect`, the best
    asked_steps  only in cue: which step showed the pair that a query asks for
"""
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from model import setting

# Splits differ in their sequences (copying), classes (images) and random numbers.
SPLITS = ("train", "val", "test")

class Episodes(NamedTuple):
    """B episodes: pairs (x, y), then queries x. Copying has only support_x, target."""
    support_x: torch.Tensor  # (B, T) tokens, (B, T, E) features or (B, T, ...) images
    support_y: torch.Tensor  # (B, T, 1) values or (B, T) labels; None in copying
    query_x: torch.Tensor  # (B, Q, E) or (B, Q, ...); None in copying
    target: torch.Tensor  # (B, Q, 1) values, (B, Q) labels or (B, L) last tokens

    def to(self, device, rank=0, world=1):  # the share of process `rank` of `world`
        return Episodes(*(x if x is None else x[rank::world].to(device) for x in self))

def random_generator(seed, split):
    """A generator per seed and split: no split draws another one's random numbers."""
    return torch.Generator().manual_seed(len(SPLITS) * seed + SPLITS.index(split))

class Classification:
    """The last L outputs are the answers: out (B, >= L, n_out), target (B, L)."""
    metric = "accuracy"
    perfect = 1.0

    def loss(self, out, target):
        out = out[:, -target.size(1):]  # (B, L, n_out)
        return F.cross_entropy(out.flatten(0, 1), target.flatten())

    def score(self, out, target):
        out = out[:, -target.size(1):]
        return (out.argmax(-1) == target).double()  # (B, L)

class SquaredError:
    """Every output is an answer: out (B, Q, 1), target (B, Q, 1)."""
    kind = "vector"
    n_out = 1
    metric = "mse"
    perfect = 0.0
    bias_scale = 1.0  # model.Embed says what for

    def loss(self, out, target):
        return F.mse_loss(out, target)

    def score(self, out, target):
        return (out - target).double().square().squeeze(2)  # (B, Q)

@dataclass
class Copy(Classification):
    """Tokens, then blanks (0), then a delimiter (V - 1), after which to recall them.

    step    0 1 2 3 4 | 5 .. 24 | 25 | 26 27 28 29 30
    shown   4 8 3 2 1 | 0 ..  0 |  9 |  0  0  0  0  0
    answer            |         |    |  4  8  3  2  1

    A recall comes 26 steps after its item; two layers with a window of 8 see 14 back.
    """
    kind = "token"
    seq_len: int = setting(5, "tokens to remember", 2, 1000)
    delay: int = setting(20, "blanks before the delimiter", 0, 7999)
    vocab_size: int = setting(10, "tokens, blank and delimiter included", 5, 10_000)

    def __post_init__(self):
        self.n_out = self.vocab_size
        self.chance = 1 / (self.vocab_size - 2)
        self.step_names = ["item"] * self.seq_len + ["blank"] * self.delay
        self.step_names += ["delimiter"] + ["recall"] * self.seq_len

    def sample(self, split, batch_size, generator):
        split_of_sum = torch.tensor([0, 0, 0, 1, 2])  # index in SPLITS, by sum % 5
        items = torch.zeros(batch_size, self.seq_len, dtype=torch.long)  # (B, L)
        wrong = torch.ones(batch_size, dtype=torch.bool)  # (B): of another split
        while wrong.any():
            size = (wrong.sum(), self.seq_len)
            items[wrong] = torch.randint(1, self.vocab_size - 1, size, generator=generator)
            wrong = split_of_sum[items.sum(1) % 5] != SPLITS.index(split)

        context = F.pad(items, (0, self.delay + 1 + self.seq_len))  # (B, T)
        context[:, self.seq_len + self.delay] = self.vocab_size - 1
        return Episodes(context, None, None, items)

@dataclass
class Cue(SquaredError):
    """Pairs of a one-hot cue and a reward in [0, 1]; then their cues, in random order.

    step      0     1    ..   7    | queries
    cue      13     4    ..  19    |   4    19   ..   13
    reward  0.31  0.84   .. 0.07   |   ?     ?   ..    ?
    answer                         | 0.84  0.07  ..  0.31

    With `noise`, other pairs come among these; one more feature marks those that count.
    """
    pairs: int = setting(8, "pairs of a cue and its reward", 1, 2500)
    cues: int = setting(20, "different cues", 1, 10_000)
    noise: int = setting(0, "more pairs, of any cues, which are never asked for", 0, 5000)

    def __post_init__(self):
        if self.pairs > self.cues:
            raise ValueError(f"--pairs {self.pairs} is over --cues {self.cues}")
        self.n_features = self.cues + 1 if self.noise else self.cues
        self.chance = 1 / 12  # the variance of a reward: the error of answering 0.5
        self.step_names = ["pair"] * (self.pairs + self.noise)

    def sample(self, split, batch_size, generator):
        N = self.pairs
        cues = torch.rand(batch_size, self.cues, generator=generator).argsort(dim=1)
        noise = torch.randint(self.cues, (batch_size, self.noise), generator=generator)
        cues = torch.cat([cues[:, :N], noise], dim=1)  # (B, T)
        reward = torch.rand(*cues.shape, 1, generator=generator)  # (B, T, 1)

        x = torch.eye(self.cues, self.n_features)[cues]  # (B, T, E)
        x[:, :N, self.cues:] = 1.0  # With noise, this feature marks what counts.
        query_x, target = shuffle(generator, x[:, :N], reward[:, :N])  # (B, N, ...)
        if self.noise:
            x, reward = shuffle(generator, x, reward)
        return Episodes(x, reward, query_x, target)

    def asked_steps(self, episodes):  # which step showed the pair that is asked for
        return (episodes.query_x @ episodes.support_x.mT).argmax(-1)  # (B, Q)

@dataclass
class Regression(SquaredError):
    """y = w·x + b with new w and b in every episode. w, b and x are drawn from N(0, 1).

    step     0    1   ..   9   | queries
    x       x_0  x_1  ..  x_9  |  x_10  x_11  ..
    y       y_0  y_1  ..  y_9  |    ?     ?   ..
    answer                     |  y_10  y_11  ..
    """
    dim: int = setting(3, "inputs", 1, 10_000)
    support: int = setting(10, "pairs of x and y shown", 1, 5000)
    queries: int = setting(10, "queries per episode", 1, 5000)
    bias_scale = 4.0

    def __post_init__(self):
        self.n_features = self.dim
        self.chance = self.dim + 1.0  # the variance of y: the error of answering 0
        self.step_names = ["pair"] * self.support

    def sample(self, split, batch_size, generator):
        T = self.support
        x = torch.randn(batch_size, T + self.queries, self.dim, generator=generator)
        w = torch.randn(batch_size, self.dim, 1, generator=generator)
        b = torch.randn(batch_size, 1, 1, generator=generator)
        y = x @ w + b  # (B, T + Q, 1)
        return Episodes(x[:, :T], y[:, :T], x[:, T:], y[:, T:])

@dataclass
class FewShot(Classification):
    """`shots` labelled images of each of `ways` classes; then others of these classes.

    step      0     1     2     3     4  | queries
    image    fox   bed  rose  worm  baby |  bed'   fox'  ..
    label     2     0     1     4     3  |    ?      ?   ..
    answer                               |    0      2   ..

    Splits have different classes. Each episode draws classes and numbers them anew.
    With `merge` 2, a label stands for two classes, so it shows 2 * `shots` images.
    """
    kind = "image"
    task: str  # "cifarfs" or "omniglot"
    data_dir: str
    ways: int = setting(5, "classes per episode", 1, 100)
    shots: int = setting(1, "labelled images per class", 1, 50)
    queries: int = setting(5, "queries per class (in regression: per episode)", 1, 5000)
    merge: int = setting(1, "classes that share a label", 1, 50)

    def __post_init__(self):
        self.images, self.class_ids = load_pack(self.data_dir, self.task)
        n_images = self.images.size(1)
        n_classes = min(len(ids) for ids in self.class_ids.values())
        if self.ways > n_classes or self.shots + self.queries > n_images:
            raise ValueError(f"--ways {self.ways} of {n_classes} classes, --shots {self.shots} "
                             f"and --queries {self.queries} of {n_images} images")
        if self.ways % self.merge:
            raise ValueError(f"--merge {self.merge} does not divide --ways {self.ways}")
        self.image_shape = self.images.shape[2:4]  # channels, size
        self.n_out = self.ways // self.merge
        self.chance = 1 / self.n_out
        self.step_names = ["image"] * (self.ways * self.shots)
        # On CIFAR-FS, pretraining also learns to name the training classes.
        self.n_classes = len(self.class_ids["train"]) if self.task == "cifarfs" else 0
        self.features = {}  # split: (classes, images, E), after encode_images()

    def sample(self, split, batch_size, generator, sizes=None):
        """Episodes of `sizes` (ways, shots, queries), or of the task's own."""
        N, K, Q = sizes or (self.ways, self.shots, self.queries)
        n_classes = len(self.class_ids[split])
        classes = torch.rand(batch_size, n_classes, generator=generator).argsort(dim=1)
        if sizes and N == n_classes:  # Pretraining on all classes names them: labels stay.
            classes = torch.arange(N).expand(batch_size, N)
        n_images = self.images.size(1)
        images = torch.rand(batch_size, N, n_images, generator=generator).argsort(dim=2)
        classes = classes[:, :N, None].expand_as(images)  # (B, N, images)
        labels = torch.arange(N) % (N if sizes else self.n_out)  # pretraining merges none
        labels = labels[:, None].expand_as(images)
        # One row per image: (class, number within the class, label in the episode).
        table = torch.stack([classes, images, labels], dim=3)  # (B, N, images, 3)
        [support] = shuffle(generator, table[:, :, :K].flatten(1, 2))  # (B, N * K, 3)
        [query] = shuffle(generator, table[:, :, K:K + Q].flatten(1, 2))  # (B, N * Q, 3)
        support_x = self.take(split, support, generator)
        query_x = self.take(split, query, generator)
        return Episodes(support_x, support[..., 2], query_x, query[..., 2])

    def take(self, split, chosen, generator):
        """The images (B, M, ...) in the rows `chosen` (B, M, 3) of the table."""
        classes, images, _ = chosen.unbind(2)
        if split in self.features:
            return self.features[split][classes, images]  # (B, M, E)
        x = self.images[self.class_ids[split][classes], images]
        if split == "train":
            x = distort(x, generator) if self.task == "omniglot" else shift(x, generator)
        return x  # (B, M, channels, size, size)

    @torch.no_grad()
    def encode_images(self, split, encoder, device):
        """On CIFAR-FS alone, keep the mean feature of each image and its mirror image."""
        if self.task == "cifarfs":  # Omniglot still distorts its images.
            means = []
            for images in self.images[self.class_ids[split]].to(device):  # of a class
                means.append((encoder(images) + encoder(images.flip(-1))) / 2)
            self.features[split] = torch.stack(means).cpu()  # (classes, images, E)

# For each task, its class and its defaults. `steps` sufficed for every seed tried.
FEW_SHOT = dict(batch_size=16, lr=1e-3, d_model=128, d_ff=256)
TASKS = {"copy": (Copy, dict(steps=140, lr=8e-3)),
         "cue": (Cue, dict(steps=400, lr=3e-3, alpha_init=20.0)),
         "regression": (Regression, dict(steps=2000, lr=2e-3, n_layer=4, queries=50)),
         "cifarfs": (FewShot, dict(FEW_SHOT, steps=1000, pretrain_steps=7000)),
         "omniglot": (FewShot, dict(FEW_SHOT, steps=2000, pretrain_steps=3000))}
# Ways, shots and queries of pretraining. On CIFAR-FS, ways must be all 64 classes.
PRETRAINING = {"cifarfs": (64, 1, 1), "omniglot": (60, 1, 2)}

def make_task(args):
    """The task of `args`, a dict. ValueError where its sizes do not fit."""
    task, _ = TASKS[args["task"]]
    return task(**{field.name: args[field.name] for field in fields(task)})

def shuffle(generator, *tensors):
    """Put the N of each episode into a random order, one for all tensors (B, N, ...)."""
    order = torch.rand(tensors[0].shape[:2], generator=generator).argsort(dim=1)
    rows = torch.arange(len(order))[:, None]  # (B, 1)
    return [tensor[rows, order] for tensor in tensors]

def distort(images, generator):
    """Images (..., channels, size, size), each turned, scaled and moved a little."""
    flat = images.flatten(0, -4)  # (N, channels, size, size)
    random = torch.rand(4, len(flat), generator=generator) * 2 - 1  # (4, N) in [-1, 1]
    angle = torch.deg2rad(10 * random[0])  # (N)
    cos = (1 + 0.15 * random[1]) * angle.cos()  # scaled by up to 15%
    sin = (1 + 0.15 * random[1]) * angle.sin()
    right, down = 0.15 * random[2:]
    theta = torch.stack([cos, -sin, right, sin, cos, down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, flat.shape, align_corners=False)
    moved = F.grid_sample(flat.float(), grid, align_corners=False)
    return moved.round().byte().view_as(images)

def shift(images, generator):
    """Images (..., channels, size, size), half mirrored, all moved by <= 2 pixels."""
    size = images.size(-1)
    x = images.flatten(0, -4)  # (N, channels, size, size)
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    x = torch.where(mirrored, x.flip(-1), x)
    x = F.pad(x, (2, 2, 2, 2))  # black
    x = x.unfold(2, size, 1).unfold(3, size, 1)  # (N, channels, 5, 5, size, size)
    down, right = torch.randint(5, (2, len(x)), generator=generator)  # a window each
    return x[torch.arange(len(x)), :, down, right].view_as(images)

# CIFAR-100 by class, split as by Bertinetto et al. 2019: all other classes train.
CIFARFS_VAL = """beaver otter flatfish shark lamp television beetle butterfly sea camel
    cattle crab crocodile maple_tree motorcycle tractor""".split()
CIFARFS_TEST = """whale poppy rose sweet_pepper telephone bed table wardrobe leopard plain
    chimpanzee fox snail worm baby man woman bicycle pickup_truck rocket""".split()
# The file of each data set, and its classes, images, channels, size and size.
PACKS = {"cifarfs": ("cifar100.pt", (100, 600, 3, 32, 32)),
         "omniglot": ("omniglot.pt", (1623, 20, 1, 28, 28))}

def load_pack(data_dir, name):
    """-> images (classes, images, channels, size, size); {split: its classes}."""
    file_name, shape = PACKS[name]
    path = Path(data_dir, file_name)
    try:
        if not path.exists():
            print(f"{path} is not there: downloading and packing {name}, once", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            pack = pack_cifar100 if name == "cifarfs" else pack_omniglot
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                torch.save(pack(folder), f"{folder}/pack")
                Path(folder, "pack").replace(path)  # Last, so no half file is left.
        images, classes = torch.load(path, weights_only=True, mmap=True).values()
        if images.dtype != torch.uint8 or images.shape != shape or len(classes) != shape[0]:
            raise ValueError(f"not {shape} images in bytes")
        if name == "cifarfs":
            train = [c for c in classes if c not in CIFARFS_VAL + CIFARFS_TEST]
            splits = {"train": train, "val": CIFARFS_VAL, "test": CIFARFS_TEST}
            return images, {split: torch.tensor([classes.index(c) for c in names])
                            for split, names in splits.items()}
    except Exception as error:  # A download or a damaged file can fail in any way.
        raise ValueError(f"no {name} in {path} ({error!r}): check the network and --data-dir, "
                         "and delete the file, to download it again") from error

    # Omniglot goes on here: the background set trains, but its last five alphabets
    # validate; the evaluation set tests. In training, each quarter-turn is a class.
    turns = torch.cat([images.rot90(k, (-2, -1)) for k in range(4)])
    train = torch.cat([torch.arange(813) + k * len(images) for k in range(4)])
    return turns, {"train": train, "val": torch.arange(813, 964),
                   "test": torch.arange(964, 1623)}

def pack_cifar100(folder):
    from torchvision.datasets import CIFAR100
    parts = [CIFAR100(folder, train, download=True) for train in (True, False)]
    images = torch.cat([torch.from_numpy(part.data) for part in parts])  # (N, 32, 32, 3)
    labels = torch.tensor(parts[0].targets + parts[1].targets)
    order = labels.argsort(stable=True)  # by class, its training images first
    images = images[order].permute(0, 3, 1, 2).contiguous()
    return {"images": images.unflatten(0, (100, 600)), "classes": parts[0].classes}

def pack_omniglot(folder):
    from PIL import Image, ImageOps
    from torchvision.datasets import Omniglot
    from torchvision.transforms.functional import pil_to_tensor
    images = []
    classes = []
    for background in (True, False):
        data = Omniglot(folder, background=background, download=True)
        for file in sorted(Path(data.target_folder).glob("*/*/*.png")):
            scan = ImageOps.invert(Image.open(file).convert("L"))  # Ink is 255.
            images.append(pil_to_tensor(scan.resize((28, 28), Image.BILINEAR)))
            classes.append("/".join(file.parts[-3:-1]))  # Alphabet/characterNN
    return {"images": torch.stack(images).unflatten(0, (-1, 20)), "classes": classes[::20]}
