"""Make a peer's virtual environment: `python -m benchmarks.peers.install trl074`.

A peer is a folder here with a `requirements.txt`; its environment is `.venv` inside that folder. Packages in
a `no-deps.txt` beside it are installed afterwards, without what they say they require: for wheels that name
packages which can't be had. The environment is rebuilt when either file changes and left alone otherwise.
Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).parent


def python(peer: str) -> Path:
    """The peer's interpreter, whether it is installed yet or not."""
    return PEERS / peer / ".venv" / "bin" / "python"


def is_installed(peer: str) -> bool:
    stamp = _stamp(peer)
    return stamp.exists() and stamp.read_text() == _fingerprint(peer)


def ensure(peer: str, base: str = sys.executable) -> None:
    """Install the peer unless it is there, made from the requirements as they are now."""
    if not is_installed(peer):
        print(f"{peer}: installing (minutes)", flush=True)
        install(peer, base)


def install(peer: str, base: str) -> None:
    """Build the environment with the interpreter `base`; a failed or outdated one is replaced."""
    subprocess.run([base, "-m", "venv", "--clear", PEERS / peer / ".venv"], check=True)
    pip_install = [str(python(peer)), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip_install, "-r", _requirements(peer)], check=True)
    if _no_deps(peer).exists():
        subprocess.run([*pip_install, "--no-deps", "-r", _no_deps(peer)], check=True)
    _stamp(peer).write_text(_fingerprint(peer))


def _requirements(peer: str) -> Path:
    return PEERS / peer / "requirements.txt"


def _no_deps(peer: str) -> Path:
    return PEERS / peer / "no-deps.txt"


def _stamp(peer: str) -> Path:
    return PEERS / peer / ".venv" / ".installed"


def _fingerprint(peer: str) -> str:
    files = [_requirements(peer), _no_deps(peer)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.exists())).hexdigest()


def main() -> None:
    known = sorted(path.parent.name for path in PEERS.glob("*/requirements.txt"))
    parser = argparse.ArgumentParser(description="Make peers' virtual environments.")
    parser.add_argument("peers", nargs="*", default=known, help=f"default: all ({', '.join(known)})")
    parser.add_argument("--python", default=sys.executable, help="interpreter to build with (this one)")
    options = parser.parse_args()
    if unknown := sorted(set(options.peers) - set(known)):
        parser.error(f"unknown peer {', '.join(unknown)}; expected one of {', '.join(known)}")
    for peer in options.peers:
        ensure(peer, options.python)
        print(f"{peer}: ready")


if __name__ == "__main__":
    main()
