"""The project agrees with itself: metadata, notebooks, claims, sizes; no path of any machine."""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from workshop import author, books, measure  # noqa: E402

CHAPTERS = books.chapters()
SETTINGS = author.settings()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FULL_FORM = ["By the end you can", "Why care?", "Setup", "Exercises", "Limits", "Recap"]
SLUGS = [
    f"sae_{k}"
    for k in ("tied", "untied", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "alpha0")
] + ["codebook", "kmeans", "ica", "ica_relu", "pca", "pca_relu", "basis", "neurons", "random"]
BOARD = [
    "sae_tied",
    "sae_untied",
    "sae_topk",
    "sae_batchtopk",
    "sae_jumprelu",
    "sae_gated",
    "sae_matryoshka",
    "sae_alpha0",
    "codebook_tuned",
    "codebook",
    "kmeans",
    "ica",
    "pca",
    "neurons",
    "basis",
    "random",
    "random_d",
]
CLAIMS = {
    "01": [
        "fsm.bayes_loss",
        "fsm.trigrams",
        "fsm.state_accuracy",
        "fsm.legal_mass",
        "fsm.neuron_f1",
    ],
    "02": ["codebook.gradient_error"],
    "03": [
        f"states.{n}"
        for n in (
            "state_accuracy",
            "legal_mass",
            "code_precision",
            "neuron_precision",
            "codeset_f1",
            "neuron_f1",
            "dead_share",
            "jsd_mlp",
            "jsd_all",
            "jsd_none",
            "jsd_random",
        )
    ],
    "04": [
        f"stories.{n}"
        for n in (
            "loss",
            "entropy_floor",
            "ioi_accuracy",
            "ioi_probability",
            "close_parenthesis",
            "topic_persistence",
            "month_persistence",
            "forgotten_facts",
        )
    ],
    "05": [
        f"finetune.{n}"
        for n in (
            "loss_gap",
            "gap_single",
            "gap_top8",
            "ioi_accuracy",
            "dead_share",
            "bits_per_activation",
            "likeness_top8",
            "written_receiver",
        )
    ]
    + [f"finetune.gap_residual_k{k}_c{n}" for k in (1, 2, 4, 8) for n in (256, 512, 1024, 2048)]
    + [f"finetune.gap_cosine_k{k}_c{n}" for k in (1, 4, 8, 16) for n in (256, 1024)],
    "06": [
        f"codes.{n}"
        for n in ("precision_gain_over_neurons", "precision_gain_equal_pool", "written_month")
    ],
    "07": [
        f"sae.{n}"
        for n in ("fvu", "l0", "perplexity_ratio", "dead_share", "seed_overlap", "interop_error")
    ],
    "08": [
        f"baselines.{kind}.{m}"
        for m in SLUGS
        for kind in ("concept_f1", "fvu_at_l0")
        if (kind, m) != ("fvu_at_l0", "neurons")
    ],
    "09": [
        f"autointerp.score.{m}.layer{layer}"
        for layer in range(3)
        for m in (
            "sae_tied",
            "sae_topk",
            "sae_alpha0",
            "codebook",
            "codebook_tuned",
            "ica",
            "ica_relu",
            "ica_topk",
            "pca",
            "pca_relu",
            "pca_topk",
            "neurons",
            "basis",
            "random",
        )
    ]
    + [
        f"autointerp.difference.sae_tied_{b}"
        for b in ("ica", "ica_relu", "pca", "pca_relu", "random", "sae_alpha0", "neurons")
    ]
    + [
        "autointerp.difference.ica_pca",
        "autointerp.difference.pca_relu_random",
        "autointerp.difference.random_basis",
    ]
    + [
        f"autointerp.{n}"
        for n in (
            "agreement_with_truth",
            "agreement_with_truth_and_words",
            "puzzles_solved",
            "perfect_simulator",
            "rows_again",
        )
    ],
    "10": [
        f"ioi.{what}.{m}.{names}"
        for what in ("kl_at_5", "features_for_90pct", "edit_at_90pct")
        for m in ("sae_tied", "sae_topk", "sae_alpha0", "pca", "ica", "basis", "codebook", "random")
        for names in ("fixed", "random", "per_prompt")
    ]
    + [
        f"ioi.{n}"
        for n in (
            "forward_passes",
            "one_code",
            "chosen_features",
            "rows_again",
            "floor_last_layer",
            "kl_at_5_difference.sae_tied_pca.fixed",
        )
    ],
    "11": [
        f"circuits.{n}"
        for n in (
            "preactivation_after_ablation",
            "kept_by_gradient",
            "tree_effect",
            "random_effect",
            "root_alone",
            "tree_kl",
            "tree_kl.possessive",
            "tree_kl.at_apostrophe",
            "kl_elsewhere",
            "rows_again",
            "tree_at_its_own_places",
            "code_tree_effect",
            "written_parenthesis",
            "nearest_is_strongest",
        )
    ],
    "12": [
        f"steering.topic_rate_at_budget.{m}"
        for m in (
            "codebook",
            "sae_tied",
            "codebook_start",
            "sae_tied_start",
            "codebook_swap",
            "sae_tied_swap",
            "codebook_forced",
            "sae_tied_added",
            "mean_difference",
            "mean_difference_at_places",
            "mean_difference_at_words",
            "random_codes",
            "random",
        )
    ]
    + [
        f"steering.{n}"
        for n in (
            "baseline_rate",
            "off_target",
            "recogniser",
            "forced_mentions",
            "suppressed",
            "month_rate",
            "mood_rate",
            "talk_rate",
            "two_at_once",
            "row_again",
        )
    ],
    "13": [f"scoreboard.{what}.{m}" for what in ("concept_f1", "steered") for m in BOARD]
    + [f"scoreboard.stability.{m}" for m in BOARD if m not in ("neurons", "basis")]
    + [f"scoreboard.fsm_f1.{m}" for m in BOARD if m != "codebook_tuned"]
    + [
        f"scoreboard.{n}"
        for n in (
            "row_again",
            "one_code_one_machine",
            "one_code_three_machines",
            "ica_three_machines",
        )
    ],
    "14": ["scale.codebook_overhead", "scale.prediction_error", "scale.shift_precision"]
    + [
        f"scale.seed_stability.{m}"
        for m in (
            "sae_tied",
            "sae_topk",
            "sae_jumprelu",
            "codebook",
            "kmeans",
            "ica",
            "pca",
            "random",
        )
    ],
}


