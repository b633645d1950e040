"""Write README.md from nbs/index.ipynb: prose as it stands, code fenced, printed results below it."""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def text_of(output: dict) -> str:
    "What a cell printed or returned, as text; empty for a figure."
    if "image/png" in output.get("data", {}):
        return ""
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))


def render(notebook: dict) -> str:
    "Markdown of a notebook: neighbouring code cells share a fence, cells marked `#| hide` are left out."
    parts = [("", "<!-- Made by tools/readme.py from nbs/index.ipynb: edit the notebook. -->")]
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(("", source))
        elif not re.search(r"^#\| *hide\b", source, re.MULTILINE):
            code = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip()
            if parts[-1][0] == "python":
                code = parts.pop()[1] + "\n\n" + code
            parts.append(("python", code))
            if printed := "".join(map(text_of, cell["outputs"])).strip():
                parts.append(("text", printed))
    return "\n\n".join(f"```{kind}\n{body}\n```" if kind else body.strip() for kind, body in parts) + "\n"


if __name__ == "__main__":
    notebook = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))
    (ROOT / "README.md").write_text(render(notebook), encoding="utf-8")
