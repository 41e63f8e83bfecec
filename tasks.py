"""The five tasks, each a source of batches of episodes.

A task has a `sample(split, batch_size, generator)` that draws B episodes of the split train, val or test, a
`loss(out, target)` to train on and a `score(out, target)` to report, and says of itself

    kind             token, vector or image: how model.Embed reads it
    n_out            numbers in an answer
    context_length   T, the steps read and written one by one
    n_positions      the positions an episode takes: T, and one more for the queries, which all stand right after it
    metric           accuracy or mse
    item_steps       the context steps that carry what must be remembered, where there are others (gate selectivity)

The splits of copy, cue and regression differ in their random numbers only; those of the images in their classes.
Sizes and protocol: Chaudhary 2025 (arXiv 2510.21908), but with class-disjoint splits and queries in random order.
"""
import io
import math
import os
import tempfile
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from torch.nn import functional as F

SPLITS = ("train", "val", "test")


class Episodes(NamedTuple):
    """B episodes. support_x is all there is in copy; the other tasks show (x, y) pairs and then ask for a query's y."""

    support_x: torch.Tensor  # (B, T) tokens, (B, T, F) features or (B, T, channels, size, size) uint8 images
    support_y: Optional[torch.Tensor]  # (B, T, 1) values, or (B, T) labels of images
    query_x: Optional[torch.Tensor]  # (B, Q, F) or (B, Q, channels, size, size)
    target: torch.Tensor  # (B, L) tokens at the last L steps, (B, Q, 1) values or (B, Q) labels

    def to(self, device):
        return Episodes(*(None if t is None else t.to(device) for t in self))

    def share(self, rank, world):
        """Every world-th episode from `rank` on: what one of `world` processes does."""
        return Episodes(*(None if t is None else t[rank::world] for t in self))


def random_generator(seed, split):
    """A generator of its own for each seed and split, so that training never draws a test episode's numbers."""
    return torch.Generator().manual_seed(len(SPLITS) * seed + SPLITS.index(split))


def shuffle(x, generator):
    """x (B, N, ...) with the N in a random order, another one in each row -> the same shape, and that order (B, N)."""
    order = torch.rand(x.shape[:2], generator=generator).argsort(dim=1)  # (B, N)
    return x[torch.arange(len(x))[:, None], order], order


class Classification:
    """Cross entropy and accuracy of the last L answers: out (B, >= L, n_out), target (B, L)."""

    metric, higher_is_better = "accuracy", True

    def loss(self, out, target):
        return F.cross_entropy(out[:, -target.size(1):].flatten(0, 1), target.flatten())

    def score(self, out, target):
        """-> (B,), one accuracy an episode; on the CPU, as MPS has no double precision."""
        return (out[:, -target.size(1):].argmax(-1) == target).cpu().double().mean(1)


class SquaredError:
    """Mean squared error of the answers: out (B, Q, 1), target (B, Q, 1)."""

    metric, higher_is_better = "mse", False

    def loss(self, out, target):
        return F.mse_loss(out, target)

    def score(self, out, target):
        """-> (B,), one error an episode."""
        return (out - target).cpu().double().square().mean((1, 2))


class Copy(Classification):
    """seq_len tokens of 1..V-2, `delay` blanks (0), a delimiter (V-1), then seq_len blanks at which to recall them.

    With `min_delay` a training batch's delay is drawn from min_delay to delay; validation and test have `delay`.
    """

    kind = "token"

    def __init__(self, seq_len=5, delay=20, vocab_size=10, min_delay=None):
        if vocab_size < 4:
            raise ValueError(f"--vocab-size {vocab_size}: needs at least 4: a blank, a delimiter and two tokens to copy")
        if min_delay is not None and min_delay > delay:
            raise ValueError(f"--min-delay {min_delay} is more than --delay {delay}")
        self.seq_len, self.delay, self.vocab_size = seq_len, delay, vocab_size
        self.min_delay = delay if min_delay is None else min_delay
        self.n_out = vocab_size
        self.context_length = self.n_positions = 2 * seq_len + delay + 1
        self.item_steps = range(seq_len)

    def sample(self, split, batch_size, generator):
        items = torch.randint(1, self.vocab_size - 1, (batch_size, self.seq_len), generator=generator)  # (B, L)
        delay = self.delay
        if split == "train" and self.min_delay < delay:
            delay = torch.randint(self.min_delay, delay + 1, (), generator=generator).item()
        context = torch.zeros(batch_size, 2 * self.seq_len + delay + 1, dtype=torch.long)  # (B, T)
        context[:, :self.seq_len] = items
        context[:, self.seq_len + delay] = self.vocab_size - 1
        return Episodes(context, None, None, items)

    def describe(self, episodes):
        """The context steps of the first episode, a word each."""
        return [{0: ".", self.vocab_size - 1: "|"}.get(t, str(t)) for t in episodes.support_x[0].tolist()]


