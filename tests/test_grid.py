"""The long runs' grid: it resumes when killed, shares its jobs, and writes the committed claims."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "claims"))
from grid import claims_text, keep_last  # noqa: E402

SCRIPTS = sorted((ROOT / "claims").glob("[0-9]*.py"))
# their jobs are the rows' first fields, and nothing but the rows is computed at the end
PLAIN = ("05_finetune", "09_autointerp", "10_ioi", "11_circuits", "12_steering", "13_scoreboard")
FAKE = '''
"""A small grid."""
import os, torch
from typing import NamedTuple
from grid import Grid


class Settings(NamedTuple):
    version: int = 1
    n: int = 5


class Job(NamedTuple):
    name: str
    seed: int


def jobs(s):
    return [Job(f"a/b {i}", i) for i in range(s.n)]


def run_one(job, s):
    with open(os.environ["DONE"], "a") as f:
        f.write(f"{job.seed} ")
    if str(job.seed) == os.environ.get("KILL"):
        os._exit(9)
    row = job._asdict() | dict(square=job.seed**2)
    if job.seed == 0:
        return row, dict(x=torch.ones(2))
    return row if job.seed % 2 else [row, row | dict(square=-1)]


def finish(grid):
    assert grid.tensors(jobs(grid.settings)[0])["x"].sum() == 2
    return dict(n=grid.settings.n, rows=grid.rows(seconds=False))


GRID = Grid(__file__, Settings(), jobs, run_one=run_one, finish=finish, lines=("rows",))
if __name__ == "__main__":
    GRID.main()
'''


@cache
def grid_of(stem):
    "A script's grid, imported as a module of its own."
    path = ROOT / "claims" / f"{stem}.py"
    spec = importlib.util.spec_from_file_location(f"claims_{stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GRID


@pytest.fixture
def fake(tmp_path):
    "fn(arguments, kill=number) -> (exit status, jobs that were begun); its folder."
    (tmp_path / "claims").mkdir()
    script = tmp_path / "claims" / "99_fake.py"
    script.write_text(FAKE)

    def call(*args, kill=""):
        done, path = tmp_path / "done", os.pathsep.join([str(ROOT / "claims"), str(ROOT)])
        done.write_text("")
        env = os.environ | dict(PYTHONPATH=path, DONE=str(done), KILL=kill, TQDM_DISABLE="1")
        got = subprocess.run(
            [sys.executable, script, *args], env=env, capture_output=True, text=True
        )
        return got.returncode, done.read_text().split()

    return call, tmp_path


def test_a_killed_run_resumes_and_writes_once_all_rows_are_there(fake):
    call, folder = fake
    found = folder / "claims" / "99.full.json"
    assert call(kill="3") == (9, ["0", "1", "2", "3"]) and not found.exists()
    assert call("--part", "0/2") == (0, ["4"]) and not found.exists()
    assert call("--only", "b 1") == (0, []) and not found.exists()
    assert call() == (0, ["3"])
    text = found.read_text()
    assert [r["square"] for r in json.loads(text)["rows"]] == [0, 1, 4, -1, 9, 16, -1]
    assert '"seed": 1, "square": 1},\n' in text and text.endswith("\n]}\n")
    assert call() == (0, []) and found.read_text().split('"rows"')[1] == text.split('"rows"')[1]
    assert not list(folder.rglob("*.part"))


def test_other_settings_are_a_trial_with_rows_of_its_own(fake):
    call, folder = fake
    assert call("--set", "n=2") == (0, ["0", "1"])
    assert not (folder / "claims" / "99.full.json").exists()
    assert json.loads((folder / "out" / "trial" / "99.full.json").read_text())["n"] == 2
    assert call("--set", "m=2")[0] == 2 and call("--part", "0/5") == (0, ["0"])


def test_the_last_result_is_dropped_before_the_next():
    calls, fn = [], None
    fn = keep_last(lambda i: calls.append(i) or i)
    assert [fn(1), fn(1), fn(2), fn(1)] == [1, 1, 2, 1] and calls == [1, 2, 1]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_committed_claims_are_what_the_grid_would_write(path):
    "Every byte of the file from what it holds."
    text = (ROOT / "claims" / f"{path.stem[:2]}.full.json").read_text()
    assert claims_text(json.loads(text), grid_of(path.stem).lines) == text


@pytest.mark.parametrize("stem", PLAIN)
def test_rows_are_assembled_as_they_are_committed(stem, tmp_path):
    "From a file per job to the bytes of the claims, but for the header: command, commit, hours."
    grid, number = grid_of(stem), stem[:2]
    text = (ROOT / "claims" / f"{number}.full.json").read_text()
    old = json.loads(text)
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / f"{number}.full.json").write_text(text)
    grid = replace(grid, script=str(tmp_path / "claims" / f"{stem}.py"), take_up=False)
    given = [row for key in ("rows", "again", "table_3") for row in old.get(key, [])]
    jobs = [job for job in grid.jobs(grid.settings) if rows_of(job, given)]
    grid = replace(grid, jobs=lambda settings: jobs)
    for job in jobs:
        rows = [dict(row) for row in rows_of(job, given)]
        seconds = [row.pop("cpu_seconds", 0.0) for row in rows]
        file = grid.file(job)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dict(rows=rows, cpu_seconds=seconds[0])))
    grid.write()
    new = json.loads(grid.claims.read_text())
    for key in ("rows", "stability", "again", "table_3"):
        assert new.get(key) == old.get(key)
    same = {
        key: old.get(key) for key in new if key not in ("command", "commit", "hours", "settings")
    }
    kept = ("machine", "hardware", "notes")
    assert all(new[key] == same[key] for key in same if key not in kept)
    assert grid.claims.read_text() == claims_text(new, grid.lines)


def rows_of(job, rows):
    "Committed rows of a job."
    if job[1:2] == ("table_3",):
        return [row for row in rows if (row.get("method"), row["seed"]) == ("table_3", job.seed)]
    return [row for row in rows if job._asdict().items() <= row.items()]


def test_settings_that_the_committed_rows_have():
    "So that rows of the claims are taken up, not computed again."
    for stem in ("13_scoreboard", "14_scale"):
        committed = json.loads((ROOT / "claims" / f"{stem[:2]}.full.json").read_text())
        assert grid_of(stem).key == committed["settings"]
    committed = json.loads((ROOT / "claims" / "14.full.json").read_text())
    grid = grid_of("14_scale")
    assert [grid.name(job) for job in grid.jobs(grid.settings)] == list(committed["rows"])


def test_rows_of_the_claims_are_taken_up(tmp_path):
    (tmp_path / "claims").mkdir()
    found = tmp_path / "claims" / "13.full.json"
    found.write_text((ROOT / "claims" / "13.full.json").read_text())
    old = json.loads(found.read_text())
    replace(grid_of("13_scoreboard"), script=str(tmp_path / "claims" / "13_scoreboard.py")).main([])
    new = json.loads(found.read_text())
    changed = [key for key in old if old[key] != new[key]]
    assert set(changed) <= {"command", "commit", "machine"} and list(old) == list(new)
