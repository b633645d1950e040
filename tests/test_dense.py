"""Heads for segmentation and detection: against other implementations, counted by hand, and learning eight images by heart."""
import copy

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from medvis.data.preprocessing import Preprocessing
from medvis.data.phantom import Phantom
from medvis.encoders.image import ResNetEncoder, image_encoder
from medvis.evaluate.detect import Targets, YoloV3
from medvis.evaluate.metrics import count_pixels, dice_table, mean_ap
from medvis.evaluate.segment import _SEGMENTATION_LOSSES, LinearSegmenter, SetrDecoder, SmpUNet, UNet

TINY = ("tiny_resnet", "tiny_resnet_fine", "tiny_vit")
PAIRS = [(head, name) for head in (LinearSegmenter, UNet, SmpUNet, SetrDecoder, YoloV3) for name in TINY
         if head not in (UNet, SmpUNet) or name != "tiny_vit"]
BOXES = [np.array([[10, 20, 30, 44, 1], [40, 40, 47, 46, 0]], np.float32), np.zeros((0, 5), np.float32)]
heads = pytest.mark.parametrize("kind, name", PAIRS, ids=lambda value: value if isinstance(value, str) else value.__name__)


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def features(head, encoder, images):
    return encoder.pyramid(images) if head.needs == "pyramid" else getattr(encoder(images), head.needs)


def answers(kind, size=64):
    "What is right for two images and two classes."
    if kind is YoloV3:
        return BOXES
    masks = torch.zeros(2, 2, size, size, dtype=torch.uint8)
    masks[0, 0, 20:44, 10:30] = masks[0, 1, 40:46, 40:47] = masks[1, 1, :9, :9] = 1
    return masks


