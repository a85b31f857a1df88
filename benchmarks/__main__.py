"""Every benchmark in a process of its own, or one with its options: python -m benchmarks [NAME [OPTIONS]]

Threads wait for each other as they do under the command line, which has to be said before torch is loaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from liftkit.cli.app import set_waiting


def main() -> None:
    set_waiting(os.environ)
    files = {file.stem: file for file in sorted(Path(__file__).parent.glob("[!_]*.py"))}
    name, options = sys.argv[1:2], sys.argv[2:]
    if name and name[0] not in files:
        sys.exit(f"{name[0]!r} is no benchmark; there are {', '.join(files)}")
    for each in name or files:
        code = subprocess.run([sys.executable, files[each], *options], check=False).returncode
        if code:
            sys.exit(code)


main()
