"""The layers in a prompt that gives them a label each, read back."""

import re


def read_cells(prompt: str) -> tuple[list[str], dict[str, list[str]]]:
    """What the numbers of a layer are, and those of each by blocks (``7``, ``0-2``) and name."""
    lines = prompt.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("layers by block"))
    legend = lines[start].partition("LABEL")[2].partition(": ")[2]
    titles = re.split(r"(?:^|; )\d ", legend)[1:]
    told = lines[start - 1].partition("per cent: ")[2].split("; ")
    labels = {label: name.split(" ")[0] for label, name in (part.split(" = ") for part in told)}
    found = {}
    for line in lines[start + 1 :]:
        blocks, _, row = line.partition(": ")
        if not re.fullmatch(r"\d+(-\d+)?", blocks):
            break
        for word in row.split(" "):
            found_label = re.match(r"([a-zA-Z]+|.*:)(?=\d)", word)
            assert found_label is not None
            label = found_label[0].removesuffix(":")
            cells = word[found_label.end() :].split("/")
            assert len(cells) == len(titles)
            found[f"{blocks}.{labels[label]}"] = cells
    return titles, found


def read_map(prompt: str, title: str) -> dict[str, str]:
    """One of the numbers of each cell, by blocks and projection."""
    titles, found = read_cells(prompt)
    (index,) = (i for i, words in enumerate(titles) if words.startswith(title))
    return {name: cells[index] for name, cells in found.items()}
