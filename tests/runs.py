"""Runs of which the text file is not the point, and readers of what they leave."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import gen_astrasim_workload_input as tool
from chakra_reader import Node, read_trace
from helpers import inside, settings

TYPED = "Layer,m,n,k,Type,Count,CustomizedParallelization"


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file by the names of its columns."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run_inside(folder: Path, **changes: Any) -> tool.Settings:
    """Run in a folder with `settings`; return them."""
    chosen = settings(folder, **changes)
    with inside(folder):
        tool.run(chosen)
    return chosen


def layers_csv_of(folder: Path, **changes: Any) -> list[dict[str, str]]:
    """Return the rows of layers.csv that these settings give."""
    chosen = run_inside(folder, **changes)
    return read_rows(folder / "outputs" / chosen.parallel / chosen.run_name / "layers.csv")


def summary_row_of(folder: Path, **changes: Any) -> dict[str, str]:
    """Return the row that these settings give in a new summary."""
    run_inside(folder, **changes, summary_csv=folder / "s.csv")
    (row,) = read_rows(folder / "s.csv")
    return row


def traces(folder: Path) -> dict[str, Any]:
    """Return the settings of traces that have a us for each cycle."""
    return {"chakra_et": folder / "et" / "x", "clock_mhz": 1.0}


def trace_of(folder: Path, **changes: Any) -> list[Node]:
    """Return the nodes of the first NPU's trace."""
    run_inside(folder, **{**traces(folder), **changes})
    return read_trace(folder / "et" / "x.0.et")


def came_before(nodes: list[Node]) -> dict[int, set[int]]:
    """Return all nodes that have to end before a node starts, for each."""
    before: dict[int, set[int]] = {}
    for node in nodes:
        before[node.id] = set(node.after).union(*(before[number] for number in node.after))
    return before
