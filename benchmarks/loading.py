"""How many pairs a second does one core read, as each method's paper has them, and how much is that against JPEGs decoded on the fly?

`python benchmarks/loading.py --out loading.csv` makes 256 phantoms as a Pack of 256 px and as JPEGs of 512 px, and times side by side, in processor time of one thread:
*raw*, what a worker does for a pair (film, draws, tokens, collating); *developed*, the augmentation of a batch on the CPU (on a GPU the GPU does it); *on the fly*, what a
loader of published code does: decode, resize, transform and tokenise one pair, and stack."""
import argparse
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import json  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from medvis.core.machine import describe_machine  # noqa: E402
from medvis.data.pack import Pack  # noqa: E402
from medvis.data.pairs import Pairs, collate, tokenise  # noqa: E402
from medvis.data.phantom import Phantom  # noqa: E402
from medvis.data.prepare import PhantomConfig, prepare_phantom  # noqa: E402
from medvis.data.sampling import Sampling  # noqa: E402
from medvis.data.views import Views  # noqa: E402
from medvis.encoders.image import image_encoder  # noqa: E402
from medvis.encoders.text import train_tokenizer  # noqa: E402
from medvis.methods.settings import find_settings, methods_with_text  # noqa: E402

BATCH, STUDIES = 64, 256
METHODS = ("mgca", "lovt", "convirt", "clip", "gloria", "local-mi", "simclr", "byol", "pixelpro")


def samples(method: str, pack: Pack, tokenizer) -> Pairs:
    "The training samples of a method's preset `paper`."
    config, recipe = find_settings(method)[1]["paper"]
    config = find_settings(method)[0](**config)
    with torch.device("meta"):
        view = image_encoder(config.image, None, **config.image_options).preprocessing
    sampling = Sampling(**{key: value for key, value in recipe.items() if key in Sampling.__dataclass_fields__})
    if method in methods_with_text():
        return Pairs(pack, tokenizer, view, sampling, train=True, labels=[])
    return Views(pack, view, sampling, train=True, labels=[])


def on_the_fly(pairs: Pairs, films: list[Path], tokenizer) -> Callable[[int], None]:
    "What published loaders do for a batch: files decoded, resized and transformed one by one."
    shrink, change, s = v2.Resize(256, antialias=True), pairs.preprocessing.transform(pairs.augment), pairs.sampling
    views = getattr(pairs, "count", 1)

    def read(epoch: int) -> None:
        images = []
        for i in range(BATCH):
            film = shrink(torch.from_numpy(np.array(Image.open(films[i]).convert("L")))[None])
            images += [change(film) for _ in range(views)]
            if pairs.tokens is not None:
                tokenise(pairs.sentences(i), tokenizer, s.max_tokens, s.punctuation, s.overflow)
        torch.stack(images)

    return read


def cpu_ms(work: Callable[[int], object], epoch: int) -> float:
    start = time.process_time()
    work(epoch)
    return 1000 * (time.process_time() - start) / BATCH


def measure(repeats: int) -> Iterator[dict[str, float]]:
    "One line a method: medians of interleaved repeats."
    with tempfile.TemporaryDirectory() as place:
        pack = prepare_phantom(PhantomConfig(out=Path(place) / "pack", studies=STUDIES, size=256, progress=False))
        films = [Path(place) / f"{i}.jpg" for i in range(BATCH)]
        phantom = Phantom(size=512)
        for i, film in enumerate(films):
            Image.fromarray(phantom[i].image).save(film, quality=95)
        tokenizer = train_tokenizer(said for sentences in pack.studies["sentences"] for said in sentences)
        for method in METHODS:
            pairs = samples(method, pack, tokenizer)
            pairs.learn_words()
            raw = collate([pairs.raw(i) for i in range(BATCH)])
            ways = {
                "raw": lambda epoch: collate([pairs.raw((epoch, i)) for i in range(BATCH)]),
                "developed": lambda epoch: pairs.develop(raw),
                "on the fly": on_the_fly(pairs, films, tokenizer),
            }
            spent = [{name: cpu_ms(work, epoch) for name, work in ways.items()} for epoch in range(repeats + 1)][1:]
            ms = {name: median(one[name] for one in spent) for name in ways}
            line = {"method": method, **{f"{name}, ms a pair": value for name, value in ms.items()}}
            yield line | {"pairs a second and core": 1000 / ms["raw"], "on the fly / raw": ms["on the fly"] / ms["raw"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    asked, lines = parser.parse_args(), []
    torch.set_num_threads(1)
    for line in measure(asked.repeats):
        lines.append(line)
        pd.DataFrame(lines).round(3).to_csv(asked.out, index=False)
        print(line, flush=True)
    asked.out.with_suffix(".json").write_text(json.dumps({"batch": BATCH, "repeats": asked.repeats, **describe_machine()}, indent=1) + "\n")
