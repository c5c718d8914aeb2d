"""The code browser in a real Chromium: as one file with no network, and as a panel in JupyterLab.

A story full of markup is shown as text."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch

from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.base import random_directions
from codebook_tutorial.dictionary.bottleneck import add_codebooks
from codebook_tutorial.feature.indexing import build_index
from codebook_tutorial.model.text import Text, pack
from codebook_tutorial.show.browser import browse, export_browser
from codebook_tutorial.show.html import escape
from codebook_tutorial.show.pages import script_json

EVIL = (
    "the <script>window.hacked=1</script> dog & <img src=x onerror=window.hacked=1> "
    "</script><!-- \u2028 naïve 日本 👍 end"
)
DOCS = [
    EVIL,
    *(
        f"the dog saw the {w} and the cat ran home to the {w}"
        for w in ("cat", "bird", "“king”", "tree", "house", "sea")
    ),
    "a 👍 b 日 c the end",
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def byte_level():
    "A tokenizer over bytes that has seen the documents."
    import transformers as t
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    raw.train_from_iterator(
        DOCS[1:7] * 3,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return t.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An index of a small random model over byte-level text:
    codes, and a site name's worth of features with values."""
    import transformers as t

    folder = tmp_path_factory.mktemp("browser")
    tok = byte_level()
    tok.save_pretrained(folder / "tok")
    model, draw = (
        t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=400, n_embd=16, n_layer=2, n_head=2, n_positions=256)
        ).eval(),
        seeded(0),
    )
    with torch.no_grad():
        [
            p.normal_(0, 0.02, generator=draw) for p in model.parameters() if p.dim() > 1
        ]  # the same numbers under every version of transformers
    text = Text(pack([tok(d)["input_ids"] for d in DOCS * 6], 200, 0, pad=0, whole=True), 0, 0)
    cb = (
        add_codebooks(model, ["mlp.0", "heads.1"], n_codes=24, k=2)
        .eval()
        .init_from_data(text.ids, 2, generator=seeded(0))
    )
    index = build_index(cb, tok, text, folder=folder / "codes")
    with cb.bypass():
        valued = build_index(
            cb,
            tok,
            text,
            folder=folder / "valued",
            dictionaries={"resid.0": random_directions(40, 16, relu=True)},
        )
    return index, valued, folder


# ---------------------------------------------------------------- without a browser
def data_of(path):
    return json.loads(
        re.search(
            r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S
        )[1]
    )


def test_json_cannot_leave_its_script():
    for text in ("</script><script>x()", "<!--<script>", "a & b", "\u2028\u2029", "日本 👍 \ud800"):
        written = script_json({"t": text})
        assert (
            json.loads(written) == {"t": text}
            and not set("<>&\u2028\u2029") & set(written)
            and written.isascii()
        )
    with pytest.raises(ValueError):
        script_json([float("nan")])


def test_the_file_holds_no_markup_of_the_text_and_is_written_at_once(built, tmp_path):
    index, *_ = built
    path = export_browser(
        index,
        tmp_path / "b.html",
        patterns=["the"],
        title="<script>window.hacked=1</script> @@ & co",
    )
    source = path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["b.html"] and path == tmp_path / "b.html"
    assert (
        source.count("<script") == 2 == source.count("</script>")
        and "<img" not in source
        and "<title>&lt;script&gt;" in source
    )
    assert (
        "innerHTML" not in source
        and "http://" not in source
        and "https://" not in source
        and "default-src 'none'" in source
    )
    with pytest.raises(ValueError, match="no regular expression"):
        export_browser(index, tmp_path / "c.html", patterns=["("])
    assert [p.name for p in tmp_path.iterdir()] == ["b.html"]


def check_documents(index, docs):
    pieces = index.surface.pieces
    for doc in docs:
        units, n = doc["text"].encode("utf-16-le"), len(doc["begin"])
        ids = index.ids.ravel()[doc["at"] : doc["at"] + n]
        assert (
            doc["text"].encode() == b"".join(pieces[ids])
            and index.mask.ravel()[doc["at"] : doc["at"] + n].all()
        )
        for b, e, piece in zip(doc["begin"], doc["end"], pieces[ids]):
            assert piece in units[2 * b : 2 * e].decode("utf-16-le").encode()


