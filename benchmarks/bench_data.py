"""The data pipeline: source images/s of the whole pipeline and of the loaders alone; the photometric stage in C++, compiled and
in eager mode.

Run it with `pytest --benchmark benchmarks/bench_data.py`. The photographs are the full-size JPEGs of
`../shared/data/imagenet-sample`; benchmarks that need them are skipped without them. The rival does what most trainers do:
torchvision v2 on PIL images in two DataLoader workers, with the same recipe (ImageNet asymmetric, bicubic crops), two views of
224 px and normalised batches. All rates are measured in the steady state.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from falcon_fast.data.loaders import training as loader
from falcon_fast.data.loaders.batch import Batch
from falcon_fast.data.sources.decoding import header_size
from falcon_fast.data.sources.folders import IMAGENET_MEAN, IMAGENET_STD
from falcon_fast.data.sources.images import ImageArray, ImageFiles, Source, Split
from falcon_fast.data.views.augmentation import AUGMENTATIONS, Augmentation
from falcon_fast.data.views.photometric import to_tensors
from falcon_fast.data.views.photometric_stage import photometric_stage
from falcon_fast.data.views.sampling import Clock
from falcon_fast.training.graphed import Graphed

from .conftest import interleaved

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet-sample"
RECIPE = AUGMENTATIONS["imagenet-asymmetric"]
CPU = torch.device("cpu")
BATCH, WARM_UP, TIMED, ROUNDS = 64, 5, 6, 3
WORKERS = 2
MEAN, STD = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)


def photographs() -> Source:
    paths = tuple(map(str, sorted(SAMPLE.rglob("*.JPEG"))))
    if not paths:
        pytest.skip("no ../shared/data/imagenet-sample next to the repository")
    split = Split(ImageFiles(paths, tuple(map(header_size, paths))), None)
    return Source(split, split, (), 224, IMAGENET_MEAN, IMAGENET_STD, "sample")


def rates(starts: dict[str, Callable[[], Iterator[object]]], images: int, timed: int = TIMED) -> dict[str, float]:
    """Return the median images/s of each pipeline; every round runs all of them in turn.

    The queues are as full at the end of a timed part as at its start.
    """
    found: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(ROUNDS):
        for name, start in starts.items():
            with closing(start()) as batches:  # type: ignore[type-var]
                for _ in range(WARM_UP):
                    next(batches)
                begin = time.perf_counter()
                for _ in range(timed):
                    next(batches)
                found[name].append(timed * images / (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in found.items()}


class _RivalViews:
    """A dataset of files that returns two views of an image, made by torchvision's transforms."""

    def __init__(self, paths: tuple[str, ...], recipe: Augmentation, size: int) -> None:
        from torchvision.transforms import InterpolationMode, v2

        self.paths = paths
        jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
        self.views = [
            v2.Compose(
                [
                    v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC),
                    v2.RandomHorizontalFlip(recipe.flip_probability),
                    v2.RandomApply([jitter], recipe.jitter_probability),
                    v2.RandomGrayscale(recipe.gray_probability),
                    v2.RandomApply([v2.GaussianBlur(13, recipe.blur_sigma)], recipe.blur_probability[view]),
                    v2.RandomSolarize(recipe.solarize_threshold, recipe.solarize_probability[view]),
                    v2.ToImage(),
                    v2.ToDtype(torch.float32, scale=True),
                    v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
                ]
            )
            for view in range(2)
        ]

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        from PIL import Image

        with Image.open(self.paths[index % len(self.paths)]) as file:
            image = file.convert("RGB")
        return self.views[0](image), self.views[1](image)


def rival(source: Source) -> Iterator[torch.Tensor]:
    from torch.utils.data import DataLoader

    dataset = _RivalViews(source.train.images.paths, RECIPE, source.size)  # type: ignore[attr-defined]
    for first, second in DataLoader(dataset, BATCH, num_workers=WORKERS):  # type: ignore[arg-type]
        yield torch.cat([first, second]).contiguous(memory_format=torch.channels_last)


def batches_of(name: str, source: Source, recipe: Augmentation, batch: int, device: torch.device) -> Iterator[Batch]:
    clock = Clock(0, len(source.train.images), batch, recipe)
    return loader.training_batches(name, source, clock, range(10**6), device, WORKERS)


def test_whole_pipeline(table) -> None:
    """From files to normalised views."""
    source = photographs()
    stage = photometric_stage(RECIPE, "cpu")

    def ours() -> Iterator[torch.Tensor]:
        for batch in batches_of("dali", source, RECIPE, BATCH, CPU):
            yield stage(batch.views, batch.parameters, MEAN, STD)

    starts: dict[str, Callable[[], Iterator[object]]] = {
        "torchvision v2, PIL, 2 workers": lambda: rival(source),
        "DALI, C++ photometrics": ours,
    }
    found = rates(starts, BATCH)
    baseline = found["torchvision v2, PIL, 2 workers"]
    for name, rate in found.items():
        table.add(what="whole pipeline, 224 px", variant=name, **{"images/s": rate, "times faster": rate / baseline})


def test_loaders_alone(table) -> None:
    """uint8 views, with no work after the crop."""
    source = photographs()
    names = ("workers", "dali")
    found = rates({name: lambda name=name: batches_of(name, source, RECIPE, BATCH, CPU) for name in names}, BATCH)
    for name, rate in found.items():
        ratio = {"times faster": rate / found["workers"]}
        table.add(what="loader alone, 224 px", variant=name, **{"images/s": rate, **ratio})


