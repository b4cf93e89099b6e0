"""Mutated files: every file that a command reads, changed in many ways, and the command that reads it."""

import gzip
import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import TINY, Ended, must_run, results, run, same, sound
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from published_state import published_state

# A mutation promises something of its command: "same" results or a refusal; "any" sound results; "refuse" is a refusal.
Mutation = Callable[[random.Random, Path], tuple[str, str]]
ODD = (
    None, True, -1, 0, 1.5, 10**6, 21_000, 10**18, 10**30, -(2**63), 1e300, math.nan, math.inf, -math.inf,
    "", "x", "nan", "../../etc/passwd", "é" * 100_000, [], {}, [[]], [1, 2, 3],
)  # fmt: skip
TYPES = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.bool)


class Evil:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def pack_zeros(file) -> None:
    """Three gigabytes of them."""
    for _ in range(3 * 2**7):
        file.write(bytes(2**23))


# ---- any file ----


def flipped(rng: random.Random, path: Path) -> tuple[str, str]:
    """Bits."""
    data, count = bytearray(path.read_bytes()), rng.choice((1, 1, 2, 8, 64))
    for _ in range(count):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{count} bits flipped", "same"


def shortened(rng: random.Random, path: Path) -> tuple[str, str]:
    """Truncated, perhaps to nothing."""
    size = rng.choice((0, 1, rng.randrange(path.stat().st_size), path.stat().st_size - 1))
    path.write_bytes(path.read_bytes()[:size])
    return f"truncated to {size} bytes", "same"


def overwritten(rng: random.Random, path: Path) -> tuple[str, str]:
    """A stretch of zeros, of noise, or of the file itself put in another place, or at its end."""
    data, size = bytearray(path.read_bytes()), rng.randrange(1, 600)
    begin, end = rng.choice(((begin := rng.randrange(len(data)), begin + size), (len(data), len(data))))
    what, stretch = rng.choice((("zeros", bytes(size)), ("noise", rng.randbytes(size)), ("its start", data[:size])))
    data[begin:end] = stretch
    path.write_bytes(data)
    return f"{size} bytes at {begin} became {what}", "same"


def replaced(rng: random.Random, path: Path) -> tuple[str, str]:
    """Another kind of thing in its place."""
    path.unlink()
    what = rng.choice(("nothing", "folder", "loop", "pickle", "noise", "text"))
    if what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path.name)
    elif what != "nothing":
        path.write_bytes({"pickle": pickle.dumps(Evil()), "noise": rng.randbytes(5000), "text": b"[1, 2"}[what])
    return f"replaced by {what}", "any"


ANY = (flipped, flipped, shortened, overwritten, replaced)

# ---- JSON ----


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """All (container, key) of nested dictionaries and lists."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def odd_json(rng: random.Random, path: Path) -> tuple[str, str]:
    """A value of another type, too large or no number; a key that is missing, or that nobody knows."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = rng.randrange(len(lines))
    tree, value, fate = (
        json.loads(lines[number]),
        rng.choice(ODD),
        rng.choice(("value", "value", "value", "gone", "more")),
    )
    place, key = rng.choice(list(places(tree)))
    if fate == "gone":
        del place[key]
    elif fate == "more" and isinstance(place, dict):
        place["unheard_of"] = value
    else:
        place[key] = value
    lines[number] = json.dumps(tree)
    path.write_text("\n".join(lines) + "\n")
    return f"{key}: {fate} {str(value)[:30]}", "any"


def odd_document(rng: random.Random, path: Path) -> tuple[str, str]:
    """Another root, other encodings, or brackets nested deeper than a parser's stack."""
    text, depth = path.read_text(), rng.choice((1000, 100_000))
    deep = "[" * depth + "]" * depth
    what, data = rng.choice((
        ("root", json.dumps(rng.choice(ODD)).encode()), ("utf-16", text.encode("utf-16")),
        ("mark", text.encode("utf-8-sig")), ("null bytes", text.replace(" ", "\0").encode()),
        ("deep", deep.encode()), ("deep value", text.replace("{", '{"deep": ' + deep + ",", 1).encode()),
    ))  # fmt: skip
    path.write_bytes(data)
    return what, "any"


JSON = (*[odd_json] * 4, odd_document)

# ---- tensors ----


