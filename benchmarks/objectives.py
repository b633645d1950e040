"""How long do the objectives take, beside the same in the form in which it is published, and how do they grow?

`python benchmarks/objectives.py --out benchmarks/objectives.csv`: forward and backward, processor time of one thread. The published forms are written anew from what their code does (a loop over pairs,
texts or reports); values and gradients agree in double precision to 1e-9, each tensor by its own length, or there is no line. In single precision, in which they are timed, each is so far from that as
the table says: *apart*, by length, of the worst tensor whose gradient is not nought (the gradient of the last bias of a judge is: a bound does not change if all scores rise, and what is left is rounding)."""
from tables import arguments, keep, side_by_side  # isort: skip

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medvis.encoders.features import pool_tokens
from medvis.objectives.mutual_information import Discriminator, cpc_bound, local_scores
from medvis.objectives.prototypes import sinkhorn
from medvis.objectives.tokens import gloria_loss, token_alignment_loss


def pairs_published(judge: Discriminator, regions: Tensor, sentence: Tensor, index: Tensor) -> Tensor:
    "local-mi: every sentence against every image, one pair after another, the features of both concatenated."
    rows = []
    for i in range(len(regions)):
        for j in range(len(sentence)):
            both = torch.cat([regions[i, index[i]], sentence[j]])[None]
            rows.append(judge.layers(both)[0, 0])
    return torch.stack(rows).unflatten(0, (len(regions), len(sentence)))


def words_published(tokens: Tensor, index: Tensor) -> Tensor:
    "MGCA and GLoRIA: report by report, token by token, the pieces of a word are gathered in a list and added."
    reports = []
    for report, numbers in zip(tokens, index):
        words, bank, last = [], [], None
        for token, number in zip(report, numbers):
            number = number.item()
            if number != last and bank:
                words.append(torch.stack(bank).sum(0))
                bank = []
            if number >= 0:
                bank.append(token)
            last = number
        if bank:
            words.append(torch.stack(bank).sum(0))
        words += [torch.zeros_like(tokens[0, 0])] * (tokens.shape[1] - len(words))
        reports.append(torch.stack(words))
    return torch.stack(reports)


def gloria_published(regions: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    "GLoRIA: one text after another, its words repeated for every image."
    B, N, _ = regions.shape
    context, columns = regions.mT, []
    for word, valid in zip(words, mask):
        said = word[valid].T[None].repeat(B, 1, 1)
        count = said.shape[2]
        attention = F.softmax((context.mT @ said).reshape(B * N, count), dim=1).reshape(B, N, count).mT
        attention = F.softmax(attention.reshape(B * count, N) * 4.0, dim=-1).reshape(B, count, N)
        gathered = context @ attention.mT
        said, gathered = said.mT.reshape(B * count, -1), gathered.mT.reshape(B * count, -1)
        cosine = F.cosine_similarity(said, gathered, dim=1).reshape(B, count)
        columns.append(torch.log((cosine * 5.0).exp().sum(1, keepdim=True)))
    scores = torch.cat(columns, 1) * 10.0
    labels = torch.arange(B)
    return F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)


def sinkhorn_published(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    "SwAV, MGCA: row and column sums divided out in turn."
    Q = (scores / epsilon).exp().T
    Q = Q / Q.sum()
    for _ in range(iterations):
        Q = Q / Q.sum(1, keepdim=True) / Q.shape[0]
        Q = Q / Q.sum(0, keepdim=True) / Q.shape[1]
    return (Q * Q.shape[1]).T


def case(name: str, size: int, quick: bool = False, precision: torch.dtype = torch.float32) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor]]:
    "Ours and the published form of an objective, as functions of the same tensors (drawn in single precision, whatever they are computed in), and those to derive by."
    torch.manual_seed(0)
    width = 64 if quick else 768

    def drawn(*shape: int, times: float = 1.0) -> Tensor:
        return (times * torch.randn(*shape)).to(precision).requires_grad_()

    if name == "pair scores":
        judge, index = Discriminator(width, width).to(precision), torch.randint(0, 49, (size,))
        regions, sentence = drawn(size, 49, width), drawn(size, width)
        forms = {"ours": lambda: cpc_bound(local_scores(judge, regions, sentence, index)), "published": lambda: cpc_bound(pairs_published(judge, regions, sentence, index))}
        return forms, [regions, sentence, *judge.parameters()]
    if name == "word pooling":
        tokens, length = drawn(size, 112, width), 90
        index = torch.full((size, 112), -1)
        index[:, 1:length] = (torch.rand(size, length - 1) < 0.7).long().cumsum(1) - 1
        index[:, 1:length] -= index[:, 1:2].clone()
        weight = torch.randn(112, width).to(precision)
        forms = {"ours": lambda: (lambda words: (words * weight[:words.shape[1]]).sum())(pool_tokens(tokens, index)[0]), "published": lambda: (words_published(tokens, index) * weight).sum()}
        return forms, [tokens]
    if name == "GLoRIA local":
        regions, words = drawn(size, 361, width, times=width**-0.5), drawn(size, 25, width)
        mask = torch.arange(25) < torch.randint(5, 26, (size, 1))
        mask[0] = True
        return {"ours": lambda: gloria_loss(regions, words, mask), "published": lambda: gloria_published(regions, words, mask)}, [regions, words]
    scores = (F.normalize(torch.randn(size, 128)) @ F.normalize(torch.randn(500, 128)).T).to(precision)
    return {"ours": lambda: sinkhorn(scores), "published": lambda: sinkhorn_published(scores)}, []