def small_images() -> Source:
    pixels = np.random.RandomState(0).randint(0, 256, (50000, 32, 32, 3)).astype(np.uint8)
    split = Split(ImageArray(pixels), np.arange(50000) % 10)
    return Source(split, split, (), 32, (0.5,) * 3, (0.25,) * 3, "small")


def test_loaders_of_small_images(table) -> None:
    source, recipe = small_images(), AUGMENTATIONS["cifar-asymmetric"]
    names = ("workers", "resident")
    starts = {name: lambda name=name: batches_of(name, source, recipe, 256, CPU) for name in names}
    found = rates(starts, 256, timed=20)
    for name, rate in found.items():
        ratio = {"times faster": rate / found["workers"]}
        table.add(what="loader alone, 32 px", variant=name, **{"images/s": rate, **ratio})


@pytest.mark.parametrize(
    ("name", "size", "views"),
    [("imagenet-asymmetric", 224, 64), ("symmetric", 224, 64), ("cifar-asymmetric", 32, 512), ("symmetric", 32, 512)],
)
def test_photometric_stage(table, name: str, size: int, views: int) -> None:
    recipe = AUGMENTATIONS[name]
    parameters = to_tensors(Clock(0, views // 2, views // 2, recipe).at(0).photometric, CPU)
    images = torch.randint(0, 256, (views, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    # Compilation takes half a minute: only one recipe at each size.
    modes = ("eager", "compiled", "cpu") if name == "symmetric" else ("eager", "cpu")
    stages = {mode: photometric_stage(recipe, mode) for mode in modes}
    functions = {
        mode: lambda stage=stage: stage(images, parameters, MEAN, STD)  # type: ignore[misc]
        for mode, stage in stages.items()
    }
    seconds = interleaved(functions, 5)
    for mode, value in seconds.items():
        ratio = {"times faster": seconds["eager"] / value}
        microseconds = 1e6 * value / views
        table.add(
            what=f"photometric, {name}, {size} px",
            variant="C++" if mode == "cpu" else mode,
            **{"us/view": microseconds, **ratio},
        )


# ---- with a GPU ----

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
@pytest.mark.parametrize("graphed", [False, True])
def test_resident_on_a_gpu(table, graphed: bool) -> None:
    """Two augmented views of 32 px, the clock included, as the training loop calls it and inside a step that is a CUDA graph."""
    source, recipe, device = small_images(), AUGMENTATIONS["cifar-asymmetric"], torch.device("cuda")
    stage, (mean, std) = photometric_stage(recipe, "compiled", device=device), source.normalization(device)
    batch, steps, warm_up = (
        512,
        290,
        20,
    )  # three epochs of 97 steps: the clock's numbers are uploaded at the start of each
    clock = Clock(0, len(source.train.images), batch, recipe)
    inputs, batch_of = loader.training_inputs("resident", source, clock, range(10**6), device)

    def views(planned):
        made = batch_of(planned)
        return stage(made.views, made.parameters, mean, std)

    call = Graphed(views, device) if graphed else views
    for step, planned in zip(range(steps + warm_up), inputs, strict=False):
        if step == warm_up:
            torch.cuda.synchronize()
            begin = time.perf_counter()
        call(planned)
    torch.cuda.synchronize()
    rate = steps * batch / (time.perf_counter() - begin)
    variant = "in a CUDA graph" if graphed else "launch by launch"
    table.add(what="resident, 32 px, compiled photometrics, on a GPU", variant=variant, **{"images/s": rate})


@needs_gpu
@pytest.mark.parametrize("model", ["resnet18", "vit_small_patch16_224"])
def test_data_wait_on_a_gpu(table, model: str) -> None:
    """The share of a training step at 224 px spent waiting for data, and the rate of the DALI loader alone."""
    import timm

    source, device = photographs(), torch.device("cuda")
    stage, (mean, std) = photometric_stage(RECIPE, "compiled", device=device), source.normalization(device)
    network = timm.create_model(model, num_classes=0).to(device, memory_format=torch.channels_last)
    network = torch.compile(network)
    batches = batches_of("dali", source, RECIPE, 128, device)
    waited, steps = 0.0, 60
    for step in range(steps + 10):
        if step == 10:
            torch.cuda.synchronize()
            begin, waited = time.perf_counter(), 0.0
        waiting = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - waiting
        with torch.autocast("cuda", dtype=torch.bfloat16):
            network(stage(batch.views, batch.parameters, mean, std)).float().square().mean().backward()
        torch.cuda.current_stream().synchronize()  # as in a run that logs each step: the wait is then only for the loader
    seconds = time.perf_counter() - begin
    table.add(
        what=f"DALI on a GPU, {model}, 224 px",
        variant="step",
        **{"images/s": steps * 128 / seconds, "wait": waited / seconds},
    )
    batches = batches_of("dali", source, RECIPE, 128, device)
    for _ in range(10):
        next(batches)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        next(batches)
    torch.cuda.synchronize()
    table.add(
        what="loader alone, 224 px, on a GPU",
        variant="dali",
        **{"images/s": steps * 128 / (time.perf_counter() - begin)},
    )
