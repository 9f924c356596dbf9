"""Each script and the notebook of examples/ runs, shortened. (slurm.sh and torchrun.sh: tests/runs/test_restart.py.)"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
VERDICT = re.compile(r"trained: kNN (0\.\d+); (\d+) codes in use; representation ok")


def run(folder: Path, *command: str) -> str:
    """The output of `command`, run in `folder` by this Python with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_example_is_run_by_a_test() -> None:
    """A new file in examples/ needs a test here or, for a shell script, in tests/runs/test_restart.py."""
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    here = {"pytorch_loop.py", "lightning_loop.py", "ddp_loop.py", "quickstart.ipynb"}
    restart = (EXAMPLES.parent / "tests" / "runs" / "test_restart.py").read_text(encoding="utf-8")
    assert names == here | {name for name in names if name.endswith(".sh") and name in restart}


def test_the_plain_loop_learns(tmp_path: Path) -> None:
    """Sixty steps: more than chance (.1) by kNN, more than two codes, and no constant output."""
    output = run(tmp_path, str(EXAMPLES / "pytorch_loop.py"), "--steps", "60")
    found = VERDICT.search(output)
    assert found, output
    assert float(found[1]) > 0.5
    assert int(found[2]) > 2


def test_two_processes_stay_together(tmp_path: Path) -> None:
    """The script itself compares the processes' weights; here, that it went through to the end."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    output = run(tmp_path, *launcher, str(EXAMPLES / "ddp_loop.py"), "--steps", "10")
    assert "codes in use over 2 processes" in output
    assert VERDICT.search(output), output


def test_lightning(tmp_path: Path) -> None:
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed: pip install lightning")
    output = run(tmp_path, str(EXAMPLES / "lightning_loop.py"), "--steps", "60")
    found = VERDICT.search(output)
    assert found, output
    assert float(found[1]) > 0.5


def notebook() -> dict:
    return json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))


def test_the_notebook_is_committed_without_outputs() -> None:
    cells = [cell for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code cells in order, with one epoch: by nbclient where that and a kernel are installed, else as one program."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    content = notebook()
    for cell in content["cells"]:
        cell["source"] = "".join(cell["source"]).replace("EPOCHS = 80", "EPOCHS = 1")
    sources = [cell["source"] for cell in content["cells"] if cell["cell_type"] == "code"]
    assert any("EPOCHS = 1\n" in source for source in sources)
    if importlib.util.find_spec("nbclient") and importlib.util.find_spec("ipykernel"):
        import nbclient
        import nbformat

        book = nbformat.from_dict(content)
        nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
        output = "".join(out.get("text", "") for cell in book.cells for out in cell.get("outputs", []))
    else:
        program = tmp_path / "notebook.py"
        program.write_text("import matplotlib\nmatplotlib.use('Agg')\n" + "\n".join(sources), encoding="utf-8")
        output = run(tmp_path, str(program))
    assert "trained      probe" in output
    assert re.search(r"code \d+: digits \[\d", output)
    assert (tmp_path / "runs" / "quickstart" / "backbone.safetensors").is_file()