def odd_tensor(rng: random.Random, tensor: Tensor, pickled: bool) -> tuple[str, str, Tensor]:
    """Another tensor in its place: what it is, the promise, the tensor."""
    edits = [
        ("another shape", "refuse", lambda: torch.zeros(3, 3)),
        ("a row more", "refuse", lambda: torch.cat((tensor, tensor)) if tensor.dim() else tensor[None]),
        ("empty", "refuse", lambda: tensor.new_zeros(0)),
        ("complex", "refuse", lambda: tensor.to(torch.complex64)),
        *((str(kind), "any", lambda kind=kind: tensor.to(kind)) for kind in TYPES),
    ]
    if tensor.is_floating_point():
        edits += [(f"all {v}", "refuse", lambda v=v: torch.full_like(tensor, v)) for v in (math.nan, math.inf)]
        edits += [(f"all {v}", "any", lambda v=v: torch.full_like(tensor, v)) for v in (1e30, -1.0)]
    if pickled:
        edits.append(("a number stretched to 2^34", "refuse", lambda: torch.zeros(1).expand(2**34)))
        edits.append(("sparse", "any", lambda: tensor.to_sparse()))
    what, promise, edit = rng.choice(edits)
    return what, promise, edit()


def odd_tensors(rng: random.Random, path: Path) -> tuple[str, str]:
    """A tensor (or, in a checkpoint, another value) changed, lost, renamed or added, in a file that is whole."""
    pickled, promise = path.suffix != ".safetensors", "any"
    tree = torch.load(path, weights_only=True) if pickled else load_file(path)
    tensors = rng.random() < 0.7
    where = [(place, key) for place, key in places(tree) if isinstance(place[key], Tensor) == tensors]
    place, key = rng.choice(where or list(places(tree)))
    what = rng.choice((*["changed"] * 6, "lost", "renamed", "added"))
    if what == "lost":
        del place[key]
    elif what in ("renamed", "added") and isinstance(place, dict):
        name = rng.choice(("blocks.99999999.x", "flow.blocks.99999999.x", "x" * 10_000, ""))
        place[name] = place[key] if what == "added" else place.pop(key)
    elif isinstance(place[key], Tensor):
        what, promise, place[key] = odd_tensor(rng, place[key], pickled)
    else:
        place[key] = rng.choice(ODD)
        what = f"became {str(place[key])[:30]}"
    if pickled:
        torch.save(tree, path)
    else:
        path.write_bytes(save({name: tensor.clone().contiguous() for name, tensor in tree.items()}))
    return f"{key}: {what}", promise


def odd_header(rng: random.Random, path: Path) -> tuple[str, str]:
    """The header of a .safetensors: shapes, types and offsets that do not fit the data."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    if rng.random() < 0.1:
        path.write_bytes(struct.pack("<Q", size := rng.choice((0, 2**33, 2**63, size - 1))) + raw[8:])
        return f"a header of {size} bytes", "refuse"
    name = rng.choice([key for key in header if key != "__metadata__" and header[key]["shape"]])
    entry, key = header[name], rng.choice(("shape", "shape", "dtype", "data_offsets"))
    flat = [math.prod(entry["shape"]), 1, 1]
    entry[key] = rng.choice({
        "shape": ([2**40], [*entry["shape"], 0], [-1], [2**33, 2**33], flat, [10**30], "x"),
        "dtype": ("F64", "F16", "I32", "U8", "F8_E4M3", "F99", None),
        "data_offsets": ([0, 10**15], [8, 4], [0, 4], [-4, 0], []),
    }[key])  # fmt: skip
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return f"{name}: {key} {entry[key]}", "any"


def odd_archive(rng: random.Random, path: Path) -> tuple[str, str]:
    """A .pt, .pth or .npz packed anew, with right checksums: entries changed, lost, doubled, huge, or that run code."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    what = rng.choice(("deflated", "flipped", "lost", "doubled", "evil", "evil", "bomb"))
    name = rng.choice([name for name in entries if entries[name]])
    if what == "flipped":
        data = bytearray(entries[name])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        entries[name] = bytes(data)
    elif what == "evil":
        name = next((name for name in entries if name.endswith(".pkl")), name)
        np.save(array := io.BytesIO(), np.array([Evil()], object), allow_pickle=True)
        entries[name] = array.getvalue() if name.endswith(".npy") else pickle.dumps(Evil())
    elif what == "lost":
        del entries[name]
    with zipfile.ZipFile(
        path, "w", zipfile.ZIP_DEFLATED if what in ("deflated", "bomb") else zipfile.ZIP_STORED
    ) as archive:
        for entry, data in entries.items():
            if (what, entry) == ("bomb", name):
                with archive.open(name, "w", force_zip64=True) as file:
                    pack_zeros(file)
            else:
                archive.writestr(entry, data)
        if what == "doubled":
            with warnings.catch_warnings(action="ignore"):
                archive.writestr(name, entries[name][::-1])
    return f"{name}: {what}", "any"


