"""The long run of chapter 12: every way to steer at every strength, ten topics, three seeds -> claims/12.full.json; see `hours` there.

usage: python scripts/steering_full.py [--seeds 0 1 2]

A seed means: which words choose and which count, the prompts, the autoencoder (seed 0: the shipped one; others trained by its recipe), the sampling, the random controls. The codebook model is one. Words and prompts are others than those the methods were developed on. Finished rows are kept in out/steering_rows/SETTINGS/, so that a stopped run goes on where it was.
"""
import argparse, hashlib, json, platform, subprocess, tempfile, time
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from tqdm.auto import tqdm
from codebook_tutorial.activations import harvest
from codebook_tutorial.codebook import CodebookModel
from codebook_tutorial.concepts import prompts
from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.effects import count_words, effect_and_price, recognise, topic_words
from codebook_tutorial.formats import load_sae
from codebook_tutorial.models import load_lm, load_text
from codebook_tutorial.sae import refit, train_sae, tune_decoder
from codebook_tutorial.sites import intervene
from codebook_tutorial.steering import add_vector, find_choices, find_switches, force_codes, mean_difference, split_words, steer, topic_features
from codebook_tutorial.stories import TOPICS

ROOT = Path(__file__).resolve().parents[1]
ROWS, CLAIMS = ROOT / "out" / "steering_rows", ROOT / "claims" / "12.full.json"
LAST, TOKENS, N, SEEDS, PRECISION, STEPS, TUNE = "resid.2", 300_000, 40, 3, .3, 8000, 600
# method -> strengths; what is pushed everywhere is tried on both sides of the budget
GRID = {"unsteered": [0], "codebook_unsteered": [0], "sae_tied": [1., 2., 3., 4.], "sae_tied_start": [2., 3., 4.], "sae_tied_swap": [1., 2., 3.], "sae_tied_added": [.2, .3, .4, .5, .6, .8], "random": [1., 2., 3., 4.],
        "codebook": ["mlp.2", "heads.2", "both"], "codebook_start": ["mlp.2", "both"], "codebook_swap": ["mlp.2", "both"], "random_codes": ["mlp.2", "heads.2", "both"], "codebook_forced": [1, 2, 4],
        "mean_difference": [f"next x {x}" for x in (.4, .5, .55, .6, .7, .8, 1.)] + [f"about x {x}" for x in (10., 12., 14.)] + [f"about, resid.1 x {x}" for x in (12., 16.)] + [f"about, resid.0 x {x}" for x in (8., 12.)],
        "mean_difference_at_places": [1., 2., 3., 4., 6.], "mean_difference_at_words": [1., 2., 3., 4., 6.]}
DATA = ("stories/model.safetensors", "sae/last/sae_state.safetensors", "codes/single/codebooks.safetensors", "codes/single/model.safetensors", "codes/top8/codebooks.safetensors", "codes/top8/model.safetensors")
SHA = {f"data/{name}": hashlib.sha256((data_path(name.rpartition("/")[0]) / name.rpartition("/")[2]).read_bytes()).hexdigest() for name in DATA}
KEY = hashlib.sha256(json.dumps([3, TOKENS, N, PRECISION, STEPS, TUNE, GRID, SHA]).encode()).hexdigest()[:8]      # raise the first number when what a row means changes


def autoencoder(seed, model, tok):
    "Seed 0: as shipped; others by the same recipe, kept between runs."
    shipped = load_sae(data_path("sae/last"))
    if seed == 0: return shipped
    meta = json.loads((data_path("sae/last") / "sae.json").read_text())["meta"]
    from safetensors.torch import load_file, save_file
    recipe = hashlib.sha256(json.dumps([STEPS, TUNE, meta["alpha"], shipped.config]).encode()).hexdigest()[:8]
    if (file := ROWS / f"sae_{recipe}_{seed}.safetensors").exists(): shipped.load_state_dict(load_file(file)); return shipped
    text = load_text(tok, "stories", n_tokens=1_000_000, length=256, split="train", seed=11)
    with tempfile.TemporaryDirectory() as folder:
        x = harvest(model, text, LAST, Path(folder) / "acts", verbose=False).load(LAST)
        sae = tune_decoder(refit(train_sae(x.to(model.device), shipped.W_dec.shape[0], alpha=meta["alpha"], steps=STEPS, seed=seed), x[:400_000].to(model.device)), model, text, LAST, steps=TUNE, seed=seed)
    save_file(sae.state_dict(), file.with_suffix(".part")); file.with_suffix(".part").replace(file)
    return sae


def asked(seed): return prompts(200, lambda s: np.searchsorted(s.sentences, [2]) if s.document == "story" else [], seed=seed, each=1)


