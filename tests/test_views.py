"""Methods that compare two views of an image: their losses against double loops, their slow copy, their runs, and the doors they cannot open."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import medvis.objectives.views as objectives
from medvis.data.augment import apply_numbers
from medvis.data.pairs import Pairs, read_batch
from medvis.data.prepare import PhantomConfig, prepare_phantom
from medvis.data.preprocessing import AUGMENTATIONS, Preprocessing
from medvis.data.sampling import Sampling
from medvis.data.views import Views
from medvis.evaluate import linear_probe
from medvis.evaluate.retrieve import retrieve
from medvis.methods import BYOL, METHODS, PixelPro, SimCLR
from medvis.methods.method import NoText
from medvis.objectives.contrastive import valid_pairs
from medvis.objectives.views import nt_xent, pixel_consistency_loss, pixel_places, propagate, regression_loss, same_place
from medvis.testing import tiny_batch
from medvis.train import TrainConfig, create_method, fit, load_method
from medvis.train.diagnostics import collapse
from medvis.train.loop import _learning_rate
from medvis.train.schedules import epoch_cosine
from medvis.widgets.study import Studies

VIEWS = ("simclr", "byol", "pixelpro")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return prepare_phantom(PhantomConfig(out=tmp_path_factory.mktemp("data") / "pack", studies=60, size=64, progress=False))


# ---------------------------------------------------------------- the losses, view by view and pixel by pixel

def cosine(a, b):
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def nt_xent_by_hand(first, second, tau, valid=None):
    count, terms = len(first), []
    for side, other in ((first, second), (second, first)):
        for i in range(count):
            own, rivals = torch.exp(cosine(side[i], other[i]) / tau), []
            for k in range(count):
                if valid is None or valid[i, k]:
                    rivals += [torch.exp(cosine(side[i], other[k]) / tau)] + ([torch.exp(cosine(side[i], side[k]) / tau)] if k != i else [])
            terms.append(torch.log(sum(rivals)) - torch.log(own))
    return sum(terms) / len(terms)


def regression_by_hand(q, z):
    return sum(((a / a.norm() - b.detach() / b.detach().norm()) ** 2).sum() for a, b in zip(q, z)) / len(q)


def consistency_by_hand(x, g, z, where, gamma=2.0):
    images = []
    for b in range(len(x)):
        y = [sum(torch.clamp(cosine(x[b, i], x[b, j]), min=0) ** gamma * g[b, j] for j in range(x.shape[1])) for i in range(x.shape[1])]
        found = [cosine(y[i], z[b, j].detach()) for i, j in np.argwhere(where[b].numpy())]
        images += [sum(found) / len(found)] if found else []
    return -sum(images) / len(images)


def agree(loss, by_hand, *inputs):
    "Values and gradients, to 1e-6."
    copies = [[one.detach().clone().requires_grad_() for one in inputs] for _ in range(2)]
    results = [function(*mine) for function, mine in zip((loss, by_hand), copies)]
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)
    grads = [torch.autograd.grad(result, mine, allow_unused=True) for result, mine in zip(results, copies)]
    for ours, wanted in zip(*grads):
        assert (ours is None or not ours.any()) == (wanted is None or not wanted.any()), "a gradient where none belongs, or none where one does"
        if wanted is not None and ours is not None:
            torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-6)


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


VALID = valid_pairs(torch.tensor([0, 0, 1, 2, 2]))
WHERE = same_place(torch.tensor([[0.0, 0, 1, 1], [0, 0, 0.4, 0.4], [0, 0, 0.6, 0.6]]), torch.tensor([[0.1, 0, 0.9, 1], [0.6, 0.6, 1, 1], [1, 0.2, 0.3, 1]]), (2, 2))


def check_nt_xent():
    first, second = numbers(2, 5, 7)
    for valid in (None, VALID):
        agree(lambda a, b: objectives.nt_xent(a, b, 0.3, valid), lambda a, b: nt_xent_by_hand(a, b, 0.3, valid), first, second)


def check_regression():
    agree(objectives.regression_loss, regression_by_hand, *numbers(2, 5, 7, seed=1))


def check_pixels():
    assert WHERE.any((1, 2)).tolist() == [True, False, True], "the views of the second image share no place"
    for gamma in (1.0, 2.0):
        agree(lambda x, g, z: objectives.pixel_consistency_loss(objectives.propagate(x, g, gamma), z, WHERE),
              lambda x, g, z: consistency_by_hand(x, g, z, WHERE, gamma), *numbers(3, 3, 4, 5, seed=2))


def check_places():
    frame = torch.tensor([[0.2, 0.1, 0.8, 0.5], [0.8, 0.1, 0.2, 0.5]])
    found = objectives.pixel_places(frame, (2, 3))
    for b, (x0, y0, x1, y1) in enumerate(frame.tolist()):
        wanted = [[x0 + (x1 - x0) * (column + 0.5) / 3, y0 + (y1 - y0) * (row + 0.5) / 2] for row in range(2) for column in range(3)]
        torch.testing.assert_close(found[b], torch.tensor(wanted))
    first, second, grid = torch.tensor([[0.0, 0.0, 0.6, 0.6]]), torch.tensor([[0.9, 0.2, 0.1, 1.0]]), (3, 3)
    close = objectives.same_place(first, second, grid)[0]
    a, b, reach = objectives.pixel_places(first, grid)[0], objectives.pixel_places(second, grid)[0], 0.7 * math.hypot(0.8 / 3, 0.8 / 3)
    wanted = [[math.dist(p, q) <= reach for q in b.tolist()] for p in a.tolist()]
    assert close.tolist() == wanted and 9 < close.sum() < 60


CHECKS = (check_nt_xent, check_regression, check_pixels, check_places)


@pytest.mark.parametrize("check", CHECKS)
def test_against_double_loops(check):
    check()


MUTANTS = [     # what is written, what a slip would write, which check must notice
    ("@ views.T / temperature", "@ views.T * temperature", check_nt_xent), ("@ views.T / temperature", "@ views.T / -temperature", check_nt_xent),
    ("left_out = torch.eye(2 * count, dtype=torch.bool, device=views.device)", "left_out = torch.zeros(2 * count, 2 * count, dtype=torch.bool)", check_nt_xent),
    ("left_out | ~valid.repeat(2, 2)", "left_out", check_nt_xent), (" + count) % (2 * count)", " + 1) % (2 * count)", check_nt_xent),
    ("(2 - 2 * (", "(2 + 2 * (", check_regression), ("l2_normalize(target.detach())).sum", "l2_normalize(target)).sum", check_regression),
    ("l2_normalize(propagated) @ l2_normalize(target.detach())", "l2_normalize(propagated) @ l2_normalize(target)", check_pixels),
    ("return -by_image.sum()", "return by_image.sum()", check_pixels), ("(count > 0).sum()", "torch.tensor(len(count))", check_pixels),
    ("(agreement * positives)", "agreement", check_pixels), (".clamp(min=0) ** sharpness", " ** sharpness", check_pixels),
    ("amax(0)[:, None, None]", "amin(0)[:, None, None]", check_places), ("<= threshold * diagonal", "<= threshold", check_places),
    ("x0 + (x1 - x0) * across", "x0 + (x0 - x1) * across", check_places)]


@pytest.mark.parametrize("written, slip, check", MUTANTS, ids=[f"{check.__name__}-{number}" for number, (*_, check) in enumerate(MUTANTS)])
def test_a_slip_is_noticed(written, slip, check, monkeypatch):
    "A sign, a mask, a detach or a temperature that is changed makes a check fail."
    source = Path(objectives.__file__).read_text(encoding="utf-8")
    assert source.count(written) == 1, "the line is there, once"
    space = {"__name__": objectives.__name__, "__package__": objectives.__package__}
    exec(compile(source.replace(written, slip), objectives.__file__, "exec"), space)
    for name in ("nt_xent", "regression_loss", "pixel_places", "same_place", "propagate", "pixel_consistency_loss"):
        monkeypatch.setattr(objectives, name, space[name])
    with pytest.raises((AssertionError, RuntimeError)):
        check()


def test_order_and_half_precision():
    first, second = numbers(2, 5, 7)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(nt_xent(second[order], first[order], 0.2, VALID[order][:, order]), nt_xent(first, second, 0.2, VALID))
    x, g, z = numbers(3, 3, 4, 5)
    torch.testing.assert_close(pixel_consistency_loss(propagate(x, g)[[2, 0, 1]], z[[2, 0, 1]], WHERE[[2, 0, 1]]), pixel_consistency_loss(propagate(x, g), z, WHERE))
    pixels = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(propagate(x[:, pixels], g[:, pixels]), propagate(x, g)[:, pixels])
    assert nt_xent((first * 1e3).half(), (second * 1e3).half(), 0.05).isfinite() and regression_loss(first.half() * 0, second.half()) == 2


@pytest.mark.parametrize("augment", ["simclr", "pixelpro"])
def test_frames_are_true_on_coordinate_images(augment):
    "A film whose pixels hold their own coordinates: away from the edge, views show what frame and grid promise, also of two views of one film."
    axis = (torch.arange(24.0) + 0.5) / 24
    film, view_of = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))[:, None], Preprocessing(size=56, crop=1.0)
    part_and_flip = AUGMENTATIONS[augment](56, 1.0)[1:3]
    mirrored = set()
    for seed in range(20):
        torch.manual_seed(seed)
        shown = []
        for draws in (view_of.draw(augment, 24), view_of.draw(augment, 24)):
            view, frame = apply_numbers(part_and_flip, film, draws[:5].expand(2, -1))[:, 0], view_of.frames(augment, draws, 24)
            read = view.unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2)).flatten(1).T      # (49, 2)
            inside = F.pad(torch.ones(5, 5, dtype=torch.bool), (1, 1, 1, 1)).flatten()
            torch.testing.assert_close(read[inside], pixel_places(frame[None], (7, 7))[0][inside], atol=1e-5, rtol=0)
            mirrored.add(bool(frame[0] > frame[2]))
            shown.append((read, frame, inside))
        (a, one, inside), (b, two, _) = shown
        near = same_place(one[None], two[None], (7, 7))[0]
        apart, reach = torch.cdist(a, b), 0.7 * max(math.hypot(*((frame[2:] - frame[:2]).abs() / 7).tolist()) for frame in (one, two))
        sure = inside[:, None] & inside & ((apart - reach).abs() > 1e-4)
        assert torch.equal(near[sure], (apart <= reach)[sure])
    assert mirrored == {True, False}


# ---------------------------------------------------------------- the slow copy

@pytest.mark.parametrize("kind", [BYOL, PixelPro])
def test_only_the_online_network_is_trained_and_the_copy_follows(kind):
    torch.manual_seed(0)
    method = kind.from_preset("tiny").train()
    method.start_run(4)
    method(tiny_batch(method)).total.backward()
    weights = dict(method.named_parameters())
    copied = {name for name in weights if name.startswith("copy.")}
    assert copied and all(weights[name].grad is None and not weights[name].requires_grad for name in copied)
    used = {name for name in weights if name not in copied and weights[name].grad is not None}
    assert used == {name for name in weights if name not in copied}, "everything else is"
    before = {name: value.detach().clone() for name, value in weights.items()}
    torch.optim.SGD([weights[name] for name in used], 0.1).step()
    assert all(torch.equal(weights[name], before[name]) for name in copied), "an optimiser's step leaves it alone"
    method.after_step()
    parts = [method.image_encoder, method.pixel_head, method.image_head] if kind is PixelPro else [method.image_encoder, method.image_head]
    for number, part in enumerate(parts):
        for name, value in part.named_parameters():
            own = f"copy.networks.{number}.{name}"
            torch.testing.assert_close(weights[own], 0.95 * before[own] + 0.05 * value)
    assert method.copy.step == 1 and 0.95 < method.copy.momentum < 1


def test_released_pixelpro_never_learns(tmp_path):
    "Its schedule stays at 0 without a warm-up; BYOL and SimCLR lose their first epoch; the papers' presets warm up."
    rates = {}
    for name in VIEWS:
        method = METHODS[name]
        for preset in ("paper", "released"):
            config = TrainConfig(run=tmp_path, **method.presets[preset][1])
            rates[name, preset] = [_learning_rate(config, step, 10, []) for step in range(0, 1000, 5)]
            assert max(rates[name, preset]) == (0 if (name, preset) == ("pixelpro", "released") else config.lr)
            assert rates[name, preset][1] == (0 if preset == "released" else config.lr / 2), "in the middle of the first epoch"
            assert config.keep == "last" and config.per == "image"
    assert rates["byol", "released"][2] == 1e-4 and [epoch_cosine(e, 100, 1.0, 0.0) for e in (0, 50)] == [0, 0]


# ---------------------------------------------------------------- runs

@pytest.mark.parametrize("name", VIEWS)
def test_tiny_trains_without_collapse_and_is_read_again(name, pack, tmp_path, recwarn):
    method = create_method(name, "tiny", data=pack, hidden=64, dim=32)
    assert method.vocabulary_of is None
    run = fit(method, pack, tmp_path / "run", epochs=3, batch_size=8, lr=3e-3, progress=False)
    said = run.diagnostics.iloc[-1].to_dict()
    assert collapse(said) == [] and said["image_std"] > 0 and said["image_rank"] > 1.5 and not [one for one in recwarn if "CollapseWarning" in one.category.__name__]
    losses = run.metrics.query("split == 'train'").loss
    assert losses.iloc[-5:].mean() < losses.iloc[:5].mean() and run.metrics.query("split == 'validate'").loss.notna().all()
    assert not (run.path / "text").exists()
    loaded = load_method(run)
    assert type(loaded) is METHODS[name] and loaded.preset == "tiny" and not loaded.reads_text
    assert all(torch.equal(value, method.state_dict()[key]) for key, value in loaded.state_dict().items()), "known by its last weights"
    if name != "simclr":
        assert loaded.copy.step == 15 and (run.config["config"]["momentum_schedule"], loaded.copy.start) == ("cosine", 0.95)
    more = create_method(name, "tiny", init=run.path, hidden=64, dim=32)
    assert all(torch.equal(value, method.state_dict()[key]) for key, value in more.state_dict().items())
    table = linear_probe(run, pack, fractions=(1.0,), seeds=(0,))
    assert table.auroc.notna().any() and set(table.encoder) == {"run", "random-init"}
    refuse_words(run, loaded, pack)


def refuse_words(run, method, pack) -> None:
    "Retrieval, grounding and the widget say what is missing, before any work."
    for door in (lambda: retrieve(run, pack), lambda: Studies(method, pack)[0], lambda: method.correspondence(tiny_batch(method))):
        with pytest.raises(NoText, match=f"{type(method).__name__} reads no text"):
            door()
    with pytest.raises(ValueError, match="unknown setting of .* 'text'"):
        type(method).from_preset("tiny", text="bert-base")


def test_settings_that_views_cannot_have(pack, tmp_path):
    method = create_method("byol", data=pack, hidden=32, dim=16)
    for changes, message in ((dict(augment="lovt"), "choose from simclr, pixelpro"), (dict(mirror=True), "mirror exchanges left and right")):
        with pytest.raises(ValueError, match=message):
            fit(method, pack, tmp_path / "run", epochs=1, progress=False, **changes)
    with pytest.raises(ValueError, match="compares two views of each image, the batch has none"):
        method(read_batch(Pairs(pack, None, method.preprocessing), [0, 1]))


def test_views_depend_on_the_counters_alone(pack):
    preprocessing = Preprocessing(size=32, crop=1.0, channels=1)
    views = Views(pack, preprocessing, Sampling(augment="pixelpro"), train=True, seed=3)
    want = views[2, 4]
    loader = torch.utils.data.DataLoader(views, batch_sampler=[[(2, 3), (2, 4)]], num_workers=1, collate_fn=lambda samples: samples, multiprocessing_context="fork")
    torch.manual_seed(9)
    for found in (views[2, 4], next(iter(loader))[1]):
        assert torch.equal(found.views, want.views) and torch.equal(found.frames, want.frames)
    assert not torch.equal(want.views[0], want.views[1]) and not torch.equal(views[3, 4].frames, want.frames)
    assert want.frames[:, [1, 3]].diff(dim=1).min() >= 0.59, "60 to 80 % of the side"


# ---------------------------------------------------------------- full size

@pytest.mark.parametrize("kind, grid", [(SimCLR, None), (BYOL, None), (PixelPro, (7, 7))])
def test_one_step_at_full_size(kind, grid):
    "Preset `paper`, batch 2 at 224 pixels: exactly what is trained moves, and then the copy."
    torch.manual_seed(0)
    method = kind.from_preset("paper", image_weights=None).train()
    batch = tiny_batch(method, [(), ()], patients=[0, 1], size=224)
    assert batch.views.shape == (2, 2, 3, 224, 224)
    losses = method(batch)
    losses.total.backward()
    assert losses.total.isfinite() and torch.isclose(sum(losses.parts.values()), losses.total.detach())
    weights = dict(method.named_parameters())
    unused = {name for name, value in weights.items() if value.grad is None}
    assert unused == {name for name in weights if name.startswith("copy.") or ".body.fc." in name}
    before = {name: value.detach().clone() for name, value in weights.items()}
    torch.optim.Adam([weights[name] for name in weights if name not in unused], method.training_settings["lr"]).step()
    moved = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    still = weights.keys() - unused - moved
    assert moved <= weights.keys() - unused and {name for name in still if not name.endswith("layers.0.bias")} == set(), "a batch normalisation does not feel a constant"
    parts = {SimCLR: (), BYOL: ("image_encoder", "image_head"), PixelPro: ("image_encoder", "pixel_head", "image_head")}[kind]
    copied = {f"{part}.{name}": f"copy.networks.{number}.{name}" for number, part in enumerate(parts) for name, _ in getattr(method, part).named_parameters()}
    assert set(copied.values()) == {name for name in weights if name.startswith("copy.")}
    online = {name: value.detach().clone() for name, value in weights.items()}
    method.start_run(100)
    method.after_step()
    followed = {name for name, value in weights.items() if not torch.equal(value, online[name])}
    assert followed == {copied[name] for name in moved if name in copied} and bool(followed) == (kind is not SimCLR), "the copy follows what moved, and nothing else"
    if grid:
        with torch.no_grad():
            assert method.image_encoder(batch.image).grid == grid
