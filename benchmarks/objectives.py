"""How long do the objectives take, beside the same in the form in which it is published, and how do they grow?

`python benchmarks/objectives.py --out benchmarks/objectives.csv`: forward and backward, processor time of one thread. The published forms are written anew from what their code does (a loop over pairs,
texts or reports); values and gradients agree to 1e-4 of the largest, or there is no line."""
from tables import arguments, cpu_seconds, keep, side_by_side  # isort: skip

from collections.abc import Callable, Iterator

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


def case(name: str, size: int, quick: bool = False) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor]]:
    "Ours and the published form of an objective, as functions of the same tensors, and those to derive by."
    torch.manual_seed(0)
    width = 64 if quick else 768
    if name == "pair scores":
        judge, index = Discriminator(width, width), torch.randint(0, 49, (size,))
        regions, sentence = torch.randn(size, 49, width, requires_grad=True), torch.randn(size, width, requires_grad=True)
        forms = {"ours": lambda: cpc_bound(local_scores(judge, regions, sentence, index)), "published": lambda: cpc_bound(pairs_published(judge, regions, sentence, index))}
        return forms, [regions, sentence, *judge.parameters()]
    if name == "word pooling":
        tokens, length = torch.randn(size, 112, width, requires_grad=True), 90
        index = torch.full((size, 112), -1)
        index[:, 1:length] = (torch.rand(size, length - 1) < 0.7).long().cumsum(1) - 1
        index[:, 1:length] -= index[:, 1:2].clone()
        weight = torch.randn(112, width)
        forms = {"ours": lambda: (lambda words: (words * weight[:words.shape[1]]).sum())(pool_tokens(tokens, index)[0]), "published": lambda: (words_published(tokens, index) * weight).sum()}
        return forms, [tokens]
    if name == "GLoRIA local":
        regions, words = torch.randn(size, 361, width, requires_grad=True), torch.randn(size, 25, width, requires_grad=True)
        with torch.no_grad():
            regions.mul_(width**-0.5)
        mask = torch.arange(25) < torch.randint(5, 26, (size, 1))
        mask[0] = True
        return {"ours": lambda: gloria_loss(regions, words, mask), "published": lambda: gloria_published(regions, words, mask)}, [regions, words]
    scores = F.normalize(torch.randn(size, 128)) @ F.normalize(torch.randn(500, 128)).T
    return {"ours": lambda: sinkhorn(scores), "published": lambda: sinkhorn_published(scores)}, []


def agree(forms: dict[str, Callable[[], Tensor]], leaves: list[Tensor]) -> None:
    "AssertionError if values differ by more than 1e-4 of the largest value, or gradients of the largest gradient."
    values = [form() for form in forms.values()]
    answers = [[[value.detach()] for value in values]]
    answers += [[torch.autograd.grad(value, leaves) for value in values]] if leaves else []
    for ours, published in answers:
        largest = max(float(one.abs().max()) for one in published)
        for one, other in zip(ours, published):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * largest)


def learn(form: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    value = form()
    if leaves:
        torch.autograd.grad(value, leaves)


def measure(repeats: int, quick: bool = False) -> Iterator[dict]:
    cases = {"pair scores": (64, 40), "word pooling": (72, 20), "GLoRIA local": (48, 8), "Sinkhorn": (144, 1)}
    for name, (size, goal) in cases.items():
        forms, leaves = case(name, 8 if quick else size, quick)
        agree(forms, leaves)
        seconds = side_by_side({form: lambda of=of: learn(of, leaves) for form, of in forms.items()}, repeats)
        yield {"objective": name, "batch": 8 if quick else size, "ours, ms": 1000 * seconds["ours"], "published, ms": 1000 * seconds["published"], "published / ours": seconds["published"] / seconds["ours"], "goal": goal}


def growth(sizes: tuple[int, ...], repeats: int) -> Iterator[dict]:
    "How time grows with the batch: the slope between the two largest."
    for name in ("pair scores", "word pooling", "GLoRIA local"):
        spent = {}
        for size in sizes:
            forms, leaves = case(name, size)
            spent[size] = min(cpu_seconds(lambda: learn(forms["ours"], leaves)) for _ in range(repeats))
        (before, last) = sizes[-2:]
        slope = torch.tensor(spent[last] / spent[before]).log() / torch.tensor(last / before).log()
        yield {"objective": name, **{f"B {size}, ms": 1000 * seconds for size, seconds in spent.items()}, "slope": float(slope)}


if __name__ == "__main__":
    asked = arguments(__doc__, repeats=3)
    torch.set_num_threads(1)
    keep(measure(asked.repeats), asked.out, repeats=asked.repeats)
    keep(growth((16, 32, 64), asked.repeats), asked.out.with_name(asked.out.stem + "_growth.csv"))
