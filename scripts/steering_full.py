"""The long run of chapter 12: every way to steer at every strength, ten topics, three seeds -> claims/12.full.json; see `hours` there.

usage: python scripts/steering_full.py

A seed means: which words choose and which count, the autoencoder (seed 0: the shipped one; others trained by its recipe), the sampling, the random controls. Finished rows are kept in out/steering_rows/SETTINGS/, so that a stopped run goes on where it was.
"""
import argparse, hashlib, json, platform, subprocess, tempfile, time
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from tqdm.auto import tqdm
from codebook_tutorial.activations import harvest
from codebook_tutorial.codebook import CodebookModel
from codebook_tutorial.concepts import WORD_TABLES, prompts
from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.formats import load_sae
from codebook_tutorial.models import load_lm, load_text
from codebook_tutorial.sae import refit, train_sae, tune_decoder
from codebook_tutorial.sites import intervene
from codebook_tutorial.steering import add_vector, count_words, effect_and_price, find_choices, find_switches, force_codes, mean_difference, recognise, split_words, steer, topic_features
from codebook_tutorial.stories import ID, LISTS, TOPICS, plural

ROOT = Path(__file__).resolve().parents[1]
ROWS, CLAIMS = ROOT / "out" / "steering_rows", ROOT / "claims" / "12.full.json"
LAST, TOKENS, N, SEEDS, PRECISION, STEPS, TUNE = "resid.2", 120_000, 40, 3, .3, 8000, 600
KEY = hashlib.sha256(json.dumps([1, TOKENS, N, PRECISION, STEPS, TUNE, (data_path("sae/last") / "sae.json").read_text()]).encode()).hexdigest()[:8]      # raise the first number when what a row means changes


def topic_words():
    own = lambda w, i: WORD_TABLES["topic_word"][ID[w]] == i
    forms = lambda w, part, i: tuple(ID[v] for v in dict.fromkeys((w, plural(w)) if part == "noun" else (w,)) if own(v, i))
    return {topic: [f for part in ("noun", "verb", "adj", "place") for w in LISTS[f"topic_{part}"][topic] if (f := forms(w, part, i))] for i, topic in enumerate(TOPICS)}


def autoencoder(seed, model, tok):
    "Seed 0: as shipped; others by the same recipe, kept between runs."
    shipped = load_sae(data_path("sae/last"))
    if seed == 0: return shipped
    meta = json.loads((data_path("sae/last") / "sae.json").read_text())["meta"]
    from safetensors.torch import load_file, save_file
    if (file := ROWS / KEY / f"sae_{seed}.safetensors").exists(): shipped.load_state_dict(load_file(file)); return shipped
    text = load_text(tok, "stories", n_tokens=1_000_000, length=256, split="train", seed=11)
    with tempfile.TemporaryDirectory() as folder:
        x = harvest(model, text, LAST, Path(folder) / "acts", verbose=False).load(LAST)
        sae = tune_decoder(refit(train_sae(x, shipped.W_dec.shape[0], alpha=meta["alpha"], steps=STEPS, seed=seed), x[:400_000]), model, text, LAST, steps=TUNE, seed=seed)
    save_file(sae.state_dict(), file.with_suffix(".part")); file.with_suffix(".part").replace(file)
    return sae


