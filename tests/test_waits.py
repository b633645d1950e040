"""A training step asks a GPU once: for the numbers of its log."""
import pytest
import torch

from medvis.data.pairs import Batch, _padded
from medvis.methods import METHODS
from medvis.methods.method import phantom_tokenizer
from medvis.methods.settings import SETTINGS
from medvis.testing import tiny_batch
from medvis.train import TrainConfig, loop
from medvis.train.processes import make_accelerator
from waits import Waits

ASKED = dict(finding_phrases=1.0, side_negatives=0.5, region_prior="side", mask_identical=True)
CASES = {name: (name, {}) for name in SETTINGS} | {
    "convirt, pooled otherwise": ("convirt", dict(whole_image="attention", whole_text="pooler", negatives="other-patient")),
    "gloria, projected": ("gloria", dict(project_text=True, negatives="other-study")),
    "lovt, padded": ("lovt", dict(padded=True)),
    "mgca, released words": ("mgca", dict(released_words=60, mask_padding=False)),
    "mgca, learned attention": ("mgca", dict(learned_attention=True)),
    "mgca, a transformer": ("mgca", dict(image="tiny_vit")),
    "local-mi, by bound": ("local-mi", dict(region_select="bound", negatives_regions="max")),
    "mixture-mi, sides kept": ("mixture-mi", dict(**ASKED, side_words="keep")),
    "mixture-mi, sides removed": ("mixture-mi", dict(**ASKED, side_words="remove")),
    "mixture-mi, frozen text": ("mixture-mi", dict(**ASKED, side_words="remove", freeze_text="all")),
    "caption-lstm, coverage": ("caption-lstm", dict(coverage=1.0)),
}
TEXTS = (("No pleural effusion.",), ("Mild cardiomegaly.", "Clear lungs.", "No pneumothorax."), (), ("Left pneumothorax.",), ("Small left pleural effusion.", "The heart is enlarged.", "No pneumothorax."))


def as_on_a_gpu(batch: Batch) -> torch.Tensor:
    "What a batch knows of its texts without its tensors."
    assert len(batch.numbers) == len(batch)
    return _padded(batch.numbers, batch.input_ids.shape[1])


def count(method, batch: Batch, steps: int = 2) -> list[str]:
    "The waits of the last of these steps."
    accelerator = make_accelerator(TrainConfig(run="unused", device="cpu"), method.unused_parameters)
    method.start_run(10)
    method.start_epoch(2)
    network, optimizer = accelerator.prepare(method.train(), torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], fused=True))
    for step in range(steps):
        tensors = []
        batch.each(lambda tensor: tensors.append(tensor) or tensor)
        with Waits([*tensors, *method.parameters(), *method.buffers()]) as waits:
            loop._optimise(network, optimizer, [batch], accelerator, [step])
    return waits.found


@pytest.fixture(scope="module")
def tokenizer():
    return phantom_tokenizer(60)


@pytest.mark.parametrize("runs", ["one run", "runs"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_its_numbers_alone(case, runs, tokenizer, monkeypatch):
    name, changes = CASES[case]
    kind = METHODS.find(name)
    if runs == "runs":
        if not kind.reads_text:
            pytest.skip("reads no text")
        monkeypatch.setattr("medvis.encoders.text._RUN", 0)
    monkeypatch.setattr(Batch, "texts", as_on_a_gpu)
    torch.manual_seed(0)
    classes = dict(classes=("Edema", "Fracture")) if name == "supervised" else {}
    method = kind.from_preset("tiny", tokenizer if kind.reads_text else None, **classes, **changes)
    found = count(method, tiny_batch(method, TEXTS))
    assert len(found) == 1 and found[0].startswith("tolist at loop.py"), found


@pytest.mark.parametrize("ask", [
    lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.unique(), lambda x: torch.equal(x, x + 1),
    lambda x: x.masked_select(x > 0), lambda x: x.new_tensor([1.0]), lambda x: x.index_put((x > 1,), x[0]), lambda x: torch.arange(3).to(x.device), lambda x: int(x.argmax()), lambda x: torch.tensor([1], device=x.device)])
def test_what_asks_is_counted(ask):
    x = torch.arange(4.0)
    with Waits([x]) as waits:
        y = x * 2
        assert waits.found == []
        ask(y)
    assert len(waits.found) >= 1, waits.found


def test_what_does_not_ask_is_not_counted():
    x = torch.arange(4.0)
    with Waits([x]) as waits:
        assert torch.arange(4).nonzero().tolist() == [[1], [2], [3]] and int(torch.tensor(3)) == 3      # numbers of the CPU
        (x[torch.tensor([0, 2])] * x[:2]).index_select(0, (x > 1).byte().argsort()[:1]).masked_fill(x[:1] > 3, 0)
        torch.arange(3).to(x.device, non_blocking=True)
    assert waits.found == []
