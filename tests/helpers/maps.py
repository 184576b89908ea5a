"""The layers of a prompt that gives them a label each, read back."""

import re


def read_cells(prompt: str) -> tuple[list[str], dict[str, list[str]]]:
    """What the numbers of a layer are, and those of each layer by block and projection."""
    lines = prompt.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("layers by block, each as"))
    legend = lines[start].partition(": ")[2]
    titles = re.split(r"(?:^|; )\d ", legend)[1:]
    labels = dict(part.split(" = ") for part in lines[start + 1].partition(": ")[2].split(", "))
    found = {}
    for line in lines[start + 2 :]:
        block, _, row = line.partition(": ")
        if not block.isdigit():
            break
        for word in row.split(" "):
            found_label = re.match(r"([a-zA-Z]+|.*:)(?=\d)", word)
            assert found_label is not None
            label = found_label[0].removesuffix(":")
            cells = word[found_label.end() :].split("/")
            assert len(cells) == len(titles)
            found[f"{block}.{labels[label]}"] = cells
    return titles, found


def read_map(prompt: str, title: str) -> dict[str, str]:
    """One of the numbers of each layer, by block and projection."""
    titles, found = read_cells(prompt)
    (index,) = (i for i, words in enumerate(titles) if words.startswith(title))
    return {name: cells[index] for name, cells in found.items()}
