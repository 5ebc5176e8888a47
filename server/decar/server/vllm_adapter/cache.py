"""What is asked of vLLM once, and kept in the user's cache for as long as its sources stay as they are."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import sys
from contextlib import suppress
from pathlib import Path

from decar.server.vllm_adapter.versions import installed_version

FORMAT = 1
"""Of what is kept; another one has files of other names."""
SOURCES = ("config/**/*.py", "engine/arg_utils.py", "utils/argparse_utils.py", "entrypoints/**/cli_args.py")
"""In vLLM's folder, what its parser is made of."""


def cache_file(kind: str) -> Path:
    """Where something of this ``kind`` is kept, for the installed vLLM and its plugins."""
    spec = importlib.util.find_spec("vllm")
    home = Path(*(spec.submodule_search_locations or ())[:1]) if spec is not None else Path("nowhere")
    plugins = sorted(
        entry.value
        for group in ("vllm.general_plugins", "vllm.platform_plugins")
        for entry in importlib.metadata.entry_points(group=group)
    )
    sources = [
        (str(path), stat.st_size, stat.st_mtime_ns)
        for pattern in SOURCES
        for path in sorted(home.glob(pattern))
        for stat in [path.stat()]
    ]
    of = repr((FORMAT, installed_version(), sys.version_info[:2], plugins, sources))
    name = f"vllm-{installed_version()}-{kind}-{hashlib.sha256(of.encode()).hexdigest()[:16]}.json"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "decar" / name


def keep(kind: str, text: str) -> None:
    """In one go: another start may read it now. Without a folder to write to, the next start asks again."""
    with suppress(OSError):
        file = cache_file(kind)
        file.parent.mkdir(parents=True, exist_ok=True)
        copy = file.with_name(f"{file.name}.{os.getpid()}")
        copy.write_text(text)
        copy.replace(file)