class Setting:
    "All that one seed needs, and its ways to steer: .way(method, strength) -> model, rows -> context."
    def __init__(self, seed, model, tok):
        self.model, self.text = model, load_text(tok, n_tokens=TOKENS, length=256, split="train", seed=3)
        self.seed, (self.choose, self.count), some = seed, split_words(topic_words(), seed=10 + seed), asked(100 + seed)
        self.sae, self.coded, self.choices = autoencoder(seed, model, tok).to(model.device), CodebookModel.from_pretrained(data_path("codes/single")).to(model.device), find_choices(self.text, self.choose, self.count)
        self.target, self.prompts = torch.arange(len(TOPICS)).repeat_interleave(N), [some[i].ids for _ in TOPICS for i in range(N)]
        real = [p.story.ids[p.at:p.at + 96].tolist() for p in some]
        self.recogniser = (recognise(real, self.count) == torch.tensor([p.story.facts["topic"] for p in some])).float().mean().item()
        self.features = find_switches(model, {LAST: self.sae}, self.text, self.choices, PRECISION)
        self.codes = find_switches(self.coded, {s: self.coded.codebooks[s] for s in ("heads.2", "mlp.2")}, self.text, self.choices, PRECISION)
        self.ranked = topic_features(self.coded, self.coded.codebooks, self.text[:200], find_choices(self.text[:200], self.choose, self.count), 8)
        self.vectors = {name: (site, mean_difference(model, site, self.text, self.choices, at)) for name, site, at in (("next", LAST, "next"), ("about", LAST, "about"), ("about, resid.1", "resid.1", "about"), ("about, resid.0", "resid.0", "about"))}
        self.noise = F.normalize(torch.randn(self.vectors["next"][1].shape, generator=seeded(100 + seed)), dim=-1).to(model.device)
        self.random_codes = {site: torch.where(s.write >= 0, torch.randint(0, s.owner.shape[1], s.write.shape, generator=seeded(100 + seed)), -1) for site, s in self.codes.items()}

    def way(self, method, strength):
        "The model that writes, and what is opened around each batch."
        base, kind = (method.removesuffix(f"_{kind}"), kind) if (kind := method.rpartition("_")[2]) in ("start", "swap") else (method, None)
        kw = dict(start=False) if kind == "swap" else dict(swap=False) if kind == "start" else {}
        if base in ("codebook", "random_codes"):
            sites = ("heads.2", "mlp.2") if strength == "both" else (strength,)
            tables = lambda rows: {s: self.codes[s].fn(self.target[rows], write=self.random_codes[s] if base == "random_codes" else None, **kw) for s in sites}
            return self.coded, lambda rows: self.coded.edit_codes(tables(rows))
        if base == "codebook_forced": return self.coded, forced(self.coded, self.ranked, strength, self.target)
        if base in ("unsteered", "codebook_unsteered"): return (self.model if base == "unsteered" else self.coded), None
        site, edit = getattr(self, base)(strength, kw)
        return self.model, lambda rows: intervene(self.model, {site: edit(self.target[rows])})

    def sae_tied(self, strength, kw): return LAST, lambda t: self.features[LAST].fn(t, strength, **kw)
    def sae_tied_added(self, strength, kw): return LAST, lambda t: add_vector(strength * self.features[LAST].usual[t] @ self.sae.directions.detach())
    def mean_difference(self, strength, kw):
        name, _, x = strength.partition(" x ")
        site, v = self.vectors[name]
        return site, lambda t: add_vector(float(x) * v[t])
    def mean_difference_at_places(self, strength, kw): return LAST, lambda t: lambda x: x + self.features[LAST].fires(x, t)[..., None] * strength * self.vectors["next"][1][t, None]
    def mean_difference_at_words(self, strength, kw):
        "No feature: where the model itself gives the words that choose, of all topics together, more than 0.2."
        chosen, read = torch.tensor([t for some in self.choose.values() for t in some]), torch.nn.Sequential(self.model.base_model.final_layer_norm, self.model.get_output_embeddings())
        def edit(t): return lambda x: x + (read(x).softmax(-1)[..., chosen].sum(-1, keepdim=True) > .2) * strength * self.vectors["next"][1][t, None]
        return LAST, edit
    def random(self, strength, kw):
        "Edits as long as the switch's of that strength, at the same places."
        def edit(t, own=self.features[LAST]): own = own.fn(t, strength); return lambda x: x + (own(x) - x).norm(dim=-1, keepdim=True) * self.noise[t, None]
        return LAST, edit

    def again(self, tok):
        "One row that the chapter makes again live: its words and prompts, 8 texts a topic; only the sampling differs by seed."
        (choose, count), text = split_words(topic_words()), load_text(tok, n_tokens=120_000, length=256, split="train", seed=3)
        v, target, some = mean_difference(self.model, LAST, text, find_choices(text, choose, count)), torch.arange(len(TOPICS)).repeat_interleave(8), asked(0)
        e = effect_and_price(self.model, tok, [some[i].ids for _ in TOPICS for i in range(8)], target, count, self.model, lambda rows: intervene(self.model, {LAST: add_vector(.6 * v[target[rows]])}), seed=self.seed, progress=False)
        return dict(method="again", strength="next x 0.6, 8 texts a topic", seed=self.seed, rate=e.rate, loss=e.loss)

    def row(self, method, strength, tok):
        model, way = self.way(method, strength)
        e = effect_and_price(model, tok, self.prompts, self.target, self.count, self.model, way, seed=self.seed, progress=False)
        some, by_target = lambda part: dict(rate=part.rate, mentions=part.mentions, loss=part.loss, distinct=part.distinct), lambda x: x.float().view(len(TOPICS), N).sum(1)
        return dict(method=method, strength=strength, seed=self.seed, all=some(e), even=some(e[::2]), odd=some(e[1::2]), by_target=(by_target(e.right) / N).tolist(), loss_by_target=(by_target(e.nats) / by_target(e.tokens)).tolist(),
                    other_topics=((count_words(e.samples, self.count) > 0).float().sum(1) - e.mention.float() > 0).float().mean().item(), recogniser=self.recogniser)

    def table_3(self, tok):
        "The paper's Table 3: 4 prompts x 10 samples, no code forced, one, eight, eight random ones of the same groups; of the model with eight codes a state."
        cb, text = CodebookModel.from_pretrained(data_path("codes/top8")).to(self.model.device), self.text[:200]
        ranked, four = topic_features(cb, cb.codebooks, text, find_choices(text, self.choose, self.count), 8), [self.prompts[i] for _ in TOPICS for i in range(4) for _ in range(10)]
        g = np.random.default_rng(100 + self.seed)
        drawn = {name: [r | dict(feature=int(g.integers(1024)) + r["feature"] // 1024 * 1024) for r in some] for name, some in ranked.items()}
        for n in (0, 1, 8, "8 random"):
            e = effect_and_price(cb, tok, four, self.target, self.count, self.model, forced(cb, drawn if n == "8 random" else ranked, 8 if n == "8 random" else n, self.target) if n else None, seed=self.seed, progress=False)
            yield dict(method="table_3", strength=n, seed=self.seed, mentions=e.mentions, mentions_by_target=e.mention.view(len(TOPICS), N).float().mean(1).tolist(), rate=e.rate, loss=e.loss, distinct=e.distinct)


def forced(cb, ranked, n, target):
    "The n best codes of every topic at every position (no more than k in a group)."
    lists = {site: [[r["feature"] for r in ranked[name][:n] if r["site"] == site] for name in TOPICS] for site in cb.codebooks}
    return lambda rows: cb.edit_codes({site: force_codes(cb.codebooks[site], some, target[rows]) for site, some in lists.items() if any(some)})


def run(seed, model, tok):
    "All rows of a seed that are not there yet, one line each."
    file, start = ROWS / KEY / f"{seed}.jsonl", time.process_time()
    kept = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    todo = [(m, s) for m, some in GRID.items() for s in some if not any((r["method"], r["strength"]) == (m, s) for r in kept)]
    extra = [m for m in ("table_3", "again") if not any(r["method"] == m for r in kept)]
    if not todo and not extra: return
    setting = Setting(seed, model, tok)
    for job in tqdm([*todo, *extra], desc=f"seed {seed}"):
        new = [setting.row(*job, tok)] if isinstance(job, tuple) else [*setting.table_3(tok)] if job == "table_3" else [setting.again(tok)]
        new[0]["cpu_seconds"], start = time.process_time() - start, time.process_time()
        with file.open("a") as f: f.write("".join(json.dumps(r) + "\n" for r in new))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)), help="only these now; claims/12.full.json is written when all are there")
    seeds = p.parse_args().seeds
    torch.set_num_threads(1); (ROWS / KEY).mkdir(parents=True, exist_ok=True)
    model, tok = load_lm("stories")
    for seed in seeds: run(seed, model, tok)
    done = [json.loads(line) for seed in range(SEEDS) if (ROWS / KEY / f"{seed}.jsonl").exists() for line in (ROWS / KEY / f"{seed}.jsonl").read_text().splitlines()]
    if any((m, s, seed) not in {(r["method"], r["strength"], r["seed"]) for r in done} for m, some in (GRID | {"again": ["next x 0.6, 8 texts a topic"], "table_3": [0, 1, 8, "8 random"]}).items() for s in some for seed in range(SEEDS)): return
    hours = sum(r.pop("cpu_seconds", 0.) for r in done) / 3600
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    out = dict(command="python scripts/steering_full.py", commit=commit, hardware="one CPU core", machine=platform.machine(), hours=hours, inputs_sha256=SHA, tokens=TOKENS, texts_a_topic=N, precision=PRECISION, seeds="words that choose and count, prompts, autoencoder (0: shipped), sampling, random controls; one codebook model")
    part = lambda names: "[\n" + ",\n".join(json.dumps(r) for r in done if r["method"] in names) + "\n]"
    CLAIMS.with_suffix(".part").write_text(json.dumps(out, indent=1)[:-2] + f',\n "rows": {part(GRID)},\n "table_3": {part(["table_3"])},\n "again": {part(["again"])}\n}}\n')
    CLAIMS.with_suffix(".part").replace(CLAIMS)


if __name__ == "__main__": main()
