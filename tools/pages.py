"""The site behind `course.py docs`: chapters with their committed outputs, the library, the findings, the static pages; then Sphinx."""
import argparse, ast, base64, html, re, shutil, subprocess, sys, textwrap
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parent))
import books  # noqa: E402
from books import NBS, OUT, ROOT, chapters, directives, learner_copy, read_book, stub, write_book, write_text  # noqa: E402

DOCS, SRC, SITE, LIB = ROOT / "docs", OUT / "docs" / "src", OUT / "docs" / "html", ROOT / "codebook_tutorial"
STATIC = {"06": "codes.html", "09": "features.html", "12": "steering.html"}       # chapter -> the page that it writes as it runs
TOO_COMMON = ("generate",)                # mostly the models' own method is meant


# ---- the library's pages ---------------------------------------------------------------------------------------------
CALLED = ("property", "classmethod", "staticmethod", "contextmanager")


def head(lines, node):
    "A definition's first lines as they stand, with the comments that give shapes, and the decorators that change how it is called; without its body."
    first = node.body[0].lineno - 1
    text = lines[node.lineno - 1:max(first, node.lineno)]
    if first < node.lineno: text = [text[0][:node.body[0].col_offset].rstrip()]
    marks = [f"@{mark}" for d in node.decorator_list if (mark := ast.unparse(d)) in CALLED or mark.startswith("dataclass")]
    if any("cls_method=True" in ast.unparse(d) for d in node.decorator_list): marks = ["@classmethod"]
    return textwrap.dedent("\n".join([" " * node.col_offset + mark for mark in marks] + text))