def tracked():
    "Files of the project: those git knows, or would know."
    out = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if out.returncode:
        pytest.skip("not a git checkout")
    return [p for p in (ROOT / line for line in out.stdout.splitlines()) if p.is_file()]


def claims(number):
    return json.loads((ROOT / "claims" / f"{number}.json").read_text())


def test_the_readme_example_runs(tmp_path):
    "On the stories' model, with files as it names them."
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]
    sizes = {'"gpt2"': '"stories"', "resid.2": "resid.0", "resid.5": "resid.1", "768": "96"}
    sizes |= {"k=32": "k=8, steps=50", "n_codes=1000": "n_codes=50"}
    for theirs, ours in sizes.items():
        assert theirs in example, theirs
        example = example.replace(theirs, ours)
    docs = [{"text": "One day Anna gave Tom a ball in the garden . "} for _ in range(250)]
    (tmp_path / "my_texts.jsonl").write_text("\n".join(map(json.dumps, docs)))
    example += "\nprint(lens.read(text[:2]).shape)"
    env = os.environ | dict(OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", example]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
    assert b"torch.Size([2, 256, 768])" in ran.stdout, ran.stderr.decode()[-3000:]
    assert (tmp_path / "for_saelens" / "cfg.json").exists() and (tmp_path / "my_acts").exists()


def test_settings_and_pyproject_agree():
    assert (
        PROJECT["name"] == SETTINGS["lib_name"]
        and PROJECT["version"] == SETTINGS["version"]
        and PROJECT["description"] == SETTINGS["description"]
    )
    assert (
        PROJECT["license"] == SETTINGS["license"]
        and PROJECT["requires-python"] == ">=" + SETTINGS["min_python"]
        and PROJECT["keywords"] == SETTINGS["keywords"].split()
    )
    assert PROJECT["dependencies"] == SETTINGS["requirements"].split() and all(
        PROJECT["optional-dependencies"][kind] == SETTINGS[f"{kind}_requirements"].split()
        for kind in ("dev", "docs")
    )
    assert PROJECT["urls"][
        "Repository"
    ] == f"https://github.com/{SETTINGS['user']}/{SETTINGS['repo']}" and PROJECT["authors"] == [
        {"name": SETTINGS["author"]}
    ]
    from codebook_tutorial import __version__

    assert __version__ == SETTINGS["version"]


def test_everything_required_is_pinned_and_torch_stays_open():
    pins = {
        re.split(r"[=\[]", line)[0].lower().replace("_", "-"): line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    for need in PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), []):
        name = re.split(r"[<>=]", need)[0].lower()
        assert name in pins, f"{name} is required but not pinned in constraints.txt"
    assert (
        pins["torch"] == "torch==2.13.0"
        and "torch>=2.6" in PROJECT["dependencies"]
        and not any("nvidia" in p or "://" in p for p in pins.values())
    )


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
class TestChapter:
    def test_form(self, path):
        nb = books.read_book(path)
        prose = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
        heads = re.findall(r"^## (.+)$", prose, re.M)
        missing = [h for h in FULL_FORM if h not in heads]
        assert not missing and sum(bool(re.match(r"[1-5] ", h)) for h in heads) == 5
        assert (
            re.match(rf"# {path.name[:2]} .+\n\n> .+\?\n", nb.cells[0].source)
            and "CPU minute" in nb.cells[0].source
        )

    def test_colab_comes_from_settings(self, path):
        nb, again = books.read_book(path), author.apply_settings(books.read_book(path), path.name)
        assert [c.source for c in nb.cells] == [c.source for c in again.cells]
        address = f"github/{SETTINGS['user']}/{SETTINGS['repo']}/blob/{SETTINGS['branch']}"
        assert f"{address}/nbs/{path.name}" in nb.cells[0].source
        install = next(c.source for c in nb.cells if "colab" in books.directives(c))
        assert (
            SETTINGS["user"] in install
            and not re.search(r"\b(torch|numpy)\b", install)
            and install.count("pip") == 1
        )

    def test_outputs_are_committed_and_clean(self, path):
        nb = books.read_book(path)
        assert path.stat().st_size < 1_000_000
        for cell in nb.cells:
            for out in cell.get("outputs", []):
                assert (
                    out.output_type != "error"
                    and out.get("name") != "stderr"
                    and out.get("execution_count") is None
                )
                assert "❌" not in str(out.get("data", {}).get("text/plain", ""))
        shown = sum(bool(c.get("outputs")) for c in nb.cells)
        assert shown > 15, "the chapter is committed without its outputs"

    def test_every_picture_has_alt_text(self, path):
        for cell in books.read_book(path).cells:
            for out in cell.get("outputs", []):
                if "image/png" in out.get("data", {}):
                    assert (
                        len(out["data"]["text/plain"]) > 20
                        and "Figure(" not in out["data"]["text/plain"]
                    )

    def test_no_cell_is_an_asserting_test_nor_touches_hooks(self, path):
        for cell in books.read_book(path).cells:
            if cell.cell_type != "code":
                continue
            assert not re.match(r"(\s*assert[^\n]*\n?)+$", cell.source)
            if path.name[:2] != "00":
                assert "register_forward" not in cell.source