def test_the_file_holds_what_the_index_says(built, tmp_path):
    index, valued, _ = built
    d = data_of(
        export_browser(index, tmp_path / "b.html", patterns=["the", r"(do)g"], n_tokens=900)
    )
    assert (
        d["size"] == 800
        and d["sample"] == int(index.mask[:4].sum())
        and d["tokens"] == index.mask.sum()
    )
    assert [p["pattern"] for p in d["prepared"]] == ["the", "(do)g"] and d["prepared"][0][
        "marked"
    ] == int(index.mark("the").sum())
    assert d["prepared"][0]["found"][0] == [
        index.search("the")[0][k] for k in ("site", "feature", "precision", "recall", "active")
    ]
    for s in d["sites"]:
        store = index.arrays[s["site"]]
        for i, f in enumerate(s["features"]):
            own = store["positions"][store["offsets"][f] : store["offsets"][f + 1]]
            assert (
                s["positions"][s["offsets"][i] : s["offsets"][i + 1]]
                == own[own < 800].tolist()
                != []
            )
    check_documents(index, d["documents"])
    whole = data_of(export_browser(valued, tmp_path / "v.html", patterns=[]))
    assert whole["size"] == valued.mask.size and np.allclose(
        whole["sites"][0]["values"],
        valued.arrays["resid.0"]["values"].astype(float),
        rtol=6e-3,
        atol=1e-6,
    )


def test_the_panel_says_what_is_wrong(built):
    pytest.importorskip("ipywidgets", reason="no ipywidgets: pip install ipywidgets")
    index, *_ = built
    panel = browse(index, "the")
    box, sliders, says, shown, lines, chosen = panel.children
    assert (
        "precision" in shown.value
        and says.value.endswith("features")
        and len(lines.options) > 5
        and chosen.value == ""
    )
    best = index.search("the", 0.01, 0.1)
    assert [o[1] for o in lines.options[1:]] == [(r["site"], r["feature"]) for r in best]
    lines.value = lines.options[1][1]
    assert f"feature {best[0]['feature']}" in chosen.value and "<script" not in chosen.value
    sliders.children[0].value = 0.6
    assert (
        len(lines.options) - 1 == len(index.search("the", 0.01, 0.6)) < len(best)
        and chosen.value == ""
    )
    sliders.children[1].value = 0.3
    assert len(lines.options) - (len(lines.options) > 0) == len(index.search("the", 0.3, 0.6))
    box.value = "<b>("
    assert (
        says.value
        == escape(
            "mark: '<b>(' is no regular expression: missing ), unterminated subpattern at position "
            "3"
        )
        and shown.value == ""
        and len(lines.options) == 0
    )
    box.value = "quux"
    assert "marks no token" in says.value
    box.value = ""
    assert says.value == shown.value == "" and len(lines.options) == 0


# ---------------------------------------------------------------- Chromium
def chromium():
    found = (
        os.environ.get("COURSE_CHROMIUM")
        or shutil.which("chromium")
        or shutil.which("google-chrome")
    )
    if not found:
        pytest.skip("no Chromium: apt-get install chromium, or set COURSE_CHROMIUM")
    return found


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install playwright"
    )
    with sync_api.sync_playwright() as p:
        app = p.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield app
        app.close()


@pytest.fixture
def page(browser):
    "A page that cannot reach any network, with what it asked for and what it complained of."
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.asked, page.complaints = [], []
    page.on("request", lambda r: page.asked.append(r.url))
    page.on("pageerror", lambda e: page.complaints.append(str(e)))
    page.on("console", lambda m: m.type == "error" and page.complaints.append(m.text))
    yield page
    context.close()


def rows(page):
    return page.locator("#table tbody tr").all_inner_texts()


def number(text):
    return [float(x) for x in text.replace(",", "").split("\t")[-3:]]


def type_pattern(page, pattern):
    page.fill("#pattern", pattern)
    page.wait_for_timeout(400)