def patches():
    "Class -> [(method, lines of its file)]: those that nbdev's `@patch` adds, from whatever chapter."
    found = {}
    for path in sorted(LIB.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        for n in ast.parse(source).body:
            if isinstance(n, ast.FunctionDef) and n.args.args and n.args.args[0].arg in ("self", "cls") and n.args.args[0].annotation:
                for owner in re.findall(r"\w+", ast.unparse(n.args.args[0].annotation)): found.setdefault(owner, []).append((n, source.splitlines()))
    return found


def made_class(n, lines, patched):
    "A class's head with its fields, and (name, head, docstring) of its public methods and properties."
    fields = [lines[m.lineno - 1] for m in n.body if isinstance(m, ast.AnnAssign)]
    methods = [(m.name, head(own, m), ast.get_docstring(m) or "") for m, own in [*((m, lines) for m in n.body), *patched]
               if isinstance(m, ast.FunctionDef) and (not m.name.startswith("_") or m.name == "__init__")]
    methods += [(m.targets[0].id, f"{m.targets[0].id}: property", next((k.value.value for k in m.value.keywords if k.arg == "doc"), "")) for m in n.body
                if isinstance(m, ast.Assign) and isinstance(m.value, ast.Call) and ast.unparse(m.value.func) == "property"]
    return "\n".join([head(lines, n), *fields]), methods


def entries(path, patched):
    "(name, kind, head, docstring, [methods]) of a module's public names, in their order."
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    public = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"), [])
    for n in tree.body:
        if isinstance(n, ast.Assign):
            text = ast.unparse(n).split("\n")[0]
            for t in ast.walk(n.targets[0]):
                if isinstance(t, ast.Name) and t.id in public: yield t.id, "constant", text if len(text) < 200 else text[:200] + " ...", "", []
        elif getattr(n, "name", None) not in public: continue
        elif isinstance(n, ast.FunctionDef): yield n.name, "function", head(lines, n), ast.get_docstring(n) or "", []
        else:
            text, methods = made_class(n, lines, patched.get(n.name, []))
            yield n.name, "class", text, ast.get_docstring(n) or "", methods


def modules():
    "Module -> its entries, in the order of the chapters."
    found, patched = {}, patches()
    for path in LIB.glob("*.py"):
        home = re.search(r"File to edit: \.\./nbs/(\d\d_\w+)\.ipynb", path.read_text(encoding="utf-8")[:2000])
        if home: found[path.stem] = (home[1], list(entries(path, patched)))
    return dict(sorted(found.items(), key=lambda item: item[1][0]))


def label(module, name, kind): return f"api-{module}-{name}-{kind}".lower().replace("_", "-")


def api(mods, used):
    "One page a module; every name links back to the cell that makes it and to the chapters that speak of it."
    rows = []
    for module, (home, names) in mods.items():
        doc = (ast.get_docstring(ast.parse((LIB / f"{module}.py").read_text(encoding="utf-8"))) or "").split("\n\nDocs:")[0]          # nbdev's own link
        rows.append(f"| [{module}]({module}.md) | [{home[:2]}](../{home}.ipynb) | {', '.join(f'[`{n}`](#{label(module, n, kind)})' for n, kind, *_ in names)} |")
        page = [f"# {module}", doc, f"Made in [chapter {home[:2]}](../{home}.ipynb)."]
        for name, kind, signature, text, methods in names:
            also = [c for c in used.get((module, name), []) if c != home]
            page += [f"({label(module, name, kind)})=\n## {name}", text, f"```python\n{signature}\n```",
                     f'<p class="taught">Made in <a href="../{home}.html#lib-{name}">chapter {home[:2]}</a>' + ("; used in " + ", ".join(f'<a href="../{c}.html">{c[:2]}</a>' for c in also) if also else "") + ".</p>"]
            for m, one, words in methods: page += [f"### {name}.{m}", words, f"```python\n{one}\n```"]
        write_text(SRC / "api" / f"{module}.md", "\n\n".join(p for p in page if p) + "\n")
    listed = "\n".join(rows)
    write_text(SRC / "api" / "modules.md", f"# The library\n\nEvery name, its module, and the chapter that builds it step by step. Shapes stand beside the arguments, in square brackets.\n\n| module | chapter | names |\n|---|---|---|\n{listed}\n\n```{{toctree}}\n:hidden:\n\n" + "\n".join(mods) + "\n```\n")


# ---- the chapters' pages ---------------------------------------------------------------------------------------------
def outside_code(text, fn):
    "Apply `fn` to the parts of a text that are no fenced code, no link and no HTML tag."
    parts = re.split(r"(```.*?```|!?\[[^\]]*\]\([^)]*\)|<[^>]+>)", text, flags=re.S)
    return "".join(p if i % 2 else fn(p) for i, p in enumerate(parts))


def maths(text):
    "Formulas as MathML, which a browser shows by itself."
    from latex2mathml.converter import convert
    formula = lambda some: re.sub(r"\$([^$\n]+)\$", lambda m: convert(m[1]), some)
    return "".join(p if i % 2 else formula(p) for i, p in enumerate(re.split(r"(```.*?```|`[^`]+`)", text, flags=re.S)))


def links(text, here, index, used):
    "Names of the library and other chapters become links; what is used is noted for the way back."
    def name(m):
        homes = index.get(m[1], [])
        here_first = [h for h in homes if h[2] == here] or homes
        if len(here_first) != 1: return m[0]              # two modules have such a name: no guessing
        module, kind, home = here_first[0]
        used.setdefault((module, m[1]), [])
        if here not in used[module, m[1]]: used[module, m[1]].append(here)
        return f"[{m[0]}](#{label(module, m[1], kind)})"
    book = {p.name[:2]: p.name for p in chapters()}
    def chapter(m): return f"[{m[0]}]({book[m[1]]})" if m[1] in book and not here.startswith(m[1]) else m[0]
    text = outside_code(text, lambda part: re.sub(r"`(\w+)(?:\(\))?`", name, part))
    return outside_code(text, lambda part: re.sub(r"[Cc]hapter (\d\d)\b", chapter, part))


def shown(output, stem, n):
    "An output for the site: a picture is a file with alt text, the rest stays."
    data = output.get("data", {})
    if "image/png" not in data: return output
    name, alt = f"{stem}_{n:02}.png", html.escape(" ".join(data.get("text/plain", "").split()))
    (SRC / "_static" / "figures").mkdir(parents=True, exist_ok=True)
    (SRC / "_static" / "figures" / name).write_bytes(base64.b64decode(data["image/png"]))
    return nbformat.v4.new_output("display_data", data={"text/html": f'<img class="figure dark-light" src="_static/figures/{name}" alt="{alt}">'})


def bare(source): return re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")          # without directives
def solution(cell): return re.sub(r"^ *### (BEGIN|END) SOLUTION\n?", "", bare(cell.source), flags=re.M).strip("\n")


def page(path, index, used):
    "A chapter as the site shows it: no directives, stubs with folded solutions, links, pictures with alt text, the appendix folded."
    stem, cells, appendix, n = path.stem, [], False, 0
    for cell in read_book(path).cells:
        d = directives(cell)
        if cell.cell_type == "markdown":
            appendix |= cell.source.startswith("## Appendix")
            text = re.sub(r"(</summary>)\n?", r"\1\n\n", cell.source).replace("</details>", "\n\n</details>")
            cells.append(nbformat.v4.new_markdown_cell(maths(links(text, stem, index, used))))
            if len(cells) == 1: cells[0].source += f'\n\n<a class="take" href="learner/{path.name}" download>Take this chapter along</a>: a notebook with the exercises open and no solutions.'
            continue
        if "colab" in d: continue
        for module, names in re.findall(r"^from codebook_tutorial\.(\w+) import ([\w, ]+)", cell.source, re.M):
            for name in names.replace(" ", "").split(","):
                if stem not in (at := used.setdefault((module, name), [])): at.append(stem)
        if "export" in d:
            made = [name for some in re.findall(r"^(?:def|class) (\w+)|^([\w, ]+?) *=[^=]", cell.source, re.M) for name in re.findall(r"\w+", "".join(some))]
            cells.append(nbformat.v4.new_markdown_cell("".join(f'<a id="lib-{name}"></a>' for name in made) or "<!-- -->"))
        outputs = []
        for output in cell.outputs:
            n += "image/png" in output.get("data", {})
            outputs.append(shown(output, stem, n))
        solved = "exercise" in d
        new = nbformat.v4.new_code_cell(bare(stub(cell.source) if solved else cell.source), outputs=[] if solved else outputs)
        if "export" in d and (appendix or d["export"].startswith("checks.")): new.metadata["tags"] = ["hide-input"]
        if new.source: cells.append(new)
        if solved: cells.append(nbformat.v4.new_markdown_cell(f"<details><summary>Solution</summary>\n\n```python\n{solution(cell)}\n```\n\n</details>"))
    nb = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"), language_info=dict(name="python")))
    for i, cell in enumerate(nb.cells): cell.id = f"s{i}"
    return nb


# ---- findings, static pages ------------------------------------------------------------------------------------------
def findings(): return (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- claims: begin -->")[1].split("<!-- claims: end -->")[0].strip()


def minutes():
    "One row a chapter: what it needs, minutes to run (as its first lines say), to read (estimated), of its exercises (their own words)."
    for path in chapters():
        cells = read_book(path).cells
        text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
        taught = [c.source for c in cells if c.cell_type == "code" and not directives(c).get("export", "").startswith("checks.")]
        needs, run = re.search(r"needs: ([^|]+?) \|", text)[1], re.search(r"about ([^|]+?) CPU minutes?", text)[1]
        reading = len(text.split()) / 150 + sum(len(c.splitlines()) for c in taught) / 12 / 2          # half of the code is skimmed: appendices
        yield f"| [{path.stem.replace('_', ' ')}]({path.name}) | {needs} | {run} | {reading:.0f} | {sum(map(int, re.findall(r'difficulty [0-9], ([0-9]+) minutes', text)))} |"


def answer_key():
    "Every exercise's solution."
    page = ["# Answer key", "For teachers: each exercise with its solution. Other answers pass the checks as well."]
    for path in chapters():
        cells = read_book(path).cells
        page.append(f"## {path.stem.replace('_', ' ')}")
        for before, cell in zip(cells, cells[1:]):
            if "exercise" not in directives(cell): continue
            title = (re.findall(r"### (Exercise [^\n]+)", before.source) or ["Exercise"])[-1]
            page.append(f"**{title}**\n\n```python\n{solution(cell)}\n```")
    return "\n\n".join(page) + "\n"


def statics():
    "The pages that chapters write as they run: of the last run, or of one made now where that is older than the chapter."
    def page_of(n):
        newer = [p for p in (OUT / "run" / n).rglob(STATIC[n]) if p.stat().st_mtime >= chapters([n])[0].stat().st_mtime]
        return newer[0] if newer else None
    missing = [n for n in STATIC if not page_of(n)]
    if missing:
        print(f"docs: running chapter {', '.join(missing)}: the site shows the pages that they write", flush=True)
        if books.run(argparse.Namespace(only=missing, jobs=2, outputs=False)): sys.exit("docs: a chapter failed, so its page is missing")
    for n, name in STATIC.items(): shutil.copy(page_of(n), SRC / "_extra" / name)


def sources():
    "Write everything that Sphinx reads into out/docs/src."
    shutil.rmtree(SRC, ignore_errors=True)
    shutil.copytree(DOCS, SRC)
    (SRC / "_extra").mkdir(exist_ok=True)
    shutil.copytree(NBS / "images", SRC / "images")
    mods, used = modules(), {}
    index = {}
    for module, (home, names) in mods.items():
        for name, kind, *_ in names:
            if len(name) > 2 and name not in TOO_COMMON: index.setdefault(name, []).append((module, kind, home))
    for path in chapters():
        write_book(SRC / path.name, page(path, index, used))
        write_book(SRC / "_extra" / "learner" / path.name, learner_copy(read_book(path)))
    api(mods, used)
    write_text(SRC / "answer_key.md", answer_key())
    subprocess.run([sys.executable, ROOT / "benchmarks" / "report.py", SRC], check=True)
    for path in SRC.glob("*.md"): write_text(path, links(path.read_text(encoding="utf-8").replace("<!-- findings -->", findings()).replace("<!-- minutes -->", "\n".join(minutes())), path.stem, index, {}))
    shutil.copy(ROOT / "CHANGELOG.md", SRC / "changes.md")
    statics()


def broken(site):
    "Links of the built pages that lead nowhere: (page, link)."
    from bs4 import BeautifulSoup
    large = set(STATIC.values())                 # no links in those
    soups = {p.resolve(): BeautifulSoup(p.read_bytes(), "html.parser") for p in site.rglob("*.html") if "_static" not in p.parts and p.name not in large}
    anchors = {p: {t["id"] for t in s.find_all(id=True)} | {t["name"] for t in s.find_all("a", attrs={"name": True})} for p, s in soups.items()}
    for p, soup in soups.items():
        for tag, key in (("a", "href"), ("img", "src"), ("script", "src"), ("link", "href")):
            for link in {t[key] for t in soup.find_all(tag, attrs={key: True})}:
                if re.match(r"[a-z]+:|//|#?$", link): continue
                where, _, anchor = link.partition("#")
                target = (p.parent / where.partition("?")[0]).resolve() if where else p
                if target.is_dir(): target /= "index.html"
                if not target.exists() or anchor and target in anchors and anchor not in anchors[target]: yield p.relative_to(site), link


def docs(args=None):
    "Build the site into out/docs/html; a warning or a broken link is an error."
    sources()
    new = SITE.with_name("html.new")
    shutil.rmtree(new, ignore_errors=True)
    got = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", OUT / "docs" / "doctrees", SRC, new], cwd=ROOT)
    bad = sorted(broken(new)) if not got.returncode else []
    for where, link in bad: print(f"docs: broken link in {where}: {link}")
    if got.returncode or bad: return print(f"docs: FAILED; {SITE.relative_to(ROOT)} is as it was") or 1
    shutil.rmtree(SITE, ignore_errors=True)
    new.rename(SITE)
    print(f"docs: {len(list(SITE.rglob('*.html')))} pages in {SITE.relative_to(ROOT)}; open {SITE / 'index.html'}")
    return 0


if __name__ == "__main__": sys.exit(docs())
