"""What does a command cost before it does anything? `python benchmarks/startup.py --out benchmarks/startup.csv`: processor seconds, medians of interleaved repeats, beside a bare Python and what medvis cannot do without."""
from tables import arguments, command_seconds, keep  # isort: skip

import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

PYTHON, MEDVIS = sys.executable, str(Path(sys.executable).with_name("medvis"))
DESCRIBE = "import torch\nfrom medvis.core.machine import describe_machine\n"
COMMANDS = {
    "python": [PYTHON, "-c", ""],
    "import medvis": [PYTHON, "-c", "import medvis"],
    "import pandas, tyro": [PYTHON, "-c", "import pandas, tyro"],
    "medvis --version": [MEDVIS, "--version"],
    "medvis --help": [MEDVIS, "--help"],
    "python -m medvis --help": [PYTHON, "-m", "medvis", "--help"],
    **{
        f"medvis {words}": [MEDVIS, *words.split()]
        for words in (
            "pretrain mgca --help",
            "prepare rsna --help",
            "prtrain",
            "prepare phantm",
            "pretrain mcga --data p --run r",
            "pretrain mgca --dta p",
            "probe --dta p",
        )
    },
    "import torch": [PYTHON, "-c", "import torch"],
    "import torch, describe_machine()": [PYTHON, "-c", DESCRIBE + "describe_machine()"],
}


def measure(repeats: int) -> Iterator[dict]:
    spent = [{name: command_seconds(argv) for name, argv in COMMANDS.items()} for _ in range(repeats + 1)][1:]
    for name in COMMANDS:
        yield {"command": name, "processor seconds": median(one[name] for one in spent), "least": min(one[name] for one in spent)}


if __name__ == "__main__":
    asked = arguments(__doc__, repeats=5)
    keep(measure(asked.repeats), asked.out, repeats=asked.repeats)
