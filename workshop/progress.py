"""`course.py progress FOLDER`: which checks pass in a learner's copies.

Runs the learner's code with your rights, each notebook in its own process: imports, exercises and
their checks, nothing else. Use it on copies you trust.
"""

import ast, contextlib, itertools, json, re, subprocess, sys, tempfile, time
from pathlib import Path

from .books import NBS, directives, read_book
from .env import HERE

MARKS = {"passed": "■", "not yet": "□", "not begun": "·", "stopped": "×"}
START_LIMIT = 300  # seconds for a notebook's imports
GONE = "its cell, or the line #| exercise in it, was deleted"
NO_CHECK = "its check was deleted: take the cell after it from a fresh copy"


def exercises(nb):
    "(name, source of the exercise, source of its check) in order."
    code, title, found = [], "", []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            title = (re.findall(r"^### Exercise (\d\d\.\d+)", cell.source, re.M) or [title])[-1]
        else:
            code.append((title, cell))
    for i, (title, cell) in enumerate(code):
        if "exercise" not in directives(cell):
            continue
        later = [c for _, c in code[i + 1 :]]  # a scratch cell may come before the check
        until = itertools.takewhile(lambda c: "exercise" not in directives(c), later)
        checks = (c.source for c in until if re.search(r"^check_\w+\(", c.source, re.M))
        found.append((title, cell.source, next(checks, "")))
    return found


def imports(nb):
    "Import statements of a notebook, one by one; cells that are not plain Python are skipped."
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        with contextlib.suppress(SyntaxError):
            for node in ast.parse(cell.source).body:
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    yield ast.unparse(node)


def judge(source, check, names):
    "(state, message) of one exercise."
    todo = re.search(r"^\s*\.\.\.\s*# your code here", source, re.M)
    if not check:
        return ("not begun", "") if todo else ("not yet", NO_CHECK)
    try:
        exec(source, names)
        *before, last = ast.parse(check).body
        exec(compile(ast.Module(before, []), "check", "exec"), names)
        verdict = eval(compile(ast.Expression(last.value), "check", "eval"), names)
    except Exception as e:
        verdict, message = False, f"stopped with {type(e).__name__}: {e}"[:300]
    else:
        message = getattr(verdict, "message", repr(verdict))[:300]
    if verdict:
        return "passed", ""
    return ("not begun", "") if todo else ("not yet", message)


def judge_rest(args):
    "Judge a notebook's exercises from number `start` on, writing one line of JSON each."
    nb, names = read_book(Path(args.path)), {"__name__": "learner"}
    with open(args.out, "a", encoding="utf-8") as lines:
        for line in imports(nb):
            with contextlib.suppress(Exception):
                exec(line, names)
        print(json.dumps("ready"), file=lines, flush=True)
        for title, source, check in exercises(nb)[args.start :]:
            print(json.dumps([title, *judge(source, check, names)]), file=lines, flush=True)
    return 0


def watch(child, out, limit):
    "Wait for a judging process, and stop it when a line takes too long; whether it was stopped."
    seen, last = 0, time.time()
    while child.poll() is None:
        if time.time() - last >= (limit if seen else START_LIMIT):  # line 1 is after the imports
            child.kill()
            child.wait()
            return True
        time.sleep(0.05)
        n = out.read_text(encoding="utf-8").count("\n")
        if n > seen:
            seen, last = n, time.time()
    return False


def judged(path, start, limit):
    "(lines written, why it ended early) of one process that judges from exercise `start` on."
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lines"
        out.touch()
        command = [sys.executable, HERE, "judge", path, str(start), out]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        child = subprocess.Popen(command, cwd=path.parent, **quiet)
        hung = watch(child, out, limit)
        texts = out.read_text(encoding="utf-8").splitlines(keepends=True)
    lines = [json.loads(text) for text in texts if text.endswith("\n")]  # the last may be cut
    died = f"(status {child.returncode})"
    if not lines:
        late = "take longer than five minutes" if hung else f"end the process {died}"
        return lines, f"the notebook's imports {late}"
    return lines, f"took longer than {limit} seconds" if hung else f"ended the process {died}"


def states(path, limit):
    "[(exercise, state, message)] of one notebook; after one that hangs or dies the next goes on."
    total, found = [title for title, *_ in exercises(read_book(path))], []
    while len(found) < len(total):
        lines, why = judged(path, len(found), limit)
        found += [tuple(row) for row in lines if row != "ready"]
        left = total[len(found) :]
        if not lines:
            return found + [(title, "stopped", why) for title in left]
        if left:
            found.append((left[0], "stopped", why))
    return found


def report(path, limit):
    "Print one notebook's exercises: (how many pass, how many there are)."
    rows = states(path, limit)
    if (NBS / path.name).exists():
        there = {row[0] for row in rows}
        every = [title for title, *_ in exercises(read_book(NBS / path.name))]
        rows += [(title, "not begun", GONE) for title in every if title not in there]
    passed = sum(state == "passed" for _, state, _ in rows)
    marks = "".join(MARKS[state] for _, state, _ in rows)
    print(f"{path.stem:<16} {marks:<8} {passed} of {len(rows)}", flush=True)
    for title, state, message in rows:
        if message:
            print(f"    {title} {state}: {message}", flush=True)
    return passed, len(rows)


def progress(args):
    "Report every notebook of a folder; 1 if one cannot be read."
    folder = Path(args.folder).expanduser().resolve()
    books = sorted(folder.glob("[0-9][0-9]_*.ipynb")) if folder.is_dir() else []
    if not books:
        sys.exit(
            f"progress: no chapters (NN_name.ipynb) in {folder}; "
            "`course.py learner FOLDER` writes them"
        )
    done = count = unread = 0
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    for path in books:
        try:
            read_book(path)
        except Exception as e:
            unread += 1
            why = f"{type(e).__name__}: {str(e)[:200]}"
            print(f"{path.stem:<16} cannot be read as a notebook: {why}", flush=True)
            continue
        passed, total = report(path, args.limit)
        done, count = done + passed, count + total
    legend = ", ".join(f"{mark} {state}" for state, mark in MARKS.items())
    print(f"{done} of {count} exercises pass   ({legend})")
    return 1 if unread else 0
