"""The site's pages of the library: every public name, with links to the chapters that use it."""

import ast, re, textwrap

from .books import OUT, write_text
from .env import ROOT

LIBRARY, SRC = ROOT / "codebook_tutorial", OUT / "docs" / "src"
CALLED = ("property", "classmethod", "staticmethod", "contextmanager")  # they change how it is used
HOME = re.compile(r"File to edit: [./]*nbs/([\w/.]+)\.ipynb")
INDEX = """# The library

Every name, its module, and the chapter that builds it step by step. \
Shapes stand beside the arguments, in square brackets.

| module | chapter | names |
|---|---|---|
{rows}

```{{toctree}}
:hidden:

{modules}
```
"""


def head(lines, node):
    "A definition's first lines, with their comments and the decorators that change its use."
    first = node.body[0].lineno - 1
    text = lines[node.lineno - 1 : max(first, node.lineno)]
    if first < node.lineno:
        text = [text[0][: node.body[0].col_offset].rstrip()]
    decorators = [ast.unparse(d) for d in node.decorator_list]
    marks = [f"@{d}" for d in decorators if d in CALLED or d.startswith("dataclass")]
    if any("cls_method=True" in d for d in decorators):
        marks = ["@classmethod"]
    pad = " " * node.col_offset
    return textwrap.dedent("\n".join([*(pad + mark for mark in marks), *text]))


def sources():
    "Module name -> source, of the library's exported modules and its plain ones."
    for path in sorted(LIBRARY.rglob("*.py")):
        yield ".".join(path.relative_to(LIBRARY).with_suffix("").parts), path.read_text("utf-8")


def patches():
    "Class -> [(method, lines of its file)]: those that nbdev's `@patch` adds, in any chapter."
    found = {}
    for _, source in sources():
        for n in ast.parse(source).body:
            if not isinstance(n, ast.FunctionDef) or not n.args.args:
                continue
            first = n.args.args[0]
            if first.arg in ("self", "cls") and first.annotation:
                for owner in re.findall(r"\w+", ast.unparse(first.annotation)):
                    found.setdefault(owner, []).append((n, source.splitlines()))
    return found


def assigned_properties(node):
    "(name, head, docstring) of `name = property(...)` in a class."
    for m in node.body:
        if not isinstance(m, ast.Assign) or not isinstance(m.value, ast.Call):
            continue
        if ast.unparse(m.value.func) == "property":
            doc = next((k.value.value for k in m.value.keywords if k.arg == "doc"), "")
            yield m.targets[0].id, f"{m.targets[0].id}: property", doc


def made_class(node, lines, patched):
    "A class's head with its fields, and (name, head, docstring) of its public methods."
    fields = [lines[m.lineno - 1] for m in node.body if isinstance(m, ast.AnnAssign)]
    methods = []
    for m, own in [*((m, lines) for m in node.body), *patched]:
        if not isinstance(m, ast.FunctionDef):
            continue
        if not m.name.startswith("_") or m.name == "__init__":
            methods.append((m.name, head(own, m), ast.get_docstring(m) or ""))
    methods += assigned_properties(node)
    return "\n".join([head(lines, node), *fields]), methods


def constants(node, public):
    "Entries of an assignment's public names."
    text = ast.unparse(node).split("\n")[0]
    text = text if len(text) < 200 else text[:200] + " ..."
    for t in ast.walk(node.targets[0]):
        if isinstance(t, ast.Name) and t.id in public:
            yield t.id, "constant", text, "", []


def entries(source, patched):
    "(name, kind, head, docstring, [methods]) of a module's public names, in their order."
    tree, lines, public = ast.parse(source), source.splitlines(), []
    for n in tree.body:
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__":
            public = ast.literal_eval(n.value)
    for n in tree.body:
        if isinstance(n, ast.Assign):
            yield from constants(n, public)
        elif getattr(n, "name", None) not in public:
            continue
        elif isinstance(n, ast.FunctionDef):
            yield n.name, "function", head(lines, n), ast.get_docstring(n) or "", []
        else:
            text, methods = made_class(n, lines, patched.get(n.name, []))
            yield n.name, "class", text, ast.get_docstring(n) or "", methods


def modules():
    "Module -> (its notebook, its entries), in the order of the chapters; without the checks."
    found, patched = {}, patches()
    for module, source in sources():
        home = HOME.search(source[:2000])
        if home and not module.startswith("checks."):
            found[module] = (home[1], list(entries(source, patched)))
    return dict(sorted(found.items(), key=lambda item: item[1][0]))


def label(module, name, kind):
    "The anchor of a name's entry."
    return re.sub(r"[_.]", "-", f"api-{module}-{name}-{kind}".lower())


def home_link(home):
    "Where a module is made, as a link if the site has that notebook."
    return f"`nbs/{home}.ipynb`" if "/" in home else f"[chapter {home[:2]}](../{home}.ipynb)"


def taught(name, home, chapters):
    "The line under an entry: where it is made, and the chapters that use it."
    made = f'<a href="../{home}.html#lib-{name}">chapter {home[:2]}</a>'
    made = f"<code>nbs/{home}.ipynb</code>" if "/" in home else made
    used = ", ".join(f'<a href="../{c}.html">{c[:2]}</a>' for c in chapters if c != home)
    return f'<p class="taught">Made in {made}{"; used in " + used if used else ""}.</p>'


def module_page(module, home, names, *, source, used):
    "One module's page."
    doc = (ast.get_docstring(ast.parse(source)) or "").split("\n\nDocs:")[0]  # nbdev's own link
    page = [f"# {module}", doc, f"Made in {home_link(home)}."]
    for name, kind, signature, text, methods in names:
        page += [f"({label(module, name, kind)})=\n## {name}", text, f"```python\n{signature}\n```"]
        page.append(taught(name, home, used.get((module, name), [])))
        for m, one, words in methods:
            page += [f"### {name}.{m}", words, f"```python\n{one}\n```"]
    return "\n\n".join(p for p in page if p) + "\n"


def api(mods, used):
    "Write one page per module and their index."
    rows, source = [], dict(sources())
    for module, (home, names) in mods.items():
        text = module_page(module, home, names, source=source[module], used=used)
        write_text(SRC / "api" / f"{module}.md", text)
        linked = ", ".join(f"[`{n}`](#{label(module, n, kind)})" for n, kind, *_ in names)
        made = home_link(home).replace("[chapter ", "[")
        rows.append(f"| [{module}]({module}.md) | {made} | {linked} |")
    index = INDEX.format(rows="\n".join(rows), modules="\n".join(mods))
    write_text(SRC / "api" / "modules.md", index)