class Cue(SquaredError):
    """`pairs` of a one-hot cue, of `cues` in all, and a reward in [0, 1]; then each cue again, in random order."""

    kind, n_out, item_steps = "vector", 1, None

    def __init__(self, pairs=8, cues=20):
        if pairs > cues:
            raise ValueError(f"--pairs {pairs} is more than the --cues {cues} there are")
        self.context_length, self.n_positions, self.n_features = pairs, pairs + 1, cues

    def sample(self, split, batch_size, generator):
        B, T = batch_size, self.context_length
        cues = torch.rand(B, self.n_features, generator=generator).argsort(dim=1)[:, :T]  # (B, T), all different
        reward = torch.rand(B, T, 1, generator=generator)
        queries, order = shuffle(cues, generator)
        one_hot = torch.eye(self.n_features)
        return Episodes(one_hot[cues], reward, one_hot[queries], reward.gather(1, order[..., None]))

    def describe(self, episodes):
        cues, rewards = episodes.support_x[0].argmax(-1).tolist(), episodes.support_y[0, :, 0].tolist()
        return [f"cue {c}: {r:.2f}" for c, r in zip(cues, rewards)]


class Regression(SquaredError):
    """y = w·x + b with w, b and x ~ N(0, 1), w and b new in each episode; `support` pairs shown, `queries` asked."""

    kind, n_out, item_steps = "vector", 1, None

    def __init__(self, dim=3, support=10, queries=10):
        self.context_length, self.n_positions, self.n_features, self.n_queries = support, support + 1, dim, queries

    def sample(self, split, batch_size, generator):
        B, T = batch_size, self.context_length
        x = torch.randn(B, T + self.n_queries, self.n_features, generator=generator)  # (B, T + Q, dim)
        w = torch.randn(B, self.n_features, 1, generator=generator)  # (B, dim, 1)
        b = torch.randn(B, 1, 1, generator=generator)
        y = x @ w + b  # (B, T + Q, 1)
        return Episodes(x[:, :T], y[:, :T], x[:, T:], y[:, T:])

    def describe(self, episodes):
        return [f"y = {y:+.2f}" for y in episodes.support_y[0, :, 0].tolist()]


