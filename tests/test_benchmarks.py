"""The benchmarks that take no time: what they compare is the same, and what is on paper follows from the tables."""
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", ["pair scores", "word pooling", "GLoRIA local", "Sinkhorn"])
def test_published_forms_are_the_same(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import objectives

    found = objectives.agree(name, 6, quick=True)
    assert found.keys() == {"ours", "published"} and 0 < max(found.values()) < 1e-5
    with pytest.raises(AssertionError, match="apart in double precision"):
        objectives.agree(name, 6, quick=True, change=1 + 1e-8)


@pytest.mark.parametrize("name", ["convirt", "simclr"])
def test_a_step_is_its_encoders_and_the_rest(name, monkeypatch):
    "The encoders' part leaves no gradient in heads, the rest none in encoders"
    monkeypatch.syspath_prepend(BENCHMARKS)
    import steps

    method, batch = steps.make(name, "tiny", 4, 64, "cpu")
    calls = steps.record(method, batch)
    inner = {id(p) for encoder in (method.image_encoder, method.text_encoder) if encoder is not None for p in encoder.parameters()}
    for work, within in ((lambda: steps.rest(method, batch, calls), False), (lambda: steps.encoders(calls, 2), True)):
        method.zero_grad()
        work()
        assert {id(p) in inner for p in method.parameters() if p.grad is not None} == {within}
    assert steps.kept_bytes(method, lambda: method(batch).total.backward()) > 1000


def test_paper_follows_from_the_tables():
    """What benchmarks/scale.py prints is what stands in benchmarks/scale.md."""
    result = subprocess.run([sys.executable, BENCHMARKS / "scale.py"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (BENCHMARKS / "scale.md").read_text()
