"""What do 217 000 pairs need on 1, 8 and 64 GPUs, on paper? `python benchmarks/scale.py > benchmarks/scale.md`

Nothing here was run on a GPU. Every factor is a piece that was measured (the tables beside this script) or a figure that somebody has published (CITED); what is assumed is in ASSUMED. Change one and run
it again."""
from pathlib import Path

import pandas as pd

from medvis.methods.settings import find_settings

HERE = Path(__file__).parent
PAIRS, TESTED = 217_000, 27_000  # MIMIC-CXR: training images with a report that says something, and images to validate or test on

CITED = {  # what -> value, unit, who says so
    "resnet": (2470, "images/s", "ResNet-50 training, 224 px, mixed precision, one A100 80 GB: NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5, README"),
    "resnet on 8": (16621, "images/s", "the same on 8"),
    "bert": (580, "sequences/s", "BERT-large pre-training, 128 tokens, mixed precision, one A100 80 GB: NVIDIA/DeepLearningExamples, PyTorch/LanguageModeling/BERT, README"),
    "nodes": (7.86, "times 8 GPUs", "8 nodes of 8 GPUs, the same README"),
    "node, $/h": (32.77, "US$/h", "8 x A100 40 GB, on demand, AWS p4d.24xlarge, US East, second quarter of 2024 (xither.com, GPU compute costs); others ask half of it"),
    "raw, GB": (570.3, "GB", "MIMIC-CXR-JPG 2.1.0, 377 110 JPEGs: PhysioNet"),
    "nvlink": (600, "GB/s", "NVLink of an A100, both directions together: NVIDIA"),
    "fabric": (50, "GB/s", "network of a p4d node, 400 Gbit/s: AWS"),
    "card": (80, "GB", "memory of an A100 80 GB"),
}
ASSUMED = {
    "bert-large": (0.303e9, "weights of BERT-large's layers: 24 x 12 x 1024^2, from which its FLOPs a token are 6 times as many, forward and backward"),
    "busy": (0.9, "of the cited speed is reached: encoders alternate, batches are small"),
    "overlap": (0.5, "of the exchange of gradients hides behind the backward pass"),
}
GFLOP = {"ViT-B/16": 101.6, "BERT-base": 58.5}  # a pair, forward and backward, BERT at 112 tokens; counted by torch on this code
MODELS = {  # method -> image tower, millions of weights (BERT with 29 000 pieces), MB that a pair keeps for the backward pass in float32, step / encoders
    "convirt": ("ResNet-50", 142, 88, 1.003),
    "lovt": ("ResNet-50", 169, 109, 1.03),
    "mgca": ("ViT-B/16", 201, 168, 1.022),
}
MEASURED = {"prepare": (17.8, "ms an image of 2 000 px, one core"), "prints": (0.31, "ms an image, benchmarks/guard.py"), "guard": (193, "s of one core, hashes of 400 000 images in three splits (guard.md)")}


def table(name: str) -> pd.DataFrame:
    return pd.read_csv(HERE / f"{name}.csv")


def cited(name: str) -> float:
    return CITED[name][0]


def pace(method: str) -> float:
    "Seconds a pair on one GPU."
    rate = cited("bert") * 128 * 6 * ASSUMED["bert-large"][0] / 1e9  # GFLOP/s that a transformer reaches
    tower = MODELS[method][0]
    image = 1 / cited("resnet") if tower == "ResNet-50" else GFLOP[tower] / rate
    encoders = image + GFLOP["BERT-base"] / rate
    return encoders * MODELS[method][3] / ASSUMED["busy"][0]


def exchange(method: str, gpus: int) -> float:
    "Seconds to add up the gradients of all GPUs once, in float32, as a ring."
    if gpus == 1:
        return 0.0
    speed = cited("nvlink") / 2 if gpus <= 8 else cited("fabric")
    return 2 * (gpus - 1) / gpus * 4e6 * MODELS[method][1] / (1e9 * speed)


