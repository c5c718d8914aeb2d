"""The site's pages of the chapters: links, formulas, pictures with alt text, folded solutions."""

import ast, base64, html, re

import nbformat

from .api import SRC, label
from .books import chapters, directives, read_book
from .learner import stub

PYTHON = dict(name="python3", display_name="python3", language="python")
TAKE = (
    '\n\n<a class="take" href="learner/{name}" download>Take this chapter along</a>: '
    "a notebook with the exercises open and no solutions."
)
SOLVED = "<details><summary>Solution</summary>\n\n```python\n{code}\n```\n\n</details>"
MARKS = re.compile(r"(```.*?```|!?\[[^\]]*\]\([^)]*\)|<[^>]+>)", re.S)  # code, links, tags
MADE = re.compile(r"^(?:def|class) (\w+)|^([\w, ]+?) *=[^=]", re.M)


def outside_code(text, fn):
    "Apply `fn` to the parts of a text that are not fenced code, links or HTML tags."
    return "".join(p if i % 2 else fn(p) for i, p in enumerate(MARKS.split(text)))


def maths(text):
    "Formulas as MathML, which a browser shows by itself."
    from latex2mathml.converter import convert

    parts = re.split(r"(```.*?```|`[^`]+`)", text, flags=re.S)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"\$([^$\n]+)\$", lambda m: convert(m[1]), parts[i])
    return "".join(parts)


def note_use(used, module, name, *, here):
    "Remember that a chapter uses a name of the library, for the way back."
    there = used.setdefault((module, name), [])
    if here not in there:
        there.append(here)


def links(text, here, index, *, used):
    "Names of the library and other chapters become links."
    book = {p.name[:2]: p.name for p in chapters()}

    def name(m):
        homes = index.get(m[1], [])
        found = [h for h in homes if h[2] == here] or homes
        if len(found) != 1:
            return m[0]  # two modules have such a name: no guessing
        module, kind, _ = found[0]
        note_use(used, module, m[1], here=here)
        return f"[{m[0]}](#{label(module, m[1], kind)})"

    def chapter(m):
        other = m[1] in book and not here.startswith(m[1])
        return f"[{m[0]}]({book[m[1]]})" if other else m[0]

    text = outside_code(text, lambda part: re.sub(r"`(\w+)(?:\(\))?`", name, part))
    return outside_code(text, lambda part: re.sub(r"[Cc]hapter (\d\d)\b", chapter, part))


def shown(output, stem, n):
    "An output for the site: a picture is a file with alt text, the rest stays."
    data = output.get("data", {})
    if "image/png" not in data:
        return output
    name = f"{stem}_{n:02}.png"
    alt = html.escape(" ".join(data.get("text/plain", "").split()))
    folder = SRC / "_static" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(base64.b64decode(data["image/png"]))
    img = f'<img class="figure dark-light" src="_static/figures/{name}" alt="{alt}">'
    return nbformat.v4.new_output("display_data", data={"text/html": img})


def bare(source):
    "A cell's code without directives."
    return re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")


def solution(cell):
    "An exercise's code without the marks of its solution."
    code = re.sub(r"^ *### (BEGIN|END) SOLUTION\n?", "", bare(cell.source), flags=re.M)
    return code.strip("\n")


def imported(source, index):
    "(module, name) of what a cell imports from the library."
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return  # a cell of IPython's own commands
    for node in body:
        if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
            continue
        package, _, module = node.module.partition(".")
        for name in (a.name for a in node.names) if package == "codebook_tutorial" else ():
            homes = index.get(name, [])
            if module or len(homes) == 1:
                yield module or homes[0][0], name


def prose_cell(cell, here, index, *, used):
    "A markdown cell with links, formulas and foldable parts."
    text = re.sub(r"(</summary>)\n?", r"\1\n\n", cell.source)
    text = text.replace("</details>", "\n\n</details>")
    return nbformat.v4.new_markdown_cell(maths(links(text, here, index, used=used)))


def code_cells(cell, outputs, appendix):
    "A code cell as the site shows it: anchors of what it exports, the code, a folded solution."
    d, cells = directives(cell), []
    if "export" in d:
        made = re.findall(r"\w+", " ".join(map(" ".join, MADE.findall(cell.source))))
        anchors = "".join(f'<a id="lib-{name}"></a>' for name in made)
        cells.append(nbformat.v4.new_markdown_cell(anchors or "<!-- -->"))
    solved = "exercise" in d
    code = bare(stub(cell.source) if solved else cell.source)
    new = nbformat.v4.new_code_cell(code, outputs=[] if solved else outputs)
    if "export" in d and (appendix or d["export"].startswith("checks.")):
        new.metadata["tags"] = ["hide-input"]
    if code:
        cells.append(new)
    if solved:
        cells.append(nbformat.v4.new_markdown_cell(SOLVED.format(code=solution(cell))))
    return cells


def page(path, index, used):
    "A chapter as the site shows it: no directives, stubs with folded solutions, links, alt text."
    stem, cells, appendix, n = path.stem, [], False, 0
    for cell in read_book(path).cells:
        if cell.cell_type == "markdown":
            appendix |= cell.source.startswith("## Appendix")
            cells.append(prose_cell(cell, stem, index, used=used))
            if len(cells) == 1:
                cells[0].source += TAKE.format(name=path.name)
            continue
        if "colab" in directives(cell):
            continue
        for module, name in imported(cell.source, index):
            note_use(used, module, name, here=stem)
        outputs = []
        for output in cell.outputs:
            n += "image/png" in output.get("data", {})
            outputs.append(shown(output, stem, n))
        cells += code_cells(cell, outputs, appendix)
    for i, cell in enumerate(cells):
        cell.id = f"s{i}"
    metadata = dict(kernelspec=PYTHON, language_info=dict(name="python"))
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)