def check_pattern(page, index, pattern):
    "The page finds what Python finds."
    type_pattern(page, pattern)
    want = sorted(index.search(pattern), key=lambda r: (-r["precision"], -r["recall"]))
    assert (
        page.inner_text("#status")
        == f"{int(index.mark(pattern).sum()):,} tokens marked, {len(want)} features, in the "
        f"{index.mask.sum():,} tokens of this page."
    )
    got = [number(r) for r in rows(page)]
    assert (
        np.allclose(got, [[r["precision"], r["recall"], r["active"]] for r in want], atol=0.0006)
        and len(got) > 2
    )
    heads = next((t.split("\t") for t in rows(page) if "\theads.1\t" in t), None)
    if heads:
        assert int(heads[0].split()[-1]) == 24 * int(heads[2]) + int(heads[3])


def test_one_file_searches_filters_and_shows(built, page, tmp_path):
    index, *_ = built
    path = export_browser(
        index,
        tmp_path / "b.html",
        patterns=[r"\b(the)\b", "dog"],
        title="Codes <i>here</i>",
        n_tokens=10**6,
    )
    page.goto(path.as_uri())
    assert page.inner_text("h1") == page.title() == "Codes <i>here</i>"
    assert page.input_value("#pattern") == r"\b(the)\b" and "in all" in page.inner_text("#status")
    page.locator("#precision").fill("0")
    for pattern in (
        r"saw the (\w+)",
        "do(g) saw",
        r"日|👍",
        "(?:cat|bird)",
        "👍 b",
        r"“(.*?)”",
        r"r=(.)",
    ):  # live, over all of the text: as Python finds
        check_pattern(page, index, pattern)
    type_pattern(page, "dog")
    prepared = rows(page)
    page.locator("#precision").fill("0.3")
    few = rows(page)
    assert few == [r for r in prepared if number(r)[0] >= 0.3] and 0 < len(few) < len(prepared)
    page.locator("#recall").fill("0.2")
    assert (
        rows(page) == [r for r in few if number(r)[1] >= 0.2]
        and page.inner_text("#recallShown") == "0.20"
    )
    assert page.asked == [path.as_uri()] and page.complaints == []


def check_errors(page):
    for bad, says in (
        ("(", "Unterminated group"),
        ("(a)(b)", "2 groups, expected one or none"),
        ("[", "Invalid regular expression"),
    ):
        type_pattern(page, bad)
        assert (
            says in page.inner_text("#error")
            and rows(page) == []
            and page.inner_text("#contexts") == ""
        )
    page.get_by_role(
        "button", name="(?P<x>cat)"
    ).click()  # Python's own syntax works where it was prepared
    assert (
        page.inner_text("#error") == ""
        and len(rows(page)) > 1
        and "in all" in page.inner_text("#status")
    )


def test_one_file_by_keyboard_and_its_errors(built, page, tmp_path):
    index, *_ = built
    page.goto(
        export_browser(
            index, tmp_path / "b.html", patterns=["dog", "(?P<x>cat)"], n_tokens=10**6
        ).as_uri()
    )
    page.focus("#pattern")
    page.keyboard.press("Control+A")
    page.keyboard.type("saw")
    page.wait_for_timeout(400)
    for _ in range(5):
        page.keyboard.press("Tab")  # two examples, two sliders, the first feature
    assert page.evaluate("document.activeElement.textContent").startswith("show ")
    page.keyboard.press("Enter")
    first = rows(page)[0].split("\t")
    assert (
        page.inner_text("#which") == f"{first[1]}, feature {first[0].split()[-1]}"
        and 1 <= page.locator(".context").count() <= 8
    )
    assert (
        page.locator("tr.chosen").count() == 1
        and page.locator(".context span[title='1']").count() >= page.locator(".context").count()
    )
    check_errors(page)
    type_pattern(page, "")
    assert page.inner_text("#status") == "" and rows(page) == []
    assert page.complaints == []


def test_markup_in_a_story_is_shown_as_text(built, page, tmp_path):
    index, *_ = built
    page.goto(
        export_browser(
            index,
            tmp_path / "b.html",
            patterns=["<script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>"],
            n_tokens=10**6,
        ).as_uri()
    )
    page.locator("#precision").fill("0")
    for pattern, visible in (
        (r"<script>(win)", "<script>window.hacked"),
        ("onerror", "<img src=x onerror="),
    ):
        type_pattern(page, pattern)
        seen = ""
        for i in range(page.locator("#table button").count()):
            page.locator("#table button").nth(i).click()
            seen += page.inner_text("#contexts")
        assert visible in seen
    page.locator("#examples button").first.click()
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2
    assert len(page.asked) == 1 and page.complaints == []