def test_smp_unet_is_the_library_s():
    "Our encoder under the library's decoder is the library's own network, weight for weight."
    theirs = smp.Unet("resnet18", encoder_weights=None, classes=2).eval()
    ours = ResNetEncoder(torchvision.models.resnet18(weights=None), Preprocessing(size=64)).eval()
    head = SmpUNet(ours, ("a", "b")).eval()
    missing, extra = ours.body.load_state_dict(theirs.encoder.state_dict(), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not extra
    head.decoder.load_state_dict(theirs.decoder.state_dict())
    head.head.load_state_dict(theirs.segmentation_head.state_dict())
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(head(ours.pyramid(x)), theirs(x), rtol=0, atol=0)


def test_smp_unet_begins_as_the_library_s():
    "First weights of the same spread, which are not torch's own: what is trained for few epochs depends on them."
    ours = ResNetEncoder(torchvision.models.resnet18(weights=None), Preprocessing(size=64))
    theirs, head = smp.Unet("resnet18", encoder_weights=None), SmpUNet(ours, ("a",))
    for a, b in ((theirs.decoder, head.decoder), (theirs.segmentation_head, head.head)):
        for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
            assert x.shape == y.shape and (x.std() / y.std() - 1).abs() < 0.2 if x.ndim > 1 else torch.equal(x, y), name


def test_dice_objectives_are_smp_s():
    logits, masks = torch.randn(4, 3, 16, 16), (torch.rand(4, 3, 16, 16) < 0.2).float()
    masks[:, 2] = 0
    theirs = smp.losses.DiceLoss(mode="binary")
    joint = _SEGMENTATION_LOSSES["dice-joint"](logits, masks).total
    torch.testing.assert_close(joint, theirs(logits, masks))
    each = [theirs(logits[:, c : c + 1], masks[:, c : c + 1]) for c in range(3)]
    assert each[2] == 0
    torch.testing.assert_close(_SEGMENTATION_LOSSES["dice"](logits, masks).total, sum(each) / 3)


def conv(width_in, width, side, bias=True):
    return width_in * width * side**2 + bias * width


def double(width_in, width):
    return conv(width_in, width, 3) + conv(width, width, 3) + 4 * width


def yolo_count(dims, widths, answers):
    "dims: channels of the three maps, coarsest first."
    total, before = 0, 0
    for dim, width in zip(dims, widths):
        if before:
            total += conv(before, width, 1, bias=False) + 2 * width
        into = dim + (width if before else 0)
        total += conv(into, width, 1, False) + 2 * conv(2 * width, width, 1, False) + 3 * conv(width, 2 * width, 3, False)
        total += 2 * (3 * width + 3 * 2 * width) + conv(2 * width, answers, 1)
        before = width
    return total


def count(module):
    return sum(value.numel() for value in module.parameters())


def test_parameters_are_as_many_as_by_hand():
    tiny, fine, vit = (image_encoder(name) for name in TINY)
    steps = ((160, 96, 80, 2), (80, 48, 40, 1), (40, 24, 20, 2), (20, 16, 16, 2), (16, 1, 16, 2))
    unet = double(160, 160) + sum(conv(i, o, step) + double(o + skip, o) for i, skip, o, step in steps) + conv(16, 2, 1)
    assert count(UNet(tiny, ("a", "b"))) == unet
    steps = ((64, 32, 32, 1), (32, 16, 16, 2), (16, 1, 16, 2))
    assert count(UNet(fine, ("a",))) == double(64, 64) + sum(conv(i, o, s) + double(o + k, o) for i, k, o, s in steps) + conv(16, 1, 1)
    blocks = ((160, 96, 256), (256, 48, 128), (128, 24, 64), (64, 16, 32), (32, 0, 16))
    smp_unet = sum(conv(i + skip, o, 3, False) + conv(o, o, 3, False) + 4 * o for i, skip, o in blocks) + conv(16, 2, 3)
    assert count(SmpUNet(tiny, ("a", "b"))) == smp_unet
    setr = conv(128, 128, 1) + sum(conv(i, o, 3) + 2 * o for i, o in ((128, 256), (256, 128), (128, 64))) + conv(64, 1, 3)
    assert count(SetrDecoder(vit, ("a",))) == setr
    assert count(LinearSegmenter(tiny, ("a", "b"))) == 97 * 2
    assert count(YoloV3(tiny, ("a", "b"))) == yolo_count((160, 96, 24), (64, 32, 16), 21)
    assert count(YoloV3(fine, ("a",))) == yolo_count((64, 64, 16), (64, 32, 16), 18)
    assert count(YoloV3(vit, ("a",))) == yolo_count((128, 128, 128), (64, 32, 16), 18)


@heads
def test_gradient_reaches_the_encoder_only_when_it_should(kind, name):
    encoder = image_encoder(name)
    head, images, target = kind(encoder, ("a", "b")), torch.rand(2, 1, 64, 64), answers(kind)
    owned = {id(value) for value in encoder.parameters()}
    assert not any(id(value) in owned for value in head.parameters()), "a head must not own its encoder"
    before, begun = copy.deepcopy(encoder.state_dict()), copy.deepcopy(head.state_dict())

    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], 1e-3)
    encoder.eval()
    with torch.no_grad():
        frozen = features(head, encoder, images)
    for _ in range(2):  # frozen, though the optimiser holds all
        optimizer.zero_grad()
        head.loss(head(frozen), target).total.backward()
        optimizer.step()
    assert all(value.grad is None for value in encoder.parameters())
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items()), "weights and statistics"
    still = {key for key, value in head.named_parameters() if torch.equal(value, begun[key])}
    assert not still, still

    encoder.train()
    optimizer.zero_grad()
    head.loss(head(features(head, encoder, images)), target).total.backward()
    optimizer.step()
    deaf = {key for key, value in encoder.named_parameters() if value.grad is None or not value.grad.any()}
    behind = (kind, name) == (LinearSegmenter, "tiny_resnet")  # its regions come from layer 3
    assert deaf == {key for key, _ in encoder.named_parameters() if behind and key.startswith("body.layer4.")}
    after = encoder.state_dict()
    assert all(not torch.equal(after[key], before[key]) for key, _ in encoder.named_parameters() if key not in deaf)
    assert all(not torch.equal(after[key], before[key]) for key in after if key.endswith("running_mean"))


