"""Starts a peer's worker: `python main.py NAME`, in an environment that need not hold Paretune.

The workers are loaded as a package of their own by path, so that no folder of ours is on `sys.path`: a worker may be
called `transformers` and still import that library.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path


def main() -> None:
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != here]
    where = [str(here)]
    spec = importlib.util.spec_from_file_location(
        "peer_workers", here / "__init__.py", submodule_search_locations=where
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["peer_workers"] = package
    spec.loader.exec_module(package)
    importlib.import_module(f"peer_workers.{sys.argv[1]}").main()


if __name__ == "__main__":
    main()
