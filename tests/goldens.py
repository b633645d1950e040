"""Numbers computed by the published code, and how to compare with them. MEDVIS_GOLDEN names another folder of the same files."""
import os
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(os.environ.get("MEDVIS_GOLDEN", Path(__file__).parent / "golden"))


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.tensor(file[key]) for key in file.files}


def leaves(g: dict, *names: str) -> list[torch.Tensor]:
    return [g[name].clone().requires_grad_() for name in names]


def same(found: torch.Tensor, wanted: torch.Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=rtol, atol=atol)


def same_gradients(loss: torch.Tensor, of: list, wanted: list, **tolerance) -> None:
    for found, want in zip(torch.autograd.grad(loss, of, retain_graph=True), wanted, strict=True):
        same(found, want, **tolerance)