@pytest.mark.parametrize("number", CLAIMS)
def test_the_claims_are_there_and_hold(number):
    kept = claims(number)
    assert set(CLAIMS[number]) <= set(kept)
    for name, c in kept.items():
        assert {
            "value",
            "values",
            "interval",
            "unit",
            "at_least",
            "at_most",
            "tolerance",
            "paper",
            "context",
            "control",
            "note",
        } == set(c) - {"title", "setting", "paper_said", "headline"}
        assert ("title" in c) == ("setting" in c) == ("paper_said" in c)
        if not c["values"]:
            assert (
                c["value"] is None and c["note"] and c["at_least"] is None and c["at_most"] is None
            )
            continue
        assert (
            c["value"] == pytest.approx(sum(c["values"]) / len(c["values"]))
            and c["tolerance"] >= max(c["values"]) - min(c["values"]) - 1e-12
        )
        assert (c["at_least"] is None or c["value"] >= c["at_least"]) and (
            c["at_most"] is None or c["value"] <= c["at_most"]
        ), name


BOUNDS = {
    "01": {
        "fsm.state_accuracy": ("at_least", 0.97),
        "fsm.legal_mass": ("at_least", 0.97),
        "fsm.loss": ("at_most", 1.19),
    },
    "03": {
        "states.state_accuracy": ("at_least", 0.97),
        "states.code_precision": ("at_least", 0.98),
        "states.codeset_f1": ("at_least", 0.99),
        "states.dead_share": ("at_most", 0.05),
        "states.jsd_all": ("at_most", 0.05),
    },
    "07": {
        "sae.l0": ("at_most", 12),
        "sae.fvu": ("at_most", 0.06),
        "sae.perplexity_ratio": ("at_most", 1.05),
        "sae.interop_error": ("at_most", 1e-5),
    },
}