@heads
def test_images_of_a_batch_do_not_know_of_each_other(kind, name):
    "In evaluation mode: permuted batches give permuted answers, and a batch of one the same."
    encoder = image_encoder(name).eval()
    head, images = kind(encoder, ("a", "b")).eval(), torch.rand(3, 1, 64, 64)
    with torch.no_grad():
        raw = head(features(head, encoder, images))
        turned = head(features(head, encoder, images[[2, 0, 1]]))
        single = head(features(head, encoder, images[2:]))
    for a, b, c in zip(*([x] if torch.is_tensor(x) else x for x in (raw, turned, single))):
        torch.testing.assert_close(a[[2, 0, 1]], b)
        torch.testing.assert_close(a[2:], c)
    said, alone = head.predict(raw), head.predict(single)
    if kind is YoloV3:
        third = said[said.image == 2]
        assert set(said.image) <= {0, 1, 2} and len(third) == len(alone) > 0
        np.testing.assert_allclose(third.scores, alone.scores, rtol=1e-5)
    else:
        torch.testing.assert_close(said[2:], alone)
        assert said.shape == (3, 2, 64, 64) and ((said > 0) & (said < 1)).all()


@pytest.mark.parametrize("kind", [LinearSegmenter, UNet, SmpUNet, SetrDecoder, YoloV3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_in_half_precision(kind, dtype):
    "Losses are of single precision, and finite with their gradients, under autocast and from extreme logits."
    encoder = image_encoder("tiny_vit" if kind is SetrDecoder else "tiny_resnet")
    head, images, target = kind(encoder, ("a", "b")), torch.rand(2, 1, 64, 64), answers(kind)
    if dtype is torch.bfloat16:
        with torch.autocast("cpu", dtype):
            loss = head.loss(head(features(head, encoder, images)), target).total
        assert loss.dtype == torch.float32 and loss.isfinite()
        loss.backward()
        assert all(value.grad.isfinite().all() for value in head.parameters())
    shapes = [part.shape for part in head(features(head, encoder, images))] if kind is YoloV3 else [(2, 2, 64, 64)]
    for value in (-3e4, 0.0, 3e4):
        if kind is YoloV3 and value:  # the sides of boxes are exponents: let only the others be extreme
            raws = [torch.zeros(shape, dtype=dtype).unflatten(1, (3, -1)) for shape in shapes]
            for raw in raws:
                raw[:, :, [0, 1, 4, 5, 6]] = value
            raws = [raw.flatten(1, 2).requires_grad_() for raw in raws]
        else:
            raws = [torch.full(shape, value, dtype=dtype, requires_grad=True) for shape in shapes]
        raw = raws if kind is YoloV3 else raws[0]
        loss = head.loss(raw, target)
        assert loss.total.dtype == torch.float32 and loss.total.isfinite() and torch.isclose(sum(loss.parts.values()), loss.total)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss.total, raws))
        said = head.predict(raw)
        assert np.isfinite(said.corners).all() if kind is YoloV3 else said.dtype == torch.float32 and said.isfinite().all()


@pytest.mark.parametrize("kind", [LinearSegmenter, UNet, SmpUNet, SetrDecoder])
def test_masks_of_another_size_are_refused(kind):
    encoder = image_encoder("tiny_vit" if kind is SetrDecoder else "tiny_resnet")
    head = kind(encoder, ("a", "b"))
    raw = head(features(head, encoder, torch.rand(2, 1, 64, 64)))
    with pytest.raises(ValueError, match=r"\(2, 2, 64, 64\).*\(2, 2, 32, 32\)"):
        head.loss(raw, answers(kind, 32))
    with pytest.raises(ValueError, match=r"\(2, 2, 64, 64\).*\(2, 1, 64, 64\)"):
        head.loss(raw, answers(kind)[:, :1])


@pytest.mark.parametrize("kind", [LinearSegmenter, UNet, SmpUNet, YoloV3])
def test_other_encoders_and_sizes(kind):
    "local-mi's network at 128 pixels (its stem has the stride of the image), and a tiny one at 96."
    for name, size, cells in (("resnet256", 128, [2, 4, 8]), ("tiny_resnet", 96, [6, 12, 24])):
        encoder = image_encoder(name, size=size)
        head = kind(encoder.eval(), ("a", "b")).eval()
        with torch.no_grad():
            raw = head(features(head, encoder, torch.rand(1, 1, size, size)))
        if kind is YoloV3:
            assert [tuple(part.shape) for part in raw] == [(1, 21, side, side) for side in cells]
            assert (head.anchors[0, 0] * 416 / size).round().tolist() == [116, 90]
        else:
            assert raw.shape == (1, 2, size, size)


