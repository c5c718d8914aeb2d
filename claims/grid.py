"""One long run: jobs are computed once and kept in out/rows/, then all go to claims/NN.full.json.

python claims/13_scoreboard.py                     resumes where an earlier call stopped
python claims/13_scoreboard.py --part 0/2          half of the jobs; --part 1/2 runs beside it
python claims/13_scoreboard.py --only random       jobs whose name contains this
python claims/13_scoreboard.py --set steps=20      a trial with other settings, kept in out/trial/
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from codebook_tutorial.core import data_path
from codebook_tutorial.model.hub import load_lm

ROOT = Path(__file__).resolve().parents[1]


def keep_last(fn):
    "fn with its last result kept, and dropped before the next one is computed."
    kept = {}

    def call(*key):
        if key not in kept:
            kept.clear()
            kept[key] = fn(*key)
        return kept[key]

    return call


@cache
def language():
    "The stories' model and its tokenizer."
    return load_lm("stories")


def sha256(path):
    "Checksum of a file."
    return hashlib.sha256(path.read_bytes()).hexdigest()


def commit():
    "The commit that the numbers come from."
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def write_whole(path, text):
    "Write a file under another name, then rename it: it is whole or it is not there."
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def claims_text(found, lines=()):
    "JSON as the claims are kept: indented; of the lists named in `lines`, one entry per line."
    if not lines:
        return json.dumps(found, indent=1) + "\n"
    head = json.dumps({k: v for k, v in found.items() if k not in lines}, indent=1)[:-2]
    for key in lines:
        head += f',\n "{key}": [\n' + ",\n".join(map(json.dumps, found[key])) + "\n]"
    return head + ("\n}\n" if len(lines) > 1 else "}\n")


@dataclass
class Grid:
    "Jobs (NamedTuples) of one chapter, how to run one, and what the file says about them."

    script: str  # its __file__: claims/NN_name.py
    settings: NamedTuple  # other settings, other rows; `version` is raised when a row means more
    jobs: Callable  # settings -> jobs, in the order of the rows
    _: KW_ONLY
    run_one: Callable  # job, settings -> a row, a list of rows, or (row, tensors to keep)
    finish: Callable  # grid -> what the file holds after its header
    inputs: tuple = ("stories/model.safetensors",)  # files of data/ that the rows rest on
    lines: tuple = ()  # lists that are written one entry per line
    take_up: bool = False  # start with the rows of the claims, where these have the same settings
    hardware: str = "one CPU core a process"
    trial: bool = False

    @cached_property
    def sha(self):
        "Checksums of the inputs."
        return {f"data/{name}": sha256(data_path(name)) for name in self.inputs}

    @cached_property
    def key(self):
        "Which settings and inputs the rows belong to."
        return hashlib.sha256(json.dumps([*self.settings, self.sha]).encode()).hexdigest()[:8]

    @property
    def out(self):
        "Where rows and trials are kept."
        return Path(self.script).resolve().parents[1] / "out"

    @property
    def claims(self):
        "Where all rows are written."
        name = f"{Path(self.script).name[:2]}.full.json"
        return (self.out / "trial" if self.trial else Path(self.script).parent) / name

    def name(self, job):
        "A job in one word: its kind and its fields."
        return "_".join(map(str, (type(job).__name__.lower(), *job)))

    def file(self, job):
        "Where a job's rows are kept."
        folder = self.out / "rows" / Path(self.script).name[:2] / self.key
        return folder / (quote(self.name(job), safe=" ,=+") + ".json")

    def rows(self, jobs=None, *, seconds=True):
        "The rows of some jobs (or of all), with their CPU seconds."
        found = []
        for job in self.jobs(self.settings) if jobs is None else jobs:
            kept = json.loads(self.file(job).read_text())
            more = {"cpu_seconds": kept["cpu_seconds"]} if seconds else {}
            found += [row | more for row in kept["rows"]]
        return found

    def tensors(self, job):
        "What a job kept besides its row; empty if it was taken from the claims."
        file = self.file(job).with_suffix(".safetensors")
        return load_file(file) if file.exists() else {}

    def compute(self, job):
        "Run one job and keep its rows."
        start = time.process_time()
        row = self.run_one(job, self.settings)
        row, tensors = row if isinstance(row, tuple) else (row, None)
        rows = row if isinstance(row, list) else [row]
        text = json.dumps(dict(rows=rows, cpu_seconds=time.process_time() - start))
        file = self.file(job)
        file.parent.mkdir(parents=True, exist_ok=True)
        if tensors:
            save_file(tensors, file.with_suffix(".safetensors"))
        write_whole(file, text)

    def committed(self):
        "The claims as they are, if they were made with these settings."
        found = json.loads(self.claims.read_text()) if self.claims.exists() else {}
        return found if found.get("settings") == self.key else {}

    def keep_committed(self):
        "Rows of the claims, kept as if they had just been computed."
        rows = self.committed().get("rows", [])
        for job in [job for job in self.jobs(self.settings) if not self.file(job).exists()]:
            for row in [row for row in rows if job._asdict().items() <= row.items()]:
                seconds = row.pop("cpu_seconds")
                write_whole(self.file(job), json.dumps(dict(rows=[row], cpu_seconds=seconds)))

    def write(self):
        "All rows and how they were made, to claims/NN.full.json."
        jobs = self.jobs(self.settings)
        seconds = sum(json.loads(self.file(job).read_text())["cpu_seconds"] for job in jobs)
        header = dict(
            command=f"python claims/{Path(self.script).name}",
            commit=commit(),
            hardware=self.hardware,
            machine=platform.machine(),
            hours=seconds / 3600,
            settings=self.key,
            inputs_sha256=self.sha,
        )
        write_whole(self.claims, claims_text(header | self.finish(self), self.lines))

    def main(self, argv=None):
        "Compute what is missing; write the claims if nothing is missing any more."
        args = options(self.settings, argv)
        grid = replace(self, settings=args.settings, trial=args.settings != self.settings)
        part, parts = map(int, args.part.split("/"))
        torch.set_num_threads(1)
        if grid.take_up:
            grid.keep_committed()
        jobs = grid.jobs(grid.settings)
        mine = [j for i, j in enumerate(jobs) if i % parts == part and args.only in grid.name(j)]
        for job in tqdm(
            [j for j in mine if not grid.file(j).exists()], desc=Path(self.script).stem
        ):
            grid.compute(job)
        missing = [grid.name(job) for job in jobs if not grid.file(job).exists()]
        if missing:
            return print(f"{len(missing)} of {len(jobs)} jobs to go: {', '.join(missing[:3])} ...")
        grid.write()
        print(f"{grid.claims} written")


def options(settings, argv=None):
    "Part, name and settings from the command line."
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, epilog=__doc__, formatter_class=form
    )
    p.add_argument("--part", default="0/1", help="share of the jobs, e.g. 0/2 and 1/2")
    p.add_argument("--only", default="", help="jobs whose name contains this")
    p.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help=str(settings))
    args = p.parse_args(argv)
    for name, _, value in (one.partition("=") for one in args.set):
        if name not in settings._fields:
            p.error(f"--set {name}: expected one of {', '.join(settings._fields)}")
        settings = settings._replace(**{name: json.loads(value)})
    args.settings = settings
    return args