class Setting:
    "All that one seed needs, and its ways to steer: {(method, strength): (model, rows -> context)}."
    def __init__(self, seed, model, tok):
        self.model, text = model, load_text(tok, n_tokens=TOKENS, length=256, split="train", seed=3)
        self.seed, (self.choose, self.count) = seed, split_words(topic_words(), seed=seed)
        self.sae, self.coded, self.choices = autoencoder(seed, model, tok), CodebookModel.from_pretrained(data_path("codes/single")), find_choices(text, self.choose, self.count)
        self.target = torch.arange(len(TOPICS)).repeat_interleave(N)
        asked = prompts(200, lambda s: np.searchsorted(s.sentences, [2]) if s.document == "story" else [], seed=0, each=1)
        real = [p.story.ids[p.at:p.at + 96].tolist() for p in asked]
        self.recogniser = (recognise(real, self.count) == torch.tensor([p.story.facts["topic"] for p in asked])).float().mean().item()
        self.prompts = [asked[i].ids for _ in TOPICS for i in range(N)]
        self.features = find_switches(model, {LAST: self.sae}, text, self.choices, PRECISION)
        self.codes = find_switches(self.coded, {s: self.coded.codebooks[s] for s in ("heads.2", "mlp.2")}, text, self.choices, PRECISION)
        self.ranked = topic_features(self.coded, self.coded.codebooks, text[:200], find_choices(text[:200], self.choose, self.count), 8)
        self.vectors = {(site, at): mean_difference(model, site, text, self.choices, at) for site, at in (("resid.0", "about"), ("resid.1", "about"), (LAST, "about"), (LAST, "next"))}

    def ways(self):
        t, sw, V = self.target, self.features[LAST], self.vectors[LAST, "next"]
        at = lambda fn, site=LAST: (self.model, lambda rows: intervene(self.model, {site: fn(rows)}))
        noise = F.normalize(torch.randn(V.shape, generator=seeded(100 + self.seed)), dim=-1)
        def as_long(s):
            def fn(rows): edit = sw.fn(t[rows], s); return lambda x: x + (edit(x) - x).norm(dim=-1, keepdim=True) * noise[t[rows], None]
            return fn
        def gated(s): return lambda rows: lambda x: x + sw.fires(x, t[rows])[..., None] * s * V[t[rows], None]
        def switch(codes, **kw): return self.coded, lambda rows: steer(self.coded, {site: self.codes[site] for site in codes}, t[rows], **kw)
        def forced(n):
            lists = {site: [[r["feature"] for r in self.ranked[name][:n] if r["site"] == site] for name in TOPICS] for site in self.coded.codebooks}
            return self.coded, lambda rows: self.coded.edit_codes({site: force_codes(self.coded.codebooks[site], some, t[rows]) for site, some in lists.items() if any(some)})
        random_codes = {site: torch.randint(0, s.owner.shape[1], s.write.shape, generator=seeded(100 + self.seed)) for site, s in self.codes.items()}
        both = ("heads.2", "mlp.2")
        return {("unsteered", 0): (self.model, None), ("codebook_unsteered", 0): (self.coded, None),
                **{("sae_tied", s): at(lambda rows, s=s: sw.fn(t[rows], s)) for s in (1., 1.5, 2., 3., 4.)},
                **{("sae_tied_start", s): at(lambda rows, s=s: sw.fn(t[rows], s, swap=False)) for s in (2., 3., 4.)},
                **{("sae_tied_swap", s): at(lambda rows, s=s: sw.fn(t[rows], s, start=False)) for s in (1., 2., 3., 4.)},
                **{("sae_tied_added", s): at(lambda rows, s=s: add_vector(s * sw.value[t[rows], None] * sw.dictionary.directions.detach()[sw.write[t[rows]]])) for s in (.2, .3, .4, .5, .8)},
                ("codebook", "mlp.2"): switch(["mlp.2"]), ("codebook", "heads.2"): switch(["heads.2"]), ("codebook", "both"): switch(both),
                **{("codebook_start", name): switch(sites, swap=False) for name, sites in (("mlp.2", ["mlp.2"]), ("both", both))},
                **{("codebook_swap", name): switch(sites, start=False) for name, sites in (("mlp.2", ["mlp.2"]), ("both", both))},
                **{("codebook_forced", n): forced(n) for n in (1, 2, 4, 8)},
                **{("mean_difference", f"{name} x {s}"): at(lambda rows, v=self.vectors[key], s=s: add_vector(s * v[t[rows]]), key[0]) for key, name, some in (((LAST, "next"), "next", (.4, .5, .6, .7, .8, 1.)), ((LAST, "about"), "about", (6., 8., 10.)), (("resid.1", "about"), "about, resid.1", (6., 10.)), (("resid.0", "about"), "about, resid.0", (6., 10.))) for s in some},
                **{("mean_difference_at_places", s): at(gated(s)) for s in (.5, 1., 1.5, 2., 3.)},
                **{("random", s): at(as_long(s)) for s in (1., 2., 3.)},
                **{("random_codes", name): (self.coded, lambda rows, sites=sites: self.coded.edit_codes({site: self.codes[site].fn(t[rows], write=random_codes[site]) for site in sites})) for name, sites in (("mlp.2", ["mlp.2"]), ("both", both))}}

    def row(self, method, strength, model, way, tok):
        e = effect_and_price(model, tok, self.prompts, self.target, self.count, self.model, way, seed=self.seed, progress=False)
        n = torch.arange(len(e.samples))
        some = lambda part: dict(rate=part.rate, mentions=part.mentions, loss=part.loss, distinct=part.distinct)
        return dict(method=method, strength=strength, seed=self.seed, all=some(e), even=some(e[n[::2]]), odd=some(e[n[1::2]]), by_target=e.right.view(len(TOPICS), N).float().mean(1).tolist(),
                    other_topics=((count_words(e.samples, self.count) > 0).float().sum(1) - e.mention.float() > 0).float().mean().item(), recogniser=self.recogniser)

    def table_3(self, tok):
        "The paper's Table 3: 4 prompts x 10 samples, no code forced, one, eight, of the model with eight codes a state."
        cb, text = CodebookModel.from_pretrained(data_path("codes/top8")), load_text(tok, n_tokens=TOKENS, length=256, split="train", seed=3)[:200]
        ranked, four = topic_features(cb, cb.codebooks, text, find_choices(text, self.choose, self.count), 8), [self.prompts[i] for _ in TOPICS for i in range(4) for _ in range(10)]
        for n in (0, 1, 8):
            lists = {site: [[r["feature"] for r in ranked[name][:n] if r["site"] == site] for name in TOPICS] for site in cb.codebooks}
            way = lambda rows: cb.edit_codes({site: force_codes(cb.codebooks[site], some, self.target[rows]) for site, some in lists.items() if any(some)})
            e = effect_and_price(cb, tok, four, self.target, self.count, self.model, way if n else None, seed=self.seed, progress=False)
            yield dict(method="table_3", strength=n, seed=self.seed, mentions=e.mentions, mentions_by_target=e.mention.view(len(TOPICS), N).float().mean(1).tolist(), rate=e.rate, loss=e.loss, distinct=e.distinct)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1); (ROWS / KEY).mkdir(parents=True, exist_ok=True)
    model, tok = load_lm("stories")
    done, hours = [], 0.
    for seed in range(SEEDS):
        file, start = ROWS / KEY / f"{seed}.jsonl", time.process_time()
        kept = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        setting = None if any(r.get("finished") for r in kept) else Setting(seed, model, tok)
        have = {(r["method"], r["strength"]) for r in kept if "method" in r}
        for (method, strength), (m, way) in tqdm((setting.ways() if setting else {}).items(), desc=f"seed {seed}"):
            if (method, strength) in have: continue
            kept.append(setting.row(method, strength, m, way, tok) | dict(cpu_seconds=time.process_time() - start)); start = time.process_time()
            with file.open("a") as f: f.write(json.dumps(kept[-1]) + "\n")
        if setting:
            kept += [r | dict(cpu_seconds=0.) for r in setting.table_3(tok)]
            with file.open("a") as f: f.write("".join(json.dumps(r) + "\n" for r in kept if r["method"] == "table_3"))
            with file.open("a") as f: f.write(json.dumps(dict(finished=True)) + "\n")
        done += [r for r in kept if "method" in r]
    hours = sum(r.pop("cpu_seconds") for r in done) / 3600
    sha = {f"data/{name}": hashlib.sha256((data_path(name.rpartition("/")[0]) / name.rpartition("/")[2]).read_bytes()).hexdigest() for name in ("stories/model.safetensors", "sae/last/sae_state.safetensors", "codes/single/model.safetensors", "codes/single/codebooks.safetensors")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    out = dict(command="python scripts/steering_full.py", commit=commit, hardware="one CPU core", machine=platform.machine(), hours=hours, inputs_sha256=sha, tokens=TOKENS, texts_a_topic=N, precision=PRECISION, seeds="words that choose and count, autoencoder (0: shipped), sampling, random controls")
    text = json.dumps(out, indent=1)[:-2] + ',\n "rows": [\n' + ",\n".join(json.dumps(r) for r in done if r["method"] != "table_3") + '\n],\n "table_3": [\n' + ",\n".join(json.dumps(r) for r in done if r["method"] == "table_3") + "\n]}\n"
    CLAIMS.with_suffix(".part").write_text(text); CLAIMS.with_suffix(".part").replace(CLAIMS)


if __name__ == "__main__": main()
