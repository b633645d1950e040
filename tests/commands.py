"Command lines, one after the other in one process: in this one, or in a fresh one that has imported nothing."
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

from medvis.cli.start import main


def run_line(line: str) -> tuple[int, str]:
    "Exit code of a command line, and all that it prints."
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            code = main(line.split()[1:])
        except SystemExit as stop:      # tyro's help
            code = stop.code or 0
    return code, out.getvalue()


def run_fresh(lines: list[str], folder: Path, *paths: Path) -> list[tuple[int, str]]:
    "The same in a new process, in a folder, with more folders on PYTHONPATH."
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, Path(__file__).parents[1]])), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, __file__, json.dumps(lines)], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps([run_line(line) for line in json.loads(sys.argv[1])]))