# ---- data ----


def odd_idx(rng: random.Random, path: Path) -> tuple[str, str]:
    """A gzipped IDX file whose header does not fit, whose labels are none, or that unpacks to gigabytes."""
    raw, what = (
        bytearray(gzip.decompress(path.read_bytes())),
        rng.choice(("header", "header", "values", "bomb", "twice")),
    )
    at = rng.randrange(4 + 4 * raw[3]) if what == "header" else -rng.randrange(1, 20)
    if what == "header":
        raw[at] ^= 1 << rng.randrange(8)
    elif what == "values":
        raw[at] = 255
    with gzip.open(path, "wb", 1) as file:
        file.write(gzip.compress(raw) if what == "twice" else raw)
        if what == "bomb":
            pack_zeros(file)
    return f"{what}, byte {at}", "any" if what == "values" and "images" in path.name else "refuse"


def odd_arrays(rng: random.Random, path: Path) -> tuple[str, str]:
    """Arrays of an .npz that are of another type or shape, or labels that are none."""
    with np.load(path) as file:
        arrays = dict(file)
    edits: dict[str, Callable] = {
        "halves": lambda a: a + 0.5, "deeper": lambda a: a[None].T, "empty": lambda a: a[:0],
        "text": lambda a: a.astype(str), "a label": lambda a: np.r_[a[:-1], rng.choice((-1, 0, 1001, math.nan, 2**40))],
    }  # fmt: skip
    what = rng.choice(list(edits))
    key = "labels" if what == "a label" else rng.choice(list(arrays))
    np.savez_compressed(path, **arrays | {key: edits[what](arrays[key])})
    return f"{key}: {what}", "refuse"


def odd_picture(rng: random.Random, path: Path) -> tuple[str, str]:
    """A picture of gigabytes in a small file, of no size, of another kind, or no picture."""
    what = rng.choice(("13000 x 13000", "13000 x 13000", "100000 x 100000", "0 x 0", "1 x 5000", "gif", "eps"))
    if what == "gif":
        Image.new("L", (16, 16), 9).save(path, "gif")
    elif what == "eps":
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(executed) (w) file\nshowpage\n")
    else:
        path.write_bytes(_png(*map(int, what.split(" x "))))
    return what, "refuse" if what in ("0 x 0", "100000 x 100000") else "any"