def test_the_files_own_policy_forbids_the_network(built, browser, tmp_path):
    "Where a network is there: the page may not use it."
    index, *_ = built
    page, refused = browser.new_page(), []
    page.on("console", lambda m: refused.append(m.text))
    page.goto(export_browser(index, tmp_path / "b.html").as_uri())
    page.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0)")
    page.evaluate(
        "new Promise(r => { const i = new Image(); i.onerror = r; i.src = "
        "'http://127.0.0.1:9/x.png'; document.body.append(i); })"
    )
    assert sum("Content Security Policy" in r for r in refused) >= 2
    page.close()


def test_values_are_shown_strongest_first_in_light_and_dark(built, browser, tmp_path):
    _, valued, _ = built
    path, ground = (
        export_browser(valued, tmp_path / "v.html", patterns=["dog"], n_tokens=10**6),
        set(),
    )
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(path.as_uri())
        page.locator("#precision").fill("0")
        page.locator("#table button").first.click()
        f = int(page.inner_text("#which").split()[-1])
        tops = [
            max(
                float(t)
                for t in line.locator("span[title]").evaluate_all("all => all.map(e => e.title)")
            )
            for line in page.locator(".context").all()
        ]
        store = valued.arrays["resid.0"]
        assert (
            tops[0]
            == pytest.approx(
                float(store["values"][store["offsets"][f] : store["offsets"][f + 1]].max()),
                rel=1e-2,
            )
            and len(tops) == 8
        )
        ground.add(page.evaluate("getComputedStyle(document.querySelector('h1')).color"))
        page.close()
    assert len(ground) == 2


def explained(tmp_path):
    "The page of three features of tokens full of markup."
    from codebook_tutorial.feature.explain.protocol import make_cases
    from codebook_tutorial.feature.explain.rules import PredicateExplainer
    from codebook_tutorial.feature.explain.scores import interpret
    from codebook_tutorial.show.features import export_features

    words = [
        [EVIL[:40], "</details>", f"w{i}", "<img src=x onerror=window.hacked=1>"] for i in range(40)
    ]
    f = np.zeros((160, 3))
    f[0::4, 0] = np.arange(40) + 1
    f[3::4, 1] = 5.0
    f[0:40:4, 2] = 1.0
    cases = make_cases(f, words)
    explainer = PredicateExplainer()
    return export_features(
        cases, interpret(cases, explainer), tmp_path / "f.html", title="Features <i>here</i>"
    )


def test_the_page_of_explained_features_opens_without_scripts_or_network(page, browser, tmp_path):
    "Tokens and explanations full of markup are text; a feature opens by a click; light and dark."
    path = explained(tmp_path)
    page.goto(path.as_uri())
    assert (
        page.locator("details").count() == 2
        and "1 more are active too seldom" in page.inner_text("body")
        and page.locator("h1").inner_text() == "Features <i>here</i>"
    )
    strip = page.locator("details").first.locator("div").first
    assert not strip.is_visible()
    page.locator("summary").first.click()
    assert (
        strip.is_visible()
        and "<img src=x onerror=window.hacked=1>" in strip.inner_text()
        and "as the feature reacts" in strip.inner_text()
    )
    assert (
        page.evaluate("window.hacked") is None
        and page.asked == [path.as_uri()]
        and page.complaints == []
    )
    colours = set()
    for scheme in ("light", "dark"):
        other = browser.new_page(color_scheme=scheme)
        other.goto(path.as_uri())
        colours.add(other.evaluate("getComputedStyle(document.querySelector('h1')).color"))
        other.close()
    assert len(colours) == 2


def steered(tmp_path):
    "The page of two prompts, plain and steered in three ways."
    from codebook_tutorial.show.steering import export_steering

    samples = [
        dict(prompt=p, way=None, text=f"{p} a b </script><img src=x onerror=window.hacked=1>")
        for p in ("one", "two")
    ]
    samples += [
        dict(prompt=p, way=w, towards=t, strength=s, text=f"{p} a {t}{s} <b>", note="loss 1.2")
        for p in ("one", "two")
        for w, t in (("switch", "dragon"), ("switch", "space"), ("vector", "dragon"))
        for s in ((1.0, 2.0) if w == "switch" else (4.0,))
    ]
    return export_steering(tmp_path / "s.html", samples, "Steering <i>here</i>")