def test_the_issues_bounds_stand_in_the_claims():
    "What the project set out to reach, beside what the chapters enforce: no claim may be looser."
    for number, bounds in BOUNDS.items():
        for name, (kind, bound) in bounds.items():
            enforced = claims(number)[name][kind]
            assert enforced >= bound if kind == "at_least" else enforced <= bound, name
    language = claims("04")
    assert (
        all(c["control"] is not None for n, c in language.items())
        and language["stories.entropy_floor"]["value"]
        < language["stories.loss"]["value"]
        < language["stories.entropy_floor"]["value"] + 0.1
    )


def test_the_shipped_model_is_the_first_of_three():
    rows, shipped = (
        json.loads((ROOT / "claims/04.full.json").read_text())["rows"],
        hashlib.sha256((ROOT / "data/stories/model.safetensors").read_bytes()).hexdigest(),
    )
    assert (
        [r["seed"] for r in rows] == [r["training"]["seed"] for r in rows] == list(range(len(rows)))
        and len({r["sha256"] for r in rows}) == len(rows) == 3
        and rows[0]["sha256"] == shipped
    )
    assert (
        shipped in (ROOT / "data/stories/README.md").read_text()
        and hashlib.sha256((ROOT / "data/stories/grammar.toml").read_bytes()).hexdigest()
        in (ROOT / "data/README.md").read_text()
    )


def test_the_states_chapter_was_run_with_three_seeds():
    three = claims("03")
    assert all(
        len(three[n]["values"]) == 3
        for n in (
            "states.state_accuracy",
            "states.code_precision",
            "states.jsd_all",
            "states.neuron_precision",
        )
    )


def test_data_is_small():
    size = {p: p.stat().st_size for p in tracked() if p.is_relative_to(ROOT / "data")}
    assert (
        sum(size.values()) < 30e6
        and (ROOT / "data/stories/model.safetensors").stat().st_size <= 8e6
    )


def test_no_machines_path_and_no_pickle():
    here = [str(ROOT.parent) + "/", str(Path.home()) + "/"]
    for path in tracked():
        assert path.suffix not in (".pt", ".pkl", ".bin", ".pth"), path
        if path.suffix in (".safetensors", ".png"):
            continue
        text = path.read_text(encoding="utf-8")
        assert not any(h in text for h in here), f"{path} holds a path of this machine"


