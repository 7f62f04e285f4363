"""`python <this folder> train <run folder> [device]`: trains a job without ComfyUI, or for it.

The folder is loaded under a name of its own, because the pack's name depends on where it is installed.
"""

import importlib
import importlib.util
import logging
import sys
from pathlib import Path

NAME = "videolora_core"


def main(arguments: list[str]) -> int:
    if len(arguments) not in (2, 3) or arguments[0] != "train":
        print("usage: python core train RUN_FOLDER [DEVICE]\n  RUN_FOLDER holds job.json; DEVICE is cuda, cpu, ...",
              file=sys.stderr)  # fmt: skip
        return 2
    here = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(NAME, here / "__init__.py", submodule_search_locations=[str(here)])
    package = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    worker = importlib.import_module(f"{NAME}.training.worker")
    return worker.work(Path(arguments[1]), *arguments[2:])


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    raise SystemExit(main(sys.argv[1:]))
