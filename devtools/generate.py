"""Writes anew what follows from the code: workflows/, the nodes' help pages in web/docs, locales/ and docs/defaults.md.

python dev.py generate
"""

from __future__ import annotations

import defaults_page
import help_pages
from server import ROOT, prepare, running

import locales
import workflows


def files(info: dict[str, dict]) -> dict[str, str]:
    """Path below the pack -> content of every file that is made; `info` is ComfyUI's /object_info."""
    ours = {name: node for name, node in info.items() if name.startswith("VideoLoRA")}
    parts = {"workflows": workflows.files(info), "web/docs": help_pages.files(ours), "locales": locales.files(ours)}
    made = {f"{folder}/{path}": content for folder, files in parts.items() for path, content in files.items()}
    return {**made, "docs/defaults.md": defaults_page.text()}


def main() -> None:
    with running(prepare()) as server:
        made = files(server.get("/object_info"))
    for path, content in made.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(content, encoding="utf-8", newline="\n")
    print(f"wrote {len(made)} files")


if __name__ == "__main__":
    main()