def test_the_library_is_exported_not_written():
    for path in (ROOT / "codebook_tutorial").rglob("*.py"):
        text = path.read_text()
        by_hand = path.name == "__init__.py" or path.parent.name == "checks"
        assert by_hand or "autogenerated" in text.lower()
        if (
            path.name == "formats.py"
        ):  # others' layouts: read as tensors alone, written as they read them
            assert set(re.findall(r"torch\.load\((.*)\)", text)) and all(
                "weights_only=True" in call for call in re.findall(r"torch\.load\((.*)\)", text)
            )
            assert set(re.findall(r"allow_pickle=(\w+)", text)) <= {"False"} and not re.search(
                r"^\s*(import|from) pickle", text, re.M
            )
        else:
            assert "pickle" not in text and not re.search(r"torch\.(save|load)\(", text)


def test_plain_nbdev_gives_the_committed_library_and_clean_notebooks(tmp_path):
    for name in ("nbs", "codebook_tutorial"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "settings.ini", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    env = os.environ | dict(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for command in ("nbdev-export", "nbdev-clean"):
        subprocess.run([command], cwd=tmp_path, env=env, check=True, capture_output=True)
    for name, kind in (("codebook_tutorial", "*.py"), ("nbs", "*.ipynb")):
        for path in (ROOT / name).rglob(kind):
            made = tmp_path / path.relative_to(ROOT)
            assert made.read_bytes() == path.read_bytes(), path.relative_to(ROOT)


def test_a_room_imports_only_rooms_above_it():
    order = measure.ROOMS
    for path in (ROOT / "codebook_tutorial").rglob("*.py"):
        room = path.relative_to(ROOT / "codebook_tutorial").parts[0].removesuffix(".py")
        if room.startswith("_"):
            continue
        package = ["codebook_tutorial", *path.relative_to(ROOT / "codebook_tutorial").parts[:-1]]
        for dots, module in re.findall(r"^ *from (\.*)([\w.]+) import", path.read_text(), re.M):
            base = package[: len(package) - len(dots) + 1] if dots else []
            full = [*base, *module.split(".")]
            if full[0] == "codebook_tutorial" and len(full) > 1 and full[1] in order:
                assert order.index(full[1]) <= order.index(room), f"{path.name}: {'.'.join(full)}"


def test_every_method_is_there_wherever_its_class_is():
    "None is patched in from another module, which somebody may not have loaded."
    seen = 0
    for path in sorted((ROOT / "codebook_tutorial").rglob("*.py")):
        body = ast.parse(path.read_text()).body
        own = {node.name for node in body if isinstance(node, ast.ClassDef)}
        for node in body:
            decorators = map(ast.unparse, getattr(node, "decorator_list", []))
            if any(d.split("(")[0] == "patch" for d in decorators):
                assert ast.unparse(node.args.args[0].annotation) in own, (path, node.name)
                seen += 1
    assert seen > 5


def test_the_shipped_autoencoder_is_the_one_described():
    for name in ("tied", "last"):
        assert (
            hashlib.sha256(
                (ROOT / "data/sae" / name / "sae_state.safetensors").read_bytes()
            ).hexdigest()
            in (ROOT / "data/README.md").read_text()
        )
    for number, name in (
        ("07", "stories/model.safetensors"),
        ("08", "stories/model.safetensors"),
        ("08", "sae/tied/sae_state.safetensors"),
        ("09", "sae/tied/sae_state.safetensors"),
        ("09", "codes/single/model.safetensors"),
        ("10", "stories/model.safetensors"),
        ("10", "codes/residual/model.safetensors"),
        ("11", "stories/model.safetensors"),
        ("11", "sae/tied/sae_state.safetensors"),
        ("12", "stories/model.safetensors"),
        ("12", "sae/last/sae_state.safetensors"),
        ("12", "codes/single/codebooks.safetensors"),
        ("13", "stories/model.safetensors"),
        ("13", "sae/tied/sae_state.safetensors"),
        ("13", "fsm_0/model.safetensors"),
        ("14", "stories/model.safetensors"),
    ):
        full = json.loads((ROOT / f"claims/{number}.full.json").read_text())
        assert (
            full["inputs_sha256"][f"data/{name}"]
            == hashlib.sha256((ROOT / "data" / name).read_bytes()).hexdigest()
            and full["commit"]
            and full["rows"]
        )


def test_only_show_writes_html():
    "Besides browser.py and steering_pages.py: one fixed page each, shows what it gets as text."
    for path in (ROOT / "codebook_tutorial").glob("*.py"):
        if path.name not in ("show.py", "browser.py", "steering_pages.py", "_modidx.py"):
            assert not re.search(r"<(div|span|table|td)\b", path.read_text()), path


def test_public_names_have_a_docstring():
    import importlib
    import inspect

    for path in (ROOT / "codebook_tutorial").glob("[a-z]*.py"):
        module = importlib.import_module(f"codebook_tutorial.{path.stem}")
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                assert thing.__doc__, f"{path.stem}.{name} has no docstring"


def test_importing_downloads_nothing_and_leaves_heavy_imports_out():
    modules = "core model.text world.concepts dictionary.bottleneck feature.states".split()
    imports = ", ".join(f"codebook_tutorial.{name}" for name in modules)
    heavy = "'transformers' in sys.modules, 'datasets' in sys.modules"
    command = [sys.executable, "-c", f"import sys, {imports}; print({heavy})"]
    got = subprocess.run(command, capture_output=True, text=True, check=True)
    assert got.stdout.split() == ["False", "False"]


def test_the_package_alone_loads_no_torch_and_its_names_load_when_used():
    command = "import sys, codebook_tutorial as c; print('torch' in sys.modules, len(dir(c)))"
    got = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert got.stdout.split()[0] == "False"
    import codebook_tutorial

    for name in codebook_tutorial.__all__:
        assert getattr(codebook_tutorial, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        codebook_tutorial.nothing


def test_shipped_codes_are_what_their_recipes_say():
    "Files as told in training.json, sites and settings as trained; the control has no codes."
    for folder in sorted((ROOT / "data/codes").iterdir()):
        told = json.loads((folder / "training.json").read_text())
        assert told["sha256"] == {
            f.name: hashlib.sha256(f.read_bytes()).hexdigest()
            for f in sorted(folder.glob("*.safetensors"))
        }, folder.name
        if folder.name == "control":
            assert told["form"] is None and not (folder / "codebooks.json").exists()
            continue
        books = json.loads((folder / "codebooks.json").read_text())["sites"]
        assert sorted(books) == [f"{kind}.{i}" for kind in ("heads", "mlp") for i in range(3)]
        assert all(
            b[key] == told["form"][key]
            for b in books.values()
            for key in ("n_codes", "k", "select")
        )
    assert {f.name for f in (ROOT / "data/codes").iterdir()} == {
        "control",
        "residual",
        "single",
        "top8",
    }


def test_what_the_finetuning_set_out_to_reach():
    "Bounds of the chapter's claims; and its long run: one base model, controls of the same seeds."
    found, full = claims("05"), json.loads((ROOT / "claims/05.full.json").read_text())
    assert (
        found["finetune.loss_gap"]["at_most"] <= 0.02 * 1.2
        and found["finetune.ioi_accuracy"]["at_least"] >= 0.98
        and found["finetune.dead_share"]["at_most"] <= 0.1
        and found["finetune.gap_single"]["at_most"] <= 0.05
    )
    assert (
        full["inputs_sha256"]["data/stories/model.safetensors"]
        == hashlib.sha256((ROOT / "data/stories/model.safetensors").read_bytes()).hexdigest()
    )
    names = {(r["name"], r["seed"]) for r in full["rows"]}
    assert len(names) == len(full["rows"])
    assert all(("control", seed) in names for _, seed in names)