class FewShot(Classification):
    """`shots` labelled images of each of `ways` classes in random order, then `queries` a class, in random order.

    Training images are augmented: CIFAR-FS by random horizontal flips; in Omniglot the quarter-turns of a character
    count as three more characters, and every drawing is distorted a little. `n_out` may exceed `ways`, to test a model on fewer classes than it was made for.
    Raises ValueError where the sizes do not fit the data, and for a data pack that is missing or damaged.
    """

    kind, item_steps = "image", None

    def __init__(self, name, data_dir, ways=5, shots=1, queries=15, n_out=None):
        self.images, classes = load_pack(data_dir, name)  # (classes, images, channels, size, size) uint8
        self.name, self.ways, self.shots, self.queries = name, ways, shots, queries
        self.n_out = n_out or ways
        self.class_ids = split_classes(name, classes)  # of each split, the rows of `images`
        n_images, self.image_shape = self.images.size(1), self.images.shape[2:4]  # (channels, size)
        fewest = min(len(ids) for ids in self.class_ids.values())
        if not 1 <= ways <= fewest:
            raise ValueError(f"--ways {ways}: {name} takes 1 to {fewest}, the classes of its smallest split")
        if ways > self.n_out:
            raise ValueError(f"--ways {ways} is more than the {self.n_out} classes the model was made for")
        if shots + queries > n_images:
            raise ValueError(f"--shots {shots} plus --queries {queries} is more than the {n_images} images a class has")
        self.context_length, self.n_positions = ways * shots, ways * shots + 1

    def n_classes(self, split):
        """The classes an episode of the split draws from, the quarter-turns of training characters included."""
        return len(self.class_ids[split]) * (4 if self.name == "omniglot" and split == "train" else 1)

    def take(self, split, classes, index, generator):
        """Images number `index` of `classes` (both of one shape, any) -> (*shape, channels, size, size), augmented."""
        ids = torch.tensor(self.class_ids[split])
        images = self.images[ids[classes % len(ids)], index]
        if split == "train" and self.name == "omniglot":
            turns = classes // len(ids)  # class c + k * len(ids) is class c after k quarter-turns
            for k in (1, 2, 3):
                images[turns == k] = images[turns == k].rot90(k, (-2, -1))
            images = distort(images, generator)
        elif split == "train":
            flip = torch.rand(index.shape, generator=generator) < 0.5
            images[flip] = images[flip].flip(-1)
        return images

    def sample(self, split, batch_size, generator):
        B, N, K, n = batch_size, self.ways, self.shots, self.shots + self.queries
        classes = torch.rand(B, self.n_classes(split), generator=generator).argsort(dim=1)[:, :N]  # (B, N)
        index = torch.rand(B, N, self.images.size(1), generator=generator).argsort(dim=2)[..., :n]  # (B, N, n)
        label = torch.arange(N)[:, None].expand(B, N, n)  # (B, N, n)

        def part(of):  # the shots or the queries, in random order: classes, image numbers and labels, (B, N * .) each
            _, order = shuffle(label[..., of].flatten(1), generator)
            return [t[..., of].flatten(1).gather(1, order) for t in (classes[..., None].expand(B, N, n), index, label)]

        (support_class, support_index, support_y), (query_class, query_index, target) = part(slice(K)), part(slice(K, n))
        return Episodes(self.take(split, support_class, support_index, generator), support_y,
                        self.take(split, query_class, query_index, generator), target)

    def sample_images(self, batch_size, generator):
        """Training images (N, channels, size, size) and their classes (N): the encoder's supervised warm-up."""
        classes = torch.randint(self.n_classes("train"), (batch_size,), generator=generator)
        index = torch.randint(self.images.size(1), (batch_size,), generator=generator)
        return self.take("train", classes, index, generator), classes

    def describe(self, episodes):
        return [f"class {label}" for label in episodes.support_y[0].tolist()]


TURN, SCALE, SHIFT = 10, 0.15, 0.15  # degrees, share of the size, share of half the width: the most that `distort` does


def distort(images, generator):
    """Each of the images (*, channels, size, size) uint8 turned, scaled and shifted a little at random -> the same shape."""
    flat = images.flatten(0, -4)  # (N, channels, size, size)
    u = torch.rand(4, flat.size(0), generator=generator) * 2 - 1  # (4, N) in [-1, 1]
    angle, scale, across, down = u[0] * math.radians(TURN), 1 + u[1] * SCALE, u[2] * SHIFT, u[3] * SHIFT
    # where in the image each pixel of the new one comes from: scale * rotation, then the shift
    theta = torch.stack([scale * angle.cos(), -scale * angle.sin(), across,
                         scale * angle.sin(), scale * angle.cos(), down], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, flat.shape, align_corners=False)  # (N, size, size, 2)
    return F.grid_sample(flat.float(), grid, align_corners=False).round().byte().view_as(images)


# The class-disjoint split of CIFAR-100 by Bertinetto et al., ICLR 2019: these to validate and test, the rest to train.
CIFARFS_VAL = """beaver otter flatfish shark lamp television beetle butterfly sea camel cattle crab crocodile
    maple_tree motorcycle tractor""".split()
CIFARFS_TEST = """whale poppy rose sweet_pepper telephone bed table wardrobe leopard plain chimpanzee fox snail worm
    baby man woman bicycle pickup_truck rocket""".split()
OMNIGLOT_BACKGROUND = 964  # characters of the background set, which come first in the pack
PACKS = {"cifarfs": ("cifar100.pt", (100, 600, 3, 32, 32)), "omniglot": ("omniglot.pt", (1623, 20, 1, 28, 28))}