def test_the_image_and_every_map_reach_the_masks():
    "All skips are wired: each map of the pyramid moves the logits; MGCA's decoder leaves out the image alone."
    encoder = image_encoder("tiny_resnet").eval()
    maps = [level.detach().requires_grad_() for level in encoder.pyramid(torch.rand(1, 1, 64, 64))]
    for kind, unread in ((UNet, set()), (SmpUNet, {0})):
        head = kind(encoder, ("a",)).eval()
        found = torch.autograd.grad(head(maps).square().sum(), maps, allow_unused=True)
        assert {k for k, gradient in enumerate(found) if gradient is None or not gradient.any()} == unread


def test_linear_is_a_convolution_and_an_enlargement():
    encoder = image_encoder("tiny_resnet", layer="layer4").eval()
    head, images = LinearSegmenter(encoder, ("a", "b", "c")), torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        local = F.conv2d(encoder.pyramid(images)[-1], head.linear.weight[..., None, None], head.linear.bias)
        wanted = nn.Upsample((64, 64), mode="bilinear", align_corners=False)(local)
        torch.testing.assert_close(head(encoder(images).regions), wanted)


def test_upsampling_and_order_of_yolo():
    "The next scale sees first the branch, enlarged by repetition, then the encoder's own map."
    encoder = image_encoder("tiny_resnet").eval()
    head = YoloV3(encoder, ("a",)).eval()
    maps = encoder.pyramid(torch.rand(1, 1, 64, 64))
    seen = []
    handle = head.scales[1].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    branch = head.onward[0](head.scales[0].trunk(maps[5]))
    head(maps)
    handle.remove()
    assert torch.equal(seen[0][:, :32], branch.repeat_interleave(2, 2).repeat_interleave(2, 3)) and torch.equal(seen[0][:, 32:], maps[4])


# ---------------------------------------------------------------- eight images by heart

def ill(findings, count=8):
    "The first phantoms that show one of the findings: images, studies."
    phantom, studies, index = Phantom(64, 0), [], 0
    while len(studies) < count:
        study, index = phantom[index], index + 1
        studies += [study] if {finding.name for finding in study.findings} & set(findings) else []
    return torch.from_numpy(np.stack([study.image for study in studies]))[:, None], studies


def learn(encoder, head, images, target, lr, steps):
    model = nn.ModuleList([encoder, head]).train()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    images = encoder.preprocessing.transform()(images)
    for _ in range(steps):
        optimizer.zero_grad()
        head.loss(head(encoder.pyramid(images)), target).total.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return head.predict(head(encoder.pyramid(images)))


@pytest.mark.trains
def test_unet_learns_by_heart():
    encoder = image_encoder("tiny_resnet")
    images, studies = ill(("Pleural Effusion",))
    masks = np.stack([np.any([f.mask for f in study.findings if f.name == "Pleural Effusion"], 0) for study in studies])[:, None]
    painted = learn(encoder, UNet(encoder, ("effusion",)), images, torch.from_numpy(masks).float(), lr=0.008, steps=80)
    assert dice_table(count_pixels(painted.numpy(), masks))["value"].iloc[0] > 0.95


@pytest.mark.trains
def test_yolo_learns_by_heart():
    torch.manual_seed(0)     # six seeds reach 1.0 with these steps; with sixty steps one of them stayed below .9
    encoder, names = image_encoder("tiny_resnet"), ("Cardiomegaly", "Nodule", "Pleural Effusion")
    images, studies = ill(names)
    boxes = [np.array([[*f.box, names.index(f.name)] for f in study.findings if f.name in names]) for study in studies]
    found = learn(encoder, YoloV3(encoder, names), images, boxes, lr=0.004, steps=100)
    assert mean_ap(found, Targets.stack(boxes).corners(), (0.5,), len(names)) > 0.9
