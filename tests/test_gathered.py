"""The batches of several processes are one batch: every method that contrasts has the same losses and gradients on 1, 2 and 4 processes (gloo, float64), rows shared out evenly or not."""
import os
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from forked import work_together
from medvis.data.pairs import collate
from medvis.methods import METHODS
from medvis.methods.method import Method, phantom_tokenizer
from medvis.methods.settings import SETTINGS
from medvis.testing import tiny_batch
from medvis.train import TrainConfig, loop, processes
from medvis.train.processes import make_accelerator

CASES = {name: (name, {}) for name in SETTINGS if METHODS.find(name).contrasts} | {
    "gloria, projected": ("gloria", dict(project_text=True, negatives="other-patient")),
    "lovt, padded": ("lovt", dict(padded=True)),
    "mgca, released words": ("mgca", dict(released_words=40, mask_padding=False, image="tiny_vit")),
    "mgca, learned attention": ("mgca", dict(learned_attention=True, directions="sum")),
    "local-mi, by bound": ("local-mi", dict(region_select="bound", negatives_regions="max")),
    "mixture-mi, all that is asked": ("mixture-mi", dict(finding_phrases=1.0, side_negatives=0.5, region_prior="side", mask_identical=True, side_words="keep")),
    "convirt, attention": ("convirt", dict(whole_image="attention", whole_text="max")),
}
SHARED = [(case, 9) for case in CASES] + [(case, 8) for case in ("mgca", "gloria", "mixture-mi, all that is asked")]
ALONE = {"supervised": dict(classes=("Edema", "Fracture")), "caption-lstm": {}, "caption-transformer": {}, "byol": {}, "pixelpro": {}}
VALIDATED = {name: CASES[name] for name in ("convirt", "lovt", "gloria", "mixture-mi", "local-mi")} | {name: (name, changes) for name, changes in ALONE.items()}
SIZES = (9, 2, 1)       # samples of the batches of a validation
TEXTS = (("No pleural effusion.",), ("Mild cardiomegaly.", "Clear lungs."), (), ("Left pneumothorax.",), ("Small left pleural effusion.", "The heart is enlarged.", "No pneumothorax."),
         ("Clear lungs.",), ("Right lower lobe consolidation with a small right pleural effusion.",), ("No acute findings.", "Left pneumothorax."), ("Mild cardiomegaly.",))
PATIENTS = (0, 0, 1, 2, 2, 3, 4, 5, 5)
FAULTS = {"no gradient comes back": ("backward", lambda ctx, gradient: (gradient.split(ctx.counts)[torch.distributed.get_rank()], None)),
          "rows in another order": ("forward", lambda ctx, rows, counts: turned(KEPT(ctx, rows, counts), counts))}
KEPT = processes._AllRows.forward


