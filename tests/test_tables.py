"""Words and regions in a given memory: GLoRIA, local-mi and mixture-mi score and learn the same, whatever they may take at a time, and take no more."""
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from medvis.methods import METHODS
from medvis.methods.method import phantom_tokenizer
from medvis.objectives.mixture import mix_pairs, side_prior
from medvis.objectives.mutual_information import Discriminator, cpc_bound, local_scores, region_scores, reselect_negatives, select_regions
from medvis.objectives.tables import tiled_scores
from medvis.objectives.tokens import gloria_loss
from medvis.testing import PeakBytes
from test_gathered import CASES, PATIENTS, TEXTS, some_rows

B, N, W = 40, 49, 12
MEMORY = 1.0      # MB


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def gloria() -> tuple[Callable, list[Tensor]]:
    regions, words, mask = random(B, N, 8), random(B, W, 8), torch.arange(W) < torch.arange(B)[:, None] % W
    return lambda memory: gloria_loss(regions, words, mask, memory=memory), [regions, words]


def judged(of_pairs: bool) -> tuple[Callable, list[Tensor]]:
    torch.manual_seed(0)
    judge, regions, sentence = Discriminator(8, 6, hidden=(256, 128)).double(), random(B, N, 8), random(B, 6)

    def loss(memory: float | None) -> Tensor:
        index = select_regions(judge, regions, sentence, memory)
        index = reselect_negatives(region_scores(judge, regions, sentence, memory), index) if of_pairs else index
        return -cpc_bound(local_scores(judge, regions, sentence, index, memory))

    return loss, [regions, sentence, *judge.parameters()]


def mixture(of_sides: bool) -> tuple[Callable, list[Tensor]]:
    regions, sentence = random(B, N, 8), random(5 * B, 8)      # texts beyond the images' are rivals
    prior = side_prior(torch.arange(5 * B) % 4, (7, 7)).double() if of_sides else None
    return lambda memory: -cpc_bound(mix_pairs(regions, sentence, prior, memory)), [regions, sentence]


WAYS = {"mixture-mi": lambda: mixture(False), "mixture-mi, sides": lambda: mixture(True), "gloria": gloria, "local-mi": lambda: judged(False), "local-mi, regions of pairs": lambda: judged(True)}


@pytest.mark.parametrize("way", WAYS)
def test_memory_is_bounded_and_changes_nothing(way):
    "At a time: what is allowed, and what does not grow with the pairs. The largest tensor of the pairs fits several times."
    loss, leaves = WAYS[way]()
    tables = 8 * B * B * {"local-mi, regions of pairs": N, "mixture-mi": 5, "mixture-mi, sides": 5}.get(way, 1)      # of scores, which are asked for
    apart = 8 * 4 * sum(leaf.numel() for leaf in leaves) + 4 * tables       # and copies and gradients of what is compared

    def learn(memory: float | None) -> tuple[list[Tensor], PeakBytes]:
        with PeakBytes() as peak:
            total = loss(memory)
            return [total, *torch.autograd.grad(total, leaves)], peak

    wanted, plain = learn(None)
    assert plain.most > 3 * (1e6 * MEMORY + apart) and plain.largest > 1e6 * MEMORY
    for memory in (MEMORY, MEMORY / 4):
        found, peak = learn(memory)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        assert peak.most < 1e6 * memory + apart
        assert peak.largest <= max(1e6 * memory / 2, tables, 8 * max(leaf.numel() for leaf in leaves))


@pytest.mark.parametrize("case", ["gloria", "local-mi", "global-mi", "mixture-mi", "mixture-mi, all that is asked"])
def test_a_method_is_the_same_in_any_memory(case):
    words, found, (name, changes) = phantom_tokenizer(60), [], CASES[case]
    for memory in (1000.0, 0.05):
        torch.manual_seed(0)
        method = METHODS.find(name).from_preset("tiny", words, score_memory=memory, **changes).double().train()
        batch = some_rows(method, len(TEXTS))
        torch.manual_seed(1)
        losses = method(batch)
        losses.total.backward()
        with torch.no_grad():
            scores = method.eval().similarity(method.embed_image(batch.image), method.embed_text(batch))
        found.append([losses.total, scores, *(p.grad for p in method.parameters() if p.grad is not None)])
    assert len(found[0]) > 9 and scores.shape == (len(PATIENTS),) * 2
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_a_pair_is_never_divided():
    "Where not even one fits, each is scored alone; all texts of an image go together where they can."
    seen = []

    def score(image: Tensor, text: Tensor) -> Tensor:
        seen.append((len(image), len(text)))
        return image[:, None] * text

    image, text = torch.arange(3.0), torch.arange(4.0)
    for memory, tiles in ((1e-9, [(1, 1)] * 12), (45e-6, [(1, 4)] * 3), (90e-6, [(2, 4), (1, 4)]), (None, [(3, 4)]), (1.0, [(3, 4)])):
        seen.clear()
        assert torch.equal(tiled_scores(score, (image,), (text,), pair=10, memory=memory), image[:, None] * text) and seen == tiles
