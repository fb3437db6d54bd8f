"""Whole runs, to the letter: the workload file, layers.csv and what is printed.

A new case is an entry in CASES, and its files, which this command writes:

    python tests/test_golden.py

It writes the files of all cases as the script has them now, and names those that changed: look at
them before they are kept. Folders and seconds stand there as <folder> and <seconds>.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest

from helpers import FAST, MNK_INPUTS, run

GOLDEN = Path(__file__).resolve().parent / "golden"
OF_16 = "--num_npus=16 --num_packages=2"

# The flags of each case, in a folder with `mnk_inputs` and `golden`; all with analytical cycles.
CASES = {
    "example_DATA": f"--parallel=DATA {OF_16}",
    "example_MODEL": f"--parallel=MODEL {OF_16}",
    "example_HYBRID_DATA_MODEL": f"--parallel=HYBRID_DATA_MODEL {OF_16}",
    "example_HYBRID_MODEL_DATA": f"--parallel=HYBRID_MODEL_DATA {OF_16}",
    "example_HYBRID_CUSTOMIZED": (
        f"--mnk=mnk_inputs/example_customized.csv --parallel=HYBRID_CUSTOMIZED {OF_16}"
    ),
    "example_in_ns": f"--time_unit=ns --clock_mhz=700 --datatype_size=4 {OF_16}",
    # Some collectives have one member; all files that a run can write.
    "example_in_1_package": (
        "--parallel=HYBRID_DATA_MODEL --time_unit=us --clock_mhz=100 --update_time=0"
        " --chakra_et=traces/x --num_passes=2 --summary_csv=s.csv"
    ),
    "bert_large": f"--mnk=mnk_inputs/bert_large.csv --parallel=HYBRID_DATA_MODEL {OF_16}",
    "gpt3_on_1024_NPUs": (
        "--mnk=mnk_inputs/gpt3_175b.csv --parallel=HYBRID_DATA_MODEL"
        " --num_npus=1024 --num_packages=128"
    ),
    "resnet50": f"--mnk=mnk_inputs/resnet50.csv --parallel=DATA --minibatch=256 {OF_16}",
    "resnet50_rounded_down": (
        "--mnk=mnk_inputs/resnet50.csv --parallel=HYBRID_MODEL_DATA --minibatch=30"
        " --num_npus=12 --num_packages=3 --shard_rounding=down"
    ),
    "groups": (
        "--mnk=golden/groups/table.csv --parallel=HYBRID_DATA_MODEL --minibatch=6"
        " --num_npus=12 --num_packages=3"
    ),
    "dlrm": f"--mnk=mnk_inputs/dlrm.csv --parallel=HYBRID_DLRM {OF_16}",
}


def results(case: str, folder: Path) -> dict[str, str]:
    """Run a case; return its files by name."""
    (folder / "mnk_inputs").symlink_to(MNK_INPUTS)
    (folder / "golden").symlink_to(GOLDEN)
    result = run(folder, FAST, *CASES[case].split())
    assert result.status == 0, result
    (layers,) = (folder / "outputs").rglob("layers.csv")
    printed = result.out.replace(str(folder.resolve()), "<folder>")
    return {
        "workload.txt": (folder / "workload.txt").read_text(),
        "layers.csv": layers.read_text(),
        "printed.txt": re.sub(r"\b\d+\.\d s$", "<seconds> s", printed, flags=re.MULTILINE),
    }


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, tmp_path: Path) -> None:
    """Written anew by `python tests/test_golden.py`."""
    for name, text in results(case, tmp_path).items():
        assert text == (GOLDEN / case / name).read_text(), name


def test_every_golden_folder_is_a_case() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(CASES)


def write_golden() -> None:
    """Write the files of all cases, and print the names of those that changed."""
    for case in CASES:
        (GOLDEN / case).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            for name, text in results(case, Path(folder)).items():
                file = GOLDEN / case / name
                if not file.exists() or file.read_text() != text:
                    print(f"changed: {file}")
                    file.write_text(text)


if __name__ == "__main__":
    write_golden()
