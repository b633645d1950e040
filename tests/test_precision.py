"""Mixed precision: every method trains in bfloat16, near what it does in single precision, and no loss is computed in half."""
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medvis.methods import METHODS
from medvis.methods.method import phantom_tokenizer
from medvis.methods.settings import SETTINGS
from medvis.testing import small_phantom, tiny_batch
from medvis.train import TrainConfig, create_method, fit, load_method
from medvis.train.processes import settle_precision
from medvis.train.run import begun_precision

CASES = {name: (name, {}) for name in SETTINGS} | {
    "gloria, projected": ("gloria", dict(project_text=True, negatives="other-patient")),
    "mgca, released words": ("mgca", dict(released_words=40, mask_padding=False, image="tiny_vit")),
    "mgca, learned attention": ("mgca", dict(learned_attention=True)),
    "local-mi, by bound": ("local-mi", dict(region_select="bound", negatives_regions="max")),
    "mixture-mi, all that is asked": ("mixture-mi", dict(finding_phrases=1.0, side_negatives=0.5, region_prior="side", mask_identical=True, side_words="keep")),
    "mixture-mi, sides alone": ("mixture-mi", dict(side_negatives=0.5, region_prior="side", side_words="remove")),
    "convirt, attention": ("convirt", dict(whole_image="attention", whole_text="max")),
}
# powers of e and what is made of them, lengths and roots: they lose their meaning in half precision
DELICATE = {"exp", "log", "log1p", "expm1", "_softmax", "_log_softmax", "logsumexp", "log_sigmoid_forward", "softplus", "binary_cross_entropy_with_logits", "nll_loss_forward",
            "linalg_vector_norm", "pow", "sqrt", "rsqrt", "div"}
TEXTS = (("No pleural effusion.",), ("Mild cardiomegaly.", "Clear lungs."), ("No acute findings.",), ("Left pneumothorax.",))


@pytest.fixture(scope="module")
def pack():
    return small_phantom(32)


@pytest.fixture(scope="module")
def words():
    return phantom_tokenizer(60)


def losses_in(precision: str, case: str, pack, folder: Path) -> list[float]:
    torch.set_num_threads(1)
    name, changes = CASES[case]
    method = create_method(name, data=pack, **changes)
    run = fit(method, pack, folder / precision, epochs=1, batch_size=8, progress=False, device="cpu", precision=precision, max_tokens=changes.get("released_words", 128))
    assert run.manifest["precision"] == run.config["train"]["precision"] == precision
    assert all(torch.isfinite(value).all() for value in load_method(run, "last").state_dict().values())
    assert "forward" not in vars(method), "it goes on computing in mixed precision"
    return run.metrics.loss.tolist()


@pytest.mark.parametrize("case", CASES)
def test_every_method_trains_in_bfloat16(case, pack, tmp_path):
    "Losses and gradients are finite (else it stops as diverged); the first loss is that in single precision but for rounding, and not the same."
    single, half = (np.array(losses_in(precision, case, pack, tmp_path)) for precision in ("no", "bf16"))
    assert len(half) == len(single) >= 3 and np.isfinite(half).all()
    assert abs(half - single)[0] < 0.02 * abs(single[0]) + 0.002 and (half != single).any()


class Watch(TorchDispatchMode):
    "Notes which delicate operations are done in half precision, outside of the networks."

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.done, self.half = 0, set(), set()

    def enter(self, *_) -> None:
        self.depth += 1

    def leave(self, *_) -> None:
        self.depth -= 1

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.partition("::")[2]
        if not self.depth and name in DELICATE:
            self.done.add(name)
            if any(isinstance(one, torch.Tensor) and one.dtype in (torch.bfloat16, torch.float16) for one in args):
                self.half.add((name, *(f"{line.filename}:{line.lineno}" for line in traceback.extract_stack() if "medvis" in line.filename)))
        return operation(*args, **(kwargs or {}))


def watched(method, dtype: torch.dtype) -> Watch:
    "One step of a method."
    watch, networks = Watch(), [getattr(method, name, None) for name in ("image_encoder", "text_encoder", "copy", "text_decoder")]
    for network in filter(None, [*networks, *getattr(networks[-1], "layers", ())]):
        network.register_forward_pre_hook(watch.enter)
        network.register_forward_hook(watch.leave)
    with torch.autocast("cpu", dtype), watch:
        total = method(tiny_batch(method, TEXTS)).total
    total.backward()
    assert total.dtype == torch.float32 and torch.isfinite(total)
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)
    return watch


def build(case: str, words, **more):
    name, changes = CASES[case]
    torch.manual_seed(0)
    kind = METHODS.find(name)
    more = more | (dict(classes=("Edema", "Fracture")) if name == "supervised" else {})
    method = kind.from_preset("tiny", words if kind.reads_text else None, **changes, **more)
    method.start_run(10)
    method.start_epoch(1)
    return method.train()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_losses_are_islands_of_single_precision(case, dtype, words):
    "PyTorch does part of it by itself, on a GPU; here it would not."
    watch = watched(build(case, words), dtype)
    assert watch.done and not watch.half, watch.half


def test_a_loss_in_half_precision_is_seen(words, monkeypatch):
    from medvis.methods import convirt
    monkeypatch.setattr(convirt, "clip_loss", lambda image, text, temperature, *_: torch.nn.functional.cross_entropy(image @ text.T / temperature, torch.arange(len(image))).float())
    assert {name for name, *_ in watched(build("convirt", words), torch.bfloat16).half} == {"div"}


@pytest.mark.parametrize(("device", "there", "able", "asked", "begun", "wanted"), [
    ("auto", True, True, "auto", None, "bf16"), ("auto", True, False, "auto", None, "no"), ("auto", False, True, "auto", None, "no"), ("cpu", True, True, "auto", None, "no"),
    ("auto", True, True, "auto", "no", "no"), ("cpu", False, False, "auto", "bf16", "bf16"), ("auto", True, True, "no", None, "no"), ("auto", True, True, "fp16", "bf16", "fp16")])
def test_what_auto_stands_for(device, there, able, asked, begun, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: able or including_emulation)
    config = TrainConfig(run=Path("run"), device=device, precision=asked)
    assert settle_precision(config, begun).precision == wanted


def test_a_run_goes_on_in_the_precision_it_began_in(pack, tmp_path):
    "Auto means that of the run; another one is refused."
    def train(**changes):
        return fit(create_method("convirt", data=pack), pack, tmp_path / "run", epochs=1, batch_size=8, progress=False, device="cpu", **changes)

    assert begun_precision(tmp_path / "run") is None
    train(precision="bf16")
    (tmp_path / "run" / "last.safetensors").unlink()
    assert begun_precision(tmp_path / "run") == "bf16" and train().manifest["precision"] == "bf16"
    with pytest.raises(ValueError, match="train differs in precision"):
        train(precision="no")
