"""The one parser of `course.py`, and the function behind each verb. Standard library only."""

import argparse, importlib, os

from . import env

OPEN = ("test", "lab", "bench", "versions")  # their further arguments go to the tool behind them
OUTSIDE = ("doctor", "versions")  # need no environment, or make their own


def parser():
    "Every verb with its flags; `to` names the module and function behind it."
    p = argparse.ArgumentParser(
        prog="course.py",
        description="The course's one command. The first call sets up .venv by itself.",
    )
    verbs = p.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name, to=None, **kw):
        found = verbs.add_parser(name, **kw)
        found.set_defaults(to=to)
        return found

    for add in (add_readers, add_authors, add_learners, add_projects):
        add(verb)
    return p


def add_readers(verb):
    "Verbs for everybody who reads the course."
    text = "execute the chapters; results go to out/, the work tree stays as it was"
    run = verb("run", to="run.run", help=text)
    text = "these chapters alone, e.g. --only 02"
    run.add_argument("--only", nargs="+", metavar="NN", default=[], help=text)
    text = (
        "for authors: name the cells whose committed outputs differ from this run's "
        "(another machine rounds and draws differently)"
    )
    run.add_argument("--outputs", action="store_true", help=text)
    jobs = min(2, os.cpu_count() or 1)
    text = "chapters at a time (default %(default)s)"
    run.add_argument("--jobs", type=int, default=jobs, help=text)
    verb("test", help="run the tests; further arguments go to pytest, e.g. test -k codebook")
    verb("lab", help="open the chapters in JupyterLab; further arguments go to it")


def add_authors(verb):
    "Verbs for authors of chapters."
    text = "for authors: text -> notebook, export, execute, normalise, clean, update claims"
    author = verb("author", to="author.author", help=text)
    text = "chapters, or library notebooks such as lib/search (default: all chapters)"
    author.add_argument("only", nargs="*", metavar="NN", help=text)
    text = "only write the notebooks as text to out/text/, to be edited there"
    author.add_argument("--text", action="store_true", help=text)
    text = (
        "export, clean, make README's tables, then fail on any change there that is not committed, "
        "and on code that breaks the rules of form"
    )
    check = verb("check", to="check.check", help=text)
    text = "only measure the form of the code and print the table; changes nothing"
    check.add_argument("--report", action="store_true", help=text)


def add_learners(verb):
    "Verbs for learners and teachers."
    text = "write the learner's copies: exercises as stubs, no solutions"
    learner = verb("learner", to="learner.learner", help=text)
    learner.add_argument("folder", metavar="FOLDER")
    text = "overwrite notebooks that are already there"
    learner.add_argument("--force", action="store_true", help=text)
    text = "which checks pass in a folder of learner's copies (runs their code)"
    progress = verb("progress", to="progress.progress", help=text)
    progress.add_argument("folder", metavar="FOLDER")
    text = "for each exercise (default %(default)s)"
    progress.add_argument("--limit", type=int, default=60, metavar="SECONDS", help=text)
    judge = verb("judge", to="progress.judge_rest")  # progress calls it: a notebook, a process
    for name, kind in (("path", str), ("start", int), ("out", str)):
        judge.add_argument(name, type=kind)
    text = "write every chapter's figures with their alt text, for slides"
    figures = verb("figures", to="figures.figures", help=text)
    figures.add_argument("folder", metavar="FOLDER")
    text = "run the chapters again and draw larger, e.g. 200; default: the committed pictures"
    figures.add_argument("--dpi", type=int, help=text)
    text = "these chapters alone"
    figures.add_argument("--only", nargs="+", metavar="NN", default=[], help=text)


def add_projects(verb):
    "Verbs about the machine and the whole project."
    verb("docs", to="pages.docs", help="build the documentation site into out/docs/html, offline")
    text = (
        "is this machine ready? Python, disk, memory, environment, GPU, network; installs nothing"
    )
    doctor = verb("doctor", to="doctor.doctor", help=text)
    doctor.add_argument("--offline", action="store_true", help="do not ask the network")
    text = (
        "measure speed and memory beside other libraries, each in its own environment; "
        "`bench --help` for its parts"
    )
    verb("bench", add_help=False, help=text)
    text = (
        "run the tests with the oldest or newest versions that the requirements allow, in "
        "out/versions; further arguments go to pytest"
    )
    versions = verb("versions", to="try_versions.versions", help=text)
    versions.add_argument("which", choices=["oldest", "newest"])
    versions.add_argument("--torch", help="this version of torch, whatever the bounds say")


def parse(argv):
    "Arguments of one command line; `rest` has those that are for the tool behind the verb."
    args, rest = parser().parse_known_args(argv)
    if rest and args.verb not in OPEN:
        parser().error(f"unknown arguments: {' '.join(rest)}")
    args.rest = rest
    return args


def follow(args):
    "Call the function behind a verb; its exit status."
    module, name = args.to.split(".")
    return getattr(importlib.import_module(f"workshop.{module}"), name)(args)


def main(argv):
    "Outside the environment: hand the command line on to the environment's Python."
    args = parse(argv)
    if args.verb in OUTSIDE:
        return follow(args)
    if args.verb == "test":
        return env.call("-m", "pytest", *args.rest, cwd=env.ROOT)
    if args.verb == "bench":
        return env.call("benchmarks/bench.py", *args.rest, cwd=env.ROOT)
    if args.verb == "lab":
        elsewhere = any(a.startswith("--notebook-dir") or "root_dir" in a for a in args.rest)
        folder = [] if elsewhere else ["--notebook-dir", "nbs"]
        return env.call("-m", "jupyter", "lab", *folder, *args.rest, cwd=env.ROOT)
    return env.call(env.HERE, *argv)


def inside(argv):
    "Inside the environment: do what the command line says."
    try:
        return follow(parse(argv))
    except KeyboardInterrupt:
        print("\nstopped; what was finished is in out/, the chapters are as they were", flush=True)
        return 130
