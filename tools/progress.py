"""Which checks pass in a learner's copies: `course.py progress FOLDER`. Runs the learner's code, each notebook in a process of its own, nothing but imports, exercises and their checks."""
import argparse, ast, contextlib, itertools, json, re, subprocess, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from books import NBS, directives, read_book  # noqa: E402

MARKS = {"passed": "■", "not yet": "□", "not begun": "·", "stopped": "×"}


def exercises(nb):
    "(name, source of the exercise, source of its check) in order."
    code, title, found = [], "", []
    for cell in nb.cells:
        if cell.cell_type == "markdown": title = (re.findall(r"^### Exercise (\d\d\.\d+)", cell.source, re.M) or [title])[-1]
        else: code.append((title, cell))
    for i, (title, cell) in enumerate(code):
        if "exercise" not in directives(cell): continue
        until = itertools.takewhile(lambda later: "exercise" not in directives(later[1]), code[i + 1:])          # a scratch cell may stand between
        found.append((title, cell.source, next((c.source for _, c in until if re.search(r"^check_\w+\(", c.source, re.M)), "")))
    return found


def imports(nb):
    "Import statements of a notebook, one by one; cells that are no plain Python are passed over."
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        with contextlib.suppress(SyntaxError):
            for node in ast.parse(cell.source).body:
                if isinstance(node, (ast.Import, ast.ImportFrom)): yield ast.unparse(node)


def judge(source, check, names):
    "(state, message) of one exercise."
    todo = re.search(r"^\s*\.\.\.\s*# your code here", source, re.M)
    if not check: return ("not begun", "") if todo else ("not yet", "its check was deleted: take the cell after it from a fresh copy")
    try:
        exec(source, names)
        *before, last = ast.parse(check).body
        exec(compile(ast.Module(before, []), "check", "exec"), names)
        verdict = eval(compile(ast.Expression(last.value), "check", "eval"), names)
    except Exception as e: verdict, message = False, f"stopped with {type(e).__name__}: {e}"[:300]
    else: message = getattr(verdict, "message", repr(verdict))[:300]
    return ("passed", "") if verdict else ("not begun", "") if todo else ("not yet", message)


def work(path, start, out):
    "Judge a notebook's exercises from number `start` on, one line of JSON each."
    nb, names = read_book(path), {"__name__": "learner"}
    with open(out, "a", encoding="utf-8") as lines:
        for line in imports(nb):
            with contextlib.suppress(Exception): exec(line, names)
        print(json.dumps("ready"), file=lines, flush=True)
        for title, source, check in exercises(nb)[start:]:
            print(json.dumps([title, *judge(source, check, names)]), file=lines, flush=True)


def states(path, limit):
    "[(exercise, state, message)] of one notebook; one that hangs is stopped after `limit` seconds, or ends the process, and the next goes on."
    total, found = [title for title, *_ in exercises(read_book(path))], []
    while len(found) < len(total):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "lines"; out.touch()
            child = subprocess.Popen([sys.executable, __file__, "--work", path, str(len(found)), out], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=path.parent)
            seen, last = 0, time.time()
            while child.poll() is None and time.time() - last < (limit if seen else 300):          # the first line comes after the imports
                time.sleep(.05)
                if (n := out.read_text(encoding="utf-8").count("\n")) > seen: seen, last = n, time.time()
            hung = child.poll() is None
            if hung: child.kill()
            child.wait()
            lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]       # the last may have been cut
            found += [tuple(row) for row in lines if row != "ready"]
            if not lines: return found + [(title, "stopped", "the notebook's imports " + ("take longer than five minutes" if hung else f"end the process (status {child.returncode})")) for title in total[len(found):]]
        if len(found) < len(total): found.append((total[len(found)], "stopped", f"took longer than {limit} seconds" if hung else f"ended the process (status {child.returncode})"))
    return found


def main(argv=None):
    p = argparse.ArgumentParser(prog="course.py progress", description="Which checks pass in a learner's copies. The learner's code is run, with your rights: use it on copies you trust.")
    p.add_argument("folder", type=Path); p.add_argument("--limit", type=int, default=60, metavar="SECONDS", help="for each exercise (default %(default)s)")
    args = p.parse_args(argv)
    folder = args.folder.expanduser().resolve()
    books = sorted(folder.glob("[0-9][0-9]_*.ipynb")) if folder.is_dir() else []
    if not books: sys.exit(f"progress: no chapters (NN_name.ipynb) in {folder}; `course.py learner FOLDER` writes them")
    done = count = unread = 0
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    for path in books:
        try: read_book(path)
        except Exception as e:
            unread += 1
            print(f"{path.stem:<16} cannot be read as a notebook: {type(e).__name__}: {str(e)[:200]}", flush=True); continue
        rows = states(path, args.limit)
        if (NBS / path.name).exists(): rows += [(title, "not begun", "its cell, or the line #| exercise in it, was deleted") for title, *_ in exercises(read_book(NBS / path.name)) if title not in {row[0] for row in rows}]
        passed = sum(state == "passed" for _, state, _ in rows)
        done, count = done + passed, count + len(rows)
        print(f"{path.stem:<16} {''.join(MARKS[state] for _, state, _ in rows):<8} {passed} of {len(rows)}", flush=True)
        for title, state, message in rows:
            if message: print(f"    {title} {state}: {message}", flush=True)
    print(f"{done} of {count} exercises pass   ({', '.join(f'{mark} {state}' for state, mark in MARKS.items())})")
    return 1 if unread else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]: work(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else: sys.exit(main())