def split_classes(name, classes):
    """The rows of the pack's classes (list of names) that train, validate and test."""
    if name == "cifarfs":
        held_out = {"val": CIFARFS_VAL, "test": CIFARFS_TEST}
        ids = {split: [classes.index(c) for c in names] for split, names in held_out.items()}
    else:
        alphabets = [c.split("/")[0] for c in classes]
        last = sorted(set(alphabets[:OMNIGLOT_BACKGROUND]))[-5:]  # 5 alphabets of the background set validate
        ids = {"val": [i for i in range(OMNIGLOT_BACKGROUND) if alphabets[i] in last],
               "test": list(range(OMNIGLOT_BACKGROUND, len(classes)))}
    ids["train"] = sorted(set(range(len(classes))) - set(ids["val"]) - set(ids["test"]))
    return ids


def load_pack(data_dir, name):
    """The packed images (classes, images, channels, size, size) uint8 and class names of cifarfs or omniglot.

    A pack that is not in data_dir is downloaded with torchvision and packed there, once. Raises ValueError.
    """
    file_name, shape = PACKS[name]
    path = Path(data_dir) / file_name
    if not path.exists():
        make_pack(path, name)
    try:
        pack = torch.load(path, weights_only=True, mmap=True)
        images, classes = pack["images"], pack["classes"]
        if images.dtype != torch.uint8 or images.shape != shape or len(classes) != shape[0]:
            raise ValueError(f"images {tuple(images.shape)} of {images.dtype}, expected {shape} of torch.uint8")
        split_classes(name, classes)
    except Exception as error:  # a damaged file can fail in any way; whichever it is, the file is what is wrong
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not a readable {name} pack ({reason}): delete it to download it again, "
                         "or name another --data-dir") from error
    return images, classes


def make_pack(path, name):
    """Download a data set into the folder of `path` and write it there as one file of images and class names."""
    print(f"{path} is not there: downloading and packing {name}, once", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # in a folder of its own: nobody takes up what a broken download left, and two processes do not meet
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=path.parent) as root:
            images, classes = (pack_cifar100 if name == "cifarfs" else pack_omniglot)(root)
        if images.shape != PACKS[name][1]:
            raise ValueError(f"what came has images {tuple(images.shape)}, expected {PACKS[name][1]}")
        save(path, {"images": images, "classes": classes})
    except Exception as error:  # a download can fail in any way; whichever it is, there is no pack
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        raise ValueError(f"cannot download {name} into --data-dir {path.parent} ({reason}): check the network, "
                         f"or put {path.name} there") from error


def write(path, content):
    """Write bytes beside the place, then rename: nobody ever finds half a file there, or loses the one before."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk does not say which file it had no room for
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def save(path, content):
    """torch.save, as `write` writes."""
    buffer = io.BytesIO()  # torch.save has no plain word for a full disk
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def pack_cifar100(root):
    from torchvision.datasets import CIFAR100

    parts = [CIFAR100(root, train=train, download=True) for train in (True, False)]
    images = torch.cat([torch.from_numpy(p.data) for p in parts]).permute(0, 3, 1, 2)  # (60000, 3, 32, 32)
    targets = torch.tensor(parts[0].targets + parts[1].targets)  # (60000)
    # a stable sort keeps the 500 training images of a class before its 100 test images
    return images[targets.argsort(stable=True)].reshape(100, 600, 3, 32, 32).contiguous(), list(parts[0].classes)


def pack_omniglot(root):
    from PIL import Image, ImageOps
    from torchvision.datasets import Omniglot
    from torchvision.transforms.functional import pil_to_tensor

    images, classes = [], []
    for background in (True, False):
        folder = Path(Omniglot(root, background=background, download=True).target_folder)  # Alphabet/characterNN/*.png
        for character in sorted(folder.glob("*/*")):
            scans = [Image.open(scan).convert("L") for scan in sorted(character.glob("*.png"))]  # 20 of 105x105
            # ink becomes 255 and paper 0
            small = [ImageOps.invert(scan).resize((28, 28), Image.BILINEAR) for scan in scans]
            images.append(torch.stack([pil_to_tensor(s) for s in small]))  # (20, 1, 28, 28)
            classes.append(f"{character.parent.name}/{character.name}")
    return torch.stack(images), classes


def make_task(args):
    """The task that `args` (task, its sizes, data_dir for images) describes. Raises ValueError where they do not fit."""
    if args.task == "copy":
        return Copy(args.seq_len, args.delay, args.vocab_size, args.min_delay)
    if args.task == "cue":
        return Cue(args.pairs, args.cues)
    if args.task == "regression":
        return Regression(args.dim, args.support, args.queries)
    return FewShot(args.task, args.data_dir, args.ways, args.shots, args.queries, getattr(args, "n_out", None))
