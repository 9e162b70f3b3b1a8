"""benches/beyond.py: that it runs from end to end, and that a wrong result is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import simulated
from contents import same
from on_device import about_uvm

#: Takes long, and is the same for every version of PyTorch.
pytestmark = pytest.mark.one_version

BENCHES = simulated.HERE.parent.parent / "benches"


@about_uvm
def test_it_runs(tmp_path: Path) -> None:
    """All experiments with small sizes, on the simulated device: each measures what it is named after."""
    out, markdown = tmp_path / "beyond.json", tmp_path / "beyond.md"
    command = [sys.executable, str(BENCHES / "beyond.py"), "--quick", "--passes", "2"]
    done = subprocess.run(
        [*command, "--out", str(out), "--markdown", str(markdown)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads(out.read_text())
    same(found["failures"], [])
    rows = {(row["experiment"], row["name"], row["batch"], row["limit"]): row for row in found["rows"]}
    same(len(rows), len(found["rows"]), "rows that are there twice")
    names = {
        experiment: {key[1] for key in rows if key[0] == experiment} for experiment in ("forward", "sweep", "train")
    }
    assert names["forward"] >= {"resident", "copies", "stream", "stream across passes", "remote", "naive"}, names
    same(names["sweep"], {"copies", "stream", "automatic"})
    same(len(names["train"]), 8, "kinds of training")
    for key, row in rows.items():
        same(len(row["ms"]), 2, str(key))
        if row["limit"] and "populated_device" in row and row["name"].startswith("stream"):
            assert row["populated_device"] <= row["limit"] + 40 * 2**20, (
                key,
                row,
            )  # a library's workspace is not counted
    weights = 8 * 1024 * 1024 * 2
    streams = sorted((row["limit"], row["link"]) for key, row in rows.items() if key[:3] == ("sweep", "stream", 1))
    same(streams[-1][1], 0, "all of it stays on the device")
    links = [link for _, link in streams]
    same(links, sorted(links, reverse=True), "less memory, more copies")
    assert all(link <= weights for link in links)
    assert "Forward at falling device limits" in markdown.read_text()


def test_wrong_results_are_noticed() -> None:
    """A digest that is not the resident model's; losses of another processor may be close."""
    sys.path.insert(0, str(BENCHES))
    import beyond

    def row(name: str, digest: str, experiment: str = "forward", values: object = None) -> dict:
        return {"experiment": experiment, "name": name, "batch": 1, "digest": digest, "values": values}

    rows = [row("resident", "a"), row("stream", "a"), row("copies", "b"), row("stream", "b", "sweep")]
    rows += [row("native, all resident", "c", "train", [1.0]), row("uvm, automatic", "d", "train", [1.0])]
    rows += [row("native, optimizer on the CPU", "e", "train", [1.0001])]
    wrong = beyond.judge(rows, simulated=False)
    same([text.partition(" batch")[0] for text in wrong], ["forward copies", "sweep stream", "train uvm, automatic"])
    same([entry["equal"] for entry in rows], [True, True, False, False, True, False, "close"])
    same(beyond.judge([dict(entry) for entry in rows], simulated=True), [])


@pytest.mark.parametrize("option", ["--experiments", "--names"])
def test_unknown_names(option: str) -> None:
    """An error that names what is allowed."""
    command = [sys.executable, str(BENCHES / "beyond.py"), option, "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    same(done.returncode, 2)
    assert f"{option}: nothing; allowed are" in done.stderr
