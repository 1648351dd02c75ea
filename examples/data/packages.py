"""How `packages.jsonl.gz` was made: short and long descriptions of packages, in words that many of them use.

    apt-get update && python examples/data/packages.py packages.jsonl.gz

Reads what apt has fetched on a Debian system, with `Acquire::Languages` "en". Kept are descriptions in plain
sentences, of 12 to 50 words, with a summary of 3 to 10 that takes at least half of its words from them; then
those that are almost wholly written in the 2,000 words that most of them share, so that a small model can
learn to read them.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

VOCABULARY = 2_000
RARE = 0.06  # of a description's words, at most


def index(kind: str) -> str:
    """What apt has fetched of one kind: "Packages" or "Translations"."""
    listed = run(
        "apt-get",
        "-o",
        "Acquire::Languages=en",
        "indextargets",
        "--format",
        "$(FILENAME)",
        f"Created-By: {kind}",
    )
    return "\n".join(run("/usr/lib/apt/apt-helper", "cat-file", name) for name in sorted(listed.split()))


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """The fields of each package; further lines of a field are kept as they are."""
    for block in text.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): ?(.*(?:\n .*)*)", block, re.MULTILINE))
        if "Package" in fields:
            yield fields


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def described(fields: dict[str, str], sources: dict[str, str]) -> dict[str, str] | None:
    """A package's two descriptions; None where they aren't sentences or don't fit each other."""
    summary, _, rest = fields.get("Description-en", "").partition("\n")
    paragraphs = re.sub(r"^ ", "", rest, flags=re.MULTILINE)
    if re.search(r"^\s*[*-] |^ |http", paragraphs, re.MULTILINE):  # lists, tables, addresses
        return None
    document = " ".join(paragraphs.replace("\n.\n", "\n").split())
    short, long = words(summary), words(document)
    if not (3 <= len(short) <= 10 and 12 <= len(long) <= 50 and (summary + document).isascii()):
        return None
    if sum(word in long for word in short) < len(short) / 2:
        return None
    name = fields["Package"]
    return {"package": name, "source": sources.get(name, name), "summary": summary, "document": document}


def common(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those in words that many of them use: what many use depends on which they are."""
    spoken = [words(f"{row['summary']} {row['document']}") for row in rows]
    chosen = list(range(len(rows)))
    for _ in range(4):
        counts = Counter(word for i in chosen for word in set(spoken[i]))
        known = {
            word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:VOCABULARY]
        }
        rare = [sum(word not in known for word in said) for said in spoken]
        chosen = [
            i
            for i, said in enumerate(spoken)
            if rare[i] <= RARE * len(said) and known.issuperset(words(rows[i]["summary"]))
        ]
    return [rows[i] for i in chosen]


def main() -> None:
    rows: dict[str, dict[str, str]] = {}
    summaries = set()
    sources = {p["Package"]: p.get("Source", p["Package"]).split()[0] for p in stanzas(index("Packages"))}
    for fields in sorted(stanzas(index("Translations")), key=lambda fields: fields["Package"]):
        row = described(fields, sources)
        if row is None or row["document"].lower() in rows or row["summary"].lower() in summaries:
            continue
        rows[row["document"].lower()] = row
        summaries.add(row["summary"].lower())
    lines = "".join(json.dumps(row) + "\n" for row in common(list(rows.values())))
    Path(sys.argv[1]).write_bytes(gzip.compress(lines.encode(), 9, mtime=0))
    print(f"{lines.count(chr(10))} packages")


if __name__ == "__main__":
    main()