def line(method: str, gpus: int) -> dict[str, str]:
    (_, weights, kept, _), recipe = MODELS[method], find_settings(method)[1]["paper"][1]
    seconds, epochs, batch = pace(method), recipe["epochs"], recipe["batch_size"]
    step = batch * seconds + exchange(method, gpus) * (1 - ASSUMED["overlap"][0])
    scaling = {1: 1.0, 8: cited("resnet on 8") / cited("resnet") / 8, 64: cited("resnet on 8") / cited("resnet") / 8 * cited("nodes") / 8}[gpus]
    rate = gpus * batch / step * scaling
    hours = PAIRS * epochs / rate / 3600
    loading = table("loading").set_index("method")["pairs a second and core"][method]
    memory = 16e6 * weights / 1e9 + batch * kept / 2 / 1024
    return {"method": method, "GPUs": str(gpus), "batch in all": f"{gpus * batch:,}".replace(",", " "), "pairs/s": f"{rate:,.0f}".replace(",", " "), "epoch": f"{PAIRS / rate / 60:.1f} min",
            "the paper's epochs": f"{epochs}: {hours:.1f} h", "US$": f"{hours * cited('node, $/h') / 8 * gpus:,.0f}".replace(",", " "), "cores that load": f"{max(rate / loading, 0.1):.1f}", "to each GPU": f"{rate / gpus * (224**2 + 2000) / 1e6:.0f} MB/s",
            "from the disk or its cache": f"{rate * 256**2 / 1e6:.0f} MB/s", "gradients": f"{1000 * exchange(method, gpus):.1f} of {1000 * step:.0f} ms", "memory of a GPU": f"{memory:.0f} of {cited('card'):.0f} GB"}


def markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def before() -> list[dict[str, str]]:
    "What is needed once, before the first step."
    images, million = PAIRS + TESTED, 1e6
    prepare, prints, guard = (value for value, _ in MEASURED.values())
    return [
        {"what": "JPEGs as they come", "need": f"{cited('raw, GB'):.0f} GB of disk", "from": "cited; of all 377 110"},
        {"what": "Pack of 256 px", "need": f"{images * 256**2 / 1e9:.1f} GB of disk; as much memory if nothing is to be read twice", "from": "65 536 bytes an image, by its format"},
        {"what": "tables and reports", "need": f"{images * 325 / million:.0f} MB", "from": "325 bytes a study, Pack of Open-i"},
        {"what": "tokens of the reports", "need": f"{PAIRS * 0.7e3 / million:.0f} MB of memory, in each worker until they are shared", "from": "0.7 kB a report, loading.md"},
        {"what": "prepare", "need": f"{images * prepare / 3.6e6:.1f} hours of one core", "from": "17.8 ms an image of 2 000 px, 3 more than Pillow alone needs"},
        {"what": "guard: prints", "need": f"{images * prints / 6e4:.1f} minutes", "from": f"{prints} {MEASURED['prints'][1]}"},
        {"what": "guard: hashes", "need": f"{guard * images / 400_000 / 60:.1f} minutes", "from": f"{guard} {MEASURED['guard'][1]}"},
    ]


TEXT = """# What 217 000 pairs need, on paper

`python benchmarks/scale.py > benchmarks/scale.md`. **Nothing of it was run on a GPU**: each number is made of pieces that were measured on this code (tables in this folder) and of published figures, listed
below; `benchmarks/gpu.py` measures the same on a real one. Half or twice as much would be no surprise.

## Once, before the first step

{before}

## Training, with bf16

{training}

- Loading is no bottleneck any more: a few cores feed a GPU (augmentation runs on it and is not counted here), and the Pack fits into the memory of any such node, so that the disk is read once.
- Gradients are small beside the step within a node. Between nodes they are not, at the papers' small batches: larger ones (`--accumulate`) are the remedy.
- 64 GPUs at the papers' batch a GPU are another experiment: the batch is 64 times as large, and so are the negatives. For the papers' own runs one GPU is enough.
- Memory: weights, gradients and Adam's two means take 16 bytes a weight; the rest are kept activations, measured in float32 and halved. Where they exceed the card, the batch is accumulated.

## Where the numbers come from

| cited | value | who |
| --- | --- | --- |
{cited}

| assumed | why |
| --- | --- |
{assumed}

Counted by torch on this code, forward and backward, a pair: {gflop}. Kept activations too, without weights. Heads and losses: measured against the encoders on a CPU, at the papers' batches. Pairs a second and core: `loading.csv`."""


if __name__ == "__main__":
    print(TEXT.format(before=markdown(before()), training=markdown([line(method, gpus) for method in MODELS for gpus in (1, 8, 64)]),
                      cited="\n".join(f"| {name} | {value} {unit} | {who} |" for name, (value, unit, who) in CITED.items()), assumed="\n".join(f"| {value:g} | {why} |" for value, why in ASSUMED.values()),
                      gflop=", ".join(f"{name} {value} GFLOP" for name, value in GFLOP.items())))