def _png(width: int, height: int) -> bytes:
    """All black, RGBA, with right checksums."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + 4 * width)) for _ in range(min(height, 13_000))) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# ---- which file is read by which command ----


@dataclass(frozen=True)
class Target:
    """A file among those of :func:`make`, the command that reads it, and the files that the command writes."""

    file: str
    argv: tuple[str, ...]
    written: tuple[str, ...]
    mutations: tuple[Mutation, ...]
    checksum: bool = True  # whether the format (or our file beside it) can tell that bits were flipped


SAMPLE = (("sample", "run", "--out=drawn.npz", "--num=4", "--device=cpu"), ("drawn.npz",))
RESUME = (("train", "--resume=run", "--max-steps=10"), ("run/model.safetensors",))
EVALUATE = (("evaluate", "run", "--num-images=8", "--importance-samples=1", "--device=cpu"), ("run/evaluation.json",))
CONVERT = (("convert", "published.pth", "converted"), ("converted/model.safetensors",))
WEIGHTS = (*ANY, odd_tensors, odd_tensors, odd_header, odd_header)
PICKLED = (*ANY, *[odd_tensors] * 5, odd_archive, odd_archive)


def _trained(dataset: str, *more: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """One step on all images, so that every pixel counts; the patch of 8 or 7 divides the images."""
    argv = ("train", f"--dataset={dataset}", f"--data-dir={dataset}", "--out=trained", *TINY, *more)
    argv += ("--batch-size=20", "--max-steps=1")
    return argv, ("trained/model.safetensors", "trained/metrics.jsonl")


MNIST = _trained("mnist")
CIFAR = _trained("cifar10", "--patch-size=8")
NPZ = _trained("imagenet64", "--patch-size=16")
FOLDER = _trained("folder", "--patch-size=8", "--image-size=16")
IDX = (*ANY, odd_idx, odd_idx, odd_idx)
TARGETS = (
    *(Target("run/config.json", *command, (*ANY, *JSON, *JSON), False) for command in (SAMPLE, RESUME, EVALUATE)),
    *(Target("run/model.safetensors", *command, WEIGHTS) for command in (SAMPLE, SAMPLE, EVALUATE)),
    Target("run/calibration.json", *SAMPLE, (*ANY, *JSON), False),
    Target("run/metrics.jsonl", *RESUME, (*ANY, *JSON), False),
    *[Target("run/checkpoints/step-00000008.pt", *RESUME, PICKLED)] * 3,
    *[Target("published.pth", *CONVERT, PICKLED)] * 2,
    *(Target(f"mnist/train-{kind}-ubyte.gz", *MNIST, IDX) for kind in ("images-idx3", "labels-idx1")),
    Target("cifar10/data_batch_3.bin", *CIFAR, ANY, False),
    Target("imagenet64/train_data_batch_2.npz", *NPZ, (*ANY, odd_arrays, odd_arrays, odd_archive)),
    Target("folder/train/b/3.png", *FOLDER, (*ANY, *[odd_picture] * 4)),
)


def make(folder: Path) -> None:
    """All files in their right form: a run with its calibration, a published checkpoint, four small datasets."""
    folder.mkdir()
    must_run(("train", "--out=run", *TINY), folder)
    must_run(("calibrate", "run", "--batches", "4", "--device=cpu"), folder)
    torch.save(published_state(), folder / "published.pth")
    draw = np.random.default_rng(0)
    for name in ("mnist", "cifar10", "imagenet64"):
        (folder / name).mkdir()
    for split in ("train", "t10k"):
        for kind, shape in ("images-idx3", (20, 28, 28)), ("labels-idx1", (20,)):
            head = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)
            values = draw.integers(0, 256 if len(shape) > 1 else 10, shape, np.uint8)
            (folder / f"mnist/{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes(), mtime=0))
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        records = draw.integers(0, 256, (4, 3073), np.uint8)
        records[:, 0] %= 10
        (folder / f"cifar10/{name}.bin").write_bytes(records.tobytes())
    for name in [f"train_data_batch_{number}" for number in range(1, 11)] + ["val_data"]:
        data = draw.integers(0, 256, (2, 12288), np.uint8)
        np.savez_compressed(folder / f"imagenet64/{name}.npz", data=data, labels=draw.integers(1, 1001, 2))
    for split in ("train", "test"):
        for number in range(20):
            path = folder / f"folder/{split}/{'ab'[number % 2]}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(path)


class Files:
    """The campaign: case number n mutates one file and runs the command that reads it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.whole = folder / "whole"
        make(self.whole)
        self.usual: dict[tuple, tuple[Ended, dict]] = {}

    def case(self, rng: random.Random, number: int) -> dict:
        """One case, as a row of the report."""
        target = TARGETS[number % len(TARGETS)]
        if target.argv not in self.usual:
            ended = must_run(target.argv, self._copy("usual", target))
            self.usual[target.argv] = ended, results(self.folder / "usual", target.written)
        (usual, expected), copy = self.usual[target.argv], self._copy(f"files-{number}", target)
        what, promise = rng.choice(target.mutations)(rng, copy / target.file)
        ended = run(target.argv, copy)
        verdict = ended.verdict(usual.peak)
        if verdict == "accepted":
            verdict = self._compare(copy, target, expected, promise)
        if (copy / "executed").exists():
            verdict = "executed"
        return {
            "case": f"{target.file}: {what}",
            "argv": target.argv,
            "verdict": verdict,
            "ended": ended,
            "folder": copy,
        }

    def _compare(self, copy: Path, target: Target, expected: dict, promise: str) -> str:
        found = results(copy, target.written)
        if same(found, expected) and promise != "refuse":
            return "same"
        bits_may_flip = promise == "any" or (promise == "same" and not target.checksum)
        return "changed" if bits_may_flip and sound(found) else "wrong"

    def _copy(self, name: str, target: Target) -> Path:
        """The files that a command reads."""
        copy, part = self.folder / name, target.file.split("/")[0]
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        source = self.whole / part
        shutil.copytree(source, copy / part) if source.is_dir() else shutil.copy(source, copy / part)
        return copy
