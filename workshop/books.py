"""The notebooks as files: which there are, read, write, execute, normalise."""

import asyncio, os, re, sys, time
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from .env import ROOT

NBS, OUT, CLAIMS = ROOT / "nbs", ROOT / "out", ROOT / "claims"
CELL_LIMIT = 600 if os.environ.get("COURSE_FULL", "") in ("", "0") else None  # seconds
PANEL = "application/vnd.jupyter.widget-view+json"


def chapters(only=()):
    "Paths of the chapters, all or those whose number is in `only`."
    books = sorted(NBS.glob("[0-9][0-9]_*.ipynb"))
    unknown = [n for n in only if not any(b.name.startswith(n + "_") for b in books)]
    if unknown:
        there = ", ".join(b.name[:2] for b in books)
        sys.exit(f"no chapter {', '.join(unknown)}; there are {there}")
    return [b for b in books if not only or b.name[:2] in only]


def library_books(only=()):
    "Paths of the library's own notebooks (nbs/lib), all or those named in `only`, e.g. lib/search."
    books = sorted((NBS / "lib").rglob("*.ipynb"))
    named = {b.relative_to(NBS).with_suffix("").as_posix(): b for b in books}
    unknown = [n for n in only if n not in named]
    if unknown:
        sys.exit(f"no notebook {', '.join(unknown)}; there are {', '.join(named) or 'none'}")
    return [b for n, b in named.items() if not only or n in only]


def write_text(path, text):
    "Write whole or not at all: to a temporary name, then rename."
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(path)


def read_book(path):
    "The notebook of a file."
    return nbformat.read(path, as_version=4)


def write_book(path, nb):
    "Write a notebook whole or not at all."
    write_text(path, nbformat.writes(nb) + "\n")


def directives(cell):
    "Words of a cell's `#|` lines: `#| export checks.fsm` gives {'export': 'checks.fsm'}."
    if cell.cell_type != "code":
        return {}
    lines = re.findall(r"^#\|\s*([\w-]+):?[ \t]*(.*)$", cell.source, re.M)
    return {name: rest.strip() for name, rest in lines}


def keep(out):
    "Whether an output belongs in the committed notebook: no progress bars, warnings or log lines."
    data = out.get("data", {})
    bar = PANEL in data and re.search(r"\[[\d:]+[<,]", data.get("text/plain", ""))
    return not bar and (out.output_type != "stream" or out.name != "stderr")


def normalise(nb):
    "Outputs that are the same from every run: no stderr, counts, timestamps or widgets' states."
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.outputs = [o for o in cell.outputs if keep(o)]
        for o in cell.outputs:
            if o.get("data", {}).pop(PANEL, None):  # a panel's state belongs to its kernel
                o["data"]["text/plain"] = "a panel: it comes to life where the cell is run"
            if "execution_count" in o:
                o.execution_count = None
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nb.metadata = nbformat.from_dict({"kernelspec": kernel})
    return nb


class Client(NotebookClient):
    "Executes a notebook, skips `#| eval: false` cells, and remembers each cell's seconds."

    async def async_execute_cell(self, cell, cell_index, **kw):
        if directives(cell).get("eval") == "false":
            return cell
        start = time.time()
        try:
            return await super().async_execute_cell(cell, cell_index, **kw)
        finally:
            self.seconds.append((round(time.time() - start, 1), cell_index))


class Outcome(NamedTuple):
    "What a run of a notebook gives."

    nb: nbformat.NotebookNode
    failure: str  # "" if every cell passed
    seconds: list  # [(seconds, cell)]
    memory: int  # the kernel's peak, MB


def peak_mb(client):
    "Peak memory of the kernel so far, MB (Linux; 0 elsewhere)."
    try:
        status = Path(f"/proc/{client.km.provisioner.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024
    except (OSError, AttributeError, TypeError):
        return 0


def kernel_env(number):
    "Environment variables of a chapter's kernel."
    env = os.environ | {
        "COURSE_CLAIMS": str(OUT / "claims" / f"{number}.json"),
        "PYTHONHASHSEED": "0",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    own = [os.environ.get(name) or "." for name in ("COURSE_MODEL", "COURSE_TEXT")]
    if all(Path(path).exists() for path in own):  # else something of the Hub is wanted
        env.setdefault("HF_HUB_OFFLINE", "1")
    if CELL_LIMIT:  # FAST: one thread sums in one order, and two on a busy core are far slower
        env.setdefault("OMP_NUM_THREADS", "1")
    return env


async def execute(path):
    "Run a chapter in its own kernel; its Outcome."
    nb, number = read_book(path), path.name[:2]
    folder = OUT / "run" / number
    folder.mkdir(parents=True, exist_ok=True)
    (OUT / "claims" / f"{number}.json").unlink(missing_ok=True)
    place = {"metadata": {"path": str(folder)}}
    client = Client(nb, timeout=CELL_LIMIT, kernel_name="python3", resources=place)
    client.extra_arguments, client.seconds = ["--log-level=ERROR"], []
    client.km = client.create_kernel_manager()
    failure, memory = "", 0
    try:  # not nbclient's own context manager: it takes Ctrl-C for itself
        await client.async_start_new_kernel(env=kernel_env(number))
        await client.async_start_new_kernel_client()
        for i, cell in enumerate(nb.cells):
            await client.async_execute_cell(cell, i, store_history=True)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
        failure = f"cell {i}: {e}"
    finally:
        memory = peak_mb(client)
        if client.kc:
            client.kc.stop_channels()
        await client.km.shutdown_kernel(now=True)
    return Outcome(nb, failure, client.seconds, memory)


async def execute_all(books, jobs, done):
    "Run chapters, `jobs` at a time; `done(path, outcome)` as each ends."
    gate = asyncio.Semaphore(jobs)

    async def one(path):
        async with gate:
            done(path, await execute(path))

    await asyncio.gather(*map(one, books))
