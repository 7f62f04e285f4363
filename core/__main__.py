"""`python <this folder> train <run folder> [device]`: trains a job without ComfyUI, or for it.
`python <this folder> metrics <run folder>`: prints the steps so far as a CSV table.
`python <this folder> merge --help`: the LoRA workbench; also unmerge, convert, resize, extract, ema, blend, inspect, interference.

The folder is loaded under a name of its own, because the pack's name depends on where it is installed.
"""

import importlib
import importlib.util
import logging
import sys
from pathlib import Path

NAME = "videolora_core"
WORKBENCH = ("merge", "unmerge", "convert", "resize", "extract", "ema", "blend", "inspect", "interference")


def main(arguments: list[str]) -> int:
    commands = {("train", 2): _train, ("train", 3): _train, ("metrics", 2): _metrics}
    command = commands.get((arguments[0] if arguments else "", len(arguments)))
    if arguments[:1] and arguments[0] in WORKBENCH:
        _load()
        return importlib.import_module(f"{NAME}.commands").run(arguments)
    if command is None:
        print("usage: python core train RUN_FOLDER [DEVICE]\n       python core metrics RUN_FOLDER\n"
              f"       python core {'|'.join(WORKBENCH)} --help\n"
              "  RUN_FOLDER holds job.json; DEVICE is cuda, cpu, ...", file=sys.stderr)  # fmt: skip
        return 2
    _load()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    return command(Path(arguments[1]), *arguments[2:])


def _load() -> None:
    here = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(NAME, here / "__init__.py", submodule_search_locations=[str(here)])
    package = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


def _train(folder: Path, device: str | None = None) -> int:
    return importlib.import_module(f"{NAME}.training.worker").work(folder, device)


def _metrics(folder: Path) -> int:
    run, watching = (importlib.import_module(f"{NAME}.training.{name}") for name in ("run", "watching"))
    watching.write_csv(run.Run(folder).metrics(), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    raise SystemExit(main(sys.argv[1:]))
