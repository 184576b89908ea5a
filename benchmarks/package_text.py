"""Writes the Python sources of installed packages as rows of text, for a domain of code.

python benchmarks/package_text.py pydantic click rich --out code-calibration.jsonl
python benchmarks/package_text.py networkx jinja2 --out code-test.jsonl
"""

import argparse
import hashlib
import importlib.util
import json
from pathlib import Path


def sources(package: str) -> list[Path]:
    """The ``.py`` files of an installed package, its tests left out."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"no package {package!r} is installed")
    root = Path(spec.submodule_search_locations[0])
    return [path for path in root.rglob("*.py") if "tests" not in path.relative_to(root).parts]


def main() -> None:
    """Write a row for each file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    texts = [p.read_text(encoding="utf-8") for name in options.packages for p in sources(name)]
    # Files of one folder are alike, so the order is that of their hashes.
    texts = sorted(
        (t for t in texts if t.strip()), key=lambda t: hashlib.sha256(t.encode()).digest()
    )
    rows = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    options.out.write_text("".join(rows), encoding="utf-8")
    print(f"{len(texts)} files, {sum(map(len, texts)):,} characters: {options.out}")


if __name__ == "__main__":
    main()
