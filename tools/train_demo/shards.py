"""Training data, drawn by worker processes while the model learns, and kept on the training device."""

from __future__ import annotations

import multiprocessing
import random
import tempfile
import threading
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from paddlemix_qwenvl_plugin.demo.world.captions import base_turn
from paddlemix_qwenvl_plugin.demo.world.draw import draw
from paddlemix_qwenvl_plugin.demo.world.sample import Sample
from paddlemix_qwenvl_plugin.demo.world.scene import Scene, random_scene
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from tools.train_demo.conversation import conversation
from tools.train_demo.rows import ONE, TWO, Row, Size, make_row

PICTURES = 512  # of a shard; each has two rows of its own, and every fourth begins a row of two pictures
SIDES = (192, 256, 320)
BASE_SHARE = 0.2

Arrays = dict[str, NDArray[np.generic]]


@cache
def _tokenizer(folder: Path) -> QwenTokenizer:
    return QwenTokenizer.from_folder(folder)


def picture(scene: Scene, image_size: int, side: int) -> NDArray[np.uint8]:
    """uint8 [image_size, image_size, 3]: drawn at `side`, then resized as processing.images does."""
    resized = draw(scene, side).resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def _write_shard(job: tuple[int, Path, int, Path]) -> Path:
    # Through a file: a pipe would keep the training process busy.
    number, folder, image_size, scratch = job
    file = scratch / f"{number}.npz"
    np.savez(file, **make_shard(number, folder, image_size))
    return file


def make_shard(number: int, folder: Path, image_size: int) -> Arrays:
    """Pictures and rows, the same for the same number, model folder and image_size."""
    tokenizer = _tokenizer(folder)
    rng = random.Random(f"training {number}")
    scenes = [random_scene(rng) for _ in range(PICTURES)]
    one, two, first_of, pair_of = [], [], [], []
    for i, scene in enumerate(scenes):
        for _ in range(2):
            if rng.random() < BASE_SHARE:
                sample = Sample((scene,), (base_turn(rng, scene),), "base")
            else:
                sample = Sample((scene,), conversation(rng, (scene,), 8), "chat")
            one.append(make_row(tokenizer, sample, ONE))
            first_of.append([i])
        if i % 4 == 0:
            other = rng.randrange(PICTURES)
            both = (scene, scenes[other])
            two.append(make_row(tokenizer, Sample(both, conversation(rng, both, 6), "chat"), TWO))
            pair_of.append([i, other])
    pictures = np.stack([picture(scene, image_size, rng.choice(SIDES)) for scene in scenes])
    return {"pictures": pictures, **_stacked("one", one, first_of), **_stacked("two", two, pair_of)}


def _stacked(name: str, rows: list[Row], pictures: list[list[int]]) -> Arrays:
    return {
        f"{name}.ids": np.stack([row.ids for row in rows]),
        f"{name}.at": np.stack([row.at for row in rows]),
        f"{name}.starts": np.stack([row.starts for row in rows]),
        f"{name}.pictures": np.array(pictures, np.int32),
    }


class Feed:
    """Shards as tensors on a device, from number `first` on; grows in the background up to `n_shards`."""

    def __init__(self, folder: Path, image_size: int, first: int, n_shards: int, workers: int) -> None:
        # Before anything touches the GPU: its state does not survive a fork.
        self._pool = multiprocessing.get_context("fork").Pool(workers)
        self._scratch = tempfile.TemporaryDirectory(prefix="shards-")
        scratch = Path(self._scratch.name)
        jobs = ((number, folder, image_size, scratch) for number in range(first, first + n_shards))
        self._shards = self._pool.imap_unordered(_write_shard, jobs)
        self._n_shards = n_shards
        self.ready = 0
        self._tensors: dict[str, torch.Tensor] = {}
        self._rows: dict[str, int] = {}
        self._failure: BaseException | None = None

    def start(self, device: torch.device, wait_for: int) -> None:
        """Begin to fill; returns when `wait_for` shards are there."""
        thread = threading.Thread(target=self._fill, args=(device,), daemon=True)
        self._enough, self._wait_for = threading.Event(), min(wait_for, self._n_shards)
        thread.start()
        self._enough.wait()
        self._check()

    def batch(self, name: str, size: Size, rows: int, random: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Pictures, ids, starts and learned positions of random rows, as QwenVL.loss takes them."""
        self._check()
        chosen = torch.randint(self.ready * self._rows[name], (rows,), generator=random).to(
            self._tensors["pictures"].device, non_blocking=True
        )
        ids, at, starts, pictures = (
            self._tensors[f"{name}.{part}"][chosen].long() for part in ("ids", "at", "starts", "pictures")
        )
        return self._tensors["pictures"][pictures.flatten()], ids, starts, at

    def close(self) -> None:
        self._pool.terminate()
        self._scratch.cleanup()

    def _fill(self, device: torch.device) -> None:
        try:
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            with torch.cuda.stream(stream) if stream else threading.Lock():
                for number, file in enumerate(self._shards):
                    with np.load(file) as shard:
                        self._append(number, dict(shard), device)
                    file.unlink()
                    if stream:
                        stream.synchronize()
                    self.ready = number + 1
                    if self.ready == self._wait_for:
                        self._enough.set()
        except BaseException as error:  # raised again by the training loop
            self._failure = error
            self._enough.set()

    def _append(self, number: int, shard: Arrays, device: torch.device) -> None:
        for name, array in shard.items():
            rows = len(array)
            if name not in self._tensors:
                shape = (self._n_shards * rows, *array.shape[1:])
                self._tensors[name] = torch.empty(shape, dtype=torch.from_numpy(array).dtype, device=device)
                self._rows[name.split(".")[0]] = rows
            values = torch.from_numpy(array)
            if name.endswith(".pictures"):
                values = values + number * PICTURES
            self._tensors[name][number * rows : (number + 1) * rows].copy_(values)

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError("drawing the training data failed") from self._failure
