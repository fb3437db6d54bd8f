"""Read convolution tables as SCALE-Sim's own reader has them (by hand; not collected by pytest).

    python tests/corpus.py FOLDER...

Give folders of SCALE-Sim's repositories, whose tables can't be kept here. Each table that both can
read has to have the same layers; tables that only one of them reads are listed, with the reason.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import app
from scalesim.topology_utils import topologies

import gen_astrasim_workload_input as tool
import helpers

Sizes = list[tuple[int, int, int]]


def as_this_tool_reads(path: Path) -> Sizes | str:
    """Return m, n and k of each layer, or why there are none."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            layers = helpers.layers_of_table(path)
    except tool.UserError as error:
        return str(error)
    return [(layer.m, layer.n, layer.k) for layer in layers]


def as_scalesim_reads(path: Path) -> Sizes | str:
    """Return m, n and k of each layer, or why there are none."""
    reader = topologies()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            reader.load_arrays_conv(str(path))
            reader.topo_calc_hyperparams()
    except Exception as error:  # it has no errors of its own
        return repr(error)
    sizes = []
    for entry, derived in zip(reader.topo_arrays, reader.layers_calculated_hyperparams):
        height, width, _, window = derived
        sizes.append((height * width, entry[6], window))
    return sizes


def main(argv: Sequence[str]) -> int:
    """Compare all tables below these folders; return 1 where one differs."""
    equal, different = 0, 0
    for folder in argv[1:]:
        for path in sorted(Path(folder).rglob("*.csv")):
            first_line = path.read_text("utf-8", "replace").partition("\n")[0].lower()
            if "filter height" not in first_line:
                continue
            ours, theirs = as_this_tool_reads(path), as_scalesim_reads(path)
            if ours == theirs:
                equal += 1
            elif isinstance(ours, str) or isinstance(theirs, str):
                reason = ours if isinstance(ours, str) else f"SCALE-Sim: {theirs}"
                print(f"{path}: {reason}")
            else:
                different += 1
                print(f"{path}: DIFFERENT")
    print(f"{equal} equal, {different} different")
    return 1 if different else 0


if __name__ == "__main__":
    app.run(main)