def test_the_page_of_steered_texts_offers_what_there_is_and_marks_what_changed(
    page, browser, tmp_path
):
    "Four choices, each offering what the ones before leave; markup in texts is text; no network."
    path = steered(tmp_path)
    page.goto(path.as_uri())
    assert (
        page.locator("h1").inner_text() == "Steering <i>here</i>"
        and "</script><img" in page.inner_text("#plain")
        and page.inner_text("#note") == "loss 1.2"
    )
    assert page.locator("#steered mark").all_inner_texts()[0] == "dragon1.0" and page.locator(
        "#steered span"
    ).all_inner_texts()[:2] == ["one", "a"]
    page.select_option("#towards", "space")
    page.select_option("#strength", "2")
    assert page.locator("#steered mark").all_inner_texts()[0] == "space2.0"
    page.select_option("#way", "vector")
    assert (
        page.locator("#towards option").all_inner_texts() == ["dragon"]
        and page.locator("#strength option").all_inner_texts() == ["4"]
        and "dragon4.0" in page.inner_text("#steered")
    )
    page.select_option("#prompt", "two")
    assert (
        page.input_value("#way") == "vector"
        and page.inner_text("#steered").startswith("two a")
        and page.inner_text("#plain").startswith("two a b")
    )
    assert (
        page.evaluate("window.hacked") is None
        and page.asked == [path.as_uri()]
        and page.complaints == []
    )


# ---------------------------------------------------------------- JupyterLab
def write_notebook(tmp_path, source):
    cells = [
        dict(cell_type="code", id=f"c{i}", metadata={}, execution_count=None, outputs=[], source=s)
        for i, s in enumerate(source)
    ]
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "panel.ipynb").write_text(
        json.dumps(
            dict(
                cells=cells,
                metadata=dict(
                    kernelspec=dict(name="python3", display_name="Python 3", language="python")
                ),
                nbformat=4,
                nbformat_minor=5,
            )
        )
    )


def jupyter_folders(tmp_path):
    "JupyterLab's folders, as variables of its environment; it asks for no news."
    dirs = {
        f"JUPYTER_{n}_DIR": str(tmp_path / n.lower()) for n in ("CONFIG", "DATA", "RUNTIME")
    } | dict(
        JUPYTERLAB_SETTINGS_DIR=str(tmp_path / "s"),
        JUPYTERLAB_WORKSPACES_DIR=str(tmp_path / "w"),
        IPYTHONDIR=str(tmp_path / "i"),
    )
    (tmp_path / "s" / "@jupyterlab" / "apputils-extension").mkdir(parents=True)
    (
        tmp_path / "s" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    ).write_text('{"fetchNews": "false", "checkForUpdates": false}')
    return dirs


def wait_for(server, port, log):
    "Until the server answers."
    for _ in range(240):
        if server.poll() is not None:
            pytest.fail(log.read_text()[-2000:])
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=1)
            return
        except OSError:
            time.sleep(0.25)


@contextlib.contextmanager
def jupyter(tmp_path, source):
    """A JupyterLab on the loopback device with folders of its own and a notebook of these cells.

    Gives its address."""
    pytest.importorskip("jupyterlab", reason="no JupyterLab: pip install jupyterlab")
    pytest.importorskip("ipywidgets", reason="no ipywidgets: pip install ipywidgets")
    write_notebook(tmp_path, source)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    dirs = jupyter_folders(tmp_path)
    log = open(tmp_path / "lab.log", "w")
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            *"jupyter lab --no-browser --allow-root --ip=127.0.0.1".split(),
            f"--port={port}",
            "--IdentityProvider.token=",
            "--ServerApp.password=",
            f"--ServerApp.root_dir={tmp_path / 'n'}",
        ],
        env={**os.environ, **dirs, "OMP_NUM_THREADS": "1"},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        wait_for(server, port, tmp_path / "lab.log")
        yield f"http://127.0.0.1:{port}/lab/tree/panel.ipynb?reset"
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