def answers(forms: dict[str, Callable[[], Tensor]], leaves: list[Tensor]) -> dict[str, list[Tensor]]:
    "Value and gradients of each form, in double precision."
    values = {name: form() for name, form in forms.items()}
    return {name: [value.detach().double(), *(one.double() for one in (torch.autograd.grad(value, leaves) if leaves else ()))] for name, value in values.items()}


def apart(some: list[Tensor], others: list[Tensor]) -> float:
    "The greatest distance of two tensors, over the length of the second; those that are nought beside the longest of their kind are left out."
    longest = [float(others[0].norm()), *[max((float(one.norm()) for one in others[1:]), default=0.0)] * (len(others) - 1)]
    return max(float((one - other).norm() / other.norm()) for one, other, most in zip(some, others, longest) if other.norm() > 1e-9 * most)


def agree(name: str, size: int, quick: bool = False, change: float = 1.0) -> dict[str, float]:
    "How far the single precision of each form is from double; AssertionError if both are not the same in double precision (`change` multiplies the published one, to see that it would be found)."
    exact = answers(*case(name, size, quick, torch.float64))
    found = apart(exact["ours"], [change * one for one in exact["published"]])
    assert found < 1e-9, f"{name}: {found:.1e} apart in double precision"
    return {form: apart(answer, exact["published"]) for form, answer in answers(*case(name, size, quick)).items()}


OFTEN = 50
GROWTH = {"pair scores": 2, "word pooling": 1, "GLoRIA local": 2, "Sinkhorn": 1}


def learn(form: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    "Forward and backward; what has no gradient, and takes less than a millisecond, often."
    for _ in range(1 if leaves else OFTEN):
        value = form()
        if leaves:
            torch.autograd.grad(value, leaves)


def measure(repeats: int, names: tuple[str, ...] = tuple(GROWTH), quick: bool = False) -> Iterator[dict]:
    cases = [*(("Sinkhorn", size, 1) for size in (8, 32, 144, 576)), ("word pooling", 72, 20), ("pair scores", 64, 40), ("GLoRIA local", 48, 8)]
    for name, size, goal in (one for one in cases if one[0] in names):
        size = 8 if quick else size
        forms, leaves = case(name, size, quick)
        found = agree(name, size, quick)
        seconds = side_by_side({form: lambda of=of: learn(of, leaves) for form, of in forms.items()}, repeats)
        seconds = {form: value / (1 if leaves else OFTEN) for form, value in seconds.items()}
        yield {"objective": name, "batch": size, "ours, ms": 1000 * seconds["ours"], "published, ms": 1000 * seconds["published"], "published / ours": seconds["published"] / seconds["ours"], "goal": goal, **{f"{form}, apart": value for form, value in found.items()}}


def growth(sizes: tuple[int, ...], repeats: int, names: tuple[str, ...] = tuple(GROWTH)) -> Iterator[dict]:
    "How time grows with what is computed of a batch: the slope of logarithms over all sizes, in the number of scores (or, of word pooling and of Sinkhorn, whose prototypes stay 500, of samples)."
    for name, power in ((name, GROWTH[name]) for name in names):
        cases = {size: case(name, size) for size in sizes}
        spent = side_by_side({str(size): lambda of=of: learn(of[0]["ours"], of[1]) for size, of in cases.items()}, repeats)
        spent = {size: value / (1 if cases[sizes[0]][1] else OFTEN) for size, value in spent.items()}
        slope = float(np.polyfit(np.log([size**power for size in sizes]), np.log([spent[str(size)] for size in sizes]), 1)[0])
        yield {"objective": name, **{f"B {size}, ms": 1000 * spent[str(size)] for size in sizes}, "slope in the scores": slope, "goal": 1.1}


if __name__ == "__main__":
    asked = arguments(__doc__, repeats=3, objectives=tuple(GROWTH))
    torch.set_num_threads(1)
    keep(measure(asked.repeats, asked.objectives), asked.out, repeats=asked.repeats)
    keep(growth((16, 32, 64), asked.repeats, asked.objectives), asked.out.with_name(asked.out.stem + "_growth.csv"))