def turned(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    return torch.cat(rows.split(counts)[::-1])


def make(name: str, words, **changes) -> Method:
    "In double precision; encoders without dropout and batch statistics, heads as in training if they see the whole batch."
    torch.manual_seed(0)
    kind = METHODS.find(name)
    method = kind.from_preset("tiny", words if kind.reads_text else None, **changes).double()
    method.start_run(10)
    method.start_epoch(1)
    method.train(kind.contrasts)
    for encoder in (method.image_encoder, method.text_encoder):
        if encoder is not None:
            encoder.eval()
    return method


def some_rows(method: Method, samples: int, rank: int = 0, world: int = 1):
    "The rows of a process, with reports padded to the longest of its own."
    batch = tiny_batch(method, TEXTS[-samples:], PATIENTS[-samples:])
    for place, label in enumerate(batch.labels):        # known of some
        batch.labels[label][place : 4 * place + 2] = torch.nan
    rows = torch.arange(samples).tensor_split(world)[rank]
    length = max(int(batch.attention_mask[rows].sum(1).max()), 1)

    def taken(name: str, value):
        if isinstance(value, dict):
            return {key: part[rows] for key, part in value.items()}
        if isinstance(value, list):
            return [value[row] for row in rows] if value else []
        if value is None or not value.is_floating_point():
            return None if value is None else value[rows, :length] if value.ndim == 2 else value[rows]
        return value[rows].double()

    return type(batch)(**{field.name: taken(field.name, getattr(batch, field.name)) for field in fields(batch)})


def learn(method: Method, batch, accelerator, share: float | None) -> dict[str, torch.Tensor]:
    "Losses and gradients of a step."
    network = accelerator.prepare(method)
    losses = loop._learn(network, batch, accelerator, 5, 1, share)
    return {"loss": losses.total.detach(), **losses.parts, **{name: p.grad for name, p in method.named_parameters() if p.grad is not None}}


def of_this_process(out: Path) -> None:
    "All that is asked of several processes, for one start of them."
    words, found = phantom_tokenizer(60), {}
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    accelerator = make_accelerator(TrainConfig(run=out, device="cpu"), unused_parameters=True)

    def run(case: str, name: str, changes: dict, samples: int, share: float | None) -> None:
        method = make(name, words, **changes)
        found[case, samples] = learn(method, some_rows(method, samples, rank, world), accelerator, share)

    for case, samples in SHARED:
        run(case, *CASES[case], samples, None)
    for name, changes in ALONE.items():
        rows = len(torch.arange(9).tensor_split(world)[rank])
        run(name, name, changes, 9, rows * world / 9)
    for case, (name, changes) in VALIDATED.items():
        method = make(name, words, **changes)
        whole = [some_rows(method, samples, rank, world) if samples >= world else collate([]) if rank else some_rows(method, samples) for samples in SIZES]
        found["validated", case] = {key: torch.tensor(value) for key, value in loop.validate(method, whole, accelerator, joined=method.contrasts).items()}
    run("own", "mgca", {}, 9, 1.0)
    for fault, (name, change) in FAULTS.items():
        kept = getattr(processes._AllRows, name)
        setattr(processes._AllRows, name, staticmethod(change))
        run(fault, "mgca", {}, 9, None)
        setattr(processes._AllRows, name, staticmethod(kept))
    if rank:      # the gradients of the first are those of all
        found = {case: {name: part for name, part in answer.items() if not part.ndim} for case, answer in found.items()}
    torch.save(found, out / f"{rank}.pt")


@pytest.fixture(scope="module", params=(2, 4))
def made(request, tmp_path_factory) -> tuple[int, list[dict]]:
    "What each of 2, and of 4 processes found."
    out = tmp_path_factory.mktemp("processes")
    work_together(out / "said.txt", request.param, of_this_process, out, seconds=500)
    return request.param, [torch.load(out / f"{rank}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def words():
    return phantom_tokenizer(60)


def alone(name: str, words, changes: dict, samples: int) -> dict[str, torch.Tensor]:
    "What one process makes of the whole batch."
    method = make(name, words, **changes)
    return learn(method, some_rows(method, samples), make_accelerator(TrainConfig(run=Path("run"), device="cpu")), 1.0)


def differ(found: dict, wanted: dict) -> list[str]:
    return [name for name in wanted if name not in found or not torch.allclose(found[name], wanted[name], rtol=1e-6, atol=1e-9)]


@pytest.mark.parametrize(("case", "samples"), SHARED)
def test_one_batch_of_all_processes(case, samples, made, words):
    world, answers = made
    wanted = alone(CASES[case][0], words, CASES[case][1], samples)
    assert len(wanted) > 5 and sum(float(part.abs().sum()) > 1e-8 for part in wanted.values()) > len(wanted) / 2
    assert differ(answers[0][case, samples], wanted) == []
    losses = {name: part for name, part in wanted.items() if not part.ndim}
    assert "loss" in losses and [differ(found[case, samples], losses) for found in answers[1:]] == [[]] * (world - 1)


@pytest.mark.parametrize("name", ALONE)
def test_samples_that_stand_for_themselves_weigh_alike(name, made, words):
    "Whether they are in a large or a small batch of their process, and however many of its labels are known, or words its reports have."
    world, answers = made
    wanted = alone(name, words, ALONE[name], 9)
    means = {part: sum(found[name, 9][part] for found in answers) / world for part, value in wanted.items() if not value.ndim}
    assert len(means) >= 2 and sum(bool(value.ndim) for value in wanted.values()) > 5 and differ(answers[0][name, 9] | means, wanted) == []


@pytest.mark.parametrize("case", VALIDATED)
def test_a_validation_is_that_of_one_process(case, made, words):
    "Batches that all share, unevenly, and batches that are too small for that."
    name, changes = VALIDATED[case]
    method = make(name, words, **changes)
    wanted = {key: torch.tensor(value) for key, value in loop.validate(method, [some_rows(method, samples) for samples in SIZES], make_accelerator(TrainConfig(run=Path("run"), device="cpu"))).items()}
    assert len(wanted) >= 2 and wanted["loss"] != 0
    assert [differ(found["validated", case], wanted) for found in made[1]] == [[]] * made[0]


def test_own_process_is_as_before(made, words):
    "Each has the loss of its own batch, and learns from the mean of their gradients."
    world, answers = made
    accelerator = make_accelerator(TrainConfig(run=Path("run"), device="cpu"))
    shares = [learn(method, some_rows(method, 9, rank, world), accelerator, 1.0) for rank in range(world) for method in [make("mgca", words)]]
    assert [float(found["own", 9]["loss"]) for found in answers] == pytest.approx([float(share["loss"]) for share in shares], rel=1e-6)
    means = {name: sum(share[name] for share in shares) / world for name, part in shares[0].items() if part.ndim}
    assert differ(answers[0]["own", 9], means) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_exchange_is_seen(fault, made, words):
    _, answers = made
    assert differ(answers[0][fault, 9], alone("mgca", words, {}, 9))


@pytest.mark.parametrize(("asked", "warned"), [({}, False), (dict(ACCELERATE_MIXED_PRECISION="no"), False), (dict(ACCELERATE_MIXED_PRECISION="no", MASTER_ADDR="127.0.0.1"), True)])
def test_one_process_where_several_were_asked_for(asked, warned, monkeypatch):
    "`accelerate launch --cpu --num_processes 2` sets these variables, and starts one."
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        make_accelerator(TrainConfig(run=Path("run"), device="cpu"))
    assert any("torchrun --nproc_per_node" in str(one.message) for one in raised) == warned