def run_all(page, address):
    """Open the notebook and choose Run All from the menu.

    Nothing but the loopback device can be reached."""
    page.route(
        lambda url: not url.startswith(("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:")),
        lambda r: r.abort(),
    )
    page.goto(address)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=90_000)
    prompts, dialog, said = (
        page.locator(".jp-CodeCell .jp-InputPrompt"),
        page.locator("dialog.jp-Dialog"),
        [],
    )
    for _ in range(
        20
    ):  # while the page still loads it may ask for a kernel, and clicks may be lost
        if dialog.count():
            said.append(dialog.first.inner_text())
            dialog.first.locator("button.jp-mod-accept").click()
            continue
        page.locator(".jp-CodeCell .cm-content").first.click()
        page.locator("#jp-MainMenu .lm-MenuBar-item", has_text=re.compile("^Run$")).click()
        page.locator("li.lm-Menu-item[data-command='runmenu:run-all']").click()
        page.wait_for_timeout(1000)
        if prompts.first.inner_text().strip() not in ("[ ]:", ""):
            return
    pytest.fail(f"the cells did not run; JupyterLab said {said}")


@pytest.fixture
def lab(tmp_path, built):
    _, _, folder = built
    with jupyter(
        tmp_path,
        [
            "from codebook_tutorial.show.browser import browse\n"
            "from codebook_tutorial.feature.index import open_index\n"
            "from transformers import AutoTokenizer",
            f"browse(open_index({str(folder / 'codes')!r}, "
            f"AutoTokenizer.from_pretrained({str(folder / 'tok')!r})))",
        ],
    ) as address:
        yield address


def test_the_panel_in_jupyterlab_after_run_all(lab, built, browser):
    index, *_ = built
    context = browser.new_context(viewport=dict(width=1300, height=1400))
    page = context.new_page()
    run_all(page, lab)
    box = page.locator(".widget-text input")
    box.wait_for(timeout=90_000)
    box.fill("<script>(win)")
    box.press("Enter")
    options = page.locator(".widget-select select option")
    page.wait_for_function(
        "document.querySelectorAll('.widget-select select option').length > 1", timeout=20_000
    )
    want = index.search("<script>(win)", 0.01, 0.1)
    assert options.count() == len(want) + 1 and page.locator(
        ".widget-html table tbody tr"
    ).count() == min(10, len(want))
    seen = ""
    for i in range(1, min(6, options.count())):
        page.locator(".widget-select select").select_option(index=i)
        site, f = want[i - 1]["site"], want[i - 1]["feature"]
        page.wait_for_function(
            "words => [...document.querySelectorAll('.widget-html')].some(e => "
            "e.textContent.includes(words))",
            arg=f"{site} feature {f}, row",
            timeout=20_000,
        )
        seen += page.locator(".widget-html").last.inner_text()
    assert "<" in seen and "script" in seen.replace(" ", "")
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.locator(".widget-html img, .widget-html script").count() == 0
    box.fill("(")
    box.press("Enter")
    page.get_by_text("is no regular expression").wait_for(timeout=20_000)
    assert options.count() == 0
    stderr = ".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']"
    assert page.locator(stderr).count() == 0
    context.close()


def test_dollars_are_no_formulas_in_jupyterlab(tmp_path, browser):
    "Token text with two dollar signs is shown as it is; plain HTML beside it becomes a formula."
    cells = [
        "from codebook_tutorial.show.html import strip, table\nfrom IPython.display import HTML",
        "HTML('<p>plain costs $5 to $10</p>')",  # the control
        "table([{'explanation': 'costs $5 to $10', 'n': 3}])",
        "strip(['costs', ' $5', ' to', ' $10'], [0., 1., 0., 2.])",
    ]
    with jupyter(tmp_path, cells) as address:
        context = browser.new_context(viewport=dict(width=1300, height=1400))
        page = context.new_page()
        run_all(page, address)
        shown = page.locator(".jp-RenderedHTMLCommon.jp-OutputArea-output")
        shown.nth(2).wait_for(timeout=60_000)
        shown.first.locator("mjx-container").wait_for(timeout=60_000)
        page.wait_for_timeout(1000)
        assert "$5 to $10" not in shown.first.inner_text()
        for i in (1, 2):
            assert shown.nth(i).locator("mjx-container").count() == 0
        assert "costs $5 to $10" in shown.nth(1).inner_text()
        words = shown.nth(2).inner_text()
        assert "$5" in words and "$10" in words
        context.close()
